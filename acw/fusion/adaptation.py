"""Category adaptation: of each category a handful of numbers by which the views' densities become one density.

    log p = t log(blur(sum_b w_b p_b)) + a log c + b (log c_own - log c), normalised

w: weights of the views. blur: shares of Gaussians of a few widths, the first of which leaves the density as it is. t: a
temperature. c: the model's centre bias, a: how much of it is added to what the heads have added. c_own: where people
look in the category's images, whatever they show; b: how far that replaces c. Without adaptation t is 1, a and b are 0
and nothing is blurred, which leaves the mixture of `category_weights`.

Heads know a category's images only if they were trained on such; these numbers are learned from some ten of them.
`adaptation_fit` finds them. Shape suffixes: C views, S kernels, G categories, H x W the density's grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from acw.heads.finalizer import normalise

# Rows and columns of relative coordinates, on which numbers are fitted and a category's own centre bias is kept.
GRID = (36, 48)
# Widths of the kernels, standard deviations, as shares of the image's long side. The first leaves things as they are.
KERNELS = (0.0, 1 / 40, 1 / 10)
# Of a density on a grid, below which its logarithm would be one of rounding.
SMALLEST = 1e-12
# Of shares that add up to 1.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Numbers:
    """One density's. weights: (C,), kernels: (S,), each with sum 1. temperature: t, > 0; center_bias_weight: a.

    own: float32 on GRID, b (log c_own - log c).
    """

    weights: np.ndarray
    kernels: np.ndarray
    temperature: float
    center_bias_weight: float
    own: np.ndarray

    @property
    def only_mix(self) -> bool:
        """Whether they change nothing but the weights, up to rounding: the density is then the views' mixture."""
        values = [self.kernels[0] - 1, self.temperature - 1, self.center_bias_weight, np.abs(self.own).max()]
        return float(np.abs(values).max()) < ROUNDING


@dataclass(frozen=True, eq=False)
class Adaptation:
    """The numbers of G categories, and in a last row those for all images together.

    weights: (G + 1, C), kernels: (G + 1, S), temperature, center_bias_weight, own_weight: (G + 1,), all float64.
    own: float32 (G, *GRID), log c_own - log c of each category.
    """

    weights: np.ndarray
    kernels: np.ndarray
    temperature: np.ndarray
    center_bias_weight: np.ndarray
    own_weight: np.ndarray
    own: np.ndarray

    @classmethod
    def none(cls, weights: np.ndarray) -> Adaptation:
        """Numbers that change nothing but the weights, (G + 1, C)."""
        rows = len(weights)
        kernels = np.tile(np.eye(len(KERNELS))[0], (rows, 1))
        return cls(weights, kernels, np.ones(rows), np.zeros(rows), np.zeros(rows), np.zeros((rows - 1, *GRID), "f"))

    def only(self, categories: Sequence[int]) -> Adaptation:
        """The numbers of some categories, and those for all."""
        rows = [*categories, len(self.temperature) - 1]
        return Adaptation(**{k: values[rows[:-1] if k == "own" else rows] for k, values in vars(self).items()})

    def beside(self, new: Adaptation) -> Adaptation:
        """With the categories of another one behind its own; the numbers for all are its own."""
        joined = {
            name: np.concatenate([own[:-1], getattr(new, name)[:-1], own[-1:]])
            for name, own in vars(self).items()
            if name != "own"
        }
        return Adaptation(**joined, own=np.concatenate([self.own, new.own]))

    def of(self, shares: np.ndarray) -> Numbers:
        """The numbers of an image whose categories are uncertain: their mean by shares, (G + 1,) with sum 1."""
        own = np.einsum("g,ghw->hw", (shares * self.own_weight)[:-1], self.own)
        return Numbers(
            shares @ self.weights,
            shares @ self.kernels,
            # Temperatures multiply.
            math.exp(float(shares @ np.log(self.temperature))),
            float(shares @ self.center_bias_weight),
            own.astype(np.float32),
        )

    def row(self, number: int) -> Numbers:
        """The numbers of one category; -1: those for all."""
        return self.of(np.eye(len(self.temperature))[number])


def adapt(log_densities_CHW: Tensor, numbers: Numbers, center_bias_HW: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) log-density on the grid, normalised, from the views' for an image of `size` px; center_bias_HW: log c."""
    assert len(numbers.weights) == len(log_densities_CHW)
    grid = (log_densities_CHW.shape[1], log_densities_CHW.shape[2])
    # Without what weighs nothing, such as another category's readouts: they must not change so much as a rounding.
    used = np.flatnonzero(numbers.weights)
    weight_C = torch.from_numpy(numbers.weights[used]).to(log_densities_CHW)
    mixed_HW = torch.einsum("chw,c->hw", normalise(log_densities_CHW[torch.from_numpy(used)]).exp(), weight_C)
    blurred_HW = torch.zeros_like(mixed_HW)
    for width, share in zip(KERNELS, numbers.kernels.tolist(), strict=True):
        rows, columns = blurring(width, size, grid)
        blurred_HW += share * (rows.to(mixed_HW) @ mixed_HW @ columns.to(mixed_HW).T)
    own_HW = F.interpolate(torch.from_numpy(numbers.own).to(mixed_HW)[None, None], grid, mode="bilinear")[0, 0]
    log_mixed_HW = blurred_HW.clamp_min(SMALLEST / mixed_HW.numel()).log()
    return normalise(numbers.temperature * log_mixed_HW + numbers.center_bias_weight * center_bias_HW + own_HW)


@lru_cache(maxsize=64)
def blurring(width: float, size: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(H, H) and (W, W): a Gaussian blur on a grid over an image of `size` px, of a share `width` of its long side.

    At the edges the density is mirrored, so that none is lost.
    """
    rows, columns = (
        torch.from_numpy(_mirrored(n, width * max(size) * n / px)) for n, px in zip(grid, size, strict=True)
    )
    return rows, columns


def _mirrored(cells: int, sigma: float) -> np.ndarray:
    """(cells, cells) whose rows and columns have sum 1; sigma: in cells."""
    if not sigma:
        return np.eye(cells)
    # By the discrete cosine transform, whose waves are those that mirrors reflect.
    wave = np.arange(cells)
    basis = np.cos(np.pi * (np.arange(cells)[:, None] + 0.5) * wave / cells) * np.where(wave, math.sqrt(2), 1)
    damped = np.exp(-0.5 * (np.pi * wave * sigma / cells) ** 2)
    return (basis * damped) @ basis.T / cells
