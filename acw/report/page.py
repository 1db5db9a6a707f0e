"""report.html: what a run found, in one file that needs nothing else.

Each section is a function of the run, which gives its data, and the block of its name in templates/run.html. Tables
come from the files in the run's folder, pictures from the caller, one example at a time.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from acw.cluster.costs import noted
from acw.evaluation import bootstrap
from acw.evaluation.metrics import METRICS, in_order
from acw.evaluation.summary import KEYS, headline, kernels
from acw.report import document, figures, gallery
from acw.report.document import Sections
from acw.report.figures import Marks
from acw.report.numbers import interval, number
from acw.report.pictures import Example
from acw.report.tables import Interval, Row, Table, Value, table
from acw.report.weights import Weights, adapted_weights_of, changes, progressions, weights_of
from acw.storage.files import csv_rows, fetch

NOTES = {
    "category_adaptation": "a handful of numbers per category: weights, temperature, spread, centre bias",
    "inferred_adaptation": "the same, the category inferred from the image",
    "global_adaptation": "one set of these numbers for all images",
    "wrong_adaptation": "control: by the numbers of all other categories, averaged; likelihoods alone",
    "shuffled_adaptation": "control: numbers fitted to labels that mean nothing; likelihoods alone",
    "category_weights": "a weight per category and backbone",
    "inferred_category": "weights of the category that is inferred from the image",
    "wrong_category": "control: weights of all other categories, averaged",
    "global_weights": "one weight per backbone for all images",
    "uniform": "the backbones mixed evenly",
    "center_bias": "where people look in any image; the zero of IG",
    "shuffled_labels": "control: weights fitted to labels that mean nothing",
    "source_weights": "control: a weight per source of the images",
    "log_mixture": "the rule of ACW (2024): weighted sum of log-densities, renormalised",
    "gold_standard": "how well other people predict a person's fixations",
    "gold_standard_upper": "the same, the person included: an upper bound",
    "oracle_weights": "the best weights for each image, chosen by its fixations",
    "split_half_weights": "the best weights for each image by half of its subjects, for the other half",
    "optimum": "the density that the fixations were drawn from",
}
# What the section on weights says first, by the paired difference in IG.
WORTH = {
    ("category_weights", "global_weights"): "a weight per category, over one set of weights for all images",
    (
        "split_half_weights",
        "global_weights",
    ): "weights for each image by half of its subjects, scored on the other half: "
    "more than this, weights by image are hardly worth",
    ("category_adaptation", "global_weights"): "a handful of numbers per category, over one set of weights for all",
    ("category_adaptation", "global_adaptation"): "a handful of numbers per category, over one set of these for all",
}
KINDS = {
    "models": "Models",
    "references": "References, which no model could be",
    "controls": "Controls, of which only the likelihood is asked",
}


@dataclass(frozen=True)
class Run:
    """What the sections are made of.

    evaluation: the content of evaluation.json. example, curves: see `write`.
    """

    folder: Path
    evaluation: dict[str, Any]
    example: Callable[[str], Example]
    curves: Mapping[str, Sequence[np.ndarray]]

    @property
    def model(self) -> str:
        """The registered model's name among `models`."""
        return headline(self.evaluation)

    @cached_property
    def category(self) -> dict[str, str]:
        """Of each scored image."""
        return {row["image"]: row["category"] for row in self._per_image}

    @cached_property
    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """Image -> model -> metric -> score; a metric that a model does not have is left out."""
        scores: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        for row in self._per_image:
            scores[row["image"]][row["model"]] = {m: float(row[m]) for m in in_order(row.keys() - set(KEYS)) if row[m]}
        return dict(scores)

    @cached_property
    def gains(self) -> dict[str, dict[str, float]]:
        """Image -> model -> IG, of models that have one."""
        return {i: {m: values["IG"] for m, values in by.items() if "IG" in values} for i, by in self.scores.items()}

    @cached_property
    def weights(self) -> Weights:
        return weights_of(self.folder)

    @cached_property
    def _per_image(self) -> list[dict[str, str]]:
        return csv_rows(self.folder / "per_image.csv")


