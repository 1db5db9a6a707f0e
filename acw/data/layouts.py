"""The categories of the built-in displays: what is on them, which of it draws the eye, and how people look there.

On the displays of four categories one kind of item is alone, and people look at its salient items alike. On those of
the other four, several kinds are mixed, of which one draws the eye, or the items are smaller or larger; and how far
around an item people look, how often at none, and from where on, is the category's own. Heads that were trained on the
first four see what stands out on the others, but not what people do there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from acw.data.displays import HEIGHT, WIDTH, Colour, Draws, oklch
from acw.data.items import Item


@dataclass(frozen=True)
class Looking:
    """How people look.

    salient, central: shares of the fixations; the rest is anywhere. spread: of fixations on a salient item, as a
    multiple of `items.SPREAD`. middle, extent: mean and standard deviations of the central ones, as shares of width and
    height. decay: an item that is further from the middle by so much, as a share of the display, is looked at e times
    less.
    """

    salient: float = 0.75
    central: float = 0.2
    spread: float = 1.0
    middle: tuple[float, float] = (0.5, 0.5)
    extent: tuple[float, float] = (0.22, 0.22)
    decay: float = math.inf


@dataclass(frozen=True)
class Category:
    """kind: whose salient items draw the eye; among: kinds whose salient items are there too and draw nobody.

    rows, columns: of the loose grid of items. scale: of the items. hue: of the ground, in radians; None: nearly grey.
    """

    kind: str
    rows: int
    columns: int
    looking: Looking = Looking()
    among: tuple[str, ...] = ()
    scale: float = 1.0
    hue: float | None = None


CATEGORIES = {
    "Closeups": Category("face", 2, 3, Looking(0.7, 0.25, 1.2, extent=(0.15, 0.15)), scale=1.8),
    "Colour": Category("disc", 4, 6),
    "Contour": Category("ring", 4, 5),
    "Crowds": Category("face", 3, 4, Looking(0.85, 0.1), among=("words", "disc"), hue=4.3),
    "Faces": Category("face", 3, 4),
    "Posters": Category(
        "words", 3, 4, Looking(0.7, 0.27, 1.2, (0.2, 0.25), (0.15, 0.2), 0.4), among=("face", "disc"), hue=1.4
    ),
    "Print": Category("words", 5, 6, Looking(0.75, 0.2, 1.4, (0.5, 0.25), (0.25, 0.12), 0.4), scale=0.6),
    "Text": Category("words", 3, 4),
}


@dataclass(frozen=True)
class Display:
    """The colour of the ground, and the items in the order in which they are drawn."""

    ground: Colour
    items: tuple[Item, ...]


def lay_out(version: object, category: str, index: int) -> Display:
    """The display of this name: equal arguments, equal display."""
    draws, mine = Draws(version, category, index, "layout"), CATEGORIES[category]
    lightness = draws.uniform(0.44, 0.52)
    ground = oklch(lightness, 0.008, draws.angle()) if mine.hue is None else oklch(lightness, 0.04, mine.hue)
    return Display(ground, tuple(_items(draws, mine)))


def _items(draws: Draws, category: Category) -> Iterator[Item]:
    """On a loose grid, one to three salient items of the kind that draws the eye, but no more than one in four, one or
    two of each other kind, and plain ones."""
    rows, columns, kinds = category.rows, category.columns, (category.kind, *category.among)
    order = draws.order(rows * columns)
    salient = [category.kind] * min((1, 1, 2, 2, 3)[draws.integer(0, 4)], rows * columns // 4)
    for kind in category.among:
        salient += [kind] * draws.integer(1, 2)
    kind_at = dict(zip(order, salient, strict=False))
    cell = min(WIDTH / columns, HEIGHT / rows)
    for place in range(rows * columns):
        kind = kind_at.get(place, kinds[draws.integer(0, len(kinds) - 1)])
        x = (place % columns + 0.5) * WIDTH / columns + draws.uniform(-0.09, 0.09) * cell
        y = (place // columns + 0.5) * HEIGHT / rows + draws.uniform(-0.09, 0.09) * cell
        yield Item(kind, x, y, category.scale * draws.uniform(0.9, 1.1), place in kind_at)
