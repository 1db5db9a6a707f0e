"""The benchmark's map for SIM: a density is the wrong map for that score, so the best one is searched for.

Published values of SIM are those of a map that maximises the expected SIM under fixations drawn from the density, found
by stochastic gradient descent: pysaliency's `SIMSaliencyMapModel`, whose optimisation this calls. The benchmark's
settings are as many fixations as an image has, at least 10 epochs, and a rate that falls where the validation loss
stands still. At full size an image takes hours, so the map is searched on a grid on which the blur is about 5 px wide.
Kuemmerer, Wallis, Bethge, "Saliency benchmarking made easy", ECCV 2018.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import torch
from scipy.ndimage import zoom
from scipy.special import logsumexp

from acw.data import Dataset, pysaliency_compat

BLUR = 5.0  # px of the grid
CAT2000_FIXATIONS, CAT2000_SIZE, CAT2000_CATEGORIES = 448, (1080, 1920), 20
# Sets of fixations an epoch, and as many for validation.
SAMPLES = 1000
FEWEST_EPOCHS = 10
MOST_EPOCHS = 1000
# At full size: of the mass of one px of an image that has at least so many.
SMALLEST_IMAGE = 800 * 600
LEARNING_RATE = 1e-7
LOWEST_RATE = 1e-11


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
    best = _maximise(small - logsumexp(small), blur_sigma * factor, fixations, area)
    back = [length / cells for length, cells in zip(log_density.shape, best.shape, strict=True)]
    return zoom(best, back, order=1, mode="nearest")


def _maximise(log_density: np.ndarray, sigma: float, fixations: int, area: float) -> np.ndarray:
    """(H, W) float64 map with sum 1 from float64 (H, W) logs with logsumexp 0; sigma in px, area in px of the image."""
    pysaliency_compat.load()
    from pysaliency.metric_optimization_torch import maximize_expected_sim

    # It names its device on stdout, and warns of its own use of torch. Images are scored without gradients; it needs
    # them.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        best, _ = maximize_expected_sim(
            log_density,
            kernel_size=sigma,
            train_samples_per_epoch=SAMPLES,
            val_samples=SAMPLES,
            fixation_count=fixations,
            initial_learning_rate=LEARNING_RATE * area,
            minimum_learning_rate=LOWEST_RATE * area,
            learning_rate_decay_scheme="validation_loss",
            min_iter=FEWEST_EPOCHS,
            max_iter=MOST_EPOCHS,
            verbose=False,
        )
    return best.astype(np.float64)
