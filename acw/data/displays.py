"""Visual-search displays: what is in each, which of it draws the eye, and how it is drawn.

In every category one feature makes an item salient, and the feature that does so in another category is there
as a decoy that draws nobody: a model must know the category to know where people look.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Spot:
    """Something salient: its middle and the standard deviations of fixations on it, all in px."""

    x: float
    y: float
    spread_x: float
    spread_y: float


@dataclass
class Display:
    """Marks in the order in which they are drawn, and the salient spots."""

    background: float  # lightness, 0-1
    marks: list[Mark] = field(default_factory=list)
    spots: list[Spot] = field(default_factory=list)


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


def lay_out(version: int, category: str, index: int) -> Display:
    """The display of this name: equal arguments, equal display."""
    draws = Draws(version, category, index, "layout")
    display = Display(background=draws.uniform(0.44, 0.52))
    _LAYOUTS[category](draws, display)
    return display


def render(display: Display, draws: Draws) -> np.ndarray:
    """uint8 (HEIGHT, WIDTH, 3) sRGB: the marks, anti-aliased, on a softly textured grey."""
    grey = np.array(oklch(display.background, 0.008, draws.angle()))
    texture = sum(_noise(draws, cell) * strength for cell, strength in ((128, 9.0), (16, 4.0), (4, 5.0), (1, 5.0)))
    canvas = grey + np.asarray(texture)[:, :, None]
    for mark in display.marks:
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


def _disc(radius: float) -> Shape:
    return lambda u, v: np.hypot(u, v) - radius


def _oval(width: float, height: float) -> Shape:
    """The distance is exact only near a circle, which is enough for an outline one pixel wide."""
    return lambda u, v: (np.hypot(u / width, v / height) - 1) * min(width, height)


def _box(width: float, height: float, corner: float, angle: float) -> Shape:
    """A rectangle of these half sides with round corners, turned by `angle`."""

    def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        across = np.abs(u * math.cos(angle) + v * math.sin(angle)) - (width - corner)
        down = np.abs(v * math.cos(angle) - u * math.sin(angle)) - (height - corner)
        outside = np.hypot(np.maximum(across, 0), np.maximum(down, 0))
        return outside + np.minimum(np.maximum(across, down), 0) - corner

    return shape


def _arc(radius: float, thickness: float, middle: float, half_angle: float) -> Shape:
    """Part of a ring with round ends, `half_angle` to either side of the direction `middle`; pi closes it."""

    def shape(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        along = u * math.cos(middle) + v * math.sin(middle)
        aside = np.abs(v * math.cos(middle) - u * math.sin(middle))
        within = np.arctan2(aside, along) <= half_angle
        end = np.hypot(along - radius * math.cos(half_angle), aside - radius * math.sin(half_angle))
        return np.where(within, np.abs(np.hypot(u, v) - radius), end) - thickness / 2

    return shape


def _stroke(x: float, y: float, length: float, thickness: float, angle: float, colour: Colour) -> Mark:
    return Mark(x, y, length / 2 + 2, _box(length / 2, thickness / 2, thickness / 2, angle), colour)


# --- Layouts -----------------------------------------------------------------------------------------------------


def _items(draws: Draws, rows: int, columns: int, jitter: float) -> Iterator[tuple[float, float, str]]:
    """Places on a loose grid, each with its role: one to three targets, one or two decoys, the rest plain."""
    roles = ["plain"] * (rows * columns)
    order = draws.order(len(roles))
    targets, decoys = (1, 1, 2, 2, 3)[draws.integer(0, 4)], draws.integer(1, 2)
    for place in order[:targets]:
        roles[place] = "target"
    for place in order[targets : targets + decoys]:
        roles[place] = "decoy"
    for place, role in enumerate(roles):
        x = (place % columns + 0.5) * WIDTH / columns + draws.uniform(-jitter, jitter)
        y = (place // columns + 0.5) * HEIGHT / rows + draws.uniform(-jitter, jitter)
        yield x, y, role


def _brightness(draws: Draws, display: Display) -> None:
    """Squares of all pale hues; the lighter or darker one is salient, the vivid one is not."""
    odd = (0.94, 0.2)[draws.integer(0, 1)]
    for x, y, role in _items(draws, 5, 7, 9):
        lightness = odd if role == "target" else draws.uniform(0.6, 0.66)
        colour = oklch(lightness, 0.17 if role == "decoy" else 0.035, draws.angle())
        half = draws.uniform(12, 17)
        display.marks.append(Mark(x, y, 1.5 * half, _box(half, half, 3, draws.angle()), colour))
        if role == "target":
            display.spots.append(Spot(x, y, 14, 14))


def _colour(draws: Draws, display: Display) -> None:
    """Discs and squares of one hue; the one of another hue is salient, the big and light one is not."""
    hue = draws.angle()
    odd = hue + math.pi + draws.uniform(-0.9, 0.9)
    for x, y, role in _items(draws, 5, 7, 9):
        lightness = 0.82 if role == "decoy" else draws.uniform(0.62, 0.68)
        colour = oklch(lightness, 0.14, odd if role == "target" else hue + draws.uniform(-0.25, 0.25))
        half = 25 if role == "decoy" else draws.uniform(11, 17)
        shape = _disc(half) if draws.integer(0, 1) else _box(half, half, 4, draws.angle())
        display.marks.append(Mark(x, y, 1.5 * half, shape, colour))
        if role == "target":
            display.spots.append(Spot(x, y, 14, 14))


def _contour(draws: Draws, display: Display) -> None:
    """Rings with a gap; the closed one is salient, the gapped one of a vivid colour is not."""
    hue = draws.angle()
    for x, y, role in _items(draws, 4, 5, 12):
        colour = oklch(0.7, 0.2, hue + math.pi) if role == "decoy" else oklch(0.85, 0.05, hue)
        radius, gap = draws.uniform(20, 28), draws.uniform(0.7, 1.0)
        half_angle = math.pi if role == "target" else math.pi - gap
        display.marks.append(Mark(x, y, radius + 6, _arc(radius, 6, draws.angle(), half_angle), colour))
        if role == "target":
            display.spots.append(Spot(x, y, 16, 16))


def _density(draws: Draws, display: Display) -> None:
    """A field of short strokes; where they stand closer is salient, where they have another colour is not."""
    hue = draws.angle()
    places = [(x, y, role) for x, y, role in _items(draws, 3, 4, 14) if role != "plain"]
    radius = draws.uniform(38, 46)
    step = 12
    for row in range(HEIGHT // step + 1):
        for column in range(WIDTH // step + 1):
            x, y = column * step + draws.uniform(-4, 4), row * step + draws.uniform(-4, 4)
            angle, length = draws.angle(), draws.uniform(9, 12)
            near = [role for at_x, at_y, role in places if math.hypot(x - at_x, y - at_y) < radius]
            if "target" not in near and (row % 2 or column % 2):
                continue
            colour = oklch(0.7, 0.2, hue + math.pi) if "decoy" in near else oklch(0.85, 0.06, hue)
            display.marks.append(_stroke(x, y, length, 3, angle, colour))
    display.spots += [Spot(x, y, 20, 20) for x, y, role in places if role == "target"]


def _faces(draws: Draws, display: Display) -> None:
    """Ovals with the parts of a face; the one where they are in their places is salient, the vivid one is not."""
    for x, y, role in _items(draws, 3, 4, 10):
        hue = draws.uniform(0.7, 1.2)
        colour = oklch(0.72, 0.2, hue + math.pi) if role == "decoy" else oklch(draws.uniform(0.74, 0.82), 0.06, hue)
        scale = draws.uniform(0.85, 1.05)
        display.marks.append(Mark(x, y, 52 * scale, _oval(36 * scale, 46 * scale), colour))
        eyes, brows = [(-14.0, -12.0), (14.0, -12.0)], [(-14.0, -23.0), (14.0, -23.0)]
        nose, mouth = (0.0, 2.0), (0.0, 20.0)
        parts = [*eyes, *brows, nose, mouth]
        turns = [0.0] * len(parts)
        if role != "target":
            parts = _scattered(draws, len(parts))
            turns = [draws.angle() for _ in parts]
        ink = oklch(0.25, 0.03, hue)
        for kind, ((u, v), turn) in enumerate(zip(parts, turns, strict=True)):
            at_x, at_y = x + scale * u, y + scale * v
            if kind < 2:
                display.marks.append(Mark(at_x, at_y, 12, _oval(7 * scale, 4.5 * scale), oklch(0.97, 0.0, 0)))
                display.marks.append(Mark(at_x, at_y, 8, _disc(3.4 * scale), ink))
            elif kind < 5:
                upright = math.pi / 2 if kind == 4 else 0.0
                display.marks.append(_stroke(at_x, at_y, 15 * scale, 3.4 * scale, turn + upright, ink))
            else:
                lowest = math.pi / 2 + turn
                smile = _arc(13 * scale, 4 * scale, lowest, 0.9)
                at_x, at_y = at_x - 10 * scale * math.cos(lowest), at_y - 10 * scale * math.sin(lowest)
                display.marks.append(Mark(at_x, at_y, 20, smile, oklch(0.45, 0.13, 0.4)))
        if role == "target":
            display.spots.append(Spot(x, y - 4, 17, 20))


def _scattered(draws: Draws, count: int) -> list[tuple[float, float]]:
    """Places in a head's oval, none too near to another."""
    places: list[tuple[float, float]] = []
    while len(places) < count:
        u, v = draws.uniform(-24, 24), draws.uniform(-33, 33)
        if math.hypot(u / 24, v / 33) < 1 and all(math.hypot(u - a, v - b) > 13 for a, b in places):
            places.append((u, v))
    return places


