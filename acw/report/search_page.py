"""report.html of a search: its configurations, which fields matter, and how each was learned; from search.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from acw.report import charts, markup
from acw.report.charts import INK, PALETTE, Axis, Marks, Polyline
from acw.report.markup import Row, Written, figure
from acw.storage.files import fetch, write_atomic
from acw.training.progress import written, written_fields

FILE = "report.html"
# The best configuration, the recipe's own, and, from the worst to the best, all others.
BEST, OWN = PALETTE[3], INK
OTHERS = ((214, 224, 236), (0, 96, 160))
Entry = dict[str, Any]


def write(folder: Path) -> Path:
    """Writes the report of the search whose search.json is in the folder; returns its path."""
    found = json.loads(fetch(folder / "search.json").read_text(encoding="utf-8"))
    entries: list[Entry] = sorted(found["configurations"], key=lambda one: -_ig(one))
    sections = {
        "Configurations": _table(found, entries),
        "What matters": _importance(found["importance"]) + _parallel(found, entries),
        "Curves": _curves(found, entries),
        "The search": _origin(found),
    }
    record = found["provenance"]
    title = f"Search of {found['space']['name']}: recipe {record['recipe']['name']} on {record['dataset']['name']}"
    write_atomic(folder / FILE, markup.document(title, _lead(found, entries), sections))
    return folder / FILE


def _ig(entry: Entry) -> float:
    return -math.inf if entry["ig"] is None or entry["state"] == "diverged" else entry["ig"]


def _name(entry: Entry) -> str:
    return str(entry["number"]) if entry["number"] else "recipe"


def _lead(found: dict[str, Any], entries: Sequence[Entry]) -> str:
    best, own = entries[0], _own(entries)
    gain = _ig(best) - _ig(own)
    folds = ", ".join(map(str, found["folds"]))
    cards = [
        (figure(best["ig"]), f"bits per fixation, the best validation IG: {written_fields(best['fields'])}"),
        (figure(gain, signed=True), f"bits over the recipe itself, which has {figure(own['ig'])}")
        if math.isfinite(gain)
        else ("-", "the recipe itself has no finite loss"),
        (str(len(entries) - 1), f"configurations, of which {_trained(entries)} were trained to their end"),
    ]
    shown = "".join(f'<div class="card"><b>{value}</b><small>{escape(text)}</small></div>' for value, text in cards)
    record = found["provenance"]
    return (
        f'<p class="soft">IG over the centre bias on the validation images of fold {folds}, the mean over '
        f"{len(record['recipe']['backbones'])} backbones of single heads. Held-out images were not used. The best of "
        "many is partly the luckiest. Commit "
        f'<span class="hash">{escape(record["commit"])}</span>.</p><div class="cards">{shown}</div>'
    )


def _own(entries: Sequence[Entry]) -> Entry:
    return next(one for one in entries if one["number"] == 0)


def _trained(entries: Sequence[Entry]) -> int:
    return sum(one["state"] == "finished" for one in entries if one["number"])


def _table(found: dict[str, Any], entries: Sequence[Entry]) -> str:
    own = _own(entries)
    rows: list[Row] = []
    for one in entries:
        gain = _ig(one) - _ig(own)
        row: dict[str, Any] = {"configuration": _name(one), "IG": _written(one["ig"], "{:.4f}")}
        row |= {"gain": _written(gain, "{:+.4f}") if one["number"] and math.isfinite(gain) else None}
        row |= {"epochs": one["epochs"], "state": one["state"]}
        for name in found["space"]["fields"]:
            value = one["fields"].get(name, found["provenance"]["recipe"][name])
            row[name] = _written(value, "{:.3g}") if isinstance(value, float) else str(value).lower()
        rows.append(row)
    columns = list(rows[0])
    return (
        "<p>The best first. Gain: over the recipe itself, in bits. Stopped: where others of its population, or other "
        "populations, were better after as many epochs. A click on a column's name sorts.</p>"
        + markup.table(columns, {"": rows}, marked={"recipe"})
    )


def _written(value: float | None, form: str) -> Written | None:
    return None if value is None else Written(value, form.format(value))


def _importance(importance: dict[str, float]) -> str:
    if not importance:
        return "<p>There is not enough to say which field matters.</p>"
    names = sorted(importance, key=lambda name: -importance[name])
    marks = [Marks("importance", "dot", PALETTE[0], importance)]
    return (
        "<p>The share of IG's variation that is due to each field alone or with others (fANOVA, a forest of regression "
        "trees). A configuration that was stopped counts with what it had reached.</p>"
        f'<div class="scroll">{charts.dots(names, marks, label="share of the variation", width=640)}</div>'
    )


def _parallel(found: dict[str, Any], entries: Sequence[Entry]) -> str:
    fields = found["space"]["fields"]
    axes = [_axis(name, fields[name]["attributes"]) for name in fields]
    known = [_ig(one) for one in entries if math.isfinite(_ig(one))]
    # What is far below the others lies at the bottom, rather than that all others share the top.
    high = known[0]
    low = max(known[-1], high - 4 * (high - float(np.median(known))))
    axes.append(Axis("IG", low, high))
    rows = []
    for rank, one in reversed(list(enumerate(entries))):
        values = [one["fields"].get(name, found["provenance"]["recipe"][name]) for name in fields]
        places = [axis.place(value) for axis, value in zip(axes, [*values, max(_ig(one), low)], strict=True)]
        on_axes = [place for place in places if place is not None]
        if len(on_axes) == len(axes):
            text = f"{_name(one)}: IG {_ig(one):.4f}, {written_fields(one['fields'])}"
            rows.append(Polyline(on_axes, text, *_look(one, rank, len(entries))))
    return (
        "<h3>All configurations</h3><p>A line each: darker is better; the best in "
        f'<span style="color:{BEST}">orange</span>, the recipe itself, where its values lie on the axes, in black.</p>'
        f'<div class="scroll">{charts.parallel(axes, rows, title="Parallel coordinates of all configurations")}</div>'
    )


def _axis(name: str, attributes: dict[str, Any]) -> Axis:
    if "choices" in attributes:
        return Axis(name, choices=tuple(attributes["choices"]))
    return Axis(name, attributes["low"], attributes["high"], attributes["log"])


def _look(entry: Entry, rank: int, count: int) -> tuple[str, float]:
    """Colour and width of a configuration's line."""
    if not entry["number"]:
        return OWN, 2.2
    if rank == 0:
        return BEST, 2.6
    share = 1 - rank / max(count - 1, 1)
    red, green, blue = (round(worst + share * (best - worst)) for worst, best in zip(*OTHERS, strict=True))
    return f"rgb({red},{green},{blue})", 1.4