def write(folder: Path, example: Callable[[str], Example], curves: Mapping[str, Sequence[np.ndarray]]) -> Path:
    """Writes the report.html of the run in the folder, below 20 MB, and returns its path.

    example: gives the pictures of the held-out image of that name in per_image.csv. It is called for an image a
    category and for the worst ones, one after the other. Its `log_densities` are to hold `pictures.OURS` and
    `pictures.CENTRE_BIAS`, and may hold `pictures.GOLD_STANDARD`.
    curves: title -> validation IG per epoch of some heads, as `figures.head_curves` and `joint_curves` give them.
    """
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    recipe, dataset = evaluation["provenance"]["recipe"], evaluation["dataset"]
    run = Run(folder, evaluation, example, curves)
    title = f"Recipe {recipe['name']} on data set {dataset['name']}"
    values = {"dataset": dataset, "run": folder.name, "evaluation": evaluation, **lead(run)}
    return document.write(folder, "run.html", title, SECTIONS, run, **values)


def lead(run: Run) -> dict[str, Any]:
    """What a reader wants to know first: cards, and notes on what was done to the data or makes a score doubtful."""
    evaluation = run.evaluation
    overall = evaluation["models"][run.model]["overall"]

    def ends(of: Mapping[str, Any], signed: bool = False) -> str:
        low, high = of["ci95"]
        return interval(low, high, signed)

    gain = overall["IG"]
    cards = [(number(gain["mean"]), f"bits per fixation of information gain over the centre bias {ends(gain)}")]
    if explained := evaluation.get("explained", {}).get(run.model, {}).get("gold_standard"):
        cards.append(
            (
                number(explained["mean"], True),
                f"of what other people's fixations tell (gold standard, {kernels(evaluation)})",
            )
        )
    for other, text in (("uniform", "over an even mixture"), ("global_weights", "over one set of weights for all")):
        for pair in evaluation["comparisons"]:
            if (pair["a"], pair["b"], pair["metric"]) == (run.model, other, "IG"):
                cards.append((number(pair["mean"], signed=True), f"bits {text} {ends(pair, True)}"))
    cards += [(number(overall[m]["mean"]), f"{m} {ends(overall[m])}") for m in ("AUC", "NSS")]
    notes = [("Note", note) for note in evaluation["dataset"]["notes"]]
    if refit := evaluation.get("refit"):
        again = f"The registered model's heads were trained on, on all {refit['images']} images, held-out ones too"
        notes.append(("Refit", f"{again}; these are the scores of those before, which had not seen them."))
    notes += [("Warning", f"{name}: {doubt}") for name, doubt in evaluation.get("doubts", {}).items()]
    return {"cards": cards, "notes": notes}


def scores(run: Run) -> dict[str, Any]:
    """All models, their metrics and paired differences."""
    evaluation = run.evaluation
    shares: dict[str, Any] = evaluation.get("explained", {})
    groups: dict[str, list[Row]] = {}
    for kind, heading in KINDS.items():
        groups[heading] = []
        for name, entry in evaluation[kind].items():
            row: dict[str, Value] = {"": name} | {m: _interval(value) for m, value in entry["overall"].items()}
            if share := shares.get(name, {}).get("gold_standard"):
                row["explained"] = _interval(share)
            groups[heading].append(row)
        groups[heading].sort(key=_by_gain)
    columns = ["", *metrics(entry["overall"] for kind in KINDS for entry in evaluation[kind].values())]
    columns += ["explained"] if shares else []
    shown = table(groups, columns, notes=NOTES, marked={run.model}, percent={"explained"})
    units: dict[str, list[str]] = defaultdict(list)
    for metric in METRICS.values():
        if metric.unit:
            units[metric.unit].append(metric.name)
    compared = differences(evaluation["comparisons"])
    return {"table": shown, "explained": bool(shares), "units": units, "differences": compared}


