"""Charts as SVG text: lines over steps, and dots on a scale a category. Small, crisp, without a library."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from acw.report.markup import figure, minus

# Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7a6a00")
INK, FAINT, GRID = "#1b1f24", "#8c959f", "#e3e7eb"
CHARACTER = 6.9  # px, of 12 px text, on average
LINE = 15  # px between texts


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in order; they repeat where there are more names than colours."""
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}


def lines(
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    first: int,
    limits: tuple[float, float],
    colour: Mapping[str, str],
    faint: Sequence[Sequence[float]] = (),
    size: tuple[int, int] = (520, 270),
) -> str:
    """Values over steps `first`, `first` + 1, ..., each line named at its end with its last value; one in the title.

    limits: of the vertical axis; lines run out of the frame beyond them. faint: further lines, thin and without a name
    (NaN where they have stopped).
    """
    width, height = size
    names = [f"{name} {figure(series[name][-1])}" for name in series]
    alone = len(names) == 1
    box = _Box(44, 30, width - (10 if alone else 14 + CHARACTER * max(map(len, names))), height - 40)
    low, high = limits
    last = first + max(max(map(len, (*series.values(), *faint))) - 1, 1)

    def x(step: float) -> float:
        return box.left + (step - first) / (last - first) * (box.right - box.left)

    def y(value: float) -> float:
        return box.bottom - (value - low) / (high - low) * (box.bottom - box.top)

    parts = [_text(0, 16, title, "strong")]
    if alone:
        parts.append(_text(box.right, 16, names[0], "soft", "end"))
    for tick in ticks(low, high, 5):
        parts.append(_line(box.left, y(tick), box.right, y(tick), GRID))
        parts.append(_text(box.left - 6, y(tick) + 4, minus(f"{tick:g}"), "soft", "end"))
    for tick in ticks(first, last, min(8, last - first + 1)):
        if tick == int(tick):
            parts.append(_text(x(tick), box.bottom + 17, f"{tick:g}", "soft", "middle"))
    parts.append(_text((box.left + box.right) / 2, height - 6, x_label, "soft", "middle"))

    # An inner svg element shows only what is inside of it.
    x_frame, y_frame, wide, high_ = box.left - 5, box.top - 5, box.right - box.left + 10, box.bottom - box.top + 5
    parts.append(
        f'<svg x="{x_frame}" y="{y_frame}" width="{wide:.1f}" height="{high_}" fill="none" '
        f'viewBox="{x_frame} {y_frame} {wide:.1f} {high_}">'
    )
    for curve in faint:
        parts.append(_path([(x(first + k), y(v)) for k, v in enumerate(curve) if math.isfinite(v)], FAINT, 0.8, 0.5))
    for name, curve in series.items():
        points = [(x(first + k), y(value)) for k, value in enumerate(curve)]
        parts.append(_path(points, colour[name], 2.2))
        if len(points) <= 25 and not faint:
            parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{colour[name]}"/>' for px, py in points]
    parts.append("</svg>")
    ends = _apart([min(max(y(curve[-1]), box.top), box.bottom) for curve in series.values()])
    for label, name, end in () if alone else zip(names, series, ends, strict=True):
        parts.append(f'<rect x="{box.right + 5:.1f}" y="{end - 1.5:.1f}" width="9" height="3" fill="{colour[name]}"/>')
        parts.append(_text(box.right + 18, end + 4, label))
    return _svg(width + 16, height, title, parts)


@dataclass(frozen=True)
class Marks:
    """What `dots` draws of one model: `shape` is dot, ring, tick or diamond; intervals, if any, as whiskers."""

    name: str
    shape: str
    colour: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] | None = None


def dots(categories: Sequence[str], marks: Sequence[Marks], *, label: str, width: int = 860) -> str:
    """A line a category with a mark for each model, and the legend; what is drawn last lies on top."""
    row, top = 24, 34
    left = 14 + CHARACTER * min(max(map(len, categories)), 28)
    bottom = top + row * len(categories)
    ends = [v for m in marks for v in m.values.values()]
    ends += [v for m in marks for interval in (m.intervals or {}).values() for v in interval]
    low, high = min(0.0, *ends), max(0.0, *ends)
    margin = 0.03 * (high - low or 1.0)
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 14)

    parts = []
    for tick in ticks(low, high, 9):
        parts.append(_line(x(tick), top - 6, x(tick), bottom, GRID if tick else FAINT))
        parts.append(_text(x(tick), bottom + 16, minus(f"{tick:g}"), "soft", "middle"))
    parts.append(_text((left + width) / 2, bottom + 34, label, "soft", "middle"))
    place = left
    for mark in marks:
        parts += [_mark(mark, place + 5, 12), _text(place + 15, 16, mark.name)]
        place += 15 + CHARACTER * len(mark.name) + 18
    for number, category in enumerate(categories):
        middle = top + row * (number + 0.5)
        text = category if len(category) <= 28 else category[:27] + "…"
        parts.append(_text(left - 10, middle + 4, text, anchor="end"))
        for mark in marks:
            if mark.intervals and category in mark.intervals:
                start, end = mark.intervals[category]
                parts.append(_line(x(start), middle, x(end), middle, mark.colour, 1.8))
            if category in mark.values:
                parts.append(_mark(mark, x(mark.values[category]), middle))
    return _svg(max(width, math.ceil(place)), bottom + 42, label, parts)


