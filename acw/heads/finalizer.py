"""From priority maps to densities: upsampling, smoothing, centre bias, normalisation, and the density of each pixel.

A `Finalizer` says how; the widths and the centre bias's weights are each head's own parameters. Everything before the
normalisation is linear and separable, so a head's map is `A_y R A_x^T` and no step is ever made on its own.
Shape suffixes: K heads, B images, F fixations, h x w a readout grid, H x W the density's grid.

DeepGaze IIE: Linardos, Kuemmerer, Press, Bethge, ICCV 2021, and its published PyTorch code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import make_interp_spline
from torch import Tensor

from acw.features.resize import nearest_index

# Of the smoothing, in cells: flat on any grid, and a diverging width must not ask for all the memory.
LONGEST_RADIUS = 4096
# For which image the progressive upsampling's steps are given (height, width); CAT2000's.
STEPS_IMAGE = (1080, 1920)
# A spline's weights fade by a factor of four a cell; these are far below float32's rounding of the sum.
NEGLIGIBLE = 1e-12

Grid = tuple[int, int]


@dataclass(frozen=True)
class Finalizer:
    """How priority maps become densities.

    upsampling: from the readout's grid to the density's, and from there to the image's pixels.
        `bilinear`: bilinear, then a cubic spline through the log-density: the density has no steps.
        `nearest`: nearest both times, as in DeepGaze IIE: the density is constant within a cell.
        `bicubic`: through the grids of `steps`, bicubic each time, as in Galván's third iteration; then a spline.
    cell: of the density's grid, in image px.
    steps: (rows, columns) of the grids between, for an image of STEPS_IMAGE; for another image they are scaled with its
        long side. Those finer than the density's grid are left out.
    """

    upsampling: str = "bilinear"
    cell: float = 8.0
    steps: tuple[Grid, ...] = ()

    def grid(self, size: Grid) -> Grid:
        """(H, W) cells of the grid on which an image of `size` px is given a density."""
        # DeepGaze IIE drops the odd pixel.
        rounding = math.floor if self.upsampling == "nearest" else math.ceil
        return max(1, rounding(size[0] / self.cell)), max(1, rounding(size[1] / self.cell))

    def area(self, size: Grid) -> Tensor | None:
        """(H, W) float32, mean 1: how many px of an image each cell of its grid stands for; None where all are equal.

        Where the image's sides are no multiples of the cell, nearest upsampling repeats some rows and columns once more
        than others, and each head is normalised over the image.
        """
        grid = self.grid(size)
        if self.upsampling != "nearest" or (size[0] % grid[0] == 0 and size[1] % grid[1] == 0):
            return None
        rows, columns = (
            torch.bincount(nearest_index(grid[axis], size[axis]), minlength=grid[axis]).float() for axis in (0, 1)
        )
        return rows[:, None] / rows.mean() * (columns / columns.mean())

    def on_grid(self, log_density: Tensor) -> Tensor:
        """A given centre bias, log-density (H, W) over an image, on the image's grid; not normalised."""
        size = (log_density.shape[0], log_density.shape[1])
        if self.upsampling == "nearest":
            rows, columns = (nearest_index(size[axis], self.grid(size)[axis]) for axis in (0, 1))
            return log_density[rows][:, columns]
        return F.interpolate(log_density[None, None], self.grid(size), mode="bilinear", antialias=True)[0, 0]

    def matrix(self, source: int, grid: Grid, axis: int, like: Tensor) -> Tensor:
        """(grid[axis], source): the upsampling of a readout of `source` cells along one axis, of the dtype and on the
        device of another tensor."""
        if self.upsampling != "bicubic":
            return resizing(source, grid[axis], self.upsampling, like.device, like.dtype)
        result = torch.eye(source, dtype=like.dtype, device=like.device)
        for step in self.steps:
            scale = STEPS_IMAGE[1] / STEPS_IMAGE[axis] * grid[axis] / max(grid)
            cells = max(1, math.floor(step[axis] * scale + 0.5))
            if cells < grid[axis]:
                result = resizing(len(result), cells, "bicubic", like.device, like.dtype) @ result
        return resizing(len(result), grid[axis], "bicubic", like.device, like.dtype) @ result

    def sampling(self, source: int, target: int, device: torch.device | str = "cpu") -> Tensor:
        """(target, source) float32: along one axis, log-density at `target` cells' centres from `source` cells."""
        if self.upsampling != "nearest":
            return spline_matrix(source, target, device)
        # Nearest takes the first of many cells: of fewer ones, the middle would be missed.
        return step_matrix(source, target, "nearest" if target >= source else "bilinear", device)

    def upsample(self, log_density: Tensor, size: Grid) -> Tensor:
        """Log-densities (..., H, W) of an image of `size` px, normalised, from those on a coarser grid."""
        if self.upsampling == "nearest":
            rows, columns = (
                nearest_index(log_density.shape[axis - 2], size[axis], log_density.device) for axis in (0, 1)
            )
            return normalise(log_density.index_select(-2, rows).index_select(-1, columns))
        return upsample(log_density, size)

    def at_pixels(self, log_density: Tensor, x: np.ndarray, y: np.ndarray, size: Grid) -> np.ndarray:
        """(n,) float64 log-density per px at places x, y (px), from a normalised one (H, W) on a grid over the image.

        Of the pixels that they fall on, as in `upsample`'s map, but without making one.
        """
        grid = log_density.shape
        rows, columns = self.places(x, y, size, (grid[0], grid[1]))
        values = ((rows @ log_density) * columns).sum(1)
        return values.double().numpy() - math.log(size[0] * size[1] / (grid[0] * grid[1]))

    def places(self, x: np.ndarray, y: np.ndarray, size: Grid, grid: Grid) -> tuple[Tensor, Tensor]:
        """(F, H) and (F, W) float32: a map's value at fixation f (px) is `rows[f] @ map @ columns[f]`."""
        rows = self.sampling(grid[0], size[0])[torch.from_numpy(y.astype(np.int64))]
        columns = self.sampling(grid[1], size[1])[torch.from_numpy(x.astype(np.int64))]
        return rows, columns

    def target_map(self, x: np.ndarray, y: np.ndarray, size: Grid, grid: Grid) -> Tensor:
        """(H, W) float32: fixations (px in an image of `size`) as weights on a grid over the image, sum 1.

        The product with a map is the mean over the fixated pixels of the map that `upsample` makes of it, which is what
        metrics read.
        """
        rows, columns = self.places(x, y, size, grid)
        return rows.T @ columns / len(x)


