"""A data set: images, their categories, and where people looked in them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from acw.data import known
from acw.data.images import decode_image
from acw.storage.checksums import fingerprint
from acw.storage.errors import UserError
from acw.storage.files import fetch

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Stimulus:
    """One image. Its pixels are read when asked for, on whatever node; of one in S3, a copy is made there first.

    name: unique and stable in its data set; below CAT2000's `trainSet/Stimuli` it is the rest of the path, whatever
        the reader, so that a split does not depend on the reader.
    path: the file, or `synthetic:<Category>/<index>`.
    size: (height, width) in px.
    source: where the image comes from, if the data set says so (`osie` for the attribute `osie-1003`).
    digest: SHA-256 in hexadecimal of the file, or of what generates the display.
    orientation: of EXIF, which is ignored: 1 is upright, 5 to 8 are turned by 90 degrees.
    """

    name: str
    path: str
    size: tuple[int, int]
    category: str
    source: str | None
    digest: str
    orientation: int = 1

    def pixels(self) -> np.ndarray:
        """The image as uint8 (H, W, 3) RGB, any EXIF rotation ignored.

        Raises UserError if the file is missing, damaged, or no longer of the size that the data set was read with.
        """
        display = _display(self)
        if display is not None:
            return known.stimulus_pixels(*display)
        pixels = decode_image(fetch(Path(self.path), immutable=True))
        if pixels.shape[:2] != self.size:
            was, now = (f"{width}x{height}" for height, width in (self.size, pixels.shape[:2]))
            raise UserError(f"{self.path}: is {now} px, but was {was} when the data set was read; restore the file")
        return pixels


class MirrorImage(Stimulus):
    """An image with left and right exchanged."""

    def pixels(self) -> np.ndarray:
        return np.ascontiguousarray(super().pixels()[:, ::-1])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Stimuli in order of their names, and F fixations in order of their stimuli.

    image: int32 (F,), ascending: the index of each fixation's stimulus.
    x, y: float64 (F,) in px, from 0: a fixation is in the pixel (row int(y), column int(x)), which rounding to float32
        could change (327.99999999999994 is in column 327).
    subject: int32 (F,), -1 where unknown.
    blur_sigma: px, of the Gaussian that turns fixations into the maps for CC, KLDiv and SIM: a degree of visual angle.
    notes: what was done to the data on the way in, and what looks odd in them, in words.
    licence: of the data, as their folder states it; None where it does not.
    """

    name: str
    reader: str
    location: str
    stimuli: tuple[Stimulus, ...]
    image: np.ndarray
    x: np.ndarray
    y: np.ndarray
    subject: np.ndarray
    blur_sigma: float
    notes: tuple[str, ...]
    licence: str | None = None

    def __post_init__(self) -> None:
        arrays = {"image": np.int32, "x": np.float64, "y": np.float64, "subject": np.int32}
        for field, dtype in arrays.items():
            array = getattr(self, field)
            assert array.dtype == dtype, field
            assert array.shape == self.image.shape, field
        assert np.all(np.diff(self.image) >= 0), "fixations must be sorted by image"

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The names of the categories, sorted."""
        return tuple(sorted({stimulus.category for stimulus in self.stimuli}))

    @cached_property
    def category_index(self) -> np.ndarray:
        """int64 (N,): each stimulus's place in `categories`."""
        position = {category: index for index, category in enumerate(self.categories)}
        return np.array([position[stimulus.category] for stimulus in self.stimuli], dtype=np.int64)

    @cached_property
    def stimuli_fingerprint(self) -> str:
        """Equal for equal images in equal order, whatever their fixations and categories: what features depend on."""
        return fingerprint([[stimulus.name, stimulus.digest, *stimulus.size] for stimulus in self.stimuli])

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal images, categories and fixations, wherever they lie and whichever reader read them."""
        columns = {"image": self.image, "x": _short(self.x), "y": _short(self.y), "subject": self.subject}
        fixations = {
            field: hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
            for field, values in columns.items()
        }
        categories = [stimulus.category for stimulus in self.stimuli]
        return fingerprint({"stimuli": self.stimuli_fingerprint, "categories": categories, "fixations": fixations})

    def recategorised(self, categories: Sequence[str], *notes: str) -> Dataset:
        """The same data set, its fingerprint too, with every stimulus in a category that is given for it."""
        stimuli = (dataclasses.replace(s, category=name) for s, name in zip(self.stimuli, categories, strict=True))
        result = dataclasses.replace(self, stimuli=tuple(stimuli), notes=(*self.notes, *notes))
        result.__dict__["fingerprint"] = self.fingerprint
        return result

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.searchsorted(self.image, np.arange(len(self.stimuli) + 1))

    def fixations_of(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of x, y and subject of stimulus i."""
        part = slice(self._offsets[i], self._offsets[i + 1])
        return self.x[part], self.y[part], self.subject[part]

    def optimum_log_density(self, i: int) -> np.ndarray | None:
        """float32 (H, W), natural logs: the density that stimulus i's fixations were drawn from; None if unknown."""
        display = _display(self.stimuli[i])
        if display is None:
            return None
        return known.log_density(*display)

    def summary(self) -> dict[str, Any]:
        """What a result records of its data set, as JSON."""
        return {
            "name": self.name,
            "reader": self.reader,
            "location": self.location,
            "images": len(self.stimuli),
            "fixations": len(self.x),
            "categories": dict(sorted(Counter(stimulus.category for stimulus in self.stimuli).items())),
            "subjects": len(np.unique(self.subject[self.subject >= 0])),
            "sizes": len({stimulus.size for stimulus in self.stimuli}),
            "fingerprint": self.fingerprint,
            "blur_sigma": self.blur_sigma,
            "notes": list(self.notes),
        } | ({"licence": self.licence} if self.licence else {})


def _short(values: np.ndarray) -> np.ndarray:
    """float32 where that changes none, as whole and half px: what earlier versions kept, and named their runs by."""
    short = values.astype(np.float32)
    return short if np.array_equal(short, values) else values


def _display(stimulus: Stimulus) -> tuple[str, int] | None:
    """Category and index of a synthetic display; None for a file."""
    scheme, _, display = stimulus.path.partition(":")
    if scheme != SYNTHETIC:
        return None
    category, _, index = display.rpartition("/")
    return category, int(index)
