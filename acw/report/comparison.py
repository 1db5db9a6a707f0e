"""report.html of a reproduction: the tables of all systems of Galván's ACW (2024) and Linardos et al.'s DeepGaze IIE
(2021), and how each one's weights were learned.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from acw.report import document, page, weights
from acw.report.document import FILE, Sections
from acw.report.tables import Interval, Row, Table, Value, table
from acw.storage.addresses import local
from acw.storage.files import fetch


@dataclass(frozen=True)
class Comparison:
    """What the sections are made of: reproduction.json, the folder that it is in, and the folder of each run."""

    content: dict[str, Any]
    folder: Path
    runs: dict[str, Path]


def write(folder: Path) -> Path:
    """Writes report.html beside a reproduction.json (jobs/reproduce.py) and returns its path."""
    content = json.loads(fetch(folder / "reproduction.json").read_text(encoding="utf-8"))
    source = Comparison(content, folder, {name: local(run) for name, run in content["runs"].items()})
    title = f"The systems of ACW and DeepGaze IIE on {content['dataset']['name']}"
    return document.write(folder, "comparison.html", title, SECTIONS, source, reproduction=content)


def validation(comparison: Comparison) -> dict[str, Any]:
    """The published table 1."""
    return {"table": _measured(comparison.content["table1"])}


def held_out(comparison: Comparison) -> dict[str, Any]:
    """The published table 2."""
    return {"table": _measured(comparison.content["table2"])}


def differences(comparison: Comparison) -> dict[str, Any]:
    """Every two systems on the same images."""
    return {"table": page.differences(comparison.content["comparisons"])}


def learned(comparison: Comparison) -> dict[str, Any]:
    """The weights of those that learned any."""
    return {
        "charts": weights.progressions({name: run for name, run in comparison.runs.items() if weights.learned(run)})
    }


def runs(comparison: Comparison) -> dict[str, Any]:
    """Each system's own report."""
    links = {name: quote(os.path.relpath(run / FILE, comparison.folder)) for name, run in comparison.runs.items()}
    return {"links": [(name, links[name], str(run)) for name, run in comparison.runs.items()]}


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
