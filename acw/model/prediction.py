"""What a model predicts of an image: a density over its pixels, and what it was mixed of.

prediction.log_density                  # (H, W) float32, natural log, logsumexp 0
prediction.by_backbone["lite0"]         # the same, of one view alone; computed when it is asked for
prediction.overlay().show()             # a PIL image: the density on the image, with contours and numbered places
prediction.save("photo.svg")            # or .png (the overlay), .npy, .density.png (16 bits), .csv (places)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from acw.heads.finalizer import Finalizer
from acw.model import drawing
from acw.model.drawing import ENCLOSED_MASS, PLACES, Lines, Place
from acw.storage.addresses import local
from acw.storage.errors import UserError
from acw.storage.files import csv_text, write_atomic


class ViewDensities(Mapping[str, np.ndarray]):
    """View -> (H, W) float32 log-density, logsumexp 0, before the weights mix them.

    Kept on the model's grid, a few numbers per thousand pixels, and brought to the image's size anew each time.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        log_densities_CHW: np.ndarray,
        finalizer: Finalizer,
        size: tuple[int, int],
    ) -> None:
        """weights: of each view (C,), with sum 1, of the components whose densities on the grid are given."""
        self._weights, self._log_densities_CHW = weights, log_densities_CHW
        self._finalizer, self._size = finalizer, size

    def __getitem__(self, name: str) -> np.ndarray:
        weights = self._weights[name]
        used = np.flatnonzero(weights)
        of_view = torch.from_numpy(self._log_densities_CHW[used])
        log_weight_C11 = torch.from_numpy(np.log(weights[used])).float()[:, None, None]
        with torch.autocast("cpu", enabled=False):
            return (self._finalizer.upsample(of_view, self._size) + log_weight_C11).logsumexp(0).numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._weights)})"


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

    def contours(self, shares: Sequence[float] = ENCLOSED_MASS) -> Lines:
        """Share of the mass -> lines (n, 2), x and y in px, that enclose it (`drawing.contours`)."""
        return drawing.contours(self.log_density, shares)

    def places(self, n: int = PLACES, radius: float | None = None) -> list[Place]:
        """The n likeliest places, with their share of the mass (`drawing.places`)."""
        return drawing.places(self.log_density, n, radius)

    def overlay(self) -> Image.Image:
        """The density on the image, with contours and numbered places."""
        return drawing.overlay(self.image, self.log_density, self.contours(), self.places())

    def encoded(self, form: str) -> bytes:
        """The content of a file of one of FORMATS."""
        return FORMATS[form].encode(self)

    def save(self, path: str | Path) -> None:
        """Writes a file, or `s3://bucket/key`, of the format that its name ends in; `.png` is the overlay.

        Raises UserError for another ending, or where it cannot be written.
        """
        name = str(path).lower()
        for form, (suffix, _) in FORMATS.items():
            if name.endswith(suffix):
                return write_atomic(local(path), self.encoded(form))
        if name.endswith(".png"):
            return write_atomic(local(path), self.encoded("overlay"))
        endings = ", ".join(suffix for suffix, _ in FORMATS.values())
        raise UserError(f"{path}: a prediction is saved as {endings} or .png; end its name so")


class Format(NamedTuple):
    """What files of a format end in, and what makes their content."""

    suffix: str
    encode: Callable[[Prediction], bytes]


def _npy(prediction: Prediction) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, prediction.log_density)
    return buffer.getvalue()


def _svg(prediction: Prediction) -> bytes:
    height, width = prediction.log_density.shape
    return drawing.svg((width, height), prediction.contours(), prediction.places()).encode()


def _csv(prediction: Prediction) -> bytes:
    rows = [
        (number, place.x, place.y, f"{place.share:.6f}", f"{place.radius:g}")
        for number, place in enumerate(prediction.places(), 1)
    ]
    return csv_text(("place", "x", "y", "share", "radius"), rows).encode()


FORMATS = {
    "overlay": Format(".overlay.png", lambda prediction: drawing.png(prediction.overlay())),
    "npy": Format(".npy", _npy),
    "png16": Format(".density.png", lambda prediction: drawing.grey_png(prediction.log_density)),
    "svg": Format(".svg", _svg),
    "csv": Format(".csv", _csv),
}
