"""The same scores by pysaliency's own functions, on the very same maps: slow, in float64, and the last word.

`jobs/evaluate.py --exact` has them in the place of those of metrics.py and sauc.py; a test holds both together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from acw.data import pysaliency_compat
from acw.evaluation.metrics import METRICS, Target, added_scores


@dataclass(frozen=True, eq=False)
class ExactTarget:
    """An image's fixations for pysaliency: its target, and the baseline's log-density, float64 (H, W)."""

    target: Target
    baseline: np.ndarray

    @cached_property
    def _fixated(self) -> tuple[np.ndarray, np.ndarray]:
        return np.divmod(self.target.pixels.numpy(), self.target.size[1])

    @cached_property
    def _empirical(self) -> np.ndarray:
        counts = np.zeros(self.target.size)
        np.add.at(counts, self._fixated, 1)
        return gaussian_filter(counts, self.target.blur_sigma, mode="reflect")

    def scores(self, log_density: np.ndarray, log_mean: Tensor) -> dict[str, float]:
        """All scores of one density, float64 (H, W) natural logs with logsumexp 0; log_mean: of the other images'."""
        pysaliency_compat.load()
        from pysaliency.metrics import CC, NSS, SIM, MIT_KLDiv, convert_saliency_map_to_density
        from pysaliency.models import ShuffledBaselineModel
        from pysaliency.roc import general_roc

        target, (rows, columns) = self.target, self._fixated
        density = np.exp(log_density)
        smooth = gaussian_filter(density, target.blur_sigma, mode="constant")
        log_p = log_density[rows, columns]
        # pysaliency's own resizing, of the mean of the others in its place.
        others: Any = ShuffledBaselineModel(None, [], predict_overall_average=True, caching=False)
        others.prediction = log_mean.numpy().copy()
        with np.errstate(invalid="ignore"):
            shuffled = log_density - others.log_density(np.zeros(target.size))
        negatives, repeats = (one.numpy() for one in target.negatives)
        found = {
            "IG": (log_p - self.baseline[rows, columns]).mean() / math.log(2),
            "LL": (log_p.mean() + math.log(density.size)) / math.log(2),
            "AUC": general_roc(density[rows, columns], density.ravel())[0],
            "sAUC": general_roc(shuffled[rows, columns], np.repeat(shuffled.ravel()[negatives], repeats))[0],
            "NSS": NSS(density, columns, rows).mean(),
            "CC": CC(convert_saliency_map_to_density(smooth), self._empirical),
            "KLDiv": MIT_KLDiv(smooth, self._empirical),
            "SIM": SIM(smooth, self._empirical),
        }
        found |= added_scores(torch.from_numpy(density), target)
        return {metric: float(found[metric]) for metric in METRICS}
