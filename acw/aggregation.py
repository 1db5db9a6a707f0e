"""From trained heads to one model: out-of-fold predictions, category weights, category inference.

Weights are fitted on out-of-fold predictions (EM), even, or learned with the heads (`acw.joint`), as the recipe says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acw import categories, fusion
from acw.banks import Bank, BankState, checkpoint_path, plan_banks
from acw.batches import TrainingSet, group_by_shape
from acw.categories import CategoryClassifier
from acw.center_bias import CenterBias, fixed_gaussian, kde
from acw.cluster import begin
from acw.data import Dataset, Split
from acw.ensemble import ensemble
from acw.features import FeatureStore
from acw.finalizer import Finalizer
from acw.fusion import CategoryWeights, Likelihoods
from acw.heads import Parameters, concatenate, select
from acw.joint import SystemState, trained_systems, weights_history
from acw.model import Model
from acw.recipes import Recipe
from acw.storage import UserError, fetch, local
from acw.training import EVALUATION_BATCH


def training_set(dataset: Dataset, split: Split, recipe: Recipe) -> TrainingSet:
    """A data set as training sees it, with each fold's centre bias from the fold's own training images."""
    baseline = [kde_of(dataset, split.training(fold)) for fold in range(recipe.folds)]
    finalizer = [finalizer_bias(recipe, dataset, split.training(fold), baseline[fold]) for fold in range(recipe.folds)]
    sizes = [stimulus.size for stimulus in dataset.stimuli]
    return TrainingSet(sizes, split.fold, dataset.image, dataset.x, dataset.y, finalizer, baseline)


def kde_of(dataset: Dataset, indices: np.ndarray, bandwidth: float = 0.0) -> CenterBias:
    """The centre bias of some images of a data set; bandwidth as for `center_bias.kde`."""
    size = np.array([stimulus.size for stimulus in dataset.stimuli])[dataset.image]
    mine = np.isin(dataset.image, indices)
    return kde((dataset.x / size[:, 1])[mine], (dataset.y / size[:, 0])[mine], dataset.image[mine], bandwidth)


def finalizer_bias(recipe: Recipe, dataset: Dataset, indices: np.ndarray, baseline: CenterBias) -> CenterBias:
    """The centre bias that heads build on, as the recipe says; baseline: the same images' over which IG is measured."""
    if recipe.center_bias == "gaussian":
        return fixed_gaussian()
    return kde_of(dataset, indices, recipe.center_bias_bandwidth) if recipe.center_bias_bandwidth else baseline


def trained_heads(recipe: Recipe, folder: Path) -> dict[Bank, BankState]:
    """The finished banks of a run; raises UserError if one is missing or has not finished."""
    result = {}
    for bank in plan_banks(recipe):
        path = checkpoint_path(folder, bank)
        if not fetch(path).exists():
            raise UserError(f"{path}: heads are not trained yet; run jobs/train.py first")
        result[bank] = BankState.load(path)
        if len(result[bank].active(recipe)):
            raise UserError(f"{path}: training has not finished; run jobs/train.py again, it goes on where it stopped")
    return result


def trained(recipe: Recipe, folder: Path) -> tuple[dict[Bank, BankState], list[SystemState]]:
    """The finished banks and, of a joint training, systems of a run; neither where it takes another model's heads.

    Raises UserError if one is missing or has not finished.
    """
    banks = {} if recipe.heads else trained_heads(recipe, folder)
    return banks, trained_systems(recipe, folder) if recipe.joint else []


def heads_by_fold(
    recipe: Recipe, banks: Mapping[Bank, BankState], systems: Sequence[SystemState]
) -> list[dict[str, Parameters]]:
    """Per fold and backbone the heads that make a run's model; the one entry of a model that is taken as it is."""
    if recipe.heads:
        return [Model.load(local(recipe.heads)).heads]
    if recipe.joint:
        return [{name: system.heads(name) for name in recipe.backbones} for system in systems]
    return best_heads(recipe, banks)


