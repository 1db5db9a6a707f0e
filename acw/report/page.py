"""report.html: what a run found, in one file that needs nothing else; and the same for a comparison of runs.

Tables come from the files in the run's folder, pictures from the caller, one example at a time.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from acw.cluster.costs import noted
from acw.evaluation.bootstrap import interval
from acw.evaluation.metrics import in_order
from acw.evaluation.summary import KEYS
from acw.report import charts, gallery, markup
from acw.report.figures import Example, extended
from acw.report.gallery import HEADLINE, Weights
from acw.report.markup import Cell, Interval, Row, figure
from acw.storage.addresses import local
from acw.storage.files import fetch, write_atomic

FILE = "report.html"
NOTES = {
    "category_weights": "the model: a weight per category and backbone",
    "inferred_category": "the same, the category inferred from the image",
    "wrong_category": "control: weights of all other categories, averaged",
    "global_weights": "one weight per backbone for all images",
    "uniform": "the backbones mixed evenly",
    "center_bias": "where people look in any image; the zero of IG",
    "shuffled_labels": "control: weights fitted to labels that mean nothing",
    "source_weights": "control: a weight per source of the images",
    "log_mixture": "the paper's rule: weighted sum of log-densities, renormalised",
    "gold_standard": "how well other people predict a person's fixations",
    "gold_standard_upper": "the same, the person included: an upper bound",
    "oracle_weights": "the best weights for each image, chosen by its fixations",
    "optimum": "the density that the fixations were drawn from",
}
Scores = dict[str, dict[str, dict[str, float]]]  # of the images: image -> model -> metric -> score


def write(run: Path, example: Callable[[str], Example], curves: Mapping[str, Sequence[np.ndarray]]) -> Path:
    """Writes the run's report.html, below 20 MB, and returns its path.

    example: gives the pictures of the held-out image of that name in per_image.csv. It is called for an image a
    category and for the worst ones, one after the other. Its `log_densities` are to hold `report.OURS` and
    `report.CENTRE_BIAS`, and may hold `report.GOLD_STANDARD`.
    curves: title -> validation IG per epoch of some heads, as `report.head_curves` and `report.joint_curves` give them.
    """
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    category, scores = _per_image(run)
    weights = _category_weights(run)
    sections = {
        "Scores": _scores(evaluation),
        "Categories": _categories(evaluation, category, scores),
        "Weights": _weights(run, evaluation, weights),
    }
    gains = {image: {m: values["IG"] for m, values in by.items() if "IG" in values} for image, by in scores.items()}
    sections["Examples"] = gallery.examples(gallery.typical(category, gains), weights, example)
    sections["Where it fails"] = gallery.failures(gallery.worst(gains), gains, example)
    if curves:
        sections["Training"] = _training(curves)
    sections["Recipe and cost"] = _recipe(run, evaluation)
    recipe, dataset = evaluation["provenance"]["recipe"], evaluation["dataset"]
    page = markup.document(f"Recipe {recipe['name']} on data set {dataset['name']}", _lead(run, evaluation), sections)
    write_atomic(run / FILE, page)
    return run / FILE


def write_comparison(folder: Path) -> Path:
    """Writes report.html beside a reproduction.json (jobs/reproduce.py) and returns its path: tables and weights."""
    found = json.loads(fetch(folder / "reproduction.json").read_text(encoding="utf-8"))
    runs = {name: local(run) for name, run in found["runs"].items()}
    sections = {
        "Table 1": "<p>Validation images, as published; loss in nats per fixation.</p>" + _measured(found["table1"]),
        "Table 2": "<p>Held-out images. IG and LL in bits per fixation.</p>" + _measured(found["table2"]),
        "Differences": "<p>On the same held-out images, in bold where the 95 % interval excludes 0; LL's are IG's.</p>"
        + _comparisons(found["comparisons"]),
        "Weights": _progressions({name: run for name, run in runs.items() if _learned(run)}),
        "Runs": _runs(folder, runs),
    }
    dataset = found["dataset"]
    lead = (
        f"<p class=soft>{len(runs)} systems on one split of {dataset['images']} images in {len(dataset['categories'])} "
        f"categories; each links to its own report at the end. Given to all: <code>{escape(' '.join(found['fields']))}"
        "</code></p>"
    )
    write_atomic(folder / FILE, markup.document(f"The paper's systems on {dataset['name']}", lead, sections))
    return folder / FILE


def _per_image(run: Path) -> tuple[dict[str, str], Scores]:
    """Of the scored images: their categories, and their scores; a metric that a model does not have is left out."""
    category: dict[str, str] = {}
    scores: Scores = defaultdict(dict)
    with (run / "per_image.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            category[row["image"]] = row["category"]
            scores[row["image"]][row["model"]] = {m: float(row[m]) for m in in_order(row.keys() - set(KEYS)) if row[m]}
    return category, dict(scores)


def _lead(run: Path, evaluation: dict[str, Any]) -> str:
    """What a reader wants to know first."""
    dataset, record = evaluation["dataset"], evaluation["provenance"]
    gains = evaluation["models"][HEADLINE]["overall"]["IG"]
    low, high = gains["ci95"]
    cards = [
        (figure(gains["mean"]), f"bits per fixation of information gain over the centre bias [{_range(low, high)}]")
    ]
    explained = evaluation.get("explained", {}).get(HEADLINE, {}).get("gold_standard")
    if explained:
        cards.append((figure(explained["mean"], True), "of what other people's fixations tell (gold standard)"))
    for other, text in (("uniform", "over an even mixture"), ("global_weights", "over one set of weights for all")):
        for pair in evaluation["comparisons"]:
            if (pair["a"], pair["b"], pair["metric"]) == (HEADLINE, other, "IG"):
                low, high = pair["ci95"]
                cards.append((figure(pair["mean"], signed=True), f"bits {text} [{_range(low, high, True)}]"))
    overall = evaluation["models"][HEADLINE]["overall"]
    cards += [(figure(overall[m]["mean"]), f"{m} [{_range(*overall[m]['ci95'])}]") for m in ("AUC", "NSS")]
    shown = "".join(f'<div class="card"><b>{value}</b><small>{escape(text)}</small></div>' for value, text in cards)
    scored = dataset["images_scored"]
    return (
        f'<p class="soft">{scored} {escape(dataset["scored"])} of {dataset["images"]}, '
        f"{len(dataset['categories'])} categories. Brackets are 95 % intervals over images, here and below. "
        f'Run <span class="hash">{escape(run.name)}</span>, commit '
        f'<span class="hash">{escape(record["commit"])}</span>.</p>{_notes(evaluation)}<div class="cards">{shown}</div>'
    )


def _notes(evaluation: dict[str, Any]) -> str:
    """What was done to the data, is odd in them, or makes a score doubtful: before any number that depends on it."""
    notes = [("Note", note) for note in evaluation["dataset"]["notes"]]
    notes += [("Warning", f"{name}: {doubt}") for name, doubt in evaluation.get("doubts", {}).items()]
    return "".join(f"<p><b>{kind}:</b> {escape(text)}.</p>" for kind, text in notes)


def _range(low: float, high: float, signed: bool = False) -> str:
    return f"{figure(low, signed=signed)},\N{NO-BREAK SPACE}{figure(high, signed=signed)}"


def _metrics(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that any of the entries has, in their usual order."""
    return in_order({metric for entry in entries for metric in entry})


