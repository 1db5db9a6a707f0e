"""Tables as the templates show them: which cell is text, which number is the best, how each is written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from acw.evaluation.metrics import better
from acw.report.numbers import minus, number


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    mean: float
    low: float
    high: float


class Written(NamedTuple):
    """A value that is written in its own way."""

    value: float
    text: str


Value = Interval | Written | float | str | None
Row = Mapping[str, Value]


class Head(NamedTuple):
    """Of a column: whether it has numbers, and whether a first click brings the largest to the top."""

    name: str
    numeric: bool
    descending: bool


class Cell(NamedTuple):
    """As it is shown; `small` stands below the text, `value` is what it is sorted by, if it is a number."""

    text: str
    small: str
    value: float | None
    bold: bool = False
    left: bool = False


@dataclass(frozen=True)
class Table:
    """Columns, and below the headings of their groups rows: whether one is marked, and its cells."""

    heads: Sequence[Head]
    groups: Mapping[str, Sequence[tuple[bool, Sequence[Cell]]]]


def table(
    groups: Mapping[str, Sequence[Row]],
    columns: Sequence[str] | None = None,
    *,
    notes: Mapping[str, str] | None = None,
    marked: Collection[str] = (),
    percent: Collection[str] = (),
    differences: bool = False,
) -> Table:
    """Rows under the headings of their groups; bold is what shows as the first group's best.

    columns: those of the first row if not given. notes: what to say below a text. marked: rows to shade, by their first
    cell. percent: columns to show as such. differences: numbers are differences, with a sign, and bold are the
    intervals that exclude 0.
    """
    columns = list(next(iter(groups.values()))[0]) if columns is None else columns
    numeric = {n for n in columns if any(_value(row.get(n)) is not None for group in groups.values() for row in group)}
    heads = [Head(name, name in numeric, name in numeric and _better(name) >= 0) for name in columns]
    best = {} if differences else _best(columns, next(iter(groups.values())))
    shown: dict[str, list[tuple[bool, list[Cell]]]] = {}
    for heading, group in groups.items():
        shown[heading] = []
        for row in group:
            cells = []
            for name in columns:
                cell = row.get(name)
                value = _value(cell)
                if value is None:
                    text = cell if isinstance(cell, str) else "\N{EN DASH}"
                    cells.append(Cell(text, (notes or {}).get(text, ""), None, left=name not in numeric))
                    continue
                away = isinstance(cell, Interval) and (cell.low > 0 or cell.high < 0) and bool(round(value, 4))
                bold = away if differences else number(value) == best.get(name)
                cells.append(_number_cell(cell, value, bold, name in percent, differences))
            shown[heading].append((row.get(columns[0]) in marked, cells))
        best = {}
    return Table(heads, shown)


def _number_cell(cell: Value, value: float, bold: bool, percent: bool, signed: bool) -> Cell:
    text = minus(cell.text) if isinstance(cell, Written) else number(value, percent, signed=signed)
    small = ""
    if isinstance(cell, Interval):
        low, high = (number(end, percent, signed=signed) for end in (cell.low, cell.high))
        small = f"[{low}, {high}]"
    return Cell(text, small, value, bold)


def _best(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    """Column -> its best value, as it is written: what cannot be told from it is as good."""
    best = {}
    for name in columns:
        values = [value for row in rows if (value := _value(row.get(name))) is not None]
        if _better(name) and len(values) > 1:
            best[name] = number((max if _better(name) > 0 else min)(values))
    return best


def _value(cell: Value) -> float | None:
    value = cell.mean if isinstance(cell, Interval) else cell.value if isinstance(cell, Written) else cell
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _better(name: str) -> int:
    """1 or -1 of a column in which one row may be the best, as more or less is better; 0 of others."""
    return -1 if name == "loss" else better(name)