def categories(run: Run) -> dict[str, Any]:
    """IG by category as a chart, all scores of each as a table, and IG by source where that is known."""
    tables: dict[str, tuple[int, Table]] = {}
    ours: dict[str, tuple[float, float]] = {}
    for name in sorted(set(run.category.values())):
        groups: dict[str, list[Row]] = {heading: [] for heading in KINDS.values()}
        images = [image for image, its in run.category.items() if its == name]
        for model, of_first in run.scores[images[0]].items():
            values = np.array([list(run.scores[image][model].values()) for image in images])
            ends = zip(*bootstrap.interval(values, np.zeros(len(images))), strict=True)
            intervals: dict[str, Value] = {m: Interval(*map(float, end)) for m, end in zip(of_first, ends, strict=True)}
            kind = next(kind for kind in KINDS if model in run.evaluation[kind])
            groups[KINDS[kind]].append({"": model, **intervals})
            if model == run.model and isinstance(gain := intervals["IG"], Interval):
                ours[name] = gain.low, gain.high
        for group in groups.values():
            group.sort(key=_by_gain)
        columns = ["", *(m for m in metrics(row for group in groups.values() for row in group) if m)]
        tables[name] = len(images), table(groups, columns, notes=NOTES, marked={run.model})
    chart = figures.svg(_by_category(run, ours), "IG of each category, bits per fixation")
    return {"chart": chart, "tables": tables, "sources": _by_source(run)}


def _by_category(run: Run, ours: Mapping[str, tuple[float, float]]) -> figures.Figure:
    evaluation = run.evaluation

    def gains(kind: str, model: str) -> dict[str, float]:
        return {c: scores["IG"] for c, scores in evaluation[kind][model]["by_category"].items()}

    backbones = [name for name in evaluation["models"] if name.startswith("backbone:")]
    colour = figures.colours(backbones)
    marks = [Marks(name.partition(":")[2], "|", colour[name], gains("models", name)) for name in backbones]
    marks.append(Marks("uniform", "o", figures.INK, gains("models", "uniform"), hollow=True))
    if "gold_standard" in evaluation["references"]:
        marks.append(Marks("gold standard", "D", "#9a6700", gains("references", "gold_standard")))
    marks.append(Marks(run.model.replace("_", " "), "o", figures.INK, gains("models", run.model), ours))
    order = sorted(ours, key=lambda name: -marks[-1].values[name])
    return figures.dots(order, marks, label="IG, bits per fixation", width=1080)


def _by_source(run: Run) -> Table | None:
    """IG by where images come from, which may be what categories differ by; None where that is unknown."""
    evaluation = run.evaluation
    groups: dict[str, list[Row]] = {}
    sources: dict[str, None] = {}
    for kind, heading in KINDS.items():
        groups[heading] = []
        for name, entry in evaluation[kind].items():
            gains: dict[str, Value] = {source: means.get("IG") for source, means in entry.get("by_source", {}).items()}
            groups[heading].append({"": name} | gains)
            sources |= dict.fromkeys(gains)
    return table(groups, ["", *sources], notes=NOTES, marked={run.model}) if len(sources) > 1 else None


def found(run: Run) -> dict[str, Any] | None:
    """The categories that the run has found by itself, each with the images that are most typical of it."""
    path = fetch(run.folder / "categories.json")
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    images = Counter(record["images"].values())
    montages = {name: (picture, images[name]) for name, picture in record["montages"].items()}
    gains = [f"{c}: {number(mean, True)} ± {number(error)}" for c, (mean, error) in record["gain_bits"].items()]
    return {"montages": montages, "gains": gains, "run": run.folder.name}