@dataclass(frozen=True)
class Axis:
    """One of `parallel`: values from `low` at the bottom to `high`, which lie further apart where `log`; or choices."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: Sequence[object] = ()

    def place(self, value: object) -> float | None:
        """Between 0 at the bottom and 1; None for what is not on the axis."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices) if value in self.choices else None
        assert isinstance(value, int | float)
        if not self.low <= value <= self.high:
            return None
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5

    def marks(self) -> list[tuple[float, str]]:
        """Places and texts along the axis."""
        values: Sequence[object] = self.choices
        if not self.choices and self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            round_ = [10.0**power * factor for power in powers for factor in (1, 2, 5)]
            inside = [value for value in round_ if self.low <= value <= self.high]
            values = [self.low, self.high] if len(inside) < 2 else inside
        elif not self.choices:
            values = ticks(self.low, self.high, 5) if self.high > self.low else [self.low]
        texts = [f"{v:g}" if isinstance(v, float) else str(v).lower() for v in values]
        return [(at, minus(text)) for v, text in zip(values, texts, strict=True) if (at := self.place(v)) is not None]


@dataclass(frozen=True)
class Polyline:
    """A line of `parallel`: a place between 0 and 1 on each axis; `text` is shown where the pointer is on it."""

    places: Sequence[float]
    text: str
    colour: str
    width: float = 1.4


def parallel(axes: Sequence[Axis], rows: Sequence[Polyline], *, title: str, size: tuple[int, int] = (860, 330)) -> str:
    """Parallel coordinates: a line a row through its values on all axes; what is drawn last lies on top."""
    width, height = size
    box = _Box(60, 40, width - 60, height - 16)
    step = (box.right - box.left) / max(len(axes) - 1, 1)

    def y(place: float) -> float:
        return box.bottom - place * (box.bottom - box.top)

    parts = []
    for row in rows:
        points = [(box.left + k * step, y(place)) for k, place in enumerate(row.places)]
        line = _path(points, row.colour, row.width, 0.9).removesuffix("/>")
        parts.append(f'{line} fill="none"><title>{escape(row.text)}</title></path>')
    for k, axis in enumerate(axes):
        x = box.left + k * step
        parts.append(_line(x, box.top, x, box.bottom, INK))
        parts.append(_text(x, 18, axis.name, "strong", "middle"))
        for place, text in axis.marks():
            # Those of the last axis are beyond all lines.
            side, anchor = (1, "start") if k == len(axes) - 1 else (-1, "end")
            parts.append(_line(x, y(place), x + 4 * side, y(place), INK))
            parts.append(_text(x + 8 * side, y(place) + 4, text, "soft halo", anchor))
    return _svg(width, height, title, parts)


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers within an interval, some `wanted` of them."""
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.8)
    return [round(k * step, 10) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float


def _apart(places: Sequence[float]) -> list[float]:
    """The same places, moved downwards as far as texts need, and all of them up again by what the last was moved."""
    order = sorted(range(len(places)), key=lambda k: places[k])
    result = list(places)
    for before, after in itertools.pairwise(order):
        result[after] = max(result[after], result[before] + LINE)
    excess = max(0.0, result[order[-1]] - places[order[-1]]) / 2
    return [place - excess for place in result]


def _mark(mark: Marks, x: float, y: float) -> str:
    if mark.shape == "tick":
        return _line(x, y - 6, x, y + 6, mark.colour, 2.2)
    if mark.shape == "diamond":
        return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z" fill="{mark.colour}"/>'
    fill = "white" if mark.shape == "ring" else mark.colour
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{mark.colour}" stroke-width="1.8"/>'


def _path(points: Sequence[tuple[float, float]], colour: str, width: float, opacity: float = 1.0) -> str:
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return (
        f'<path d="{d}" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
    )
