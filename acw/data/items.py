"""The items on the built-in displays: four kinds, of each a salient one that stands out among plain ones.

A vivid disc among pale ones, a closed ring among those with a gap, a face among faces whose parts are scattered, lines
of letters among jumbled strokes: which of a network's features tell them apart differs from kind to kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from acw.data.displays import Colour, Draws, Mark, arc, box, disc, oklch, oval, stroke


@dataclass(frozen=True)
class Item:
    """One of a kind at (x, y) px, `scale` times as large as usual; salient or plain."""

    kind: str
    x: float
    y: float
    scale: float
    salient: bool

    def marks(self, draws: Draws) -> list[Mark]:
        """What is to be drawn, in this order."""
        return _KINDS[self.kind](self, draws)

    def stroke(self, u: float, v: float, length: float, thickness: float, angle: float, colour: Colour) -> Mark:
        """A stroke at (u, v) from the item's middle, all lengths in px of an item of the usual size."""
        s = self.scale
        return stroke(self.x + u * s, self.y + v * s, length * s, thickness * s, angle, colour)

    def oval(self, u: float, v: float, width: float, height: float, colour: Colour) -> Mark:
        """An oval of these half axes, likewise."""
        s = self.scale
        return Mark(self.x + u * s, self.y + v * s, max(width, height) * s + 2, oval(width * s, height * s), colour)


def _disc(item: Item, draws: Draws) -> list[Mark]:
    """A disc or square: vivid, or pale and as light."""
    colour = oklch(draws.uniform(0.62, 0.7), 0.19 if item.salient else 0.035, draws.angle())
    half = 19 * item.scale
    shape = disc(half) if draws.integer(0, 1) else box(half, half, 4 * item.scale, draws.angle())
    return [Mark(item.x, item.y, 1.5 * half, shape, colour)]


def _ring(item: Item, draws: Draws) -> list[Mark]:
    """A ring: closed, or with a gap."""
    colour = oklch(0.85, 0.05, draws.angle())
    radius, gap = 26 * item.scale, draws.uniform(0.6, 0.9)
    shape = arc(radius, 7 * item.scale, draws.angle(), math.pi if item.salient else math.pi - gap)
    return [Mark(item.x, item.y, radius + 6 * item.scale, shape, colour)]


def _face(item: Item, draws: Draws) -> list[Mark]:
    """An oval with the parts of a face: in their places and under hair, or scattered."""
    hue, light = draws.uniform(0.75, 1.1), draws.uniform(0.7, 0.8)
    skin, shade, ink = oklch(light, 0.06, hue), oklch(light - 0.12, 0.06, hue), oklch(0.25, 0.03, hue)
    dark = oklch(draws.uniform(0.22, 0.36), 0.04, hue)
    parts, turns = [(-13.0, -8.0), (13.0, -8.0), (-13.0, -18.0), (13.0, -18.0), (0.0, 6.0), (0.0, 22.0)], [0.0] * 6
    if not item.salient:
        parts = _scattered(draws, len(parts))
        turns = [draws.angle() for _ in parts]
    marks = [item.oval(0, -8, 40, 48, dark)] if item.salient else []
    marks.append(item.oval(0, 0, 35, 46, skin))
    for u, v in parts[:2]:  # eyes
        marks += [
            item.oval(u, v, 8.5, 5.5, shade),
            item.oval(u, v, 6.5, 3.8, oklch(0.95, 0.0, 0)),
            item.oval(u, v, 3.3, 3.3, ink),
        ]
    marks += [item.stroke(u, v, 15, 3.4, turn, dark) for (u, v), turn in zip(parts[2:4], turns[2:4], strict=True)]
    (nose, mouth), (nose_turn, mouth_turn) = parts[4:], turns[4:]
    marks.append(item.stroke(*nose, 15, 4.5, nose_turn + math.pi / 2, shade))
    marks.append(item.stroke(*mouth, 23, 7, mouth_turn, oklch(0.5, 0.13, 0.4)))
    return marks


def _scattered(draws: Draws, count: int) -> list[tuple[float, float]]:
    """Places in a head's oval, none too near to another."""
    places: list[tuple[float, float]] = []
    while len(places) < count:
        u, v = draws.uniform(-24, 24), draws.uniform(-33, 33)
        if math.hypot(u / 24, v / 33) < 1 and all(math.hypot(u - a, v - b) > 13 for a, b in places):
            places.append((u, v))
    return places


def _words(item: Item, draws: Draws) -> list[Mark]:
    """A patch of strokes: letters in three lines, or jumbled."""
    ink = oklch((0.22, 0.95)[draws.integer(0, 1)], 0.02, draws.angle())
    marks = []
    for line in (-1, 0, 1):
        for place in range(8):
            if draws.uniform(0, 1) < 0.15:
                continue  # a gap between words
            for u, v, length, angle in _letter(draws):
                if item.salient:
                    u, v = u + (place - 3.5) * 12.5, v + line * 24
                else:
                    u, v, angle = draws.uniform(-48, 48), draws.uniform(-32, 32), draws.angle()
                marks.append(item.stroke(u, v, length, 2.6, angle, ink))
    return marks


def _letter(draws: Draws) -> list[tuple[float, float, float, float]]:
    """Middle (u, v), length and angle of two or three strokes of an upright letter, 8 px wide and 16 high."""
    limbs = [(0, -7, 9, 0.0), (0, 0, 9, 0.0), (0, 7, 9, 0.0), (4, 0, 16, math.pi / 2), (0, 0, 17, 1.1)]
    return [(-4, 0, 16, math.pi / 2), *(limbs[n] for n in draws.order(len(limbs))[: draws.integer(1, 2)])]


_KINDS: dict[str, Callable[[Item, Draws], list[Mark]]] = {
    "disc": _disc,
    "ring": _ring,
    "face": _face,
    "words": _words,
}
# Standard deviations of fixations on a salient item of the usual size, across and down, px.
SPREAD = {"disc": (16, 16), "ring": (19, 19), "face": (20, 23), "words": (30, 18)}
