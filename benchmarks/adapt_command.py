"""What `acw adapt` is worth on other data sets, by how many images it is given.

    python benchmarks/adapt_command.py --model RUN --data FOLDER,FOLDER [--nothing gaze_small --root ROOT]

FOLDER holds images and a fixations.csv. SIZES images are drawn DRAWS times, the model adapted to them and scored on all
others, against the model as it is: bits per fixation with 95 % intervals over images, as a Markdown table; a model that
the command would not have written counts with no gain. `--nothing` names a recipe that is run on the images of the
first draw alone, below ROOT, where features are kept, too: training from nothing. A row takes minutes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import harness
import numpy as np
from harness import Figures

import acw
from acw.data import Dataset, load_dataset
from acw.evaluation.bootstrap import interval
from acw.model import new_category
from acw.model.model import Model
from acw.model.study import Study
from acw.pipeline.adapt import fit, look

SIZES = (10, 20, 50, 100)
SCORED = 10  # images, at least
DRAWS = 4


def adapted(study: Study, drawn: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, str]:
    """Bits of each of the other images over the model as it is, and what the command would write."""
    category, model, others = fit(study, "new", drawn), study.model, study.seen.subset(rest)
    if not category.pays:
        return np.zeros(len(rest)), "nothing"
    own, before = category.readouts, new_category.as_it_is(model, others)
    if own:
        said = [study.said_by(own.heads, index) for index in rest.tolist()]
        others = dataclasses.replace(others, log_densities=said)
    else:
        others = others.only(model.shared.ravel())
    now = new_category.log_likelihood(model, others, [category.adaptation.row(0)] * len(rest))
    return (now - before) / math.log(2), f"readouts, {own.share:.0%}" if own else "numbers"


def from_nothing(dataset: Dataset, drawn: np.ndarray, recipe: str, root: str) -> Model:
    """A model that a recipe has trained on these images alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / f"{dataset.name}-{len(drawn)}"
        rows = []
        for index in drawn.tolist():
            stimulus = dataset.stimuli[index]
            image = folder / stimulus.name
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(Path(stimulus.path).read_bytes())
            x, y, subject = dataset.fixations_of(index)
            rows += [(stimulus.name, *each) for each in zip(x, y, subject, strict=True)]
        with (folder / "fixations.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "x", "y", "subject"), *rows])
        line = [sys.executable, "-m", "acw.cli", "run", recipe, "--dataset", str(folder), "--root", root]
        line += ["--fixations", str(folder / "fixations.csv")]
        told = subprocess.run(line, check=True, capture_output=True, encoding="utf-8").stdout
    return acw.load(Path(told.splitlines()[-1]).parent)


def benchmark(options: argparse.Namespace) -> Figures:
    model = acw.load(options.model)
    figures: Figures = {}
    rows = [
        "| data | images | no adaptation, LL | adapted | adopted | trained from nothing |",
        "|---|---|---|---|---|---|",
    ]
    for folder in options.data.split(","):
        dataset = load_dataset(folder, fixations=f"{folder}/fixations.csv")
        study, count = look(model, dataset, Path(options.root)), len(dataset.stimuli)
        pixels = np.array([math.log(math.prod(size)) for size in study.seen.sizes])
        as_it_is = (new_category.as_it_is(model, study.seen) + pixels) / math.log(2)
        orders = [np.random.default_rng(draw).permutation(count) for draw in range(DRAWS)]
        for size in (size for size in SIZES if size + SCORED <= count):
            gains, adopted = defaultdict(list), Counter[str]()
            for order in orders:
                values, what = adapted(study, np.sort(order[:size]), np.sort(order[size:]))
                adopted[what] += 1
                for index, value in zip(np.sort(order[size:]).tolist(), values.tolist(), strict=True):
                    gains[index].append(value)
            cells = [f"{as_it_is.mean():.3f}", _cell([np.mean(of_image) for of_image in gains.values()])]
            nothing = ""
            if options.nothing:
                trained = from_nothing(dataset, np.sort(orders[0][:size]), options.nothing, options.root)
                left = np.sort(orders[0][size:])
                others = look(trained, dataset, Path(options.root)).seen.subset(left)
                now = new_category.as_it_is(trained, others) / math.log(2) + pixels[left] / math.log(2)
                nothing = _cell(now - as_it_is[left])
            cells += [", ".join(f"{times} x {what}" for what, times in adopted.items()), nothing]
            rows.append(f"| {dataset.name} | {size} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
            figures[f"{dataset.name}, {size} images"] = " | ".join(cells)
    print("\n".join(["", *rows, ""]), flush=True)
    return figures


def _cell(values: list | np.ndarray) -> str:
    mean, low, high = interval(np.asarray(values), np.zeros(len(values)))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    harness.run(__doc__ or "", benchmark, model="", data="", nothing="", root="runs")