def finalize(
    parameters: Mapping[str, Tensor], priority_KBhw: Tensor, center_bias_KHW: Tensor, finalizer: Finalizer
) -> Tensor:
    """(K, B, H, W) float32: unnormalised log-densities on the density grid.

    The priority map is upsampled and smoothed by the head's Gaussian; the centre bias's log-density is added with the
    head's weight.
    """
    grid = (center_bias_KHW.shape[1], center_bias_KHW.shape[2])
    vertical_KHh, horizontal_KWw = smoothing(parameters, priority_KBhw, grid, finalizer)
    smooth_KBHW = vertical_KHh[:, None] @ (priority_KBhw @ horizontal_KWw.mT[:, None])
    return torch.addcmul(smooth_KBHW, parameters["center_bias_weight"][:, None, None, None], center_bias_KHW[:, None])


def smoothing(
    parameters: Mapping[str, Tensor], priority_KBhw: Tensor, grid: Grid, finalizer: Finalizer
) -> tuple[Tensor, Tensor]:
    """(K, H, h) and (K, W, w): upsampling from the readout's cells to the density's grid (H, W), and the heads'
    Gaussians, cut at ceil(3 sigma), edges replicated (the original)."""
    sigma_K = parameters["log_sigma"].exp() / finalizer.cell
    radius_K = torch.ceil(3 * sigma_K.detach().nan_to_num()).clamp_max(LONGEST_RADIUS)
    radius = int(radius_K.max())
    offset = torch.arange(-radius, radius + 1, device=sigma_K.device)
    kernel_KR = torch.exp(-0.5 * (offset / sigma_K[:, None]) ** 2)
    # A head's kernel ends at its own radius, whatever the widest of its bank is.
    kernel_KR = kernel_KR * (offset.abs() <= radius_K[:, None])
    kernel_KR = kernel_KR / kernel_KR.sum(1, keepdim=True)

    def along(axis: int) -> Tensor:
        padded = torch.arange(-radius, grid[axis] + radius, device=sigma_K.device).clamp(0, grid[axis] - 1)
        upsampling = finalizer.matrix(priority_KBhw.shape[2 + axis], grid, axis, kernel_KR)
        return torch.einsum("kr,tsr->kts", kernel_KR, upsampling[padded].unfold(0, 2 * radius + 1, 1))

    return along(0), along(1)


