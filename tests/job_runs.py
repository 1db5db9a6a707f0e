"""Jobs as a user runs them, by their command lines, on a data set that is small enough for tests."""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from acw.data import known, synthetic
from acw.pipeline.job import Job, parse

JOBS = Path(__file__).parents[1] / "jobs"
# Two banks of two heads. No rate falls, so all epochs are trained: enough of them to be interrupted in their midst.
EPOCHS = 40
RECIPE = (
    *("demo", "--backbones", "lite0,lite1", "--seeds", "1", "--folds", "2", "--heads-per-worker", "2"),
    *("--workers", "2", "--max-epochs", str(EPOCHS), "--lr-patience", str(EPOCHS)),
)
# Of a data set's folder and a root: people name folders as they like.
NAME = 'Anna\'s "5 inch" images?#50%2F <b>\N{LATIN SMALL LETTER E WITH ACUTE}'
SIZES = ((120, 160), (128, 160), (120, 152))
# In the environment of the finished run, which must not write them anywhere (tests/test_security.py).
SECRETS = {
    "AWS_ACCESS_KEY_ID": "marked-key-id",
    "AWS_SECRET_ACCESS_KEY": "marked-secret-key",
    "AWS_SESSION_TOKEN": "marked-session-token",
    "MLFLOW_TRACKING_PASSWORD": "marked-password",
}
Histories = dict[str, list[dict]]


def displays(folder: Path, categories: Sequence[str], count: int, first: int = 0, *, people: bool = True) -> list[str]:
    """Writes some of the built-in displays as small pictures of several sizes, with a CSV; options to read them by.

    people: with the columns subject and category, or only the three that are needed.
    """
    dataset = synthetic.load()
    rows: list[dict[str, object]] = []
    for number, category in enumerate(categories):
        height, width = SIZES[number % len(SIZES)]
        for index in range(first, first + count):
            name = f"{category}/{index:03d}"
            place = next(i for i, stimulus in enumerate(dataset.stimuli) if stimulus.name == name)
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(known.stimulus_pixels(category, index)).resize((width, height)).save(path)
            full_height, full_width = dataset.stimuli[place].size
            for x, y, subject in zip(*dataset.fixations_of(place), strict=True):
                row: dict[str, object] = {"image": f"{name}.png"}
                row |= {"x": float(x) * width / full_width, "y": float(y) * height / full_height}
                rows.append(row | ({"subject": int(subject), "category": category} if people else {}))
    with (folder / "fixations.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return ["--dataset", str(folder), "--fixations", str(folder / "fixations.csv")]


def command(job: str, *arguments: object) -> list[str]:
    return [sys.executable, str(JOBS / f"{job}.py"), *map(str, arguments)]


def run(job: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(job, *arguments), capture_output=True, encoding="utf-8", env=os.environ | environment)


def succeed(job: str, *arguments: object, **environment: str) -> list[str]:
    """The lines on stdout of a job that ends with status 0."""
    result = run(job, *arguments, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


class Run(NamedTuple):
    """A finished pipeline: its command line after the job's name, the job, and the lines that it printed.

    output: all of it, on stderr too.
    """

    arguments: list[str]
    job: Job
    lines: list[str]
    output: str


@functools.cache
def finished(base: Path) -> Run:
    """The pipeline over 2 categories of 8 pictures, run once for all tests of a session; below a temporary folder."""
    arguments = [*RECIPE, *displays(base / NAME, ("Colour", "Faces"), 8), "--root", str(base / f"runs on {NAME}")]
    result = run("pipeline", *arguments, **SECRETS)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return Run(arguments, parse(arguments, ""), result.stdout.splitlines(), output)


def called(run: Run, name: str) -> str:
    """What the folder of the same run is called where its data set has another name."""
    return f"{run.job.recipe.name}-{name}-{run.job.folder.name.rpartition('-')[2]}"


def elsewhere(arguments: Sequence[str], root: Path) -> list[str]:
    """The same command line with another root."""
    place = list(arguments).index("--root")
    return [*arguments[: place + 1], str(root), *arguments[place + 2 :]]


def histories(folder: Path) -> Histories:
    """Per bank what its checkpoint says about the epochs so far; whole files only, as another process writes them."""
    result: Histories = {}
    for path in sorted(folder.glob("banks/*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                result[path.stem] = json.loads(file.metadata()["history"])
        except (OSError, SafetensorError) as error:
            raise AssertionError(f"{path} is not whole") from error
    return result


def heads(folder: Path) -> dict[str, torch.Tensor]:
    """All parameters of a run's heads, the best and the last ones."""
    result = {}
    for path in folder.glob("banks/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(("best/", "parameters/"))]  # noqa: SIM118
            result |= {f"{path.stem}/{name}": file.get_tensor(name) for name in names}
    return result


def assert_same_heads(folder: Path, reference: Path) -> None:
    ours, theirs = heads(folder), heads(reference)
    assert ours
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name} {text}"
        )


def assert_same_scores(folder: Path, reference: Path, tolerance: float) -> None:
    ours, theirs = (
        json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["models"] for run in (folder, reference)
    )
    assert ours.keys() == theirs.keys()
    for name, entry in theirs.items():
        for metric, score in entry["overall"].items():
            assert ours[name]["overall"][metric]["mean"] == pytest.approx(score["mean"], abs=tolerance), (name, metric)