def _orientation(draws: Draws, display: Display) -> None:
    """Parallel bars of three hues; the turned one is salient, the one of a vivid fourth hue is not."""
    angle, hue = draws.angle(), draws.angle()
    for x, y, role in _items(draws, 5, 7, 9):
        turned = angle + math.pi / 2 + draws.uniform(-0.5, 0.5)
        tilt = turned if role == "target" else angle + draws.uniform(-0.1, 0.1)
        pale = oklch(draws.uniform(0.74, 0.84), 0.06, hue + 0.7 * draws.integer(-1, 1))
        colour = oklch(0.7, 0.2, hue + math.pi) if role == "decoy" else pale
        display.marks.append(_stroke(x, y, draws.uniform(42, 52), 11, tilt, colour))
        if role == "target":
            display.spots.append(Spot(x, y, 15, 15))


def _size(draws: Draws, display: Display) -> None:
    """Small discs; the big one is salient, the small one of a vivid colour is not."""
    hue = draws.angle()
    for x, y, role in _items(draws, 5, 7, 11):
        pale = oklch(0.76, 0.08, hue + draws.uniform(-0.4, 0.4))
        colour = oklch(0.7, 0.2, hue + math.pi) if role == "decoy" else pale
        radius = draws.uniform(25, 29) if role == "target" else draws.uniform(9, 12)
        display.marks.append(Mark(x, y, radius + 2, _disc(radius), colour))
        if role == "target":
            display.spots.append(Spot(x, y, 15, 15))