def best_heads(recipe: Recipe, banks: Mapping[Bank, BankState]) -> list[dict[str, Parameters]]:
    """Per fold and backbone the best-validation parameters of its heads, stacked."""

    def of(backbone: str, fold: int) -> Parameters:
        chosen = []
        for bank, state in banks.items():
            if bank.backbone == backbone:
                members = [k for k, head in enumerate(bank.members) if head.fold == fold]
                chosen += [select(state.best, members)] if members else []
        return concatenate(chosen)

    return [{name: of(name, fold) for name in recipe.backbones} for fold in range(recipe.folds)]


@dataclass(frozen=True)
class OutOfFold:
    """What heads and centre biases say of development images that they did not train on.

    images: (N,) indices in the data set, ascending. likelihoods: of the backbones at their fixations.
    baseline: (N,) mean log-likelihood of the folds' KDE, nats per fixation.
    """

    images: np.ndarray
    likelihoods: Likelihoods
    baseline: np.ndarray


def out_of_fold(
    recipe: Recipe,
    dataset: Dataset,
    training: TrainingSet,
    split: Split,
    heads: Sequence[Mapping[str, Parameters]],
    stores: Sequence[FeatureStore],
) -> OutOfFold:
    """Each development image predicted by the heads of the fold whose validation set it is in, averaged over seeds.

    heads: as `heads_by_fold` gives them; those of a model taken as it is trained on none of the images. Computed by all
    cores of the Ray cluster.
    """
    import ray

    finalizer, shared = recipe.finalizer, ray.put(dataset)
    said: dict[tuple[int, int], Callable[[], dict[int, np.ndarray]]] = {}
    for fold, number in itertools.product(range(recipe.folds), range(len(stores))):
        bank = heads[fold % len(heads)][recipe.backbones[number]]
        groups = group_by_shape([stores[number]], training.sizes, split.validation(fold), finalizer)
        arguments = groups, stores[number], bank, training.finalizer_bias[fold], finalizer
        said[fold, number] = begin(_log_densities, shared, *arguments)
    found = {task: result() for task, result in said.items()}
    fold_of = {int(index): fold for fold in range(recipe.folds) for index in split.validation(fold)}
    images = np.array(sorted(fold_of))
    log_p = [np.stack([found[fold_of[i], number][i] for number in range(len(stores))], 1) for i in images.tolist()]
    baseline = {}
    for index, fold in fold_of.items():
        bias = torch.from_numpy(training.baseline[fold].of_size(finalizer.grid(dataset.stimuli[index].size)))
        baseline[index] = float(_at_fixations(dataset, index, bias, finalizer).mean())
    image = np.repeat(np.arange(len(images)), [len(one) for one in log_p])
    likelihoods = Likelihoods(np.concatenate(log_p), image, len(images))
    return OutOfFold(images, likelihoods, np.array([baseline[index] for index in images]))


@torch.no_grad()
def _log_densities(
    dataset: Dataset,
    groups: Sequence[Sequence[int]],
    store: FeatureStore,
    bank: Parameters,
    center_bias: CenterBias,
    finalizer: Finalizer,
) -> dict[int, np.ndarray]:
    """Image -> log-densities at its fixations, by a bank's heads; groups: the images, by shape."""
    found = {}
    for group in groups:
        bias = torch.from_numpy(center_bias.of_size(finalizer.grid(dataset.stimuli[group[0]].size)))
        for start in range(0, len(group), EVALUATION_BATCH):
            some = group[start : start + EVALUATION_BATCH]
            for index, log_density in zip(some, ensemble(bank, store.load(some), bias, finalizer), strict=True):
                found[index] = _at_fixations(dataset, index, log_density, finalizer)
    return found


def _at_fixations(dataset: Dataset, index: int, log_density: torch.Tensor, finalizer: Finalizer) -> np.ndarray:
    x, y, _ = dataset.fixations_of(index)
    return finalizer.at_pixels(log_density, x, y, dataset.stimuli[index].size)


@dataclass(frozen=True)
class Fusion:
    """A model's weights, and those of its controls.

    category: per category and backbone. components: (G, C) the same for the model's components, where they are not the
    backbones. controls: name -> (N, B) weights an image of the data set, fitted as the category weights are: by source,
    where every image has one, and by shuffled labels.
    """

    category: CategoryWeights
    controls: dict[str, np.ndarray]
    components: np.ndarray | None = None


