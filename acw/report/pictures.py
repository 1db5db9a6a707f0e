"""Pictures of densities for a web page: a JPEG, with fixations and contours as SVG on top of it."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from acw.report.figures import CENTRE_BIAS, ENCLOSED_MASS, Example, blended, mass_levels

WIDTH, HEIGHT = 360, 420  # px that a picture has at most
CONTOUR_SIDE = 180  # cells of the grid on which contours are traced
LOWEST = 0.02  # share of an example's pixels whose log-densities are below the colours
DIFFERENCES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # bits, at which a difference's colours may end


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

    def fixations(self) -> str:
        """The image with its fixations."""
        height, width = self.example.pixels.shape[:2]
        # Pixel i is centred on coordinate i.
        x = (self.example.x + 0.5) * self.size[0] / width
        y = (self.example.y + 0.5) * self.size[1] / height
        points = "".join(f"M{px:.1f} {py:.1f}h0" for px, py in zip(x, y, strict=True))
        marks = (
            f'<path class="fixations rim" d="{points}" stroke-width="6.4"/>'
            f'<path class="fixations" d="{points}" stroke-width="4.4"/>'
        )
        return self._picture(self._thumbnail, marks)

    def density(self, log_density: np.ndarray) -> str:
        """The density on the dimmed image, with lines that enclose 25, 50 and 75 % of its mass."""
        shrunk = self._shrunk(log_density)
        colour = blended(self._thumbnail, shrunk / math.exp(self._highest))
        return self._picture(_bytes(colour), self._contours(shrunk))

    def log_density(self, log_density: np.ndarray) -> str:
        """The log-density in the colours of `range`, with the same lines."""
        import matplotlib

        shrunk = self._shrunk(log_density)
        low, high = self.range
        share = (_log(shrunk) / math.log(2) - low) / max(high - low, 1e-9)
        return self._picture(_bytes(matplotlib.colormaps["viridis"](share)), self._contours(shrunk))

    def ratio(self, a: np.ndarray, b: np.ndarray) -> tuple[str, float]:
        """log2(a / b), red where a is higher, blue where b is, white where they agree; and the bits of full colour."""
        import matplotlib

        bits = (_log(self._shrunk(a)) - _log(self._shrunk(b))) / math.log(2)
        scale = next((one for one in DIFFERENCES if one >= np.quantile(np.abs(bits), 0.99)), DIFFERENCES[-1])
        return self._picture(_bytes(matplotlib.colormaps["RdBu_r"](0.5 + bits / (2 * scale))), ""), scale

    def _shrunk(self, log_density: np.ndarray) -> np.ndarray:
        """The density over uniform at the pictures' size: the mean over the pixels that a pixel stands for."""
        density = np.exp(log_density.astype(np.float32) + np.float32(self._uniform))
        return np.asarray(Image.fromarray(density).resize(self.size, Image.Resampling.BOX))

    def _contours(self, density: np.ndarray) -> str:
        from contourpy import LineType, contour_generator

        step = -(-max(density.shape) // CONTOUR_SIDE)
        grid = density[step // 2 :: step, step // 2 :: step]
        if min(grid.shape) < 2:
            return ""
        x, y = (step // 2 + 0.5 + step * np.arange(length) for length in grid.shape[::-1])
        generator = contour_generator(x, y, grid, line_type=LineType.Separate)
        parts = []
        for level in sorted({float(level) for level in mass_levels(grid, ENCLOSED_MASS)}):
            lines: Any = generator.lines(level)
            parts += ["M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in line) for line in lines]
        return f'<path class="mass" d="{"".join(parts)}"/>'

    def _picture(self, pixels: np.ndarray, marks: str) -> str:
        width, height = self.size
        return (
            f'<svg viewBox="0 0 {width} {height}"><image width="{width}" height="{height}" '
            f'href="{jpeg(pixels)}"/>{marks}</svg>'
        )


def colour_bar(name: str) -> str:
    """An image element with a colour map from left to right."""
    import matplotlib

    colours = matplotlib.colormaps[name](np.linspace(0, 1, 128))[None].repeat(4, 0)
    return f'<img class="bar" alt="" src="{jpeg(_bytes(colours))}">'


def jpeg(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _log(density: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(density, np.finfo(np.float32).tiny))


def _bytes(colour: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(colour[..., :3], 0, 1)).astype(np.uint8)
