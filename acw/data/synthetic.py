"""The built-in data set: visual-search displays with fixations drawn from a known density.

Because the density is known, so is the best score that any model can reach on it: the data set's `optimum`.
"""

from __future__ import annotations

import hashlib

import numpy as np

from acw.data.dataset import SYNTHETIC, Dataset, Stimulus
from acw.data.displays import HEIGHT, WIDTH, Draws
from acw.data.known import VERSION, draw_pixels
from acw.data.layouts import CATEGORIES

IMAGES = 60  # a category
SUBJECTS = 15


def load() -> Dataset:
    """All displays, 60 of each category, and the fixations of 15 subjects, 4 to 8 each on every display."""
    stimuli: list[Stimulus] = []
    image, x, y, subject = [], [], [], []
    for category in CATEGORIES:
        for index in range(IMAGES):
            name = f"{category}/{index:03d}"
            digest = hashlib.sha256(f"{SYNTHETIC}/{VERSION}/{name}".encode()).hexdigest()
            rows, columns, subjects = _fixations(category, index)
            image.append(np.full(len(rows), len(stimuli), dtype=np.int32))
            x.append(columns)
            y.append(rows)
            subject.append(subjects)
            stimuli.append(Stimulus(name, f"{SYNTHETIC}:{name}", (HEIGHT, WIDTH), category, None, digest))
    return Dataset(
        name=SYNTHETIC,
        reader=SYNTHETIC,
        location=SYNTHETIC,
        stimuli=tuple(stimuli),
        image=np.concatenate(image),
        x=np.concatenate(x),
        y=np.concatenate(y),
        subject=np.concatenate(subject),
        blur_sigma=WIDTH / 48,
        notes=(),
    )


def _fixations(category: str, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, x (float64, px) and subject (int32) of each fixation: a pixel drawn from the density, a place within it."""
    draws = Draws(VERSION, category, index, "fixations")
    subject = np.repeat(np.arange(SUBJECTS, dtype=np.int32), [draws.integer(4, 8) for _ in range(SUBJECTS)])
    rows, columns = draw_pixels(category, index, draws, len(subject))
    # Steps of 1/1024 px are exact in float32 too, so that no rounding carries a fixation into the next pixel.
    within = np.floor(draws.array(2, len(subject)) * 1024) / 1024
    return rows + within[0], columns + within[1], subject
