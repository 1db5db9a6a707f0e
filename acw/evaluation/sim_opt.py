"""The benchmark's map for SIM: a density is the wrong map for that score, so the best one is searched for.

Published values of SIM are those of a map that maximises the expected SIM under fixations drawn from the density, found
by stochastic gradient descent: pysaliency's `SIMSaliencyMapModel`, with which `maximise` agrees draw by draw in a
fraction of its time. The benchmark's settings are as many fixations as an image has, at least 10 epochs, and a rate
that falls where the validation loss stands still. At full size an image takes hours, so the map is searched on a grid
on which the blur is about 5 px wide. Kuemmerer, Wallis, Bethge, "Saliency benchmarking made easy", ECCV 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import zoom
from scipy.special import logsumexp
from torch import Tensor

from acw.data import Dataset
from acw.evaluation.blur import gaussian_blur

BLUR = 5.0  # px of the grid
CAT2000_FIXATIONS, CAT2000_SIZE, CAT2000_CATEGORIES = 448, (1080, 1920), 20
# Sets of fixations an epoch, as many for validation, and how many at a time.
SAMPLES = 1000
BATCH = 50
FEWEST_EPOCHS = 10
MOST_EPOCHS = 1000
# At full size: of the mass of one px of an image that has at least so many.
SMALLEST_IMAGE = 800 * 600
LEARNING_RATE = 1e-7
LOWEST_RATE = 1e-11
DECAY = 0.333333333
TRAINING_SEED, VALIDATION_SEED = 43, 42


def fixations_of(dataset: Dataset) -> int:
    """An image's number of fixations for `best_map`: the benchmark's for CAT2000, whichever reader read it."""
    sizes = {stimulus.size for stimulus in dataset.stimuli}
    if sizes == {CAT2000_SIZE} and len(dataset.categories) == CAT2000_CATEGORIES:
        return CAT2000_FIXATIONS
    return round(len(dataset.x) / len(dataset.stimuli))


def best_map(log_density: np.ndarray, blur_sigma: float, fixations: int) -> np.ndarray:
    """(H, W) float64 map, not negative, whose SIM is expected to be highest; from natural logs with logsumexp 0.

    blur_sigma: of the empirical map, px. fixations: an image's number of them.
    """
    # At least one cell is left along each side.
    factor = max(min(1.0, BLUR / blur_sigma), 1 / min(log_density.shape))
    # Between a density of 0 and any other, interpolation of logs says NaN.
    small = np.nan_to_num(zoom(log_density, factor, order=1, mode="nearest"), nan=-np.inf, neginf=-np.inf)
    # A cell has the mass of so many px, of which each step moves the same share; in small images it would take ages.
    area = max(log_density.size, SMALLEST_IMAGE) / small.size
    found = maximise(small - logsumexp(small), blur_sigma * factor, fixations, area)
    back = [target / own for target, own in zip(log_density.shape, found.shape, strict=True)]
    return zoom(found, back, order=1, mode="nearest")


def maximise(
    log_density: np.ndarray, sigma: float, fixations: int, area: float = 1.0, samples: int = SAMPLES
) -> np.ndarray:
    """(H, W) float64 map with sum 1 from float64 (H, W) logs with logsumexp 0; sigma in px, area in px of the image.

    As pysaliency's `maximize_expected_sim(log_density, sigma, samples, samples, min_iter=10, backlook=1,
    fixation_count=fixations, learning_rate_decay_scheme="validation_loss")`, which knows only an area of 1.
    """
    draws = _Draws.of(log_density, sigma, fixations)
    density = torch.from_numpy(np.exp(log_density))
    best = gaussian_blur(density, sigma, "constant").flatten()
    best = (best / best.sum()).float()
    training = np.random.RandomState(TRAINING_SEED)
    # The same at each epoch's end.
    validation = list(draws.batches(samples, np.random.RandomState(VALIDATION_SEED)))

    def loss() -> float:
        return -sum(float(torch.minimum(one, best).sum()) for one in validation) / samples

    rate, losses, before = LEARNING_RATE * area, [loss()], 1
    while before < FEWEST_EPOCHS or (before <= MOST_EPOCHS and rate >= LOWEST_RATE * area):
        for empirical in draws.batches(samples, training):
            best = _step(best, empirical, rate)
        before += 1
        losses.append(loss())
        if losses[-1] >= min(losses[:-1]):
            rate *= DECAY
            losses = losses[-1:]
    return best.double().view(log_density.shape).numpy()


def _step(saliency: Tensor, empirical: Tensor, rate: float) -> Tensor:
    """A step of projected gradient descent within the densities: pysaliency's `DistributionSGD`."""
    # SIM grows where the empirical map is above this one: its gradient, half of it where both are equal.
    above = (torch.sign(empirical - saliency).mean(0) + 1) / 2
    slope = (above * saliency).sum() - above
    step = torch.minimum(slope, saliency / rate)
    saliency = (saliency - rate * (step - step.mean())).clamp_min_(0)
    return saliency / saliency.sum()


@dataclass(frozen=True, eq=False)
class _Draws:
    """Empirical maps of fixations that are drawn from a density.

    pixels: those with mass, by rising density; cumulative: logarithm of the sum of the densities up to each.
    """

    size: tuple[int, int]
    sigma: float
    fixations: int
    pixels: np.ndarray
    cumulative: np.ndarray

    @classmethod
    def of(cls, log_density: np.ndarray, sigma: float, fixations: int) -> _Draws:
        flat = log_density.ravel()
        there = np.flatnonzero(np.isfinite(flat))
        order = flat[there].argsort()
        cumulative = np.logaddexp.accumulate(flat[there][order])
        return cls(log_density.shape, sigma, fixations, there[order], cumulative - cumulative[-1])

    def batches(self, samples: int, random: np.random.RandomState) -> Iterator[Tensor]:
        """Of so many sets of fixations (n, H * W) float32 maps, blurred, with sum 1, for n up to BATCH."""
        for start in range(0, samples, BATCH):
            count = min(BATCH, samples - start)
            place = np.searchsorted(self.cumulative, -random.exponential(size=count * self.fixations))
            drawn = torch.from_numpy(self.pixels[place]).view(count, self.fixations)
            maps = torch.zeros(count, math.prod(self.size))
            maps.scatter_add_(1, drawn, torch.ones(drawn.shape))
            radius = math.ceil(3 * self.sigma)
            blurred = gaussian_blur(maps.view(count, *self.size), self.sigma, "constant", radius).flatten(1)
            yield blurred / blurred.sum(1, keepdim=True)
