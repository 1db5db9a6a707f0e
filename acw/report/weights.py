"""The category weights of runs, and how they were learned: a chart a run and category."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from markupsafe import Markup

from acw.report import figures
from acw.report.tables import Interval
from acw.storage.files import csv_rows, fetch

Weights = Mapping[str, Mapping[str, Interval]]  # category -> backbone -> weight
History = Mapping[str, Mapping[str, list[float]]]  # category -> backbone -> weight at each step

UNCHANGED = "as all images"
TRIFLE = 0.05  # changes of a number that go without saying


def weights_of(run: Path) -> Weights:
    """Those that a run's mixture has."""
    weights: dict[str, dict[str, Interval]] = defaultdict(dict)
    for row in csv_rows(run / "category_weights.csv"):
        weights[row["category"]][row["backbone"]] = Interval(*(float(row[k]) for k in ("weight", "low", "high")))
    return weights


def adapted_weights_of(run: Path) -> Weights:
    """Those of the adaptation, by category and, as `all images`, for all; without intervals."""
    weights: dict[str, dict[str, Interval]] = {}
    for row in csv_rows(run / "category_adaptation.csv"):
        values = {name.partition(":")[2]: float(row[name]) for name in row if name.startswith("weight:")}
        weights[row["category"]] = {name: Interval(value, value, value) for name, value in values.items()}
    return weights


def changes(run: Path) -> dict[str, str]:
    """Category -> what its adaptation changes against the numbers for all images, in words; empty without one."""
    path = run / "category_adaptation.csv"
    if not fetch(path).exists():
        return {}
    *categories, overall = csv_rows(path)
    return {row["category"]: ", ".join(_changed(row, overall)) or UNCHANGED for row in categories}


def _changed(row: Mapping[str, str], overall: Mapping[str, str]) -> Iterator[str]:
    """What is more than a trifle."""
    if abs(math.log(float(row["area"]))) > TRIFLE:
        yield f"area x{float(row['area']):.2f}"
    for column, words in (("temperature", "temperature"), ("center_bias", "centre bias")):
        if abs(float(row[column]) - float(overall[column])) > TRIFLE:
            yield f"{words} {float(overall[column]):.2f} -> {float(row[column]):.2f}"
    if abs(float(row["own_center_bias"])) > TRIFLE:
        yield f"own centre bias {float(row['own_center_bias']):.2f}"
    blurred = [1 - float(numbers["blur:0"]) for numbers in (overall, row)]
    if abs(blurred[1] - blurred[0]) > TRIFLE:
        yield f"blurred share {blurred[0]:.2f} -> {blurred[1]:.2f}"
    for column in (name for name in row if name.startswith("weight:")):
        if abs(float(row[column]) - float(overall[column])) > TRIFLE:
            yield f"{column.partition(':')[2]} {float(overall[column]):.2f} -> {float(row[column]):.2f}"


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
