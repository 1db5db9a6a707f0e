"""Reproduces Galván's ACW (2024): its systems and DeepGaze IIE (2021), both its tables, with paired intervals.

Runs the recipes acw_v1, acw_v2, acw_v3, deepgaze_iie and acw on one data set and split; fields of a recipe, such as
`--max-epochs 8`, are given to all of them. acw_v2 takes the heads of acw_v1, of which it is another mixture, to train
them jointly. `--deepgaze MODEL` adds the authors' own heads (`acw import-deepgaze`), mixed evenly and by category
weights. What is there already is kept.
Leaves table1.csv (validation images, as published), table2.csv (held-out images), reproduction.json and report.html in
ROOT/reproduction-*; the last line on stdout is the path of reproduction.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acw.pipeline.job import Job, add_job_options, job_of
from acw.pipeline.options import Parser
from acw.pipeline.whole import pipeline
from acw.recipes import Recipe
from acw.storage.addresses import shown
from acw.storage.checksums import fingerprint
from acw.storage.files import csv_rows, csv_text, fetch, listing, write_atomic, write_json

# Recipe -> what changed in it, as every row says.
SYSTEMS = {
    "acw_v1": "coarse input, one head a backbone and fold, fixed centre bias, nearest upsampling, even mixture; joint",
    "acw_v2": "acw_v1 with category weights (softmax, ten times the rate); joint",
    "acw_v3": "acw_v2 with progressive bicubic upsampling, smoothing, three seeds; joint",
    "deepgaze_iie": "fine input, KDE centre bias, three seeds, each head trained alone, even mixture",
    "acw": "deepgaze_iie with smooth upsampling, and category weights by EM on out-of-fold predictions",
}
# Of the recipe deepgaze_iie with the authors' heads: name -> (fields, what changed).
THEIRS = {
    "deepgaze2e_even": ({"category_weights": "false"}, "the authors' heads, trained elsewhere; even mixture"),
    "deepgaze2e_acw": ({"category_weights": "true"}, "the authors' heads, trained elsewhere; category weights by EM"),
}
TABLE_1 = ("loss", "IG", "LL", "AUC", "NSS")
PUBLISHED_1 = {
    "acw_v1": (13.5, 3.07, -13.56, 0.868, 2.7, 29),
    "acw_v2": (4428.47, -4478.56, -4495.20, 0.865, 2.02, 37),
    "acw_v3": (4394.64, -4502.75, -4519.39, 0.866, 2.03, 48),
}
TABLE_2 = ("IG", "AUC", "sAUC", "NSS", "CC", "KLDiv", "SIM")
PUBLISHED_2 = {
    "DeepGaze IIE": (0.1893, 0.8692, 0.6677, 2.1122, 0.8189, 0.3448, 0.706),
    "DeepGaze II": (0.0839, 0.864, 0.6498, 1.9619, 0.795, 0.3815, 0.6865),
    "UNISAL": (0.0321, 0.8604, 0.6684, 1.9359, 0.7399, 0.4703, 0.6633),
    "ICF": (-0.0229, 0.8561, 0.6187, 1.9588, 0.7791, 0.4448, 0.6697),
    "SalFBNet": (None, 0.8549, 0.633, 1.8789, 0.7027, 1.1983, 0.6425),
    "DeepGaze I": (-0.1546, 0.8524, 0.6184, 1.843, 0.7403, 0.5094, 0.6391),
    "eDN": (None, 0.847, 0.5782, 1.2092, 0.5003, 0.9832, 0.4508),
    "ACW (original)": (0.1795, 0.8883, 0.4946, 1.2663, 0.345, 8.3372, 0.3427),
}
SIM_OPT = "its SIM is that of a map optimised for SIM"


@dataclasses.dataclass(frozen=True)
class System:
    """A finished recipe: its job, its evaluation, and scores of its validation images, index -> metric -> value."""

    name: str
    changed: str
    job: Job
    evaluation: dict[str, Any]
    validation: dict[int, dict[str, float]]

    @property
    def epochs(self) -> str:
        """The most that any head was trained, and any system jointly."""
        from acw.training import checkpoints

        banks, systems = checkpoints.trained(self.job.recipe, self.job.folder)
        epochs = [[len(state.history) for state in banks.values()], [len(system.history) for system in systems]]
        return " + ".join(str(max(counts)) for counts in epochs if counts)


def reproduce(options: dict[str, Any], fields: Sequence[str]) -> Path:
    """Runs all systems and compares them; the path of reproduction.json.

    options: as `add_options` has them parsed. fields: those given to all, as options, for the record.
    """
    from acw.report import comparison

    wanted = [(name, changed, {"recipe": name}) for name, changed in SYSTEMS.items()]
    if options["deepgaze"]:
        # A model brings its own backbones and weights.
        model = {"recipe": "deepgaze_iie", "heads": options["deepgaze"], "backbones": None, "weights": None}
        wanted += [(name, changed, model | mixture) for name, (mixture, changed) in THEIRS.items()]
    systems: list[System] = []
    # All of them first: a mistake in the last is better known now than after the others' training.
    jobs = [job_of(options | own) for _, _, own in wanted]
    for (name, changed, _), job in zip(wanted, jobs, strict=True):
        print(f"--- {name}: {changed}", flush=True)
        _take_heads(job, [system.job for system in systems])
        result = pipeline(job)
        systems.append(System(name, changed, job, json.loads(result.read_text(encoding="utf-8")), _validation(job)))
    job = systems[0].job
    folder = job.root / f"reproduction-{job.dataset.name}-{fingerprint([s.job.folder.name for s in systems])}"
    first, second = _table_1(systems), _table_2(systems)
    for number, rows in ((1, first), (2, second)):
        write_atomic(folder / f"table{number}.csv", csv_text(list(rows[0]), [list(row.values()) for row in rows]))
        print(f"\nTable {number}, " + ("validation images" if number == 1 else "held-out images"))
        print(_text(rows), flush=True)
    compared = _comparisons(systems)
    print("\nIG, bit per fixation, paired over held-out images: mean [95 % interval]")
    for row in compared:
        if row["metric"] == "IG":
            print(f"  {row['a']:>16} - {row['b']:16} {row['mean']:+.4f} [{row['ci95'][0]:+.4f}, {row['ci95'][1]:+.4f}]")
    runs = {system.name: shown(system.job.folder) for system in systems}
    result = folder / "reproduction.json"
    content = {"table1": first, "table2": second, "comparisons": compared, "runs": runs}
    write_json(result, content | {"dataset": job.dataset.summary(), "split": job.split.hash, "fields": list(fields)})
    comparison.write(folder)
    return result


def _take_heads(job: Job, done: Sequence[Job]) -> None:
    """Copies the heads of a system that has trained the same ones: its recipe differs only in how they are mixed."""

    def trained_by(recipe: Recipe) -> Recipe:
        return dataclasses.replace(recipe, name="", category_weights=False)

    if listing(job.folder / "banks"):
        return
    for other in done:
        # A model's own heads, of `--heads`, are nobody's training.
        if trained_by(other.recipe) == trained_by(job.recipe) and (banks := listing(other.folder / "banks")):
            print(f"takes the heads of {other.recipe.name}, whose training is the same", flush=True)
            for path in banks:
                write_atomic(job.folder / "banks" / path.name, fetch(path).read_bytes())
            return


def _validation(job: Job) -> dict[int, dict[str, float]]:
    """Scores of each development image by what did not train on it, kept in the run's folder."""
    from acw.cluster.joining import connect
    from acw.evaluation.validation import validation_scores
    from acw.model import assembly
    from acw.tracking.load import load
    from acw.training import checkpoints

    path = fetch(job.folder / "validation.json")
    if not path.exists():
        heads = assembly.heads_by_fold(job.recipe, *checkpoints.trained(job.recipe, job.folder))
        models = assembly.fold_models(job.recipe, job.dataset, job.split, heads, load(job.folder))
        connect()
        write_json(path, validation_scores(job.dataset, job.split, models, list(job.stores().values())))
    return {int(index): scores for index, scores in json.loads(path.read_text(encoding="utf-8")).items()}


