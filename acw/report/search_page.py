"""report.html of a search: its configurations, which fields matter, and how each was learned; from search.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from acw.report import document, figures
from acw.report.document import Sections
from acw.report.figures import INK, PALETTE, Marks, Polyline, Scale
from acw.report.numbers import number
from acw.report.page import origin
from acw.report.tables import Row, Written, table
from acw.storage.files import fetch
from acw.training.progress import written, written_fields

# The best configuration, the recipe's own, and, from the worst to the best, all others.
BEST, OWN = PALETTE[3], INK
OTHERS = ((214, 224, 236), (0, 96, 160))
Entry = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What the sections are made of: the content of search.json, and its configurations, the best first."""

    content: dict[str, Any]
    entries: Sequence[Entry]

    @property
    def own(self) -> Entry:
        """The recipe itself."""
        return next(entry for entry in self.entries if entry["number"] == 0)

    def value(self, entry: Entry, field: str) -> Any:
        return entry["fields"].get(field, self.content["provenance"]["recipe"][field])


def write(folder: Path) -> Path:
    """Writes the report of the search whose search.json is in the folder; returns its path."""
    content = json.loads(fetch(folder / "search.json").read_text(encoding="utf-8"))
    results = Results(content, sorted(content["configurations"], key=lambda entry: -_ig(entry)))
    record = content["provenance"]
    title = f"Search of {content['space']['name']}: recipe {record['recipe']['name']} on {record['dataset']['name']}"
    return document.write(folder, "search.html", title, SECTIONS, results, search=content, cards=_cards(results))


def _cards(results: Results) -> list[tuple[str, str]]:
    best, own = results.entries[0], results.own
    gain = _ig(best) - _ig(own)
    trained = sum(entry["state"] == "finished" for entry in results.entries if entry["number"])
    return [
        (number(best["ig"]), f"bits per fixation, the best validation IG: {written_fields(best['fields'])}"),
        (number(gain, signed=True), f"bits over the recipe itself, which has {number(own['ig'])}")
        if math.isfinite(gain)
        else ("-", "the recipe itself has no finite loss"),
        (str(len(results.entries) - 1), f"configurations, of which {trained} were trained to their end"),
    ]


def configurations(results: Results) -> dict[str, Any]:
    """All of them, the best first."""
    rows: list[Row] = []
    for entry in results.entries:
        gain = _ig(entry) - _ig(results.own)
        row: dict[str, Any] = {"configuration": _name(entry), "IG": _written(entry["ig"], "{:.4f}")}
        row |= {"gain": _written(gain, "{:+.4f}") if entry["number"] and math.isfinite(gain) else None}
        row |= {"epochs": entry["epochs"], "state": entry["state"]}
        for name in results.content["space"]["fields"]:
            value = results.value(entry, name)
            row[name] = _written(value, "{:.3g}") if isinstance(value, float) else str(value).lower()
        rows.append(row)
    return {"table": table({"": rows}, marked={"recipe"})}


def what_matters(results: Results) -> dict[str, Any]:
    """The importance of each field, and a line through the values of each configuration."""
    importance: dict[str, float] = results.content["importance"]
    bars: Markup | None = None
    if importance:
        names = sorted(importance, key=lambda name: -importance[name])
        marks = [Marks("importance", "o", PALETTE[0], importance)]
        chart = figures.dots(names, marks, label="share of the variation", width=640)
        bars = figures.svg(chart, "Importance of fields")
    return {"importance": bars, "parallel": _parallel(results), "best": BEST}


def _parallel(results: Results) -> Markup:
    fields = results.content["space"]["fields"]
    scales = [_scale(name, fields[name]["attributes"]) for name in fields]
    known = [_ig(entry) for entry in results.entries if math.isfinite(_ig(entry))]
    # What is far below the others lies at the bottom, rather than that all others share the top.
    high = known[0]
    low = max(known[-1], high - 4 * (high - float(np.median(known))))
    scales.append(Scale("IG", low, high))
    rows, titles = {}, {}
    for rank, entry in reversed(list(enumerate(results.entries))):
        values = [*(results.value(entry, name) for name in fields), max(_ig(entry), low)]
        places = [at for scale, value in zip(scales, values, strict=True) if (at := scale.place(value)) is not None]
        if len(places) == len(scales):
            gid = f"configuration{entry['number']}"
            rows[gid] = Polyline(places, *_look(entry, rank, len(results.entries)))
            titles[gid] = f"{_name(entry)}: IG {_ig(entry):.4f}, {written_fields(entry['fields'])}"
    return figures.svg(figures.parallel(scales, rows), "Parallel coordinates of all configurations", titles)


def _scale(name: str, attributes: dict[str, Any]) -> Scale:
    if "choices" in attributes:
        return Scale(name, choices=tuple(attributes["choices"]))
    return Scale(name, attributes["low"], attributes["high"], attributes["log"])


def _look(entry: Entry, rank: int, count: int) -> tuple[str, float]:
    """Colour and width of a configuration's line."""
    if not entry["number"]:
        return OWN, 2.2
    if rank == 0:
        return BEST, 2.6
    share = 1 - rank / max(count - 1, 1)
    mixed = (round(worst + share * (best - worst)) for worst, best in zip(*OTHERS, strict=True))
    return "#" + bytes(mixed).hex(), 1.4


def curves(results: Results) -> dict[str, Any]:
    """IG after each epoch: of the mean over backbones, and of each backbone."""
    trained = [entry for entry in results.entries if entry["curves"]]
    best, own = trained[0], results.own
    named = {f"best, {_name(best)}": best} | ({"recipe": own} if own["curves"] and own is not best else {})
    colour = dict(zip(named, (BEST, OWN), strict=False))
    charts = []
    for title in ("all backbones", *results.content["provenance"]["recipe"]["backbones"]):
        every = [entry["curves"][title] if title in entry["curves"] else _mean(entry) for entry in trained]
        series = {name: every[trained.index(entry)] for name, entry in named.items()}
        values = np.concatenate([np.array(curve) for curve in every])
        limits = figures.padded(float(np.percentile(values, 10)), float(values.max()))
        chart = figures.lines(series, title=title, x_label="epoch", first=1, limits=limits, colour=colour, faint=every)
        charts.append(figures.svg(chart, f"IG after each epoch, {title}"))
    return {"charts": charts}


def the_search(results: Results) -> dict[str, Any]:
    """Its space and where it comes from."""
    space = results.content["space"]
    ranges = {name: _range(field["attributes"]) for name, field in space["fields"].items()}
    return {"doc": space["doc"].partition("\n")[0], "ranges": ranges, **origin(results.content["provenance"])}


SECTIONS: Sections[Results] = {
    "Configurations": configurations,
    "What matters": what_matters,
    "Curves": curves,
    "The search": the_search,
}


def _ig(entry: Entry) -> float:
    return -math.inf if entry["ig"] is None or entry["state"] == "diverged" else entry["ig"]


def _name(entry: Entry) -> str:
    return str(entry["number"]) if entry["number"] else "recipe"


def _written(value: float | None, form: str) -> Written | None:
    return None if value is None else Written(value, form.format(value))


def _mean(entry: Entry) -> list[float]:
    return [float(np.mean(values)) for values in zip(*entry["curves"].values(), strict=True)]


def _range(attributes: dict[str, Any]) -> str:
    if "choices" in attributes:
        return ", ".join(written(choice) for choice in attributes["choices"])
    scale = ", evenly on a logarithmic scale" if attributes["log"] else ""
    return f"{attributes['low']:g} to {attributes['high']:g}{scale}"
