"""Batches for training: one backbone's features, read ahead, and the fixations on the density grid."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from acw.center_bias import CenterBias
from acw.features import FeatureStore
from acw.heads import Features, spline_matrix

# Batches that are read while one is worked on.
READ_AHEAD = 2


@dataclass(frozen=True)
class TrainingSet:
    """What training needs to know of a data set besides its features.

    sizes: per image (H, W) px. fold: (N,) int8, -1 for held-out images, which training never touches.
    image, x, y: (F,) fixations in px, sorted by image. finalizer_bias: a centre bias per fold, from that fold's
    training images; baseline: likewise the KDE over which IG is measured.
    """

    sizes: list[tuple[int, int]]
    fold: np.ndarray
    image: np.ndarray
    x: np.ndarray
    y: np.ndarray
    finalizer_bias: list[CenterBias]
    baseline: list[CenterBias]


@dataclass
class Batch:
    """B images whose tensors have one shape.

    target_BHW: fixations on the density grid, each image's sum to 1. log_area_B: log px per cell.
    """

    indices: np.ndarray
    features: Features
    target_BHW: Tensor
    log_area_B: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        return self.target_BHW.shape[1], self.target_BHW.shape[2]


def density_grid(size: tuple[int, int], cell: float) -> tuple[int, int]:
    """(H, W) cells of the grid on which an image of `size` px is given a density."""
    return math.ceil(size[0] / cell), math.ceil(size[1] / cell)


def group_by_shape(
    store: FeatureStore, sizes: Sequence[tuple[int, int]], indices: Sequence[int] | np.ndarray, cell: float
) -> list[list[int]]:
    """Images split into those whose features and density grids have one shape."""
    result: list[list[int]] = []
    for group in store.groups(indices):
        by_grid: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in group:
            by_grid[density_grid(sizes[index], cell)].append(index)
        result += by_grid.values()
    return result


class Batches:
    """Serves one backbone's features with their targets."""

    def __init__(self, training_set: TrainingSet, store: FeatureStore, cell: float, device: torch.device) -> None:
        self.training_set, self.store, self.cell, self.device = training_set, store, cell, device
        self.offsets = np.searchsorted(training_set.image, np.arange(len(training_set.sizes) + 1))
        self._biases: dict[tuple[str, tuple[int, int], float], Tensor] = {}

    def groups(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The images split into those that fit one batch."""
        return [np.array(group) for group in group_by_shape(self.store, self.training_set.sizes, indices, self.cell)]

    def load(self, indices: np.ndarray) -> Batch:
        sizes = [self.training_set.sizes[index] for index in indices]
        grid = density_grid(sizes[0], self.cell)
        target = torch.stack([self._target(index, grid) for index in indices])
        log_area = torch.tensor([math.log(h * w / (grid[0] * grid[1])) for h, w in sizes])
        features = self.store.load(list(indices), self.device)
        return Batch(indices, features, target.to(self.device), log_area.to(self.device))

    def ahead(self, groups: Iterable[np.ndarray]) -> Iterator[Batch]:
        """The groups' batches in order, read by a thread while the last ones are worked on."""
        with ThreadPoolExecutor(1, "features") as reader:
            reading: list[Future[Batch]] = []
            for group in groups:
                reading.append(reader.submit(self.load, group))
                if len(reading) > READ_AHEAD:
                    yield reading.pop(0).result()
            while reading:
                yield reading.pop(0).result()

    def _target(self, index: int, grid: tuple[int, int]) -> Tensor:
        fixations = slice(self.offsets[index], self.offsets[index + 1])
        x, y = self.training_set.x[fixations], self.training_set.y[fixations]
        return target_map(x, y, self.training_set.sizes[index], grid)

    def bias(self, kind: str, grid: tuple[int, int], stride: float = 1) -> Tensor:
        """(folds, H, W) float32 on the device, normalised over the grid; kind is `finalizer_bias` or `baseline`.

        With a stride, the same map where a grid of cells that many times as long has its cells' centres.
        """
        key = (kind, grid, stride)
        if key not in self._biases:
            if stride == 1:
                maps = np.stack([bias.of_size(grid) for bias in getattr(self.training_set, kind)])
                self._biases[key] = torch.from_numpy(maps).to(self.device)
            else:
                rows = spline_matrix(grid[0], math.ceil(grid[0] / stride), self.device)
                columns = spline_matrix(grid[1], math.ceil(grid[1] / stride), self.device)
                self._biases[key] = rows @ self.bias(kind, grid) @ columns.T
        return self._biases[key]


def target_map(x: np.ndarray, y: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(H, W) float32: fixations (px in an image of `size`) as weights on a grid over the image, sum 1.

    The product with a map is the mean of the spline through it over the fixated pixels: just what `heads.upsample`
    makes of it, and metrics read.
    """
    vertical = spline_matrix(grid[0], size[0])[torch.from_numpy(y.astype(np.int64))]
    horizontal = spline_matrix(grid[1], size[1])[torch.from_numpy(x.astype(np.int64))]
    return vertical.T @ horizontal / len(x)
