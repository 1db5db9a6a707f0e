"""How well people predict people: the density that the other subjects' fixations give for one subject's.

A reference, not a model. It is a KDE of the other subjects' fixations on the image, mixed with the centre bias and a
uniform component; the bandwidth and the mixture maximise the left-out subjects' likelihood.
Kuemmerer, Wallis, Bethge, "Information-theoretic model comparison unifies saliency metrics", PNAS 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from acw.center_bias import CenterBias
from acw.data import Dataset
from acw.fusion import Likelihoods, em
from acw.training import density_grid, spread

# Bandwidths to choose from, in image px, and the grid's cell: the kernel is wider than the cell everywhere.
BANDWIDTHS = (12.0, 16.0, 20.0, 25.0, 32.0, 40.0, 50.0, 64.0)
CELL = 8.0
# Three numbers are fitted: more images than this would only cost time.
FITTING_IMAGES = 200


@dataclass(frozen=True)
class GoldStandard:
    """bandwidth: px. weights: (3,) shares of the KDE, the centre bias and the uniform component."""

    bandwidth: float
    weights: np.ndarray
    center_bias: CenterBias

    def leave_one_out(self, dataset: Dataset, index: int) -> list[tuple[np.ndarray, Tensor]]:
        """Per subject: which fixations are theirs (bool (n,)), and the others' log-density on the grid."""
        subject = dataset.fixations_of(index)[2]
        components = _components(dataset, index, self.bandwidth, self.center_bias)
        return [
            (subject == one, torch.from_numpy(np.log(np.tensordot(self.weights, densities, 1)).astype(np.float32)))
            for one, densities in components
        ]


def has_subjects(dataset: Dataset, indices: Sequence[int] | np.ndarray) -> bool:
    """Whether every one of these images was seen by at least two known subjects."""
    subjects = [dataset.fixations_of(index)[2] for index in indices]
    return all(len(one) and one.min() >= 0 and len(np.unique(one)) >= 2 for one in subjects)


def fit(dataset: Dataset, indices: Sequence[int] | np.ndarray, center_bias: CenterBias) -> GoldStandard:
    """Chooses bandwidth and mixture on the given images, or an even choice of them, each counting equally."""
    assert has_subjects(dataset, indices), "every image needs two known subjects"
    indices = indices[:: -(-len(indices) // FITTING_IMAGES)]
    best: tuple[float, float, np.ndarray] | None = None
    for bandwidth in BANDWIDTHS:
        log_p, image = [], []
        for position, index in enumerate(indices):
            x, y, subject = dataset.fixations_of(index)
            size = dataset.stimuli[index].size
            for one, densities in _components(dataset, index, bandwidth, center_bias):
                mine = subject == one
                rows = (y[mine] / size[0] * densities.shape[1]).astype(int)
                columns = (x[mine] / size[1] * densities.shape[2]).astype(int)
                log_p.append(np.log(densities[:, rows, columns] + 1e-30).T)
                image.append(np.full(int(mine.sum()), position))
        likelihoods = Likelihoods(np.concatenate(log_p), np.concatenate(image), len(indices))
        weights = em(likelihoods, np.ones((len(indices), 1)), np.zeros((1, 3)))[0]
        # The optimum may lie on an edge; a trace of uniform keeps every log-density finite.
        weights = np.maximum(weights, [0, 0, 1e-6]) / np.maximum(weights, [0, 0, 1e-6]).sum()
        likelihood = float(likelihoods.mean_log_likelihood(weights).mean())
        if best is None or likelihood > best[0]:
            best = likelihood, bandwidth, weights
    assert best is not None
    return GoldStandard(best[1], best[2], center_bias)


def _components(
    dataset: Dataset, index: int, bandwidth: float, center_bias: CenterBias
) -> list[tuple[int, np.ndarray]]:
    """Per subject (3, H, W): the other subjects' KDE, the centre bias and uniform, each with sum 1 over the grid."""
    x, y, subject = dataset.fixations_of(index)
    height, width = dataset.stimuli[index].size
    grid = density_grid((height, width), CELL)
    people = np.unique(subject)
    maps = np.stack(
        [
            (subject == one).sum() * spread(y[subject == one] / height, x[subject == one] / width, grid).reshape(grid)
            for one in people
        ]
    )
    smooth = gaussian_filter(maps.astype(np.float64), (0, bandwidth / CELL, bandwidth / CELL), mode="constant")
    others = smooth.sum(0) - smooth
    others = np.maximum(others, 0) / np.maximum(others, 0).sum((1, 2), keepdims=True)
    bias = np.exp(center_bias.of_size(grid).astype(np.float64))
    uniform = np.full(grid, 1 / (grid[0] * grid[1]))
    return [(int(one), np.stack([other, bias, uniform])) for one, other in zip(people, others, strict=True)]
