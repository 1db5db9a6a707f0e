"""The whole job: extract, train, aggregate, score, register. What is there already is kept; a rerun goes on.

The last line on stdout is the path of the run's evaluation.json.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from acw.pipeline.job import Job, parse
from acw.pipeline.options import Parser
from acw.pipeline.search import HELP, parse_options, tune
from acw.recipes import derive
from acw.storage.addresses import shown
from acw.storage.files import fetch


def _registered(job: Job) -> bool:
    """Whether this run's model is in the registry that was asked for."""
    from acw.tracking.mlflow_store import tracking_uri

    store = shown(tracking_uri(job.root, job.tracking_uri))
    path = fetch(job.folder / "registration.json")
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("store") == store


def pipeline(job: Job) -> Path:
    """Does all that is not done yet; the path of the run's evaluation.json."""
    result = fetch(job.folder / "evaluation.json")
    if result.exists() and _registered(job):
        return result
    from acw.cluster.joining import address, connect
    from acw.pipeline.aggregate import aggregate
    from acw.pipeline.extract import extract
    from acw.pipeline.train import train
    from acw.tracking import mlflow_store

    # What is wrong with a cluster or an MLflow store is better known now than after the training.
    address()
    mlflow_store.ready(job.root, job.tracking_uri)
    connect()
    for step in (extract, train, aggregate):
        start = time.monotonic()
        step(job)
        print(f"{step.__name__}: {time.monotonic() - start:.0f} s", flush=True)
    return result


def main(argv: Sequence[str]) -> None:
    own = Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--tune", dest="space")
    own.set_defaults(resume=True)  # as everything here goes on where it stopped
    search, rest = parse_options(own, argv)
    about = "--tune SPACE      first search a file of tune_spaces/, and train with the best that is found"
    job = parse(rest, f"{__doc__.splitlines()[0]}\n\n{about}\n{HELP}")
    if search:
        overlay = json.loads(fetch(tune(job, search)).read_text(encoding="utf-8"))
        job = dataclasses.replace(job, recipe=derive(job.recipe, overlay["fields"]), overlay=overlay)
    print(f"run: {shown(job.folder)}", flush=True)
    result = pipeline(job)
    from acw.evaluation.summary import table

    print(table(json.loads(result.read_text(encoding="utf-8"))))
    print(shown(result), flush=True)