def _scores(evaluation: dict[str, Any]) -> str:
    groups: dict[str, list[Row]] = {}
    shares: dict[str, Any] = evaluation.get("explained", {})
    explained = "explained"
    metrics = _metrics(entry["overall"] for kind in ("models", "references") for entry in evaluation[kind].values())
    for kind, heading in (("models", "Models"), ("references", "References, which no model could be")):
        rows: list[Row] = []
        for name, entry in evaluation[kind].items():
            row: dict[str, Cell] = {"": name} | {m: _interval(value) for m, value in entry["overall"].items()}
            if share := shares.get(name, {}).get("gold_standard"):
                row[explained] = _interval(share)
            rows.append(row)
        groups[heading] = sorted(rows, key=lambda row: -_mean(row.get("IG")))
    columns = ["", *metrics, *([explained] if shares else [])]
    return (
        "<p>IG: bits per fixation over the centre bias; LL: over a uniform density"
        + ("; explained: the share of the gold standard's IG" if shares else "")
        + ". Means over images; the best model is in bold. A click on a column's name sorts.</p>"
        + markup.table(columns, groups, notes=NOTES, marked={HEADLINE}, percent={explained})
        + "<h3>Paired differences</h3>"
        + "<p>On the same images, in bold where the 95 % interval excludes 0; LL's are IG's.</p>"
        + _comparisons(evaluation["comparisons"])
    )


