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

from acw.report import figures
from acw.report.document import Sections, render
from acw.report.figures import INK, PALETTE, Marks, Polyline, Scale
from acw.report.numbers import number
from acw.report.page import FILE, origin
from acw.report.tables import Row, Written, table
from acw.storage.files import fetch, write_atomic
from acw.training.progress import written, written_fields

# The best configuration, the recipe's own, and, from the worst to the best, all others.
BEST, OWN = PALETTE[3], INK
OTHERS = ((214, 224, 236), (0, 96, 160))
Entry = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What the sections are made of: the content of search.json, and its configurations, the best first."""

    content: dict[str, Any]
    entries: Sequence[Entry]

    @property
    def own(self) -> Entry:
        """The recipe itself."""
        return next(one for one in self.entries if one["number"] == 0)

    def value(self, entry: Entry, field: str) -> Any:
        return entry["fields"].get(field, self.content["provenance"]["recipe"][field])


def write(folder: Path) -> Path:
    """Writes the report of the search whose search.json is in the folder; returns its path."""
    content = json.loads(fetch(folder / "search.json").read_text(encoding="utf-8"))
    found = Found(content, sorted(content["configurations"], key=lambda one: -_ig(one)))
    record = content["provenance"]
    title = f"Search of {content['space']['name']}: recipe {record['recipe']['name']} on {record['dataset']['name']}"
    page = render("search.html", title, SECTIONS, found, found=content, cards=_cards(found))
    write_atomic(folder / FILE, page)
    return folder / FILE


def _cards(found: Found) -> list[tuple[str, str]]:
    best, own = found.entries[0], found.own
    gain = _ig(best) - _ig(own)
    trained = sum(one["state"] == "finished" for one in found.entries if one["number"])
    return [
        (number(best["ig"]), f"bits per fixation, the best validation IG: {written_fields(best['fields'])}"),
        (number(gain, signed=True), f"bits over the recipe itself, which has {number(own['ig'])}")
        if math.isfinite(gain)
        else ("-", "the recipe itself has no finite loss"),
        (str(len(found.entries) - 1), f"configurations, of which {trained} were trained to their end"),
    ]


def configurations(found: Found) -> dict[str, Any]:
    """All of them, the best first."""
    rows: list[Row] = []
    for one in found.entries:
        gain = _ig(one) - _ig(found.own)
        row: dict[str, Any] = {"configuration": _name(one), "IG": _written(one["ig"], "{:.4f}")}
        row |= {"gain": _written(gain, "{:+.4f}") if one["number"] and math.isfinite(gain) else None}
        row |= {"epochs": one["epochs"], "state": one["state"]}
        for name in found.content["space"]["fields"]:
            value = found.value(one, name)
            row[name] = _written(value, "{:.3g}") if isinstance(value, float) else str(value).lower()
        rows.append(row)
    return {"table": table({"": rows}, marked={"recipe"})}


def what_matters(found: Found) -> dict[str, Any]:
    """The importance of each field, and a line through the values of each configuration."""
    importance: dict[str, float] = found.content["importance"]
    bars: Markup | None = None
    if importance:
        names = sorted(importance, key=lambda name: -importance[name])
        marks = [Marks("importance", "o", PALETTE[0], importance)]
        chart = figures.dots(names, marks, label="share of the variation", width=640)
        bars = figures.svg(chart, "Importance of fields")
    return {"importance": bars, "parallel": _parallel(found), "best": BEST}


def _parallel(found: Found) -> Markup:
    fields = found.content["space"]["fields"]
    scales = [_scale(name, fields[name]["attributes"]) for name in fields]
    known = [_ig(one) for one in found.entries if math.isfinite(_ig(one))]
    # What is far below the others lies at the bottom, rather than that all others share the top.
    high = known[0]
    low = max(known[-1], high - 4 * (high - float(np.median(known))))
    scales.append(Scale("IG", low, high))
    rows, titles = {}, {}
    for rank, one in reversed(list(enumerate(found.entries))):
        values = [*(found.value(one, name) for name in fields), max(_ig(one), low)]
        places = [at for scale, value in zip(scales, values, strict=True) if (at := scale.place(value)) is not None]
        if len(places) == len(scales):
            gid = f"configuration{one['number']}"
            rows[gid] = Polyline(places, *_look(one, rank, len(found.entries)))
            titles[gid] = f"{_name(one)}: IG {_ig(one):.4f}, {written_fields(one['fields'])}"
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


def curves(found: Found) -> dict[str, Any]:
    """IG after each epoch: of the mean over backbones, and of each backbone."""
    trained = [one for one in found.entries if one["curves"]]
    best, own = trained[0], found.own
    named = {f"best, {_name(best)}": best} | ({"recipe": own} if own["curves"] and own is not best else {})
    colour = dict(zip(named, (BEST, OWN), strict=False))
    charts = []
    for title in ("all backbones", *found.content["provenance"]["recipe"]["backbones"]):
        every = [one["curves"][title] if title in one["curves"] else _mean(one) for one in trained]
        series = {name: every[trained.index(one)] for name, one in named.items()}
        values = np.concatenate([np.array(one) for one in every])
        limits = figures.padded(float(np.percentile(values, 10)), float(values.max()))
        chart = figures.lines(series, title=title, x_label="epoch", first=1, limits=limits, colour=colour, faint=every)
        charts.append(figures.svg(chart, f"IG after each epoch, {title}"))
    return {"charts": charts}


def the_search(found: Found) -> dict[str, Any]:
    """Its space and where it comes from."""
    space = found.content["space"]
    ranges = {name: _range(one["attributes"]) for name, one in space["fields"].items()}
    return {"doc": space["doc"].partition("\n")[0], "ranges": ranges, **origin(found.content["provenance"])}


SECTIONS: Sections[Found] = {
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
