"""How the built-in displays are drawn: marks of a shape and a colour on a softly textured ground."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH = 384, 512

Colour = tuple[float, float, float]
# Signed distance in px to a shape's outline, negative inside, at offsets (u right, v down) in px from its middle.
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Mark:
    """A shape of one colour (sRGB, 0-255) at (x, y) px; nothing of it lies further than `reach` px from there."""

    x: float
    y: float
    reach: float
    shape: Shape
    colour: Colour


class Draws:
    """Random numbers that depend on a key alone: made of PCG64's raw doubles, whose stream NumPy keeps."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))

    def array(self, *shape: int) -> np.ndarray:
        """float64 in [0, 1)."""
        return self._generator.random(shape)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._generator.random())

    def integer(self, low: int, high: int) -> int:
        """low to high, both included."""
        return low + int((high - low + 1) * float(self._generator.random()))

    def angle(self) -> float:
        return self.uniform(0, 2 * math.pi)

    def order(self, count: int) -> list[int]:
        return np.argsort(self.array(count), kind="stable").tolist()


def render(ground: Colour, marks: Iterable[Mark], draws: Draws) -> np.ndarray:
    """uint8 (HEIGHT, WIDTH, 3) sRGB: the marks in their order, anti-aliased, on a softly textured ground."""
    texture = sum(_noise(draws, cell) * strength for cell, strength in ((128, 9.0), (16, 4.0), (4, 5.0), (1, 5.0)))
    canvas = np.array(ground) + np.asarray(texture)[:, :, None]
    for mark in marks:
        left, right = max(0, math.floor(mark.x - mark.reach)), min(WIDTH, math.ceil(mark.x + mark.reach) + 1)
        top, bottom = max(0, math.floor(mark.y - mark.reach)), min(HEIGHT, math.ceil(mark.y + mark.reach) + 1)
        v, u = np.ogrid[top:bottom, left:right]
        cover = np.clip(0.5 - mark.shape(u - mark.x, v - mark.y), 0, 1)[:, :, None]
        patch = canvas[top:bottom, left:right]
        patch += cover * (np.array(mark.colour) - patch)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def oklch(lightness: float, chroma: float, hue: float) -> Colour:
    """sRGB 0-255 of a colour in OKLCH (Ottosson 2020): equal lightness (0-1) looks equally light.

    hue is in radians. Chroma is reduced until the colour exists in sRGB.
    """
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    l_ = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m_ = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s_ = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * l_ - 3.3077115913 * m_ + 0.2309699292 * s_,
        -1.2684380046 * l_ + 2.6097574011 * m_ - 0.3413193965 * s_,
        -0.0041960863 * l_ - 0.7034186147 * m_ + 1.7076147010 * s_,
    )
    if min(linear) < -1e-3 or max(linear) > 1.001:
        return oklch(lightness, chroma * 0.9, hue)
    red, green, blue = (255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055) for c in linear)
    return red, green, blue


def _noise(draws: Draws, cell: int) -> np.ndarray:
    """(HEIGHT, WIDTH) in [-0.5, 0.5): random values every `cell` px, with straight lines between them."""
    values = draws.array(HEIGHT // cell + 2, WIDTH // cell + 2) - 0.5
    for axis, length in ((0, HEIGHT), (1, WIDTH)):
        place = np.arange(length) / cell
        low = place.astype(int)
        part = np.expand_dims(place - low, 1 - axis)
        values = np.take(values, low, axis) * (1 - part) + np.take(values, low + 1, axis) * part
    return values


# --- Shapes ------------------------------------------------------------------------------------------------------


def disc(radius: float) -> Shape:
    return lambda u, v: np.hypot(u, v) - radius


def oval(width: float, height: float) -> Shape:
    """The distance is exact only near a circle, which is enough for an outline one pixel wide."""
    return lambda u, v: (np.hypot(u / width, v / height) - 1) * min(width, height)


def box(width: float, height: float, corner: float, angle: float) -> Shape:
    """A rectangle of these half sides with round corners, turned by `angle`."""

    def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        across = np.abs(u * math.cos(angle) + v * math.sin(angle)) - (width - corner)
        down = np.abs(v * math.cos(angle) - u * math.sin(angle)) - (height - corner)
        outside = np.hypot(np.maximum(across, 0), np.maximum(down, 0))
        return outside + np.minimum(np.maximum(across, down), 0) - corner

    return shape


def arc(radius: float, thickness: float, middle: float, half_angle: float) -> Shape:
    """Part of a ring with round ends, `half_angle` to either side of the direction `middle`; pi closes it."""

    def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        along = u * math.cos(middle) + v * math.sin(middle)
        aside = np.abs(v * math.cos(middle) - u * math.sin(middle))
        within = np.arctan2(aside, along) <= half_angle
        end = np.hypot(along - radius * math.cos(half_angle), aside - radius * math.sin(half_angle))
        return np.where(within, np.abs(np.hypot(u, v) - radius), end) - thickness / 2

    return shape


def stroke(x: float, y: float, length: float, thickness: float, angle: float, colour: Colour) -> Mark:
    return Mark(x, y, length / 2 + 2, box(length / 2, thickness / 2, thickness / 2, angle), colour)
