"""A built-in display by its name: its pixels, the density that its fixations are drawn from, and these fixations.

The density is a mixture over pixels of Gaussians on the salient items of the kind that draws the eye, a Gaussian around
the middle of the category's centre bias, and a uniform part. Each is normalised over the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from acw.data.displays import HEIGHT, WIDTH, Draws, render
from acw.data.items import SPREAD
from acw.data.layouts import CATEGORIES, lay_out

# Part of every display's digest: raise it with any change to what is drawn or to where people look.
VERSION = 2


def stimulus_pixels(category: str, index: int) -> np.ndarray:
    """uint8 (384, 512, 3) RGB."""
    display = lay_out(VERSION, category, index)
    draws = Draws(VERSION, category, index, "marks")
    marks = [mark for item in display.items for mark in item.marks(draws)]
    return render(display.ground, marks, Draws(VERSION, category, index, "texture"))


def log_density(category: str, index: int) -> np.ndarray:
    """float32 (384, 512), natural logs: exactly what the fixations of this display were drawn from."""
    total = sum(part.share * np.outer(part.down, part.across) for part in _parts(category, index))
    return np.log(np.asarray(total)).astype(np.float32)


def draw_pixels(category: str, index: int, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of pixels drawn from the density: a part of the mixture, then its two axes."""
    parts = _parts(category, index)
    part = _drawn(np.array([part.share for part in parts]), draws.array(count))
    down, across = draws.array(count), draws.array(count)
    rows, columns = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    for number, own in enumerate(parts):
        mine = part == number
        rows[mine], columns[mine] = _drawn(own.down, down[mine]), _drawn(own.across, across[mine])
    return rows, columns


def _drawn(mass: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Indices of `mass` (any sum) for draws in [0, 1)."""
    cumulative = np.cumsum(mass)
    return np.searchsorted(cumulative, draw * cumulative[-1], side="right")


@dataclass(frozen=True, eq=False)
class _Part:
    """share of the fixations; down (HEIGHT,) and across (WIDTH,): what the density is the product of, each of sum 1."""

    share: float
    down: np.ndarray
    across: np.ndarray


def _parts(category: str, index: int) -> list[_Part]:
    """The parts of the mixture; their shares sum to 1."""
    mine = CATEGORIES[category]
    looking, (x, y) = mine.looking, mine.looking.middle
    targets = [item for item in lay_out(VERSION, category, index).items if item.salient and item.kind == mine.kind]
    pull = np.array([math.exp(-math.hypot(t.x / WIDTH - x, t.y / HEIGHT - y) / looking.decay) for t in targets])
    parts = [
        _Part(1 - looking.salient - looking.central, np.full(HEIGHT, 1 / HEIGHT), np.full(WIDTH, 1 / WIDTH)),
        _gaussian(looking.central, (x * WIDTH, y * HEIGHT), (looking.extent[0] * WIDTH, looking.extent[1] * HEIGHT)),
    ]
    for target, share in zip(targets, (looking.salient * pull / pull.sum()).tolist(), strict=True):
        across, down = (looking.spread * target.scale * px for px in SPREAD[target.kind])
        parts.append(_gaussian(share, (target.x, target.y), (across, down)))
    return parts


def _gaussian(share: float, middle: tuple[float, float], spread: tuple[float, float]) -> _Part:
    """middle and spread: across, down, px."""
    across, down = (
        np.exp(-0.5 * ((np.arange(length) + 0.5 - at) / sigma) ** 2)
        for length, at, sigma in zip((WIDTH, HEIGHT), middle, spread, strict=True)
    )
    return _Part(share, down / down.sum(), across / across.sum())
