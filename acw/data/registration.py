"""Whether fixations lie on what draws looks in their images, or would if their coordinates were meant otherwise.

People look at what stands out from its surroundings, wherever in an image it is. How much more conspicuous fixated
places are than those that people look at in other images is a score of an image that does not depend on where people
look whatever they see. If the fixations are swapped, moved or scaled, it is near 0, and higher under the reading that
undoes that. A reading is only proposed if its score is higher than that of the given one beyond chance, paired over
images (docs/log.md has how often it is found, and found where there is nothing).

Letters: N images, F fixations of one of them, (R, C) cells of an image, (P, Q) cells of a grid over any image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CELLS = 128  # along the longer side of a usual image
GRID = 24, 32  # rows and columns of a coarse grid over any image, for where people look in other images
FEWEST_IMAGES = 8
# Normal deviates by which a reading must be better than the given one, and than none.
BEYOND_CHANCE = 3.0
# Under a reading that is proposed, this share of fixations is in their images, and their mean is so near the middle, in
# shares of the sides.
LEAST_INSIDE, NEAR_MIDDLE = 0.95, 0.2
# Smaller offsets, in cells, and factors are not told from none. Larger offsets are not looked for.
LEAST_OFFSET, MOST_OFFSET = 3, 20
LEAST_FACTOR = 1.08
SMALLER = (1 / 4, 1 / 3, 2 / 5, 1 / 2, 4 / 7, 5 / 8, 2 / 3, 3 / 4, 4 / 5, 8 / 9)
FACTORS = (*SMALLER, *(1 / factor for factor in SMALLER))
AS_GOOD = 0.03  # in its logarithm, a usual factor is preferred to one found
SCREENS = (
    (800, 600), (1024, 768), (1280, 720), (1280, 800), (1280, 960), (1280, 1024), (1366, 768), (1440, 900),
    (1400, 1050), (1600, 900), (1600, 1200), (1680, 1050), (1920, 1080), (1920, 1200), (2560, 1440), (3840, 2160),
)  # fmt: skip

Transform = Callable[[np.ndarray, np.ndarray, tuple[int, int]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Seen:
    """An image and its fixations. size: (height, width) in px; conspicuity: float32 (R, C); x, y: (F,) in px."""

    size: tuple[int, int]
    conspicuity: np.ndarray
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Reading:
    """How coordinates may be meant. kind: swapped, up, scaled, moved or screen; numbers: the factor, the offset in px
    (x, y), or the screen's width and height; apply: x and y of an image of (height, width) px -> x and y in px."""

    kind: str
    numbers: tuple[float, ...]
    apply: Transform


def cell_of(sizes: Sequence[tuple[int, int]]) -> float:
    """px of a cell, the same in all images, of (height, width) px."""
    return float(np.median([max(size) for size in sizes])) / CELLS


def conspicuity(pixels: np.ndarray, cell: float) -> np.ndarray:
    """float32 (R, C): the rank, from -0.5 to 0.5, of how much each cell of uint8 RGB (H, W, 3) stands out from what is
    around it, in brightness and opponent colours at three sizes, and in contrast."""
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    rows, columns = (max(1, round(side / cell)) for side in pixels.shape[:2])
    small = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BOX)
    red, green, blue = np.moveaxis(np.asarray(small, dtype=np.float32) / 255, 2, 0)
    grey = (red + green + blue) / 3
    total = np.sqrt(np.maximum(gaussian_filter(grey**2, 2) - gaussian_filter(grey, 2) ** 2, 0))
    for channel, size in itertools.product((grey, red - green, blue - (red + green) / 2), (1, 2, 4)):
        total += np.abs(gaussian_filter(channel, size) - gaussian_filter(channel, 4 * size))
    total = gaussian_filter(total, 1.5)
    return (np.argsort(np.argsort(total, axis=None)).reshape(total.shape) / total.size - 0.5).astype(np.float32)


def other_reading(images: Sequence[Seen], cell: float, beyond: float = BEYOND_CHANCE) -> Reading | None:
    """The reading under which fixations lie on what is conspicuous better than as they are given; None if there is
    none, or too few images to tell. beyond: by how many normal deviates."""
    best, deviate = best_reading(images, cell)
    return best if deviate >= beyond else None


def best_reading(images: Sequence[Seen], cell: float) -> tuple[Reading | None, float]:
    """The best of all other readings, and by how many normal deviates it is better than the given one, and than
    none, whichever is less; None and 0 if it does not differ from the given one, or for too few images."""
    if len(images) < FEWEST_IMAGES:
        return None, 0.0
    surrounds = np.stack([_pooled(image.conspicuity).ravel() for image in images])

    def best_of(readings: Sequence[Reading]) -> tuple[Reading, np.ndarray]:
        """The given one, scores of no image, where none can be."""
        scored = [
            (reading, _scores(images, surrounds, cell, reading.apply))
            for reading in readings
            if _may_be(images, reading)
        ]
        return max(scored, key=lambda pair: float(pair[1].mean()), default=(_GIVEN, np.zeros(0)))

    best, scores = best_of([*_readings(images), _moved(_offset(images, cell))])
    if best.kind == "scaled":
        factor = best.numbers[0]
        best, scores = best_of([_scaled(factor * step) for step in np.linspace(0.9, 1.1, 21)])
        usual = [_scaled(other) for other in FACTORS if abs(math.log(other / best.numbers[0])) < AS_GOOD]
        best, scores = best_of(usual) if usual else (best, scores)
    same = best.kind == "moved" and math.hypot(*best.numbers) < LEAST_OFFSET * cell
    if not len(scores) or same or (best.kind == "scaled" and 1 / LEAST_FACTOR < best.numbers[0] < LEAST_FACTOR):
        return None, 0.0
    given = _scores(images, surrounds, cell, _as_given)
    return best, min(_deviate(scores - given), _deviate(scores))