def _table_1(systems: Sequence[System]) -> list[dict[str, Any]]:
    """As published: loss in nats per fixation and scores on validation images; the published rows beside."""
    rows: list[dict[str, Any]] = []
    for system in systems:
        scores = list(system.validation.values())
        means = {metric: float(np.mean([image[metric] for image in scores])) for metric in TABLE_1}
        rows.append({"system": system.name, "measured": "here", **means, "epochs": system.epochs})
        rows[-1]["what changed"] = system.changed
        if system.name in PUBLISHED_1:
            published = dict(zip((*TABLE_1, "epochs"), PUBLISHED_1[system.name], strict=True))
            rows.append({"system": system.name, "measured": "published", **published, "what changed": ""})
    return rows


def _table_2(systems: Sequence[System]) -> list[dict[str, Any]]:
    """All metrics on held-out images, IG with its interval, beside what was published for CAT2000's test set."""
    from acw.evaluation.summary import headline

    rows: list[dict[str, Any]] = []
    for system in systems:
        models = system.evaluation["models"]
        rows.append(_scored(system.name, models[headline(system.evaluation)], system.changed))
        if "log_mixture" in models:
            changed = f"{system.name} with ACW's weighted sum of log-densities, renormalised"
            rows.append(_scored(f"{system.name}, log mixture", models["log_mixture"], changed))
    for name, values in PUBLISHED_2.items():
        row = {"system": name, "measured": "published, other data split", **dict.fromkeys(_columns())}
        row |= dict(zip(TABLE_2, values, strict=True))
        rows.append(row | {"IG low": None, "IG high": None, "what changed": SIM_OPT})
    return rows


