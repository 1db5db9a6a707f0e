"""Batches for training: one view's features, read ahead, and the fixations on the density grid."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from acw.features.joined import Store, parts_of
from acw.features.tensors import Features
from acw.heads.center_bias import CenterBias
from acw.heads.finalizer import Finalizer

# Batches that are read while one is worked on.
READ_AHEAD = 2
T = TypeVar("T")


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


def group_by_shape(
    stores: Iterable[Store],
    sizes: Sequence[tuple[int, int]],
    indices: Sequence[int] | np.ndarray,
    finalizer: Finalizer,
) -> list[list[int]]:
    """Images split into those whose features, in every store, and density grids have one shape."""
    groups = [list(indices)]
    for store in parts_of(stores):
        groups = [part for group in groups for part in store.groups(group)]
    result: list[list[int]] = []
    for group in groups:
        by_grid: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in group:
            by_grid[finalizer.grid(sizes[index])].append(index)
        result += by_grid.values()
    return result


class Batches:
    """Serves one view's features with their targets.

    at_once: the most images that one pass may take, None for as many as are asked for.
    """

    def __init__(self, training_set: TrainingSet, store: Store, finalizer: Finalizer, device: torch.device) -> None:
        self.training_set, self.store, self.finalizer, self.device = training_set, store, finalizer, device
        self.at_once: int | None = None
        self.offsets = np.searchsorted(training_set.image, np.arange(len(training_set.sizes) + 1))
        self._biases: dict[tuple[str, tuple[int, int], float], Tensor] = {}

    def groups(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The images split into those that fit one batch."""
        groups = group_by_shape([self.store], self.training_set.sizes, indices, self.finalizer)
        return [np.array(group) for group in groups]

    def passes(self, indices: Sequence[int] | np.ndarray, most: int) -> list[np.ndarray]:
        """`groups` in parts of at most so many images, or of `at_once`."""
        size = min(most, self.at_once or most)
        return [group[start : start + size] for group in self.groups(indices) for start in range(0, len(group), size)]

    def load(self, indices: np.ndarray) -> Batch:
        sizes = [self.training_set.sizes[index] for index in indices]
        grid = self.finalizer.grid(sizes[0])
        target = torch.stack([self._target(index, grid) for index in indices])
        log_area = torch.tensor([math.log(h * w / (grid[0] * grid[1])) for h, w in sizes])
        features = self.store.load(list(indices), self.device)
        return Batch(indices, features, target.to(self.device), log_area.to(self.device))

    def ahead(self, groups: Iterable[np.ndarray]) -> Iterator[Batch]:
        """The groups' batches in order, read by a thread while the last ones are worked on."""
        return read_ahead(groups, self.load)

    def _target(self, index: int, grid: tuple[int, int]) -> Tensor:
        fixations = slice(self.offsets[index], self.offsets[index + 1])
        x, y = self.training_set.x[fixations], self.training_set.y[fixations]
        return self.finalizer.target_map(x, y, self.training_set.sizes[index], grid)

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
                rows = self.finalizer.sampling(grid[0], math.ceil(grid[0] / stride), self.device)
                columns = self.finalizer.sampling(grid[1], math.ceil(grid[1] / stride), self.device)
                self._biases[key] = rows @ self.bias(kind, grid) @ columns.T
        return self._biases[key]

    def at_fixations(self, kind: str, batch: Batch) -> Tensor:
        """(folds, B) float32: what `bias` has at each image's fixations, mean natural-log density per cell."""
        return self.bias(kind, batch.grid).flatten(1) @ batch.target_BHW.flatten(1).T


def read_ahead(groups: Iterable[np.ndarray], load: Callable[[np.ndarray], T]) -> Iterator[T]:
    """What `load` makes of the groups, in order, by a thread that is READ_AHEAD of them ahead."""
    with ThreadPoolExecutor(1, "features", torch.set_num_threads, (1,)) as reader:
        reading: list[Future[T]] = []
        for group in groups:
            reading.append(reader.submit(load, group))
            if len(reading) > READ_AHEAD:
                yield reading.pop(0).result()
        while reading:
            yield reading.pop(0).result()
