"""How well people predict people: the density that the other subjects' fixations give for one subject's.

A reference, not a model. It is a KDE of the other subjects' fixations on the image, mixed with the centre bias and a
uniform component; the bandwidth and the mixture maximise the left-out subjects' likelihood.
Kuemmerer, Wallis, Bethge, "Information-theoretic model comparison unifies saliency metrics", PNAS 2015.

Kernels of one width blur what people agree on to bridge what they do not, and so understate people. As an option they
are adaptive: narrower where the others' density is high, wider where it is low, by its square root (Abramson, "On
bandwidth variation in kernel estimates", Annals of Statistics 1982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acw.data import Dataset
from acw.fusion.category_weights import Likelihoods, em
from acw.heads.center_bias import CenterBias
from acw.heads.finalizer import Finalizer

# Bandwidths to choose from, in image px, and the grid's cell: the kernel is wider than the cell everywhere, so that
# whoever looked at an image gives mass to some cell of it.
BANDWIDTHS = (12.0, 16.0, 20.0, 25.0, 32.0, 40.0, 50.0, 64.0)
FINALIZER = Finalizer(cell=8.0)
# Three numbers are fitted: more images than this would only cost time.
FITTING_IMAGES = 200


@dataclass(frozen=True)
class GoldStandard:
    """bandwidth: px; of adaptive kernels, where the density is its geometric mean over the fixations.

    weights: (3,) shares of the KDE, the centre bias and the uniform component.
    """

    bandwidth: float
    weights: np.ndarray
    center_bias: CenterBias
    adaptive: bool = False

    def described(self) -> dict[str, Any]:
        """For evaluation.json: what a share of the gold standard is a share of."""
        return {"kernels": "adaptive" if self.adaptive else "fixed", "bandwidth": self.bandwidth}

    def everybody(self, dataset: Dataset, index: int) -> Tensor:
        """Log-density on the grid of all subjects' fixations, those that are scored included: an upper bound."""
        seen = _Seen.of(dataset, index, self.center_bias)
        smooth = seen.everybody(self.bandwidth, self.adaptive)
        everybody, bias, uniform = self.weights
        mixed = everybody * smooth / smooth.sum() + bias * seen.bias + uniform / seen.bias.size
        return torch.from_numpy(np.log(mixed / mixed.sum()).astype(np.float32))

    def leave_one_out(self, dataset: Dataset, index: int) -> list[tuple[np.ndarray, Tensor]]:
        """Per subject: which fixations are theirs (bool (n,)), and the others' log-density on the grid."""
        subject = dataset.fixations_of(index)[2]
        seen = _Seen.of(dataset, index, self.center_bias)
        others, bias, uniform = self.weights
        mixed = others * seen.others(self.bandwidth, self.adaptive) + (bias * seen.bias + uniform / seen.bias.size)
        log_densities = torch.from_numpy(np.log(mixed).astype(np.float32))
        return [(subject == person, density) for person, density in zip(seen.people, log_densities, strict=True)]


def has_subjects(dataset: Dataset, indices: Sequence[int] | np.ndarray) -> bool:
    """Whether every one of these images was seen by at least two known subjects."""
    subjects = [dataset.fixations_of(index)[2] for index in indices]
    return all(len(seen) and seen.min() >= 0 and len(np.unique(seen)) >= 2 for seen in subjects)