def _columns() -> list[str]:
    """ACW's metrics, then the others."""
    from acw.evaluation.metrics import METRICS

    return [*TABLE_2, *(metric for metric in METRICS if metric not in TABLE_2)]


def _scored(name: str, entry: dict[str, Any], changed: str) -> dict[str, Any]:
    """A row of what was measured here; entry: a model's in evaluation.json."""
    means = {metric: entry["overall"][metric]["mean"] for metric in _columns()}
    low, high = entry["overall"]["IG"]["ci95"]
    return {"system": name, "measured": "here", **means, "IG low": low, "IG high": high, "what changed": changed}


def _comparisons(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Every two systems on the same held-out images: means of differences with bootstrap intervals."""
    from acw.evaluation.bootstrap import interval

    columns = {system.name: _per_image(system) for system in systems}
    names = list(columns[systems[0].name])
    assert all(list(column) == names for column in columns.values()), "one data set and split have one held-out set"
    category = np.array([columns[systems[0].name][name][0] for name in names])
    result = []
    metrics = (*TABLE_2, "LL")
    for a, b in itertools.combinations(reversed(columns), 2):
        difference = np.array([columns[a][name][1] for name in names]) - [columns[b][name][1] for name in names]
        mean, low, high = interval(difference, category)
        result += [
            {"a": a, "b": b, "metric": m, "mean": mean[k], "ci95": [low[k], high[k]]} for k, m in enumerate(metrics)
        ]
    return result


def _per_image(system: System) -> dict[str, tuple[str, list[float]]]:
    """Held-out image -> category and scores, in order of their names."""
    from acw.evaluation.summary import headline

    model = headline(system.evaluation)
    rows = [row for row in csv_rows(system.job.folder / "per_image.csv") if row["model"] == model]
    scores = {row["image"]: (row["category"], [float(row[metric]) for metric in (*TABLE_2, "LL")]) for row in rows}
    return dict(sorted(scores.items()))


def _text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a person reads them."""

    def shown(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    names = list(rows[0])
    cells = [names, *[[shown(row[name]) for name in names] for row in rows]]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def add_options(parser: Parser) -> None:
    about = "the authors' own model, of `acw import-deepgaze`: mixed evenly, and by category weights"
    parser.add_argument("--deepgaze", metavar="PATH", help=about)
    add_job_options(parser)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    parser.usage = f"{parser.prog} [--option VALUE ...]"
    add_options(parser)
    options = parser.read(argv)
    given = {name: value for name, value in options.items() if value != parser.get_default(name) and name != "deepgaze"}
    fields = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    print(shown(reproduce(options, fields)), flush=True)
