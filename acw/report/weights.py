"""The category weights of runs, and how they were learned: a chart a run and category."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from acw.report import figures
from acw.report.tables import Interval
from acw.storage.files import csv_rows, fetch

Weights = Mapping[str, Mapping[str, Interval]]  # category -> backbone -> weight
History = Mapping[str, Mapping[str, list[float]]]  # category -> backbone -> weight at each step


def weights_of(run: Path) -> Weights:
    """Those that a run's mixture has."""
    weights: dict[str, dict[str, Interval]] = defaultdict(dict)
    for row in csv_rows(run / "category_weights.csv"):
        weights[row["category"]][row["backbone"]] = Interval(*(float(row[k]) for k in ("weight", "low", "high")))
    return weights


def progressions(runs: Mapping[str, Path]) -> dict[str, list[Markup]]:
    """Category -> a chart for each run (name -> folder), all on the same scale."""
    histories = {name: _history(run) for name, run in runs.items()}
    every = {(c, b): weights for h in histories.values() for c, by in h.items() for b, weights in by.items()}
    values = [v for h in histories.values() for by in h.values() for weights in by.values() for v in weights]
    if not values:
        return {}
    limits = (min(values) - 0.02, max(max(values) + 0.02, min(values) + 0.1))
    colour = figures.colours(backbone for _, backbone in every)
    charts: dict[str, list[Markup]] = {category: [] for category in sorted({category for category, _ in every})}
    for name, run in runs.items():
        recipe = json.loads(fetch(run / "recipe.json").read_text(encoding="utf-8"))["recipe"]
        x_label = "epoch" if recipe.get("joint") else "step of EM"
        for category, series in histories[name].items():
            title = f"{name}: {category}" if name else category
            chart = figures.lines(series, title=title, x_label=x_label, first=0, limits=limits, colour=colour)
            charts[category].append(figures.svg(chart, f"Weights of {title}"))
    return charts


def learned(run: Path) -> bool:
    """Whether any weight is another than at the start."""
    every = [weights for by_backbone in _history(run).values() for weights in by_backbone.values()]
    return any(weights[-1] != weights[0] for weights in every)


def _history(run: Path) -> History:
    result: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in csv_rows(run / "category_weights_history.csv"):
        result[row["category"]][row["backbone"]].append(float(row["weight"]))
    return result
