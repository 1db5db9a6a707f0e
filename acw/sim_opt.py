"""The benchmark's map for SIM: a density is the wrong map for that score, so the best one is searched for.

pysaliency's `SIMSaliencyMapModel` maximises the expected SIM under fixations drawn from the density. The benchmark's
settings are as many fixations as an image has, at least 10 epochs, and a rate that falls where the validation loss
stands still. Published values of SIM are this one. At full size an image takes hours, so it is searched on a grid on
which the blur is about 5 px wide. Kuemmerer, Wallis, Bethge, "Saliency benchmarking made easy", ECCV 2018.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
from scipy.ndimage import zoom
from scipy.special import logsumexp

from acw import pysaliency_compat

BLUR = 5.0  # px of the grid
CAT2000_FIXATIONS = 448


def best_map(log_density: np.ndarray, blur_sigma: float, fixations: int) -> np.ndarray:
    """(H, W) float64 map, not negative, whose SIM is expected to be highest; from natural logs with logsumexp 0.

    blur_sigma: of the empirical map, px. fixations: an image's number of them.
    """
    pysaliency_compat.load()
    from pysaliency.metric_optimization_torch import maximize_expected_sim

    factor = min(1.0, BLUR / blur_sigma)
    small = log_density if factor == 1 else zoom(log_density, factor, order=1, mode="nearest")
    small = small - logsumexp(small)
    with contextlib.redirect_stdout(io.StringIO()):  # it says which device it uses
        found, _ = maximize_expected_sim(
            small,
            kernel_size=blur_sigma * factor,
            train_samples_per_epoch=1000,
            val_samples=1000,
            fixation_count=fixations,
            min_iter=10,
            backlook=1,
            learning_rate_decay_scheme="validation_loss",
            verbose=False,
        )
    back = [target / own for target, own in zip(log_density.shape, found.shape, strict=True)]
    full = found if factor == 1 else zoom(found.astype(np.float64), back, order=1, mode="nearest")
    return np.maximum(full, 0).astype(np.float64)