def _interval(value: dict[str, Any]) -> Interval:
    return Interval(value["mean"], *value["ci95"])


def _mean(cell: Cell) -> float:
    return cell.mean if isinstance(cell, Interval) else -math.inf


def _comparisons(comparisons: Sequence[dict[str, Any]]) -> str:
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for pair in comparisons:
        # No break after the minus sign: a long pair takes two lines, not three.
        row = rows.setdefault((pair["a"], pair["b"]), {"": f"{pair['a']} \N{MINUS SIGN}\N{NO-BREAK SPACE}{pair['b']}"})
        row[pair["metric"]] = _interval(pair)
    # Both are over the same density, so a difference in LL is the one in IG.
    metrics = [metric for metric in _metrics({pair["metric"]: None} for pair in comparisons) if metric != "LL"]
    return markup.table(["", *metrics], {"": list(rows.values())}, differences=True)


def _categories(evaluation: dict[str, Any], category: Mapping[str, str], scores: Scores) -> str:
    tables: dict[str, str] = {}
    names = sorted(set(category.values()))
    ours: dict[str, tuple[float, float]] = {}
    for name in names:
        rows: dict[str, list[Row]] = {"Models": [], "References, which no model could be": []}
        images = [image for image, its in category.items() if its == name]
        for model in scores[images[0]]:
            values = np.array([list(scores[image][model].values()) for image in images])
            ends = zip(*interval(values, np.zeros(len(images))), strict=True)
            row: dict[str, Cell] = {"": model}
            row |= {m: Interval(*map(float, end)) for m, end in zip(scores[images[0]][model], ends, strict=True)}
            rows["Models" if model in evaluation["models"] else "References, which no model could be"].append(row)
            gain = row.get("IG")
            if model == HEADLINE and isinstance(gain, Interval):
                ours[name] = gain.low, gain.high
        for group in rows.values():
            group.sort(key=lambda row: -_mean(row.get("IG")))
        metrics = _metrics(row for group in rows.values() for row in group)
        metrics.remove("")
        count = f"<p class=note>{len(images)} images</p>"
        tables[name] = count + markup.table(["", *metrics], rows, notes=NOTES, marked={HEADLINE})
    choice = markup.switch("Category", "category", names)
    return (
        "<p>IG in bits per fixation, with the 95 % interval of the category weights; 0 is the centre bias.</p>"
        + f'<div class="scroll">{_dots(evaluation, names, ours)}</div>'
        + f'<h3>All scores of one category</h3><div class="controls">{choice}</div>'
        + markup.switched("category", tables)
        + _sources(evaluation)
    )


