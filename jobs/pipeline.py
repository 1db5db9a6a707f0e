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

from acw.cli import parse, run


def main(argv: Sequence[str]) -> None:
    job = parse(argv, __doc__.splitlines()[0])
    print(f"run: {job.folder}", flush=True)
    if not (job.folder / "registration.json").exists():
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
    from acw.evaluation import table

    result = job.folder / "evaluation.json"
    print(table(json.loads(result.read_text())))
    print(result, flush=True)


if __name__ == "__main__":
    run(main)
