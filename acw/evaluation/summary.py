"""Scores of models over images: per category and overall, with intervals, paired differences, and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acw.data import Dataset
from acw.evaluation.bootstrap import interval, ratio_interval
from acw.evaluation.metrics import in_order
from acw.evaluation.scoring import CONTROLS, REFERENCES, Scores
from acw.storage.files import csv_text

# Of a row of per_image.csv, before the metrics.
KEYS = ("image", "category", "source", "model")
# By whose IG a model's is divided: what share of it the model explains.
EXPLAINED_BY = ("gold_standard", "gold_standard_upper")
# What a model is in the table of scores: without an adaptation of its categories, and with one.
HEADLINES = ("category_weights", "category_adaptation")
# See `doubts`.
TOO_GOOD, PEOPLES_ERROR, LEAST_MARGIN, INVERTED = 0.99, 0.5, 0.01, 0.4


def per_image_csv(dataset: Dataset, scores: dict[int, Scores]) -> str:
    """A row an image and model: image, category, source, model, and the metrics; empty where there is no such score."""
    columns, rows = metrics_of(scores), []
    for index, by_model in scores.items():
        stimulus = dataset.stimuli[index]
        for name, values in by_model.items():
            row = [f"{values[metric]:.6g}" if metric in values else "" for metric in columns]
            rows.append([stimulus.name, stimulus.category, stimulus.source or "", name, *row])
    return csv_text([*KEYS, *columns], rows)


def metrics_of(scores: dict[int, Scores]) -> list[str]:
    """The metrics that any model was scored by."""
    first = next(iter(scores.values()))
    return in_order({metric for values in first.values() for metric in values})


def summarise(dataset: Dataset, scores: dict[int, Scores], seed: int) -> dict[str, Any]:
    """The `models`, `references`, `controls`, `comparisons`, `explained` and `doubts` of evaluation.json; intervals are
    95 % bootstraps over images."""
    stimuli = [dataset.stimuli[index] for index in scores]
    category = np.array([stimulus.category for stimulus in stimuli])
    first = next(iter(scores.values()))
    # A saliency map has no likelihood: its entry lacks those metrics.
    metrics = {name: [m for m in metrics_of(scores) if m in values] for name, values in first.items()}
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
    models = {name: entry(name) for name in first if name not in (*REFERENCES, *CONTROLS)}
    references = {name: entry(name) for name in first if name in REFERENCES}
    return {
        "models": models,
        "references": references,
        "controls": {name: entry(name) for name in first if name in CONTROLS},
        "comparisons": comparisons,
        "explained": _explained(ig, category, seed),
        "doubts": doubts(models, references),
    }


def doubts(models: Mapping[str, Any], references: Mapping[str, Any]) -> dict[str, str]:
    """Model -> why its scores are not to be believed, in words; empty where nothing speaks against any of them.

    A model of which one speaks never becomes the champion (`registry.promote`). By AUC, the only score with a known
    best value. Free viewing gives models and people .85 to .90, however good; search for one target gives people .999.

    - The centre bias alone reaches TOO_GOOD: nearly all fixations are in one hundredth of the images, whatever these
      show. So it is where coordinates are shares of the width, or all of the same corner. The widest honest
      bias known here, of eight displays with one target each, has .956.
    - The model makes less than PEOPLES_ERROR of the error (1 - AUC) of people who predict each other, and is
      LEAST_MARGIN above them. It may honestly be above them by less: a few people know little of the next one (the
      built-in displays' gold standard has .866, the density that they were drawn from .891). By more, it has seen
      the answer, such as gaze that is drawn into the images.
    - Where people are not told apart, as in CAT2000, there is no such measure; then TOO_GOOD holds for the model.
    - Below INVERTED, so well below chance, a map says where nobody looks: most likely dark is salient in it.

    It looks at the scored images, held-out ones for a run, and only to reject: no model is chosen by it.
    """
    known = {name: entry["overall"] for name, entry in {**models, **references}.items() if "AUC" in entry["overall"]}
    auc = {name: overall["AUC"]["mean"] for name, overall in known.items()}
    people, reasons = auc.get("gold_standard"), {}
    for name in (name for name in models if name in auc):
        value = auc[name]
        if name == "center_bias" and value > TOO_GOOD:
            reasons[name] = (
                f"the centre bias alone has AUC {value:.4f}: nearly all fixations are in one place, whatever the image "
                "shows; check unit and origin of x and y"
            )
        elif value < INVERTED:
            reasons[name] = f"AUC {value:.4f} is below chance; its map may be inverted, dark where people look"
        elif people is None and value > TOO_GOOD:
            reasons[name] = f"AUC {value:.4f} is too good to be true; check whether the images show the fixations"
        elif people is not None and value - people > LEAST_MARGIN and 1 - value < PEOPLES_ERROR * (1 - people):
            reasons[name] = (
                f"AUC {value:.4f} is too good to be true, as people predict each other with {people:.4f}; check "
                "whether the images show the fixations, or are the same ones twice"
            )
    return reasons


def _explained(ig: dict[str, np.ndarray], category: np.ndarray, seed: int) -> dict[str, Any]:
    """Model -> reference -> which share of its IG the model explains; without references that are missing, as the data
    has no subjects, or not certainly above the centre bias, of which there is no share."""
    result: dict[str, Any] = {}
    known = [name for name in EXPLAINED_BY if name in ig]
    for reference in (name for name in known if interval(ig[name], category, seed=seed)[1] > 0):
        for name in (name for name in ig if name not in (*REFERENCES, *CONTROLS)):
            share, low, high = ratio_interval(ig[name], ig[reference], category, seed=seed)
            result.setdefault(name, {})[reference] = {"mean": share, "ci95": [low, high]}
    return result


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The differences that a reader asks for: what each step of the mixture is worth, and against its controls and
    external models."""
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
        ("category_adaptation", "center_bias"),
        ("category_adaptation", "uniform"),
        ("category_adaptation", "global_weights"),
        ("category_adaptation", "category_weights"),
        ("category_adaptation", "global_adaptation"),
        ("category_adaptation", "inferred_adaptation"),
        ("category_adaptation", "wrong_adaptation"),
        ("shuffled_adaptation", "global_adaptation"),
        ("global_adaptation", "global_weights"),
        ("split_half_weights", "global_weights"),
    ]
    known = {name for pair in wanted for name in pair} | {*REFERENCES, *CONTROLS}
    wanted += [("category_weights", name) for name in names if name not in known and not name.startswith("backbone:")]
    return [(a, b) for a, b in wanted if a in names and b in names]


