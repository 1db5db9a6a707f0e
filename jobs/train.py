"""Trains the heads of a recipe on extracted features; goes on where an interrupted training stopped.

python jobs/train.py gaze --dataset FOLDER      # after jobs/extract.py with the same arguments
python jobs/train.py demo                       # the embedded displays, on a CPU
"""

from __future__ import annotations

from collections.abc import Sequence

from acw.cli import Job, parse, run


def train(job: Job) -> None:
    """Trains all heads; leaves a checkpoint a bank in the run's folder."""
    from acw.aggregation import training_set
    from acw.distributed import train as train_banks
    from acw.provenance import provenance
    from acw.resources import note
    from acw.storage import write_json

    stores = job.stores()
    record = provenance(job.recipe) | {"dataset": job.dataset.summary(), "split_hash": job.split.hash}
    write_json(job.folder / "recipe.json", record)
    cost = train_banks(job.recipe, training_set(job.dataset, job.split, job.recipe), stores, job.folder)
    note(job.folder, "heads", cost)


def main(argv: Sequence[str]) -> None:
    job = parse(argv, __doc__.splitlines()[0])
    from acw.cluster import connect

    connect()
    train(job)


if __name__ == "__main__":
    run(main)