def _sources(evaluation: dict[str, Any]) -> str:
    """IG by where images come from, which may be what categories differ by; nothing where that is unknown."""
    groups: dict[str, list[Row]] = {}
    sources: dict[str, None] = {}
    for kind, heading in (("models", "Models"), ("references", "References, which no model could be")):
        groups[heading] = []
        for name, entry in evaluation[kind].items():
            gains: dict[str, Cell] = {source: one.get("IG") for source, one in entry.get("by_source", {}).items()}
            groups[heading].append({"": name} | gains)
            sources |= dict.fromkeys(gains)
    if len(sources) < 2:
        return ""
    return (
        "<h3>IG by source</h3><p>Categories of one source may differ from others by their source alone.</p>"
        + markup.table(["", *sources], groups, notes=NOTES, marked={HEADLINE})
    )


def _dots(evaluation: dict[str, Any], names: Sequence[str], ours: Mapping[str, tuple[float, float]]) -> str:
    def gains(kind: str, model: str) -> dict[str, float]:
        return {c: scores["IG"] for c, scores in evaluation[kind][model]["by_category"].items()}

    backbones = [name for name in evaluation["models"] if name.startswith("backbone:")]
    colour = charts.colours(backbones)
    marks = [charts.Marks(name.partition(":")[2], "tick", colour[name], gains("models", name)) for name in backbones]
    marks.append(charts.Marks("uniform", "ring", charts.INK, gains("models", "uniform")))
    if "gold_standard" in evaluation["references"]:
        marks.append(charts.Marks("gold standard", "diamond", "#9a6700", gains("references", "gold_standard")))
    marks.append(charts.Marks(HEADLINE.replace("_", " "), "dot", charts.INK, gains("models", HEADLINE), ours))
    order = sorted(names, key=lambda name: -marks[-1].values[name])
    return charts.dots(order, marks, label="IG, bits per fixation", width=1080)


def _weights(run: Path, evaluation: dict[str, Any], weights: Weights) -> str:
    found = evaluation.get("weights", {})
    prior = ""
    if found.get("crossvalidation_nats"):
        strength = found["prior_strength"]
        prior = (
            "Cross-validation chose an infinite prior: every category has the weights for all images."
            if strength == "inf"
            else f"A prior as strong as {strength:g} images, chosen by cross-validation, draws them to the weights for "
            "all images."
        )
    return (
        f"<p>Shares of the backbones in each category's mixture, ± half their 95 % interval. {prior}</p>"
        f'<div class="side"><div>{markup.heat_map(weights, "category")}</div>'
        f"<div>{_progressions({'': run})}</div></div>"
    )


