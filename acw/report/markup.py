"""HTML of the reports: one self-contained document, tables that a click sorts, switches between parts."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

from acw.evaluation.metrics import better


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    mean: float
    low: float
    high: float


class Written(NamedTuple):
    """A value that is written in its own way."""

    value: float
    text: str


Cell = Interval | Written | float | str | None
Row = Mapping[str, Cell]


def document(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """A page with a heading, `lead` below it, and sections by their headings; both are HTML. It can load nothing."""
    script, style = (files("acw.report").joinpath(name).read_text("utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    names = {heading: f"s{number}" for number, heading in enumerate(sections)}
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for heading, name in names.items())
    body = "".join(
        f'<section id="{names[heading]}"><h2>{escape(heading)}</h2>{content}</section>'
        for heading, content in sections.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<header><h1>{escape(title)}</h1>{lead}</header><nav aria-label="sections"><div>{links}</div></nav>'
        f"<main>{body}</main><footer></footer><script>{script}</script></body></html>\n"
    )


def table(
    columns: Sequence[str],
    groups: Mapping[str, Sequence[Row]],
    *,
    notes: Mapping[str, str] | None = None,
    marked: Collection[str] = (),
    percent: Collection[str] = (),
    differences: bool = False,
) -> str:
    """Rows under the headings of their groups, sortable by column; bold is what shows as the first group's best.

    notes: what to say below a text. marked: rows to shade, by their first cell. percent: columns to show as such.
    differences: numbers are differences, with a sign, and bold are the intervals that exclude 0.
    """
    rows = [row for group in groups.values() for row in group]
    numeric = {name for name in columns if any(_number(row.get(name)) is not None for row in rows)}
    heads = []
    for name in columns:
        first = "descending" if name in numeric and _better(name) >= 0 else "ascending"
        kind = "" if name in numeric else ' class="text"'
        label = escape(name) or "name"
        heads.append(f'<th scope="col" data-first="{first}"{kind}><button type="button">{label}</button></th>')
    bodies = []
    for number, (heading, group) in enumerate(groups.items()):
        best = _best(columns, group) if number == 0 and not differences else {}
        lines = [f'<tr class="group"><th colspan="{len(columns)}">{escape(heading)}</th></tr>'] if heading else []
        for row in group:
            cells = []
            for name in columns:
                cell = row.get(name)
                value = _number(cell)
                if value is None:
                    cells.append(_text_cell(cell, name in numeric, notes or {}))
                    continue
                away = isinstance(cell, Interval) and (cell.low > 0 or cell.high < 0) and bool(round(value, 4))
                bold = (differences and away) or (name in best and figure(value) == figure(best[name]))
                cells.append(_number_cell(cell, value, bold, percent=name in percent, signed=differences))
            kind = ' class="ours"' if row.get(columns[0]) in marked else ""
            lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
        bodies.append(f"<tbody>{''.join(lines)}</tbody>" if group else "")
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    size = "broad" if len(columns) > 6 else "narrow"
    return f'<div class="scroll"><table class="{size}">{head}{"".join(bodies)}</table></div>'


def _best(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    best = {}
    for name in columns:
        values = [value for row in rows if (value := _number(row.get(name))) is not None]
        if _better(name) and len(values) > 1:
            best[name] = (max if _better(name) > 0 else min)(values)
    return best


def _number(cell: Cell) -> float | None:
    value = cell.mean if isinstance(cell, Interval) else cell.value if isinstance(cell, Written) else cell
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _text_cell(cell: Cell, numeric: bool, notes: Mapping[str, str]) -> str:
    text = cell if isinstance(cell, str) else "\N{EN DASH}"
    note = f"<small>{escape(notes[text])}</small>" if text in notes else ""
    kind = "" if numeric else ' class="text"'
    return f"<td{kind}>{escape(text)}{note}</td>"


def _number_cell(cell: Cell, value: float, bold: bool, *, percent: bool, signed: bool) -> str:
    shown = minus(cell.text) if isinstance(cell, Written) else figure(value, percent, signed=signed)
    if bold:
        shown = f"<b>{shown}</b>"
    if isinstance(cell, Interval):
        low, high = (figure(end, percent, signed=signed) for end in (cell.low, cell.high))
        shown += f"<small>[{low}, {high}]</small>"
    return f'<td data-number="{value:.9g}">{shown}</td>'


def figure(value: float, percent: bool = False, *, signed: bool = False) -> str:
    """A number as a person reads it, with a true minus sign. percent: of a share. signed: a difference."""
    digits = 1 if percent or abs(value) >= 100 else 4 if signed else 3
    # Rounded first, and -0.0 + 0.0 is 0.0: no sign without a difference to be seen.
    rounded = round(100 * value if percent else value, 0 if isinstance(value, int) else digits) + 0.0
    sign = "+" if signed and rounded else ""
    text = f"{rounded:{sign},.{0 if isinstance(value, int) else digits}f}" + (" %" if percent else "")
    return minus(text)


def minus(number: str) -> str:
    """The number with a true minus sign."""
    return number.replace("-", "\N{MINUS SIGN}")


def heat_map(rows: Mapping[str, Mapping[str, Interval]], what: str) -> str:
    """A matrix in which darker is more, sortable; the small number is half the width of the interval."""
    columns = list(next(iter(rows.values())))
    highest = max(cell.mean for row in rows.values() for cell in row.values()) or 1.0
    heads = [f'<th scope="col" data-first="ascending"><button type="button">{escape(what)}</button></th>']
    heads += [
        f'<th scope="col" data-first="descending"><button type="button">{escape(name)}</button></th>'
        for name in columns
    ]
    lines = []
    for name, row in rows.items():
        cells = []
        for cell in row.values():
            share = max(cell.mean, 0) / highest
            red, green, blue = (round(255 + share * (full - 255)) for full in (8, 81, 156))
            colour = f"background:rgb({red},{green},{blue});color:{'white' if share > 0.72 else '#1b1f24'}"
            half = (cell.high - cell.low) / 2
            text = f"{cell.mean:.2f} <small>± {half:.2f}</small>"
            cells.append(f'<td style="{colour}" data-number="{cell.mean:.9g}">{text}</td>')
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    return f'<div class="scroll"><table class="heat">{head}<tbody>{"".join(lines)}</tbody></table></div>'


def facts(rows: Mapping[str, object]) -> str:
    """Names and values, a line each."""
    lines = "".join(f'<tr><th scope="row">{escape(n)}</th><td>{escape(str(v))}</td></tr>' for n, v in rows.items())
    return f'<div class="scroll"><table class="facts"><tbody>{lines}</tbody></table></div>'


def switch(label: str, name: str, choices: Sequence[str]) -> str:
    """A select element; all of one `name`, a word, go together."""
    options = "".join(f'<option value="{escape(text)}">{escape(text)}</option>' for text in choices)
    return f'<label>{escape(label)} <select name="{name}" autocomplete="off">{options}</select></label>'


def switched(name: str, parts: Mapping[str, str]) -> str:
    """HTML for each choice, of which one is shown at a time, by the switch of that name."""
    shown = "".join(
        f'<div data-choice="{escape(choice)}"{" hidden" if number else ""}>{part}</div>'
        for number, (choice, part) in enumerate(parts.items())
    )
    return f'<div data-switched="{name}">{shown}</div>'


def _better(name: str) -> int:
    """1 or -1 of a column in which one row may be the best, as more or less is better; 0 of others."""
    return -1 if name == "loss" else better(name)
