"""From trained heads, weights and centre biases to a finished model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acw.data import Dataset, Split
from acw.features.tensors import Standard
from acw.fusion.classifier import CategoryClassifier
from acw.fusion.weights import Fusion
from acw.heads.center_bias import CenterBias
from acw.heads.readout import Parameters, concatenate
from acw.model import files
from acw.model.model import Model
from acw.recipes import Recipe
from acw.storage.addresses import local
from acw.training.bank import Bank, BankState
from acw.training.checkpoints import best_heads
from acw.training.joint import SystemState
from acw.training.training_set import finalizer_bias, training_set


def heads_by_fold(
    recipe: Recipe, banks: Mapping[Bank, BankState], systems: Sequence[SystemState]
) -> list[dict[str, Parameters]]:
    """Per fold and backbone the heads that make a run's model; the one entry of a model that is taken as it is."""
    if recipe.heads:
        return [files.load(local(recipe.heads)).heads]
    if recipe.joint:
        return [{name: system.heads(name) for name in recipe.backbones} for system in systems]
    return best_heads(recipe, banks)


def assemble(
    recipe: Recipe,
    dataset: Dataset,
    split: Split,
    heads: Sequence[Mapping[str, Parameters]],
    center_bias: CenterBias,
    classifier: CategoryClassifier,
    fitted: Fusion,
    standards: dict[str, Standard],
    provenance: dict[str, Any],
) -> Model:
    """The finished model. heads: as for `out_of_fold`; center_bias: the KDE of all folds' images; standards: as for
    `Model`."""
    model = Model(
        views=recipe.views,
        heads={},
        finalizer=recipe.finalizer,
        categories=list(dataset.categories),
        weights=fitted.category.weights,
        global_weights=fitted.category.global_weights,
        center_bias=center_bias,
        finalizer_bias=finalizer_bias(recipe, dataset, split.development, center_bias),
        classifier=classifier,
        provenance=provenance,
        standards=standards,
        mirrored=recipe.mirrored,
        adaptation=fitted.adaptation.adaptation if fitted.adaptation and fitted.adaptation.pays else None,
    )
    if fitted.components is None:
        model.heads = {name: concatenate([of_fold[name] for of_fold in heads]) for name in recipe.backbones}
        return model
    model.systems, model.weights = len(heads), fitted.components
    model.global_weights = np.repeat(model.global_weights, model.systems) / model.systems
    of_components = [of_fold[name] for name in recipe.backbones for of_fold in heads]
    model.heads = {name: dict(bank) for name, bank in zip(model.components, of_components, strict=True)}
    return model


def fold_models(
    recipe: Recipe, dataset: Dataset, split: Split, heads: Sequence[Mapping[str, Parameters]], finished: Model
) -> list[Model]:
    """A model a fold, of its own heads and centre biases, that can score the images which it did not train on.

    heads: as for `out_of_fold`. Weights are the system's own or, where the finished model has one set, that one. It
    cannot infer a category.
    """
    training = training_set(dataset, split, recipe)
    by_system = finished.weights.reshape(len(finished.categories), len(finished.names), -1) * finished.systems
    own = [by_system[:, :, fold % finished.systems] for fold in range(recipe.folds)]
    return [
        Model(
            views=recipe.views,
            heads={name: dict(heads[fold % len(heads)][name]) for name in recipe.backbones},
            finalizer=recipe.finalizer,
            categories=list(dataset.categories),
            weights=own[fold],
            global_weights=own[fold].mean(0),
            center_bias=training.baseline[fold],
            finalizer_bias=training.finalizer_bias[fold],
            classifier=CategoryClassifier(np.empty(0), np.empty(0), np.empty(0), np.empty(0), math.nan),
            provenance={},
            standards=finished.standards,
        )
        for fold in range(recipe.folds)
    ]