def _category_weights(run: Path) -> Weights:
    rows: dict[str, dict[str, Interval]] = defaultdict(dict)
    with (run / "category_weights.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row["category"]][row["backbone"]] = Interval(*(float(row[k]) for k in ("weight", "low", "high")))
    return rows


def _history(run: Path) -> dict[str, dict[str, list[float]]]:
    """Category -> backbone -> weight at each step."""
    result: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with fetch(run / "category_weights_history.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            result[row["category"]][row["backbone"]].append(float(row["weight"]))
    return result


def _learned(run: Path) -> bool:
    """Whether any weight is another than at the start."""
    every = [weights for by_backbone in _history(run).values() for weights in by_backbone.values()]
    return any(weights[-1] != weights[0] for weights in every)


def _progressions(runs: Mapping[str, Path]) -> str:
    """How each run's weights came about, side by side, a category at a time and all on the same scale."""
    if not runs:
        return "<p>No run here learned its weights.</p>"
    histories = {name: _history(run) for name, run in runs.items()}
    units = {
        name: "epoch"
        if json.loads(fetch(run / "recipe.json").read_text(encoding="utf-8"))["recipe"].get("joint")
        else "step of EM"
        for name, run in runs.items()
    }
    values = [v for h in histories.values() for one in h.values() for weights in one.values() for v in weights]
    limits = (max(min(values) - 0.02, 0.0), max(max(values) + 0.02, min(values) + 0.1))
    colour = charts.colours(list(dict.fromkeys(b for h in histories.values() for one in h.values() for b in one)))
    categories = sorted({category for history in histories.values() for category in history})
    parts = {}
    for category in categories:
        drawn = [
            charts.lines(
                history[category],
                title=f"{name}: {category}" if name else category,
                x_label=units[name],
                first=0,
                limits=limits,
                colour=colour,
            )
            for name, history in histories.items()
            if category in history
        ]
        parts[category] = f'<div class="charts">{"".join(drawn)}</div>'
    return (
        f'<h3>How they were learned</h3><div class="controls">{markup.switch("Category", "category", categories)}</div>'
        + markup.switched("category", parts)
    )


def _training(curves: Mapping[str, Sequence[np.ndarray]]) -> str:
    longest = max(len(curve) for heads in curves.values() for curve in heads)
    values = np.concatenate([curve[np.isfinite(curve)] for heads in curves.values() for curve in heads])
    # The first epochs may be far below zero; they run out of the frame rather than flatten the rest.
    low, high = float(np.percentile(values, 5)), float(values.max())
    margin = 0.06 * max(high - low, 1e-3)
    colour = charts.colours(list(curves))
    drawn = [
        charts.lines(
            {"mean": np.mean([extended(curve, longest) for curve in heads], 0).tolist()},
            title=name,
            x_label="epoch",
            first=1,
            limits=(low - margin, high + margin),
            colour={"mean": colour[name]},
            faint=[curve.tolist() for curve in heads],
            size=(268, 205),
        )
        for name, heads in curves.items()
    ]
    return (
        "<p>IG on the validation images of each fold, bits per fixation. Thin lines are heads, or systems trained "
        "jointly; the thick one is their mean, in which one that has stopped keeps its last value.</p>"
        f'<div class="charts">{"".join(drawn)}</div>'
    )


def _recipe(run: Path, evaluation: dict[str, Any]) -> str:
    record, dataset, costs = evaluation["provenance"], evaluation["dataset"], noted(run)
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
    total = sum(cost["seconds"] for cost in costs.values()) / 60
    price = record["recipe"].get("price_per_hour")
    money = f", {total / 60 * price:.2f} at {price:g} an hour" if price else ""
    # All that fits in a line; the rest has a table of its own.
    origin = {name: value for name, value in record.items() if isinstance(value, str | int | float)}
    about = {name: value for name, value in dataset.items() if isinstance(value, str | int | float)}
    about["images by category"] = ", ".join(f"{name} {count}" for name, count in dataset["categories"].items())
    fields = {name: ", ".join(v) if isinstance(v, list) else v for name, v in record["recipe"].items()}
    time = markup.table(list(steps[0]), {"": steps}) if steps else "<p>Not noted.</p>"
    return (
        f"<h3>Time and memory, {total:.1f} minutes in all{money}</h3>{time}"
        f'<div class="side"><div><h3>Origin</h3>{markup.facts(origin)}</div>'
        f"<div><h3>Data set</h3>{markup.facts(about)}</div></div>"
        f"<details><summary>Recipe, all {len(fields)} fields</summary>{markup.facts(fields)}</details>"
        f"<details><summary>Versions</summary>{markup.facts(record['versions'])}</details>"
    )


def _measured(rows: Sequence[dict[str, Any]]) -> str:
    """A table of the reproduction; `X low` and `X high` are the interval of X; what was measured here is compared."""
    columns = [name for name in rows[0] if name != "measured" and not name.endswith((" low", " high"))]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cells: dict[str, Cell] = {name: row[name] for name in columns}
        for name in columns:
            if row.get(f"{name} low") is not None:
                cells[name] = Interval(row[name], row[f"{name} low"], row[f"{name} high"])
        groups[row["measured"]].append(cells)
    return markup.table(columns, groups)


def _runs(folder: Path, runs: Mapping[str, Path]) -> str:
    links = []
    for name, run in runs.items():
        report = quote(os.path.relpath(run / FILE, folder))
        links.append(
            f'<li><a href="{escape(report)}">{escape(name)}</a> <span class="hash">{escape(str(run))}</span></li>'
        )
    return f"<ul>{''.join(links)}</ul>"
