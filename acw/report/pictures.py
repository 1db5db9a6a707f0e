"""Images and what models predict of them: for a page, as a JPEG with lines as SVG on top; and all of some as a PNG.

A page's pictures are not drawn by matplotlib: its SVG holds an image as a PNG, several times as large as the JPEG.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from acw.model.drawing import ENCLOSED_MASS, mass_levels
from acw.report.figures import INK, blank, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 360, 420  # px that a picture has at most
CONTOUR_SIDE = 180  # cells of the grid on which contours are traced
LOWEST = 0.02  # share of an example's pixels whose log-densities are below the colours
DIFFERENCES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # bits, at which a difference's colours may end
LONGEST_SIDE = 640  # px of an image that a figure shows at most
# Names in `Example.log_densities` that mean something: what the model predicts, IG's baseline, what other people saw.
OURS, UNIFORM, CENTRE_BIAS, GOLD_STANDARD = "acw", "uniform mixture", "centre bias", "gold standard"


@dataclass(frozen=True)
class Example:
    """An image and what models predict of it.

    pixels: uint8 (H, W, 3). x, y: (F,) fixations in px. log_densities: name -> (H, W), natural logs, logsumexp 0.
    wrong: the category whose weights differ most from those of the image's, and the density (H, W) under them.
    """

    title: str
    pixels: np.ndarray
    x: np.ndarray
    y: np.ndarray
    log_densities: Mapping[str, np.ndarray]
    wrong: tuple[str, np.ndarray] | None = None


@dataclass(frozen=True)
class Picture:
    """A JPEG as a data URI, its size in px, and what is drawn on it: fixations or lines, as an SVG path."""

    width: int
    height: int
    image: str
    fixations: str = ""
    lines: str = ""

    @property
    def bytes(self) -> int:
        """What it adds to a page."""
        return len(self.image) + 2 * len(self.fixations) + len(self.lines)


@dataclass(frozen=True, eq=False)
class Pictures:
    """An example's pictures, all on the same scale: the highest of its densities has the brightest colour."""

    example: Example

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) in px of every picture."""
        height, width = self.example.pixels.shape[:2]
        scale = min(WIDTH / width, HEIGHT / height, 1.0)
        return max(round(width * scale), 1), max(round(height * scale), 1)

    @cached_property
    def _thumbnail(self) -> np.ndarray:
        return np.asarray(Image.fromarray(self.example.pixels).resize(self.size, Image.Resampling.LANCZOS))

    @cached_property
    def _highest(self) -> float:
        """Log of the largest density, over uniform, in nats."""
        return max(float(density.max()) for density in self._every.values()) + self._uniform

    @cached_property
    def _uniform(self) -> float:
        return math.log(self.example.pixels.shape[0] * self.example.pixels.shape[1])

    @cached_property
    def _every(self) -> dict[str, np.ndarray]:
        wrong = {self.example.wrong[0]: self.example.wrong[1]} if self.example.wrong else {}
        return {**self.example.log_densities, **wrong}

    @cached_property
    def range(self) -> tuple[float, float]:
        """Bits over uniform between which log-densities are coloured."""
        lowest = np.quantile(np.stack([_log(self._shrunk(d)) for d in self._every.values()]), LOWEST)
        return float(lowest / math.log(2)), self._highest / math.log(2)

    def information_gain(self, log_density: np.ndarray) -> float:
        """Bits per fixation over the centre bias, as `acw.evaluation.metrics` has it: a fixation falls on its pixel."""
        rows, columns = self.example.y.astype(int), self.example.x.astype(int)
        difference = log_density[rows, columns] - self.example.log_densities[CENTRE_BIAS][rows, columns]
        return float(difference.mean(dtype=np.float64)) / math.log(2)

    def fixations(self) -> Picture:
        """The image with its fixations."""
        height, width = self.example.pixels.shape[:2]
        # Pixel i is centred on coordinate i.
        x = (self.example.x + 0.5) * self.size[0] / width
        y = (self.example.y + 0.5) * self.size[1] / height
        points = "".join(f"M{px:.1f} {py:.1f}h0" for px, py in zip(x, y, strict=True))
        return Picture(*self.size, jpeg(self._thumbnail), fixations=points)

    def density(self, log_density: np.ndarray) -> Picture:
        """The density on the dimmed image, with lines that enclose 25, 50 and 75 % of its mass."""
        shrunk = self._shrunk(log_density)
        return Picture(*self.size, self._coloured(shrunk), lines=_contours(shrunk))

    def both(self, log_density: np.ndarray) -> tuple[Picture, Picture]:
        """The density, and the log-density in the colours of `range`, with the same lines."""
        import matplotlib

        shrunk = self._shrunk(log_density)
        low, high = self.range
        share = (_log(shrunk) / math.log(2) - low) / max(high - low, 1e-9)
        images = self._coloured(shrunk), jpeg(matplotlib.colormaps["viridis"](share))
        lines = _contours(shrunk)
        return Picture(*self.size, images[0], lines=lines), Picture(*self.size, images[1], lines=lines)

    def _coloured(self, shrunk: np.ndarray) -> str:
        return jpeg(blended(self._thumbnail, shrunk / math.exp(self._highest)))

    def ratio(self, a: np.ndarray, b: np.ndarray) -> tuple[Picture, float]:
        """log2(a / b), red where a is higher, blue where b is, white where they agree; and the bits of full colour."""
        import matplotlib

        bits = (_log(self._shrunk(a)) - _log(self._shrunk(b))) / math.log(2)
        scale = next((bound for bound in DIFFERENCES if bound >= np.quantile(np.abs(bits), 0.99)), DIFFERENCES[-1])
        return Picture(*self.size, jpeg(matplotlib.colormaps["RdBu_r"](0.5 + bits / (2 * scale)))), scale

    def _shrunk(self, log_density: np.ndarray) -> np.ndarray:
        """The density over uniform at the pictures' size: the mean over the pixels that a pixel stands for."""
        density = np.exp(log_density.astype(np.float32) + np.float32(self._uniform))
        return np.asarray(Image.fromarray(density).resize(self.size, Image.Resampling.BOX))


