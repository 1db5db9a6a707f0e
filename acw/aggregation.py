"""From trained heads to one model: out-of-fold predictions, category weights, category inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acw import categories, fusion
from acw.banks import Bank, BankState, checkpoint_path, plan_banks
from acw.batches import TrainingSet, density_grid, group_by_shape
from acw.center_bias import CenterBias, fixed_gaussian, kde
from acw.data import Dataset, Split
from acw.evaluation import sample
from acw.features import FeatureStore
from acw.fusion import CategoryWeights, Likelihoods
from acw.heads import Parameters, select, stack
from acw.model import Model, ensemble
from acw.recipes import Recipe
from acw.storage import UserError
from acw.training import EVALUATION_BATCH


def training_set(dataset: Dataset, split: Split, recipe: Recipe) -> TrainingSet:
    """A data set as training sees it, with each fold's centre bias from the fold's own training images."""
    baseline = [kde_of(dataset, split.training(fold)) for fold in range(recipe.folds)]
    finalizer = [finalizer_bias(recipe, bias) for bias in baseline]
    sizes = [stimulus.size for stimulus in dataset.stimuli]
    return TrainingSet(sizes, split.fold, dataset.image, dataset.x, dataset.y, finalizer, baseline)


def kde_of(dataset: Dataset, indices: np.ndarray) -> CenterBias:
    """The centre bias of some images of a data set."""
    size = np.array([stimulus.size for stimulus in dataset.stimuli])[dataset.image]
    mine = np.isin(dataset.image, indices)
    return kde((dataset.x / size[:, 1])[mine], (dataset.y / size[:, 0])[mine], dataset.image[mine])


def finalizer_bias(recipe: Recipe, baseline: CenterBias) -> CenterBias:
    return baseline if recipe.center_bias == "kde" else fixed_gaussian()


def trained_heads(recipe: Recipe, folder: Path) -> dict[Bank, BankState]:
    """The finished banks of a run; raises UserError if one is missing or has not finished."""
    result = {}
    for bank in plan_banks(recipe):
        path = checkpoint_path(folder, bank)
        if not path.exists():
            raise UserError(f"{path}: heads are not trained yet; run jobs/train.py first")
        result[bank] = BankState.load(path)
        if len(result[bank].active(recipe)):
            raise UserError(f"{path}: training has not finished; run jobs/train.py again, it goes on where it stopped")
    return result


def best_heads(banks: Mapping[Bank, BankState], backbone: str, fold: int | None = None) -> Parameters:
    """Best-validation parameters of a backbone's heads, of all folds or of one."""
    chosen = []
    for bank, state in banks.items():
        if bank.backbone == backbone:
            members = [k for k, head in enumerate(bank.members) if fold is None or head.fold == fold]
            chosen += [{name: value[0] for name, value in select(state.best, [k]).items()} for k in members]
    return stack(chosen)


@dataclass(frozen=True)
class OutOfFold:
    """What heads and centre biases say of development images that they did not train on.

    images: (N,) indices in the data set, ascending. likelihoods: of the backbones at their fixations.
    baseline: (N,) mean log-likelihood of the folds' KDE, nats per fixation.
    """

    images: np.ndarray
    likelihoods: Likelihoods
    baseline: np.ndarray


@torch.no_grad()
def out_of_fold(
    recipe: Recipe,
    dataset: Dataset,
    training: TrainingSet,
    split: Split,
    banks: Mapping[Bank, BankState],
    stores: Sequence[FeatureStore],
) -> OutOfFold:
    """Each development image predicted by the heads of the fold whose validation set it is in, averaged over seeds."""
    log_p: dict[int, np.ndarray] = {}
    baseline: dict[int, float] = {}
    for fold in range(recipe.folds):
        for backbone, store in zip(recipe.backbones, stores, strict=True):
            heads = best_heads(banks, backbone, fold)
            for group in group_by_shape(store, training.sizes, split.validation(fold), recipe.density_cell):
                grid = density_grid(training.sizes[group[0]], recipe.density_cell)
                bias = torch.from_numpy(training.finalizer_bias[fold].of_size(grid))
                for start in range(0, len(group), EVALUATION_BATCH):
                    some = group[start : start + EVALUATION_BATCH]
                    densities = ensemble(heads, store.load(some), bias, recipe.density_cell)
                    for index, log_density in zip(some, densities, strict=True):
                        column = _at_fixations(dataset, index, log_density)[:, None]
                        log_p[index] = np.hstack([log_p[index], column]) if index in log_p else column
        for index in split.validation(fold):
            grid = density_grid(dataset.stimuli[index].size, recipe.density_cell)
            bias = torch.from_numpy(training.baseline[fold].of_size(grid))
            baseline[index] = float(_at_fixations(dataset, index, bias).mean())
    images = np.array(sorted(log_p))
    image = np.repeat(np.arange(len(images)), [len(log_p[index]) for index in images])
    likelihoods = Likelihoods(np.concatenate([log_p[index] for index in images]), image, len(images))
    return OutOfFold(images, likelihoods, np.array([baseline[index] for index in images]))


def _at_fixations(dataset: Dataset, index: int, log_density: torch.Tensor) -> np.ndarray:
    x, y, _ = dataset.fixations_of(index)
    return sample(log_density, x, y, dataset.stimuli[index].size)


@dataclass(frozen=True)
class Fusion:
    """Fitted weights: per category; per source where every image has one (else None); per shuffled category."""

    category: CategoryWeights
    sources: list[str]
    source: CategoryWeights | None
    shuffled: CategoryWeights
    shuffled_index: np.ndarray


def fit_weights(dataset: Dataset, predictions: OutOfFold, seed: int) -> Fusion:
    """Category weights and their two controls: weights by source, and by labels that mean nothing."""
    images, likelihoods = predictions.images, predictions.likelihoods
    groups = len(dataset.categories)
    category = dataset.category_index
    # One permutation for all images, held-out ones too: every image has a label, and none says anything about it.
    shuffled = np.random.default_rng(seed).permutation(category)
    known = [stimulus.source for stimulus in dataset.stimuli]
    sources = sorted({source for source in known if source})
    by_source = None
    if sources and all(known):
        source = np.array([sources.index(name) for name in known if name])
        by_source = fusion.fit(likelihoods, source[images], len(sources), seed)
    return Fusion(
        fusion.fit(likelihoods, category[images], groups, seed),
        sources,
        by_source,
        fusion.fit(likelihoods, shuffled[images], groups, seed),
        shuffled,
    )


def assemble(
    recipe: Recipe,
    dataset: Dataset,
    split: Split,
    banks: Mapping[Bank, BankState],
    stores: Sequence[FeatureStore],
    fitted: Fusion,
    provenance: dict[str, Any],
) -> Model:
    """The finished model; its centre bias is the KDE of all five folds' images."""
    development = split.development
    center_bias = kde_of(dataset, development)
    pooled = np.hstack([store.pooled(development).double().numpy() for store in stores])
    classifier = categories.fit(
        pooled, dataset.category_index[development], len(dataset.categories), split.fold[development]
    )
    return Model(
        backbones=recipe.backbone_values,
        heads={name: best_heads(banks, name) for name in recipe.backbones},
        density_cell=recipe.density_cell,
        categories=list(dataset.categories),
        weights=fitted.category.weights,
        global_weights=fitted.category.global_weights,
        center_bias=center_bias,
        finalizer_bias=finalizer_bias(recipe, center_bias),
        classifier=classifier,
        provenance=provenance,
    )