def _text(draws: Draws, display: Display) -> None:
    """Patches of strokes; those that stand in lines as letters do are salient, the vivid jumble is not."""
    hue, light = draws.angle(), (0.22, 0.95)[draws.integer(0, 1)]
    for x, y, role in _items(draws, 3, 4, 7):
        ink = oklch(0.68, 0.22, hue) if role == "decoy" else oklch(light, 0.02, hue)
        if role == "target":
            display.spots.append(Spot(x, y, 26, 15))
        for line in (-1, 0, 1):
            for letter in range(8):
                if draws.uniform(0, 1) < 0.15:
                    continue  # a gap between words
                at_x, at_y = x + (letter - 3.5) * 12.5, y + line * 24
                glyph = _letter(draws, at_x, at_y, ink)
                display.marks += glyph if role == "target" else _jumbled(draws, glyph, x, y, ink)


def _letter(draws: Draws, x: float, y: float, ink: Colour) -> list[Mark]:
    """Two or three strokes of an upright letter, 8 px wide and 16 high."""
    stems = [_stroke(x - 4, y, 16, 2.6, math.pi / 2, ink)]
    limbs: Sequence[Mark] = (
        _stroke(x, y - 7, 9, 2.6, 0, ink),
        _stroke(x, y, 9, 2.6, 0, ink),
        _stroke(x, y + 7, 9, 2.6, 0, ink),
        _stroke(x + 4, y, 16, 2.6, math.pi / 2, ink),
        _stroke(x, y, 17, 2.6, 1.1, ink),
    )
    return stems + [limbs[place] for place in draws.order(len(limbs))[: draws.integer(1, 2)]]


def _jumbled(draws: Draws, glyph: list[Mark], x: float, y: float, ink: Colour) -> list[Mark]:
    """As many strokes of the same lengths, in any place and direction of the patch."""
    return [
        _stroke(x + draws.uniform(-50, 50), y + draws.uniform(-34, 34), 2 * mark.reach - 4, 2.6, draws.angle(), ink)
        for mark in glyph
    ]


_LAYOUTS: dict[str, Callable[[Draws, Display], None]] = {
    "Brightness": _brightness,
    "Colour": _colour,
    "Contour": _contour,
    "Density": _density,
    "Faces": _faces,
    "Orientation": _orientation,
    "Size": _size,
    "Text": _text,
}
CATEGORIES = tuple(_LAYOUTS)
