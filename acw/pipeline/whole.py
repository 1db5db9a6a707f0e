"""The whole job: extract, train, aggregate, score, register. What is there already is kept; a rerun goes on.

The last line on stdout is the path of the run's evaluation.json.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from acw.pipeline.job import Job, add_recipe_options, job_of, read_options
from acw.pipeline.options import Parser
from acw.pipeline.search import add_search_options, search_options, tune
from acw.recipes import Recipe, derive
from acw.storage.addresses import shown
from acw.storage.errors import UserError
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
    from acw.pipeline.train import record, train
    from acw.tracking import mlflow_store, runs

    # What is wrong with a cluster or an MLflow store is better known now than after the training.
    address()
    uri = mlflow_store.ready(job.root, job.tracking_uri)
    connect()
    with runs.under_way(uri, job.folder, job.recipe, record(job)):
        for step in (extract, train, aggregate):
            start = time.monotonic()
            step(job)
            print(f"{step.__name__}: {time.monotonic() - start:.0f} s", flush=True)
    return result


def add_options(parser: Parser, base: Recipe | None = None) -> None:
    about = "first search a file of tune_spaces/, and train with the best that is found"
    parser.add_argument("--tune", metavar="SPACE", help=about)
    add_search_options(parser)
    add_recipe_options(parser, base)


def main(argv: Sequence[str]) -> None:
    options = read_options(argv, __doc__, add_options)
    if not options["tune"] and (options["samples"] or options["search_folds"]):
        raise UserError("--samples and --search-folds say how to search; add --tune SPACE, or leave them out")
    # Resumed if need be, as everything here goes on where it stopped.
    search = search_options(options, options["tune"], resume=True) if options["tune"] else None
    job = job_of(options)
    if search:
        overlay = json.loads(fetch(tune(job, search)).read_text(encoding="utf-8"))
        job = dataclasses.replace(job, recipe=derive(job.recipe, overlay["fields"]), overlay=overlay)
    print(f"run: {shown(job.folder)}", flush=True)
    result = pipeline(job)
    from acw.evaluation.summary import table

    print(table(json.loads(result.read_text(encoding="utf-8"))))
    print(shown(result), flush=True)