def fit(
    dataset: Dataset, indices: Sequence[int] | np.ndarray, center_bias: CenterBias, adaptive: bool = False
) -> GoldStandard:
    """Chooses bandwidth and mixture on the given images, or an even choice of them, each counting equally."""
    assert has_subjects(dataset, indices), "every image needs two known subjects"
    indices = indices[:: -(-len(indices) // FITTING_IMAGES)]
    log_p: dict[float, list[np.ndarray]] = {bandwidth: [] for bandwidth in BANDWIDTHS}
    fixations = []
    for index in indices:
        seen = _Seen.of(dataset, index, center_bias)
        rows, columns = seen.cells
        bias = seen.bias[rows, columns]
        for bandwidth, parts in log_p.items():
            others = seen.others(bandwidth, adaptive)[seen.person, rows, columns]
            parts.append(np.log(np.stack([others, bias, np.full_like(bias, 1 / seen.bias.size)], 1) + 1e-30))
        fixations.append(len(seen.person))
    image = np.repeat(np.arange(len(indices)), fixations)
    best: tuple[float, float, np.ndarray] | None = None
    for bandwidth, parts in log_p.items():
        likelihoods = Likelihoods(np.concatenate(parts), image, len(indices))
        weights = em(likelihoods, np.ones((len(indices), 1)), np.zeros((1, 3)))[0]
        # The optimum may lie on an edge; a trace of uniform keeps every log-density finite.
        weights = np.maximum(weights, [0, 0, 1e-6]) / np.maximum(weights, [0, 0, 1e-6]).sum()
        likelihood = float(likelihoods.mean_log_likelihood(weights).mean())
        if best is None or likelihood > best[0]:
            best = likelihood, bandwidth, weights
    assert best is not None
    return GoldStandard(best[1], best[2], center_bias, adaptive)


@dataclass(frozen=True)
class _Seen:
    """Where people looked in an image.

    size: of the image, px. x, y: (n,) float64, the middles of the fixated pixels. people: (P,) the subjects, ascending;
    person: (n,) the place among them of whoever made each fixation. bias: (H, W) centre bias on a grid over the image.
    """

    size: tuple[int, int]
    x: np.ndarray
    y: np.ndarray
    people: np.ndarray
    person: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, index: int, center_bias: CenterBias) -> _Seen:
        x, y, subject = dataset.fixations_of(index)
        size = dataset.stimuli[index].size
        people, person = np.unique(subject, return_inverse=True)
        bias = np.exp(center_bias.of_size(FINALIZER.grid(size)).astype(np.float64))
        return cls(size, x.astype(np.int64) + 0.5, y.astype(np.int64) + 0.5, people, person, bias)

    @property
    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) rows and columns of the cells that the fixations are in."""
        rows, columns = (
            (place / length * cells).astype(int)
            for place, length, cells in zip((self.y, self.x), self.size, self.bias.shape, strict=True)
        )
        return rows, columns

    def everybody(self, bandwidth: float, adaptive: bool) -> np.ndarray:
        """(H, W) the sum of the kernels at all fixations."""
        every = np.full(len(self.x), True)
        plain = self._sum(every, bandwidth)
        return self._sum(every, self._widths(plain, every, bandwidth)) if adaptive else plain

    def others(self, bandwidth: float, adaptive: bool) -> np.ndarray:
        """(P, H, W) for each subject: the KDE of all others' fixations, with sum 1."""
        own = np.stack([self._sum(self.person == number, bandwidth) for number in range(len(self.people))])
        # A difference of equal numbers may be below 0 by rounding.
        others = np.maximum(own.sum(0) - own, 0)
        if adaptive:
            # The widths too are of the others alone: a subject's own fixations must not sharpen what predicts them.
            for number, density in enumerate(others):
                rest = self.person != number
                others[number] = self._sum(rest, self._widths(density, rest, bandwidth))
        return others / others.sum((1, 2), keepdims=True)

    def _widths(self, density_HW: np.ndarray, some: np.ndarray, bandwidth: float) -> np.ndarray:
        """(n,) px, of some fixations' adaptive kernels: bandwidth / sqrt(density / its geometric mean).

        No narrower than a cell, where a sum at cells' centres would be none any more.
        """
        rows, columns = self.cells
        at_fixations = density_HW[rows, columns][some]
        relative = at_fixations / np.exp(np.log(at_fixations).mean())
        widths = np.full(len(some), bandwidth)
        widths[some] = np.maximum(bandwidth / np.sqrt(relative), FINALIZER.cell)
        return widths

    def _sum(self, some: np.ndarray, widths: float | np.ndarray) -> np.ndarray:
        """(H, W) the sum of Gaussians of equal mass at some fixations, at the cells' centres; none is below 0.

        widths: px, (n,) or one for all. Interpolated, a fixation between two cells would have negative weights beside
        it, which a narrow Gaussian does not fill where all people look at one place.
        """
        width = np.broadcast_to(widths, self.x.shape)[some, None]
        rows, columns = (
            np.exp(-0.5 * (((np.arange(cells) + 0.5) * (length / cells) - place[some, None]) / width) ** 2)
            for place, length, cells in zip((self.y, self.x), self.size, self.bias.shape, strict=True)
        )
        return (rows / np.square(width)).T @ columns
