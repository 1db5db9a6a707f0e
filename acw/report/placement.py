"""Images with their fixations as they are read, to see whether they lie where they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from acw.report.figures import FAINT, INK, PALETTE, blank, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 250  # px of an image
COLUMNS = 4
LONGEST_SIDE = 500  # px of an image's copy
BEYOND = 0.25  # of an image's sides, how far outside it a fixation is shown at most
INSIDE, OUTSIDE, RATHER = "#ffd23f", "#ff3b30", PALETTE[5]


@dataclass(frozen=True)
class Shown:
    """An image, uint8 (H, W, 3), and its fixations. x, y: (F,) in px; rather: x and y as they are likely meant."""

    title: str
    pixels: np.ndarray
    x: np.ndarray
    y: np.ndarray
    rather: tuple[np.ndarray, np.ndarray] | None = None


@styled
def placement(images: Sequence[Shown]) -> Figure:
    """A picture an image: fixations as they are read, in red where outside, and rings where they are likely meant."""
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    height = WIDTH * max(image.pixels.shape[0] / image.pixels.shape[1] for image in images)
    figure = blank(columns * (WIDTH + 8), rows * (height + 26))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, image in zip(grid, images, strict=False):
        _draw(axes, image)
    return figure


def _draw(axes: Axes, image: Shown) -> None:
    height, width = image.pixels.shape[:2]
    step = -(-max(height, width) // LONGEST_SIDE)
    axes.imshow(image.pixels[::step, ::step] // 2 + 40, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    x, y = _clipped(image.x, width), _clipped(image.y, height)
    inside = (image.x >= 0) & (image.x < width) & (image.y >= 0) & (image.y < height)
    for chosen, colour in ((inside, INSIDE), (~inside, OUTSIDE)):
        axes.scatter(x[chosen], y[chosen], s=7, color=colour, edgecolors="#00000099", linewidths=0.4)
    if image.rather is not None:
        across, down = _clipped(image.rather[0], width), _clipped(image.rather[1], height)
        axes.scatter(across, down, s=14, facecolors="none", edgecolors=RATHER, linewidths=0.7)
        x, y = np.concatenate([x, across]), np.concatenate([y, down])
    axes.plot([-0.5, width - 0.5, width - 0.5, -0.5, -0.5], [-0.5, -0.5, height - 0.5, height - 0.5, -0.5], color=FAINT)
    axes.set_xlim(min(-0.5, *x) - 4, max(width, *x) + 4)
    axes.set_ylim(max(height, *y) + 4, min(-0.5, *y) - 4)
    axes.set_title(image.title, color=INK, fontsize=9)


def _clipped(values: np.ndarray, side: int) -> np.ndarray:
    return np.clip(values, -BEYOND * side, (1 + BEYOND) * side)