def weights(run: Run) -> dict[str, Any]:
    """The backbones' shares in each category's mixture, and how they were learned."""
    fit = run.evaluation.get("weights", {})
    strength = fit["prior_strength"] if fit.get("crossvalidation_nats") else None
    highest = max(weight.mean for row in run.weights.values() for weight in row.values()) or 1.0
    pairs = {(pair["a"], pair["b"]): pair for pair in run.evaluation["comparisons"] if pair["metric"] == "IG"}
    worth = []
    for pair, text in WORTH.items():
        if pair in pairs:
            low, high = pairs[pair]["ci95"]
            worth.append((number(pairs[pair]["mean"], signed=True), interval(low, high, True), text))
    adaptation = run.evaluation.get("adaptation", {}) | {"changes": changes(run.folder)}
    shown = {"strength": strength, "rows": run.weights, "highest": highest, "learned": progressions({"": run.folder})}
    return shown | {"worth": worth, "adaptation": adaptation}


def examples(run: Run) -> dict[str, Any]:
    """The image of each category whose IG is its median."""
    used = run.evaluation.get("adaptation", {}).get("used")
    weights = adapted_weights_of(run.folder) if used else run.weights
    return gallery.examples(gallery.typical(run.category, run.gains, run.model), weights, run.example)


def failures(run: Run) -> dict[str, Any]:
    """The images on which the model is worst."""
    return gallery.failures(gallery.worst(run.gains, run.model), run.gains, run.model, run.example)


def training(run: Run) -> dict[str, Any] | None:
    """Validation IG after each epoch."""
    if not run.curves:
        return None
    return {"chart": figures.svg(figures.training_curves(run.curves), "Validation IG after each epoch")}


def recipe(run: Run) -> dict[str, Any]:
    """Time and memory, where the run comes from, its data set and every field of its recipe."""
    record, dataset, costs = run.evaluation["provenance"], run.evaluation["dataset"], noted(run.folder)
    steps: list[Row] = [
        {
            "step": step,
            "minutes": cost["seconds"] / 60,
            "done": cost["images"],
            "unit": cost["unit"],
            "per second": cost["images"] / cost["seconds"] if cost["seconds"] else None,
            "GiB in one process": cost["peak_rss"] / 2**30,
        }
        for step, cost in costs.items()
    ]
    return {
        "minutes": sum(cost["seconds"] for cost in costs.values()) / 60,
        "price": record["recipe"].get("price_per_hour"),
        "steps": table({"": steps}) if steps else None,
        "dataset": in_a_line(dataset)
        | {"images by category": ", ".join(f"{name} {count}" for name, count in dataset["categories"].items())},
        **origin(record),
    }


SECTIONS: Sections[Run] = {
    "Scores": scores,
    "Categories": categories,
    "Categories found": found,
    "Weights": weights,
    "Examples": examples,
    "Where it fails": failures,
    "Training": training,
    "Recipe and cost": recipe,
}


def origin(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's or a search's provenance, as the templates show it."""
    fields = {name: ", ".join(v) if isinstance(v, list) else v for name, v in record["recipe"].items()}
    return {"origin": in_a_line(record), "fields": fields, "versions": record["versions"]}


def in_a_line(values: Mapping[str, Any]) -> dict[str, Any]:
    """What fits in one."""
    return {name: value for name, value in values.items() if isinstance(value, str | int | float)}


def metrics(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that any of the entries has, in their usual order."""
    return in_order({metric for entry in entries for metric in entry})


def differences(comparisons: Sequence[dict[str, Any]]) -> Table:
    """A row for each two systems that were compared, a column a metric."""
    rows: dict[tuple[str, str], dict[str, Value]] = {}
    for pair in comparisons:
        # No break after the minus sign: a long pair takes two lines, not three.
        row = rows.setdefault((pair["a"], pair["b"]), {"": f"{pair['a']} \N{MINUS SIGN}\N{NO-BREAK SPACE}{pair['b']}"})
        row[pair["metric"]] = _interval(pair)
    # Both are over the same density, so a difference in LL is the one in IG.
    columns = ["", *(metric for metric in metrics({pair["metric"]: None} for pair in comparisons) if metric != "LL")]
    return table({"": list(rows.values())}, columns, differences=True)


def _interval(value: Mapping[str, Any]) -> Interval:
    return Interval(value["mean"], *value["ci95"])


def _by_gain(row: Row) -> float:
    gain = row.get("IG")
    return -gain.mean if isinstance(gain, Interval) else math.inf