@styled
def examples_figure(rows: Sequence[Example]) -> Figure:
    """A row per image: the stimulus with its fixations, then the density of each model.

    Colour is the density relative to the row's highest, on the dimmed image; the lines enclose 25, 50 and 75 % of the
    mass. All rows have the same models in the same order.
    """
    names = list(rows[0].log_densities)
    assert all(list(row.log_densities) == names for row in rows)
    width = 190
    heights = [width * row.pixels.shape[0] / row.pixels.shape[1] for row in rows]
    figure = blank((1 + len(names)) * (width + 5) + 18, sum(heights) + 5 * len(rows) + 20)
    grid = figure.subplots(len(rows), 1 + len(names), squeeze=False, height_ratios=heights)
    for row, (stimulus, *others) in zip(rows, grid, strict=True):
        # Pixel i is centred on coordinate i, as fixations count.
        extent = -0.5, row.pixels.shape[1] - 0.5, row.pixels.shape[0] - 0.5, -0.5
        # Not cut to its box: the marks of fixations at the edge stay whole.
        stimulus.imshow(_thinned(row.pixels), extent=extent, interpolation="antialiased")
        stimulus.scatter(row.x, row.y, s=9, color="#ffd23f", edgecolors="#00000099", linewidths=0.5, clip_on=False)
        stimulus.set_ylabel(row.title, color=INK)
        highest = max(float(density.max()) for density in row.log_densities.values())
        for axes, log_density in zip(others, row.log_densities.values(), strict=True):
            relative = np.exp(_thinned(log_density).astype(np.float64) - highest)
            _draw_density(axes, _thinned(row.pixels), relative, extent)
        for axes in (stimulus, *others):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, name in zip(grid[0], ("fixations", *names), strict=True):
        axes.set_title(name)
    return figure


def _draw_density(
    axes: Axes, pixels: np.ndarray, relative: np.ndarray, extent: tuple[float, float, float, float]
) -> None:
    axes.imshow(blended(pixels, relative), extent=extent, interpolation="antialiased")
    axes.contour(relative, _levels(relative), colors="white", linewidths=0.7, alpha=0.9, extent=extent, origin="upper")


def blended(pixels: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """A density in [0, 1] (H, W) as colour on its dimmed image, uint8 (H, W, 3): RGB in [0, 1], float (H, W, 3)."""
    import matplotlib

    grey = pixels.astype(float).mean(2, keepdims=True) / 255
    # The square root lets the density's foothills show; where there is none, the image does, dimmed.
    colour = matplotlib.colormaps["inferno"](np.sqrt(relative))[..., :3]
    opacity = 0.25 + 0.6 * np.sqrt(relative)[..., None]
    return (1 - opacity) * (0.12 + 0.55 * grey) + opacity * colour


def _levels(density: np.ndarray) -> list[float]:
    return sorted({float(level) for level in mass_levels(density, ENCLOSED_MASS)})


def _contours(density: np.ndarray) -> str:
    """Lines that enclose shares of the density's mass, as an SVG path."""
    from contourpy import LineType, contour_generator

    step = -(-max(density.shape) // CONTOUR_SIDE)
    grid = density[step // 2 :: step, step // 2 :: step]
    if min(grid.shape) < 2:
        return ""
    x, y = (step // 2 + 0.5 + step * np.arange(length) for length in grid.shape[::-1])
    generator = contour_generator(x, y, grid, line_type=LineType.Separate)
    parts = []
    for level in _levels(grid):
        lines: Any = generator.lines(level)
        parts += ["M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in line) for line in lines]
    return "".join(parts)


def _thinned(image: np.ndarray) -> np.ndarray:
    step = -(-max(image.shape[:2]) // LONGEST_SIDE)
    return image[::step, ::step]


def colour_bar(name: str) -> str:
    """A colour map from left to right, as a data URI."""
    import matplotlib

    return jpeg(matplotlib.colormaps[name](np.linspace(0, 1, 128))[None].repeat(4, 0))


def jpeg(pixels: np.ndarray) -> str:
    """RGB, uint8 or in [0, 1] (H, W, 3 or 4), as a data URI; opacity is ignored."""
    if pixels.dtype != np.uint8:
        pixels = np.round(255 * np.clip(pixels[..., :3], 0, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _log(density: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(density, np.finfo(np.float32).tiny))
