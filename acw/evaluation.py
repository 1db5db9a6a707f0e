"""Scores of models over images: per category and overall, with intervals, paired differences, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from acw.bootstrap import interval, ratio_interval
from acw.data import Dataset
from acw.metrics import ALL_METRICS
from acw.scoring import REFERENCES, Scores
from acw.storage import csv_text

# By whose IG a model's is divided: what share of it the model explains.
EXPLAINED_BY = ("gold_standard", "gold_standard_upper")


def per_image_csv(dataset: Dataset, scores: dict[int, Scores]) -> str:
    """A row an image and model: image, category, source, model, and the metrics; empty where there is no such score."""
    columns, rows = metrics_of(scores), []
    for index, by_model in scores.items():
        stimulus = dataset.stimuli[index]
        for name, values in by_model.items():
            row = [f"{values[metric]:.6g}" if metric in values else "" for metric in columns]
            rows.append([stimulus.name, stimulus.category, stimulus.source or "", name, *row])
    return csv_text(["image", "category", "source", "model", *columns], rows)


def metrics_of(scores: dict[int, Scores]) -> list[str]:
    """The metrics that any model was scored by."""
    there = {metric for one in next(iter(scores.values())).values() for metric in one}
    return [metric for metric in ALL_METRICS if metric in there]


def summarise(dataset: Dataset, scores: dict[int, Scores], seed: int) -> dict[str, Any]:
    """The `models`, `references`, `comparisons` and `explained` of evaluation.json; intervals are 95 % bootstraps over
    images."""
    stimuli = [dataset.stimuli[index] for index in scores]
    category = np.array([stimulus.category for stimulus in stimuli])
    first = next(iter(scores.values()))
    # A saliency map has no likelihood: its entry lacks those metrics.
    metrics = {name: [m for m in metrics_of(scores) if m in one] for name, one in first.items()}
    table = {n: np.array([[s[n][m] for m in metrics[n]] for s in scores.values()]) for n in first}
    sources = sorted({stimulus.source for stimulus in stimuli if stimulus.source})
    source = np.array([stimulus.source for stimulus in stimuli])

    def entry(name: str) -> dict[str, Any]:
        values, own = table[name], metrics[name]
        mean, low, high = interval(values, category, seed=seed)

        def means(chosen: np.ndarray) -> dict[str, float]:
            return dict(zip(own, values[chosen].mean(0).tolist(), strict=True))

        result = {
            "overall": {m: {"mean": mean[k], "ci95": [low[k], high[k]]} for k, m in enumerate(own)},
            "by_category": {c: means(category == c) for c in sorted(set(category))},
        }
        if sources:
            result["by_source"] = {s: means(source == s) for s in sources}
        return result

    comparisons = []
    for a, b in _pairs(list(first)):
        both = [metric for metric in metrics[a] if metric in metrics[b]]
        columns = [table[n][:, [metrics[n].index(metric) for metric in both]] for n in (a, b)]
        mean, low, high = interval(columns[0] - columns[1], category, seed=seed)
        comparisons += [
            {"a": a, "b": b, "metric": m, "mean": mean[k], "ci95": [low[k], high[k]]} for k, m in enumerate(both)
        ]
    ig = {name: table[name][:, own.index("IG")] for name, own in metrics.items() if "IG" in own}
    return {
        "models": {name: entry(name) for name in first if name not in REFERENCES},
        "references": {name: entry(name) for name in first if name in REFERENCES},
        "comparisons": comparisons,
        "explained": _explained(ig, category, seed),
    }


def _explained(ig: dict[str, np.ndarray], category: np.ndarray, seed: int) -> dict[str, Any]:
    """Model -> reference -> which share of its IG the model explains; empty where the data has no subjects."""
    result: dict[str, Any] = {}
    for reference in (name for name in EXPLAINED_BY if name in ig):
        for name in (name for name in ig if name not in REFERENCES):
            share, low, high = ratio_interval(ig[name], ig[reference], category, seed=seed)
            result.setdefault(name, {})[reference] = {"mean": share, "ci95": [low, high]}
    return result


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The differences that a reader asks for: what each step of the mixture is worth, and against its controls and
    outside models."""
    wanted = [
        ("uniform", "center_bias"),
        ("category_weights", "center_bias"),
        ("category_weights", "uniform"),
        ("global_weights", "uniform"),
        ("category_weights", "global_weights"),
        ("category_weights", "inferred_category"),
        ("category_weights", "wrong_category"),
        ("category_weights", "source_weights"),
        ("category_weights", "shuffled_labels"),
        ("category_weights", "log_mixture"),
    ]
    known = {name for pair in wanted for name in pair} | set(REFERENCES)
    wanted += [("category_weights", name) for name in names if name not in known and not name.startswith("backbone:")]
    return [(a, b) for a, b in wanted if a in names and b in names]


def table(evaluation: dict[str, Any]) -> str:
    """The score table that a person reads, models first, best IG last, then references."""
    entries = [entry for kind in ("models", "references") for entry in evaluation[kind].values()]
    metrics = [metric for metric in ALL_METRICS if any(metric in entry["overall"] for entry in entries)]
    explained = evaluation.get("explained", {})
    header = f"{'':24}" + "".join(f"{metric:>9}" for metric in metrics) + "   IG 95 % interval"
    header += "     explained" if explained else ""
    lines = [header]
    for kind in ("models", "references"):
        lines.append("-" * len(header))
        rows = sorted(evaluation[kind].items(), key=lambda item: _ig(item[1])["mean"])
        for name, entry in rows:
            overall = entry["overall"]
            values = "".join(f"{overall[m]['mean']:z9.4f}" if m in overall else f"{'-':>9}" for m in metrics)
            interval_ = "[{:z.4f}, {:z.4f}]".format(*_ig(entry)["ci95"]) if "IG" in overall else "-"
            share = explained.get(name, {}).get("gold_standard")
            lines.append(f"{name:24}{values}   {interval_:18}" + (f"{share['mean']:z10.1%}" if share else ""))
    return "\n".join(line.rstrip() for line in lines)


def _ig(entry: dict[str, Any]) -> dict[str, Any]:
    """Saliency maps, which have none, come first."""
    return entry["overall"].get("IG", {"mean": float("-inf")})
