"""A data set as training sees it, with the centre biases of its folds."""

from __future__ import annotations

import numpy as np

from acw.data import Dataset, Split
from acw.heads.center_bias import CenterBias, fixed_gaussian, kde
from acw.recipes import Recipe
from acw.training.batches import TrainingSet


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