def fit_weights(dataset: Dataset, predictions: OutOfFold, seed: int) -> Fusion:
    """Category weights by EM and their two controls: weights by source, and by labels that mean nothing."""
    images, likelihoods = predictions.images, predictions.likelihoods
    groups = len(dataset.categories)
    category = dataset.category_index
    # One permutation for all images, held-out ones too: every image has a label, and none says anything about it.
    shuffled = np.random.default_rng(seed).permutation(category)
    controls = {"shuffled_labels": fusion.fit(likelihoods, shuffled[images], groups, seed).weights[shuffled]}
    known = [stimulus.source for stimulus in dataset.stimuli]
    sources = sorted({source for source in known if source})
    if sources and all(known):
        source = np.array([sources.index(name) for name in known if name])
        controls["source_weights"] = fusion.fit(likelihoods, source[images], len(sources), seed).weights[source]
    return Fusion(fusion.fit(likelihoods, category[images], groups, seed), controls)


def even_weights(dataset: Dataset, predictions: OutOfFold) -> Fusion:
    """The same weight for every backbone, whatever the category."""
    backbones = predictions.likelihoods.log_p.shape[1]
    overall = np.full(backbones, 1 / backbones)
    weights = np.tile(overall, (len(dataset.categories), 1))
    left_out = predictions.likelihoods.mean_log_likelihood(overall)
    history = [overall[None]] * len(dataset.categories)
    return Fusion(CategoryWeights(weights, weights, weights, overall, math.inf, {}, left_out, history), {})


def joint_weights(dataset: Dataset, split: Split, predictions: OutOfFold, systems: Sequence[SystemState]) -> Fusion:
    """Those of jointly trained systems: their mean, with their range as its interval, and each system's own."""
    by_system = np.stack([system.weights() for system in systems])
    weights = by_system.mean(0)
    images = predictions.images
    mine = by_system[split.fold[images], dataset.category_index[images]]
    left_out = predictions.likelihoods.mean_log_likelihood(mine)
    overall = weights[dataset.category_index[images]].mean(0)
    history = list(np.moveaxis(weights_history(systems), 1, 0))
    category = CategoryWeights(weights, by_system.min(0), by_system.max(0), overall, math.inf, {}, left_out, history)
    return Fusion(category, {}, np.moveaxis(by_system, 0, 2).reshape(len(weights), -1) / len(systems))


def fit_classifier(dataset: Dataset, split: Split, stores: Sequence[FeatureStore]) -> CategoryClassifier:
    """Category inference from the development images' features."""
    images = split.development
    pooled = np.hstack([store.pooled(images).double().numpy() for store in stores])
    return categories.fit(pooled, dataset.category_index[images], len(dataset.categories), split.fold[images])


def assemble(
    recipe: Recipe,
    dataset: Dataset,
    split: Split,
    heads: Sequence[Mapping[str, Parameters]],
    center_bias: CenterBias,
    classifier: CategoryClassifier,
    fitted: Fusion,
    provenance: dict[str, Any],
) -> Model:
    """The finished model. heads: as for `out_of_fold`; center_bias: the KDE of all folds' images."""
    model = Model(
        backbones=recipe.backbone_values,
        heads={},
        finalizer=recipe.finalizer,
        categories=list(dataset.categories),
        weights=fitted.category.weights,
        global_weights=fitted.category.global_weights,
        center_bias=center_bias,
        finalizer_bias=finalizer_bias(recipe, dataset, split.development, center_bias),
        classifier=classifier,
        provenance=provenance,
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
            backbones=recipe.backbone_values,
            heads={name: dict(heads[fold % len(heads)][name]) for name in recipe.backbones},
            finalizer=recipe.finalizer,
            categories=list(dataset.categories),
            weights=own[fold],
            global_weights=own[fold].mean(0),
            center_bias=training.baseline[fold],
            finalizer_bias=training.finalizer_bias[fold],
            classifier=CategoryClassifier(np.empty(0), np.empty(0), np.empty(0), np.empty(0), math.nan),
            provenance={},
        )
        for fold in range(recipe.folds)
    ]
