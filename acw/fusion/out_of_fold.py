"""Out-of-fold predictions: what heads say of images that they did not train on, on which weights are fitted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from acw.cluster.tasks import submit
from acw.data import Dataset, Split
from acw.features.joined import Store, parts_of
from acw.fusion import classifier
from acw.fusion.adaptation_fit import Maps, on_grid
from acw.fusion.category_weights import Likelihoods
from acw.fusion.classifier import CategoryClassifier
from acw.heads.center_bias import CenterBias
from acw.heads.ensemble import ensemble
from acw.heads.finalizer import Finalizer
from acw.heads.readout import Parameters
from acw.recipes import Recipe
from acw.training.batches import TrainingSet, group_by_shape
from acw.training.trainer import EVALUATION_BATCH


@dataclass(frozen=True)
class OutOfFold:
    """What heads and centre biases say of development images that they did not train on.

    images: (N,) indices in the data set, ascending. likelihoods: of the backbones at their fixations. maps: of their
    densities on a coarse grid. baseline: (N,) mean log-likelihood of the folds' KDE, nats per fixation.
    """

    images: np.ndarray
    likelihoods: Likelihoods
    maps: Maps
    baseline: np.ndarray


def out_of_fold(
    recipe: Recipe,
    dataset: Dataset,
    training: TrainingSet,
    split: Split,
    heads: Sequence[Mapping[str, Parameters]],
    stores: Sequence[Store],
) -> OutOfFold:
    """Each development image predicted by the heads of the fold whose validation set it is in, averaged over seeds.

    heads: as `heads_by_fold` gives them; those of a model taken as it is trained on none of the images. Computed by all
    cores of the Ray cluster.
    """
    import ray

    finalizer, shared = recipe.finalizer, ray.put(dataset)
    pending: dict[tuple[int, int], Callable[[], dict[int, _Predicted]]] = {}
    for fold, number in itertools.product(range(recipe.folds), range(len(stores))):
        bank = heads[fold % len(heads)][recipe.backbones[number]]
        groups = group_by_shape([stores[number]], training.sizes, split.validation(fold), finalizer)
        arguments = groups, stores[number], bank, training.finalizer_bias[fold], finalizer
        pending[fold, number] = submit(_log_densities, shared, *arguments)
    predicted = {task: result() for task, result in pending.items()}
    fold_of = {int(index): fold for fold in range(recipe.folds) for index in split.validation(fold)}
    images = np.array(sorted(fold_of))
    of_views = [[predicted[fold_of[i], number][i] for number in range(len(stores))] for i in images.tolist()]
    log_p = [np.stack([of_view.log_p for of_view in of_image], 1) for of_image in of_views]
    maps = Maps.of(
        [np.stack([of_view.density for of_view in of_image]) for of_image in of_views],
        [dataset.fixations_of(index)[:2] for index in images.tolist()],
        [dataset.stimuli[index].size for index in images.tolist()],
        [training.baseline[fold_of[index]] for index in images.tolist()],
    )
    baseline = {}
    for index, fold in fold_of.items():
        bias = torch.from_numpy(training.baseline[fold].of_size(finalizer.grid(dataset.stimuli[index].size)))
        baseline[index] = float(_at_fixations(dataset, index, bias, finalizer).mean())
    image = np.repeat(np.arange(len(images)), [len(of_image) for of_image in log_p])
    likelihoods = Likelihoods(np.concatenate(log_p), image, len(images))
    return OutOfFold(images, likelihoods, maps, np.array([baseline[index] for index in images]))


class _Predicted(NamedTuple):
    """Of an image. log_p: (F,) log-density per px at its fixations; density: mass per cell of the coarse grid."""

    log_p: np.ndarray
    density: np.ndarray


@torch.no_grad()
def _log_densities(
    dataset: Dataset,
    groups: Sequence[Sequence[int]],
    store: Store,
    bank: Parameters,
    center_bias: CenterBias,
    finalizer: Finalizer,
) -> dict[int, _Predicted]:
    """Image -> what a bank's heads say of it; groups: the images, by shape."""
    result = {}
    for group in groups:
        bias = torch.from_numpy(center_bias.of_size(finalizer.grid(dataset.stimuli[group[0]].size)))
        for start in range(0, len(group), EVALUATION_BATCH):
            some = group[start : start + EVALUATION_BATCH]
            for index, log_density in zip(some, ensemble(bank, store.load(some), bias, finalizer), strict=True):
                log_p = _at_fixations(dataset, index, log_density, finalizer)
                result[index] = _Predicted(log_p, on_grid(log_density[None])[0])
    return result


def _at_fixations(dataset: Dataset, index: int, log_density: torch.Tensor, finalizer: Finalizer) -> np.ndarray:
    x, y, _ = dataset.fixations_of(index)
    return finalizer.at_pixels(log_density, x, y, dataset.stimuli[index].size)


def fit_classifier(dataset: Dataset, split: Split, stores: Sequence[Store]) -> CategoryClassifier:
    """Category inference from the development images' features."""
    images = split.development
    pooled = np.hstack([part.pooled(images).double().numpy() for part in parts_of(stores)])
    return classifier.fit(pooled, dataset.category_index[images], len(dataset.categories), split.fold[images])