def _mean(entry: Entry) -> list[float]:
    return [float(np.mean(values)) for values in zip(*entry["curves"].values(), strict=True)]


def _curves(found: dict[str, Any], entries: Sequence[Entry]) -> str:
    """IG after each epoch: of the mean over backbones, and of each backbone."""
    learned = [one for one in entries if one["curves"]]
    best, own = learned[0], _own(entries)
    named = {f"best, {_name(best)}": best} | ({"recipe": own} if own["curves"] and own is not best else {})
    colour = dict(zip(named, (BEST, OWN), strict=False))
    backbones = found["provenance"]["recipe"]["backbones"]
    of = {"all backbones": _mean} | {name: (lambda entry, n=name: entry["curves"][n]) for name in backbones}
    drawn = []
    for title, curve in of.items():
        every = [curve(one) for one in learned]
        values = np.concatenate([np.array(one) for one in every])
        low, high = float(np.percentile(values, 10)), float(values.max())
        margin = 0.06 * max(high - low, 1e-3)
        chart = charts.lines(
            {name: curve(one) for name, one in named.items()},
            title=title,
            x_label="epoch",
            first=1,
            limits=(low - margin, high + margin),
            colour=colour,
            faint=every,
        )
        drawn.append(chart)
    return (
        "<p>Validation IG after each epoch, bits per fixation; thin lines are the other configurations.</p>"
        f'<div class="charts">{"".join(drawn)}</div>'
    )


def _origin(found: dict[str, Any]) -> str:
    record, space = found["provenance"], found["space"]
    ranges = {name: _range(one["attributes"]) for name, one in space["fields"].items()}
    recipe = {name: ", ".join(v) if isinstance(v, list) else v for name, v in record["recipe"].items()}
    origin = {name: value for name, value in record.items() if isinstance(value, str | int | float)}
    return (
        f"<p>{escape(space['doc'].partition(chr(10))[0])}</p>"
        f'<div class="side"><div><h3>Space {escape(space["name"])}</h3>{markup.facts(ranges)}</div>'
        f"<div><h3>Origin</h3>{markup.facts(origin)}</div></div>"
        f"<details><summary>Recipe, all {len(recipe)} fields</summary>{markup.facts(recipe)}</details>"
        f"<details><summary>Versions</summary>{markup.facts(record['versions'])}</details>"
    )


def _range(attributes: dict[str, Any]) -> str:
    if "choices" in attributes:
        return ", ".join(written(choice) for choice in attributes["choices"])
    scale = ", evenly on a logarithmic scale" if attributes["log"] else ""
    return f"{attributes['low']:g} to {attributes['high']:g}{scale}"