def normalise(log_density: Tensor, area: Tensor | None = None) -> Tensor:
    """Log-densities (..., H, W) whose logsumexp over the last two axes is 0; area: (H, W) of cells that differ."""
    weighted = log_density if area is None else log_density + area.log()
    return log_density - torch.logsumexp(weighted, (-2, -1), keepdim=True)


def log_mean_exp(log_densities: Tensor, dim: int = 0) -> Tensor:
    """The uniform mixture of log-densities along one axis, in the log domain."""
    return torch.logsumexp(log_densities, dim) - math.log(log_densities.shape[dim])


def upsample(log_density: Tensor, size: Grid) -> Tensor:
    """Log-densities (..., H, W) of an image of `size` px, from those on a coarser grid: cubic spline, normalised."""
    vertical = spline_matrix(log_density.shape[-2], size[0], log_density.device)
    horizontal = spline_matrix(log_density.shape[-1], size[1], log_density.device)
    return normalise(vertical @ (log_density @ horizontal.T))


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # since what predicts first may train later, which takes no tensor of inference's
def spline_matrix(source: int, target: int, device: torch.device | str = "cpu") -> Tensor:
    """(target, source) float32: values at `target` cells' centres of the cubic spline through `source` ones.

    Twice differentiable, so that sums over coarse cells are integrals: interpolated linearly, a log-density on cells of
    8 px had a normaliser that was 0.01 nat off. Not-a-knot ends, which also reach the half cell beyond the last centre.
    Weights of cells far away are 0: they, or their products, would be denormal numbers, which some CPUs multiply thirty
    times slower than others.
    """
    if source == 1:
        return torch.ones(target, 1, dtype=torch.float32, device=device)
    spline = make_interp_spline(np.arange(source) + 0.5, np.eye(source), k=min(3, source - 1))
    weights = spline((np.arange(target) + 0.5) * (source / target))
    weights[np.abs(weights) < NEGLIGIBLE] = 0
    return torch.from_numpy(weights).to(device, torch.float32)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def step_matrix(source: int, target: int, mode: str, device: torch.device | str = "cpu") -> Tensor:
    """(target, source) float32: `resizing`, kept."""
    return resizing(source, target, mode, device)


def resizing(
    source: int,
    target: int,
    mode: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,  # whatever the caller's default is
) -> Tensor:
    """(target, source): PyTorch's `interpolate(mode=mode)` of images, corners not aligned, along one axis."""
    identity = torch.eye(source, dtype=dtype, device=device)
    if mode == "nearest":
        return identity[nearest_index(source, target, device)]
    # Bicubic knows images only; along the axis that keeps its length it changes nothing.
    both = F.interpolate(identity[None, None], (target, source), mode=mode, align_corners=False)
    return both[0, 0].contiguous()
