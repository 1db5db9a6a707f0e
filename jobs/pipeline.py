"""The whole job: extract, train, aggregate, score, register. What is there already is kept; a rerun goes on.

    python jobs/pipeline.py demo                                # the embedded displays, on a CPU, in minutes
    python jobs/pipeline.py gaze --dataset FOLDER               # your images and fixations, small backbones
    ray job submit --address URL --working-dir . -- python jobs/pipeline.py cat2000 --dataset D --root R

The last line on stdout is the path of the run's evaluation.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from acw.cli import Job, parse, run


def _registered(job: Job) -> bool:
    """Whether this run's model is in the registry that was asked for."""
    from acw.storage import fingerprint
    from acw.tracking import tracking_uri

    # As a hash, since a server's URI may hold a password.
    store = fingerprint(tracking_uri(job.root, job.tracking_uri))
    path = job.folder / "registration.json"
    return path.exists() and json.loads(path.read_text()).get("store") == store


def pipeline(job: Job) -> Path:
    """Does all that is not done yet; the path of the run's evaluation.json."""
    result = job.folder / "evaluation.json"
    if result.exists() and _registered(job):
        return result
    from aggregate import aggregate
    from extract import extract
    from train import train

    from acw import tracking
    from acw.cluster import connect

    # A tracking server that does not answer is better known now than after the training.
    tracking.connect(tracking.tracking_uri(job.root, job.tracking_uri))
    connect()
    for step in (extract, train, aggregate):
        start = time.monotonic()
        step(job)
        print(f"{step.__name__}: {time.monotonic() - start:.0f} s", flush=True)
    return result


def main(argv: Sequence[str]) -> None:
    job = parse(argv, __doc__.splitlines()[0])
    print(f"run: {job.folder}", flush=True)
    result = pipeline(job)
    from acw.evaluation import table

    print(table(json.loads(result.read_text())))
    print(result, flush=True)


if __name__ == "__main__":
    run(main)
