"""sAUC as the MIT/Tuebingen benchmark has it: a density against what the same model says of other images.

Where many people look in any image, a fixation says little about this one. So the map that is ranked is the density
over the mean density of the model's predictions for the other images (log p minus its logarithm), and the negatives are
the fixations of the other images. The mean is taken at 500 x 500, where every size of image comes to the same.
Kuemmerer, Wallis, Bethge, "Saliency benchmarking made easy", ECCV 2018; pysaliency's `ShuffledBaselineModel` and
`ShuffledAUCSaliencyMapModel`, which average in float32 by default, this in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from acw.evaluation.metrics import Components, Target

SIDE = 500
# A place to which no prediction for another image gives any mass ranks above all others, not beside NaN.
SMALLEST = 1e-300
# Relative, of a sum of densities in float64.
ROUNDING = 1e-15


@lru_cache(maxsize=32)
def _between(source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """scipy's `zoom(order=1)` along one axis, whose first and last cells lie on each other: cells before and after each
    place (int64 (target,)) and the share of the latter (float64)."""
    position = np.linspace(0, source - 1, target)
    low = np.minimum(position.astype(np.int64), max(source - 2, 0))
    high = np.minimum(low + 1, source - 1)
    return torch.from_numpy(low), torch.from_numpy(high), torch.from_numpy(position - low)


def reduced(log_densities: Tensor, weights: Tensor) -> Tensor:
    """(M, SIDE, SIDE) float64 densities with sum 1 of mixtures, weights float64 (M, C), of log-densities (C, H, W).

    Resized linearly in the logarithm, first and last cells on each other, as pysaliency does it.
    """
    densities, size = log_densities.double().exp_().flatten(1), log_densities.shape[1:]
    result = densities.new_empty(len(weights), SIDE, SIDE)
    for row, small in zip(weights, result, strict=True):
        logs = (row @ densities).log_().view(1, 1, *size)
        small.copy_(interpolate(logs, size=(SIDE, SIDE), mode="bilinear", align_corners=True)[0, 0])
    # Between two places of which one has no mass there is none; nor anywhere, where all is between the places.
    return result.nan_to_num_(nan=-torch.inf).flatten(1).softmax(1).nan_to_num_(nan=0).view_as(result)


@dataclass(frozen=True, eq=False)
class MeanPrediction:
    """What one model says of all scored images: the sum of its densities (`reduced`), and how many they are."""

    total: Tensor
    images: int

    def others(self, own: Tensor | None) -> Tensor:
        """(SIDE, SIDE) log of the mean density of the other images; own: this one's, None where it is none of them."""
        if own is None or self.images == 1:
            return (self.total / self.images).clamp_min(SMALLEST).log()
        # Where this image has nearly all of the mass, what is left of the others is known up to rounding.
        others = torch.maximum(self.total - own, self.total * ROUNDING)
        return (others / (self.images - 1)).clamp_min(SMALLEST).log()


def at_pixels(log_mean: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(n,) float64: a map (SIDE, SIDE) brought to an image of a size, at some of its pixels (int64 (n,)).

    Not normalised there: a constant changes no rank.
    """
    (top, bottom, down), (left, right, across) = (
        [each.to(pixels.device) for each in _between(SIDE, cells)] for cells in size
    )
    row, column = pixels // size[1], pixels % size[1]
    upper, lower = (
        torch.lerp(log_mean[rows[row], left[column]], log_mean[rows[row], right[column]], across[column])
        for rows in (top, bottom)
    )
    return torch.lerp(upper, lower, down[row])


def shuffled_aucs(components: Components, weights: Tensor, target: Target, log_mean: Tensor) -> list[float]:
    """sAUC of M mixtures of the components, weights float64 (M, C); log_mean: of what was said of other images."""
    fixations = len(target.pixels)
    pixels = torch.cat([target.pixels, target.negatives[0]])
    values = weights @ components.density[:, pixels] * (-at_pixels(log_mean, pixels, target.size)).exp()
    return [shuffled_auc(row[:fixations], row[fixations:], target) for row in values]


def shuffled_auc(at_fixations: Tensor, at_negatives: Tensor, target: Target) -> float:
    """The chance that a fixation's value exceeds a negative's, ties counted as one half; values >= 0, float64."""
    counts = target.negatives[1]
    order, keys = _keys(at_fixations).sort().values, _keys(at_negatives)
    below, not_above = (torch.searchsorted(order, keys, right=right) for right in (False, True))
    return float(((2 * len(order) - below - not_above) * counts).sum() / (2 * len(order) * counts.sum()))


def _keys(values: Tensor) -> Tensor:
    """int64 that order as the values do without their last 12 bits, whose rounding must not part ties."""
    return (values.contiguous().view(torch.int64) + (1 << 11)) >> 12