def _may_be(images: Sequence[Seen], reading: Reading) -> bool:
    """Whether under a reading nearly all fixations are in their images, and about the middle on average."""
    shares = []
    for image in images:
        x, y = reading.apply(image.x, image.y, image.size)
        shares.append(np.stack([x / image.size[1], y / image.size[0]]))
    places = np.concatenate(shares, axis=1)
    inside = np.all((places >= 0) & (places < 1), axis=0)
    return bool(inside.mean() >= LEAST_INSIDE and np.all(np.abs(places[:, inside].mean(1) - 0.5) <= NEAR_MIDDLE))


def _as_given(x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return x, y


_GIVEN = Reading("given", (), _as_given)


def _scaled(factor: float) -> Reading:
    return Reading("scaled", (float(factor),), lambda x, y, size: (x / factor, y / factor))


def _moved(offset: tuple[float, float]) -> Reading:
    return Reading("moved", offset, lambda x, y, size: (x - offset[0], y - offset[1]))


def _on_screen(width: int, height: int) -> Reading:
    return Reading(
        "screen", (width, height), lambda x, y, size: (x - (width - size[1]) / 2, y - (height - size[0]) / 2)
    )


def _readings(images: Sequence[Seen]) -> list[Reading]:
    """All that are tried besides offsets."""
    height, width = (max(image.size[axis] for image in images) for axis in range(2))
    return [
        Reading("swapped", (), lambda x, y, size: (y, x)),
        Reading("up", (), lambda x, y, size: (x, size[0] - y)),
        *(_scaled(factor) for factor in FACTORS),
        *(_on_screen(*screen) for screen in SCREENS if screen > (width, height) and min(screen) >= height),
    ]


def _scores(images: Sequence[Seen], surrounds: np.ndarray, cell: float, apply: Transform) -> np.ndarray:
    """float64 (N,): the conspicuity of each image at its own fixations less that at the others', under a reading.

    surrounds: float (N, P * Q), each image's conspicuity on the coarse grid. What lies outside counts as average.
    """
    own, grids = np.empty(len(images)), np.empty_like(surrounds, dtype=np.float64)
    for number, image in enumerate(images):
        x, y = apply(image.x, image.y, image.size)
        r, c, inside = _cells(x / cell, y / cell, image.conspicuity.shape)
        own[number] = image.conspicuity[r[inside], c[inside]].sum() / len(x)
        grids[number] = _counts(x * GRID[1] / image.size[1], y * GRID[0] / image.size[0], GRID).ravel()
    others = (grids.sum(0) - grids) / (len(images) - 1)
    return own - np.sum(others * surrounds, axis=1)


def _counts(columns: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """float64 of this shape: the share of the fixations in each cell."""
    r, c, inside = _cells(columns, rows, shape)
    counts = np.bincount(r[inside] * shape[1] + c[inside], minlength=shape[0] * shape[1])
    return counts.reshape(shape) / len(columns)


def _cells(columns: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 (F,) row and column of each fixation's cell, and bool (F,) whether it is one of so many."""
    r, c = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    return r, c, (c >= 0) & (c < shape[1]) & (r >= 0) & (r < shape[0])


def _pooled(values: np.ndarray) -> np.ndarray:
    """float32 (P, Q): the mean of (R, C) over each cell of the coarse grid."""
    from PIL import Image

    return np.asarray(Image.fromarray(values).resize(GRID[::-1], Image.Resampling.BOX))


def _offset(images: Sequence[Seen], cell: float) -> tuple[float, float]:
    """px by which fixations are moved to the right and down from where they are most on what is conspicuous."""
    from PIL import Image

    grids = np.stack([_counts(i.x * GRID[1] / i.size[1], i.y * GRID[0] / i.size[0], GRID) for i in images])
    reach = np.arange(-MOST_OFFSET, MOST_OFFSET + 1)
    total = np.zeros((len(reach), len(reach)))
    for number, image in enumerate(images):
        others = (grids.sum(0) - grids[number]) / (len(images) - 1)
        shape = image.conspicuity.shape
        control = np.asarray(
            Image.fromarray(others.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR), dtype=np.float64
        )
        control *= others.sum() / max(control.sum(), 1e-12)
        surplus = _counts(image.x / cell, image.y / cell, shape) - control
        padded = (shape[0] + 2 * MOST_OFFSET, shape[1] + 2 * MOST_OFFSET)
        spectrum = np.fft.rfft2(surplus, padded) * np.conj(np.fft.rfft2(image.conspicuity, padded))
        total += np.fft.irfft2(spectrum, padded)[np.ix_(reach % padded[0], reach % padded[1])]
    down, across = np.unravel_index(total.argmax(), total.shape)
    return float(reach[across] * cell), float(reach[down] * cell)


def _deviate(differences: np.ndarray) -> float:
    """How many standard deviations of the normal distribution a mean as far from 0 as theirs is, by Student's t."""
    from scipy.stats import norm, t

    n = len(differences)
    spread = float(differences.std(ddof=1)) / np.sqrt(n)
    if not spread:
        return 0.0
    return float(norm.isf(t.sf(differences.mean() / spread, n - 1)))
