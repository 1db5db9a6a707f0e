"""report.html of a reproduction: the tables of all its systems, and how each one's weights were learned."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from acw.report import page, weights
from acw.report.document import Sections, render
from acw.report.tables import Interval, Row, Table, Value, table
from acw.storage.addresses import local
from acw.storage.files import fetch, write_atomic


@dataclass(frozen=True)
class Comparison:
    """What the sections are made of: reproduction.json, the folder that it is in, and the folder of each run."""

    found: dict[str, Any]
    folder: Path
    runs: dict[str, Path]


def write(folder: Path) -> Path:
    """Writes report.html beside a reproduction.json (jobs/reproduce.py) and returns its path."""
    found = json.loads(fetch(folder / "reproduction.json").read_text(encoding="utf-8"))
    source = Comparison(found, folder, {name: local(run) for name, run in found["runs"].items()})
    title = f"The paper's systems on {found['dataset']['name']}"
    write_atomic(folder / page.FILE, render("comparison.html", title, SECTIONS, source, found=found))
    return folder / page.FILE


def validation(one: Comparison) -> dict[str, Any]:
    """The published table 1."""
    return {"table": _measured(one.found["table1"])}


def held_out(one: Comparison) -> dict[str, Any]:
    """The published table 2."""
    return {"table": _measured(one.found["table2"])}


def differences(one: Comparison) -> dict[str, Any]:
    """Every two systems on the same images."""
    return {"table": page.differences(one.found["comparisons"])}


def learned(one: Comparison) -> dict[str, Any]:
    """The weights of those that learned any."""
    return {"charts": weights.progressions({name: run for name, run in one.runs.items() if weights.learned(run)})}


def runs(one: Comparison) -> dict[str, Any]:
    """Each system's own report."""
    links = {name: quote(os.path.relpath(run / page.FILE, one.folder)) for name, run in one.runs.items()}
    return {"links": [(name, links[name], str(run)) for name, run in one.runs.items()]}


SECTIONS: Sections[Comparison] = {
    "Table 1": validation,
    "Table 2": held_out,
    "Differences": differences,
    "Weights": learned,
    "Runs": runs,
}


def _measured(rows: Sequence[dict[str, Any]]) -> Table:
    """`X low` and `X high` are the interval of X; what was measured here is compared."""
    columns = [name for name in rows[0] if name != "measured" and not name.endswith((" low", " high"))]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cells: dict[str, Value] = {name: row[name] for name in columns}
        for name in columns:
            if row.get(f"{name} low") is not None:
                cells[name] = Interval(row[name], row[f"{name} low"], row[f"{name} high"])
        groups[row["measured"]].append(cells)
    return table(groups, columns)
