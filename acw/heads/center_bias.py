"""The centre bias: where people look whatever the image shows, as a log-density in relative image coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

# Cells along each axis of the stored map. A bandwidth below one cell is not resolved, and no data set asks for one.
GRID = 128
CROSSVALIDATION_FOLDS = 10
BANDWIDTHS = tuple(np.geomspace(0.01, 0.3, 18))


@dataclass(frozen=True)
class CenterBias:
    """A log-density over relative coordinates.

    log_density: (GRID, GRID) float32, rows are y and columns x, normalised over its cells.
    bandwidth: of the KDE, as a share of the image's width and height; None for Galván's Gaussian.
    uniform_weight: share of the uniform component mixed in; None for Galván's Gaussian.
    """

    log_density: np.ndarray
    bandwidth: float | None
    uniform_weight: float | None

    def of_size(self, size: tuple[int, int]) -> np.ndarray:
        """(H, W) float32 log-density over an image or grid of that size, interpolated linearly; logsumexp 0."""
        rows = _interpolation(size[0])
        columns = _interpolation(size[1])
        resized = rows @ self.log_density @ columns.T
        return (resized - logsumexp(resized)).astype(np.float32)


def _interpolation(cells: int) -> np.ndarray:
    """(cells, GRID): linear interpolation between cell centres, constant beyond the outermost."""
    position = np.clip((np.arange(cells) + 0.5) / cells * GRID - 0.5, 0, GRID - 1)
    low = np.minimum(position.astype(int), GRID - 2)
    matrix = np.zeros((cells, GRID))
    matrix[np.arange(cells), low] = 1 - (position - low)
    matrix[np.arange(cells), low + 1] = position - low
    return matrix


def kde(x: np.ndarray, y: np.ndarray, image: np.ndarray, bandwidth: float = 0.0) -> CenterBias:
    """Kernel density of fixations plus a uniform component; each image counts equally.

    Bandwidth and the uniform's weight maximise the likelihood of left-out images (10 folds over images), as in
    Kuemmerer, Wallis, Bethge, PNAS 2015. x, y: (F,) relative coordinates in [0, 1); image: (F,) the image of each.
    bandwidth: a share of the image's sides to take instead of the likeliest one, unless 0.
    """
    assert all(axis.min() >= 0 and axis.max() < 1 for axis in (x, y))
    _, image = np.unique(image, return_inverse=True)
    images = int(image.max()) + 1
    assert images >= 2, "cross-validation over images needs two"
    weight = 1 / np.bincount(image)[image]
    cell = (y * GRID).astype(int) * GRID + (x * GRID).astype(int)
    # Dealing in random order, so that folds do not follow the data set's order by category.
    folds = min(CROSSVALIDATION_FOLDS, images)
    fold = (np.random.default_rng(0).permutation(images) % folds)[image]
    counts = np.stack([np.bincount(cell[fold == f], weight[fold == f], GRID**2) for f in range(folds)])

    best = (-np.inf, BANDWIDTHS[0], 0.0)
    for candidate in (bandwidth,) if bandwidth else BANDWIDTHS:
        densities = np.stack([_smooth(counts.sum(0) - counts[f], candidate) for f in range(folds)])
        uniform_weight, likelihood = _best_uniform_weight(densities, counts)
        best = max(best, (likelihood, candidate, uniform_weight))
    _, bandwidth, uniform_weight = best
    density = _mix(_smooth(counts.sum(0), bandwidth), uniform_weight)
    return CenterBias(np.log(density).reshape(GRID, GRID).astype(np.float32), float(bandwidth), float(uniform_weight))


def _smooth(counts: np.ndarray, bandwidth: float) -> np.ndarray:
    """Density over the cells, without the mass that the kernel would put outside the image."""
    smooth = gaussian_filter(counts.reshape(GRID, GRID), bandwidth * GRID, mode="constant", truncate=5).ravel()
    return smooth / smooth.sum()


def _mix(density: np.ndarray, uniform_weight: float) -> np.ndarray:
    return (1 - uniform_weight) * density + uniform_weight / GRID**2


def _best_uniform_weight(densities: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The weight that maximises the left-out images' mean log-likelihood, which is concave in it, and its value."""
    held_out = counts > 0
    density, count = densities[held_out], counts[held_out]

    def loss(log10_weight: float) -> float:
        return -float((count * np.log(_mix(density, 10**log10_weight))).sum() / count.sum())

    optimum = minimize_scalar(loss, bounds=(-6, -0.05), method="bounded", options={"xatol": 0.01})
    return 10**optimum.x, -optimum.fun


def fixed_gaussian() -> CenterBias:
    """The original paper's centre bias: exp(-(x^2 + y^2) / (2 * 0.5^2)), x and y in [-1, 1] across the image."""
    axis = (np.arange(GRID) + 0.5) / GRID * 2 - 1
    log_density = -(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 0.5**2)
    return CenterBias((log_density - logsumexp(log_density)).astype(np.float32), None, None)


def flat() -> CenterBias:
    """No bias at all: the uniform density."""
    return CenterBias(np.full((GRID, GRID), -2 * np.log(GRID), np.float32), None, None)
