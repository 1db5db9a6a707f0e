"""What a model predicts of an image: a density over its pixels, and what it was mixed of.

prediction.log_density                  # (H, W) float32, natural log, logsumexp 0
prediction.by_backbone["lite0"]         # the same, of one view alone; computed when it is asked for
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from acw.heads.finalizer import Finalizer


class ViewDensities(Mapping[str, np.ndarray]):
    """View -> (H, W) float32 log-density, logsumexp 0, before the weights mix them.

    Kept on the model's grid, a few numbers per thousand pixels, and brought to the image's size anew each time.
    """

    def __init__(
        self, names: list[str], log_densities_CHW: np.ndarray, finalizer: Finalizer, size: tuple[int, int]
    ) -> None:
        """log_densities_CHW: on the grid, the views' components one after another, as many for each view."""
        self._names, self._log_densities_CHW = names, log_densities_CHW
        self._finalizer, self._size = finalizer, size

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        each = len(self._log_densities_CHW) // len(self._names)
        first = each * self._names.index(name)
        of_view = torch.from_numpy(self._log_densities_CHW[first : first + each])
        with torch.autocast("cpu", enabled=False):
            upsampled = self._finalizer.upsample(of_view, self._size)
        return (upsampled.logsumexp(0) - math.log(each)).numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._names)})"


@dataclass(frozen=True, eq=False)
class Prediction:
    """log_density: (H, W) float32, natural logs, logsumexp 0. categories: name -> p(category | image).

    weights: view -> share in the mixture. by_backbone: view -> its own log-density. image: uint8 (H, W, 3), the pixels
    that it is of; not a copy.
    """

    log_density: np.ndarray
    categories: dict[str, float]
    weights: dict[str, float]
    by_backbone: Mapping[str, np.ndarray]
    image: np.ndarray