def table(evaluation: dict[str, Any]) -> str:
    """The score table that a person reads: models, references, controls, best IG last in each, and what is doubtful."""
    kinds = {kind: evaluation[kind] for kind in ("models", "references", "controls") if evaluation.get(kind)}
    entries = [entry for of_kind in kinds.values() for entry in of_kind.values()]
    metrics = in_order({metric for entry in entries for metric in entry["overall"]})
    explained = evaluation.get("explained", {})
    width = max(24, *(len(name) + 2 for of_kind in kinds.values() for name in of_kind))
    header = f"{'':{width}}" + "".join(f"{metric:>9}" for metric in metrics) + "   IG 95 % interval"
    header += "     explained" if explained else ""
    lines = [header]
    for of_kind in kinds.values():
        lines.append("-" * len(header))
        rows = sorted(of_kind.items(), key=lambda item: _ig(item[1])["mean"])
        for name, entry in rows:
            overall = entry["overall"]
            values = "".join(f"{overall[m]['mean']:z9.4f}" if m in overall else f"{'-':>9}" for m in metrics)
            interval_ = "[{:z.4f}, {:z.4f}]".format(*_ig(entry)["ci95"]) if "IG" in overall else "-"
            share = explained.get(name, {}).get("gold_standard")
            lines.append(f"{name:{width}}{values}   {interval_:18}" + (f"{share['mean']:z10.1%}" if share else ""))
    if explained:
        lines.append(f"explained: the share of the IG by which people predict people ({kernels(evaluation)})")
    lines += [f"warning: {name}: {doubt}" for name, doubt in evaluation.get("doubts", {}).items()]
    return "\n".join(line.rstrip() for line in lines)


def headline(evaluation: Mapping[str, Any]) -> str:
    """Which of its `models` is the registered model."""
    return evaluation.get("headline", HEADLINES[0])


def kernels(evaluation: dict[str, Any]) -> str:
    """Which density of people the gold standard is, in words."""
    return f"{evaluation.get('gold_standard', {}).get('kernels', 'fixed')} kernels"


def _ig(entry: dict[str, Any]) -> dict[str, Any]:
    """Saliency maps, which have none, come first."""
    return entry["overall"].get("IG", {"mean": float("-inf")})
