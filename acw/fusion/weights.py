"""The weights of a run: of its model and of the controls beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from acw.cluster.tasks import submit
from acw.data import Dataset, Split
from acw.fusion import adaptation_fit, category_weights
from acw.fusion.adaptation import Adaptation
from acw.fusion.adaptation_fit import FittedAdaptation
from acw.fusion.category_weights import CategoryWeights
from acw.fusion.out_of_fold import OutOfFold
from acw.training.joint import SystemState, weights_history


@dataclass(frozen=True)
class Fusion:
    """A model's weights, and those of its controls.

    category: per category and backbone. components: (G, C) the same for the model's components, where they are not the
    backbones. controls: name -> (N, B) weights an image of the data set, fitted as the category weights are: by source,
    where every image has one, and by shuffled labels. adaptation: what categories have besides weights; shuffled: the
    same fitted to shuffled labels, and these, (N,).
    """

    category: CategoryWeights
    controls: dict[str, np.ndarray]
    components: np.ndarray | None = None
    adaptation: FittedAdaptation | None = None
    shuffled: tuple[Adaptation, np.ndarray] | None = None

    def left_out(self, predictions: OutOfFold) -> np.ndarray:
        """(N,) nats per fixation of each development image by what the model mixes with, fitted without the image."""
        if self.adaptation is None or not self.adaptation.pays:
            return self.category.left_out
        # The gain is on coarse cells, which say less of a fixation than the density at its pixel.
        unadapted = predictions.likelihoods.mean_log_likelihood(self.category.global_weights)
        return unadapted + self.adaptation.gain


def fit_weights(dataset: Dataset, predictions: OutOfFold, seed: int) -> Fusion:
    """Category weights by EM, adaptation, and their controls: by source, and by labels that mean nothing.

    Adaptation is computed by two cores of the Ray cluster.
    """
    import ray

    images, likelihoods = predictions.images, predictions.likelihoods
    groups = len(dataset.categories)
    category = dataset.category_index
    # One permutation for all images, held-out ones too: every image has a label, and none says anything about it.
    shuffled = np.random.default_rng(seed).permutation(category)
    controls = {"shuffled_labels": category_weights.fit(likelihoods, shuffled[images], groups, seed).weights[shuffled]}
    known = [stimulus.source for stimulus in dataset.stimuli]
    sources = sorted({source for source in known if source})
    if sources and all(known):
        source = np.array([sources.index(name) for name in known if name])
        controls["source_weights"] = category_weights.fit(likelihoods, source[images], len(sources), seed).weights[
            source
        ]
    fitted = category_weights.fit(likelihoods, category[images], groups, seed)
    maps = ray.put(predictions.maps)
    adaptation, control = (
        submit(adaptation_fit.fit, maps, fitted.global_weights, labels[images], groups, seed)
        for labels in (category, shuffled)
    )
    return Fusion(fitted, controls, adaptation=adaptation(), shuffled=(control().adaptation, shuffled))


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
