"""Trains the heads of a recipe on extracted features; goes on where an interrupted training stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from acw.pipeline.job import Job, parse, stage
from acw.training import checkpoints, training_set


def record(job: Job) -> dict[str, Any]:
    """What a run is made with and on: the content of recipe.json."""
    from acw.provenance import provenance

    overlay = {"overlay": job.overlay} if job.overlay else {}
    return provenance(job.recipe) | {"dataset": job.dataset.summary(), "split_hash": job.split.hash} | overlay


@stage("training")
def train(job: Job) -> None:
    """Trains all heads, then, if the recipe says so, each fold's jointly; leaves checkpoints in the run's folder."""
    from acw.cluster.costs import note
    from acw.storage.files import write_json
    from acw.tracking import mlflow_store, runs
    from acw.training import distributed
    from acw.training.joint import JointSet

    recipe, dataset, folder = job.recipe, job.dataset, job.folder
    stores = job.stores()
    job.split.refuse_unscorable()
    uri, made_with = mlflow_store.ready(job.root, job.tracking_uri), record(job)
    write_json(folder / "recipe.json", made_with)
    if recipe.heads:
        print(f"heads are those of {recipe.heads}: nothing to train", flush=True)
        return
    training = training_set.training_set(dataset, job.heads_split, recipe)
    with runs.under_way(uri, folder, recipe, made_with) as epochs:
        note(folder, "heads", distributed.train(recipe, training, stores, folder, epochs.report))
        if recipe.joint:
            data = JointSet(training, dataset.category_index, len(dataset.categories), stores)
            heads = checkpoints.best_heads(recipe, checkpoints.trained_heads(recipe, folder))
            note(folder, "systems", distributed.train_jointly(recipe, data, heads, folder, epochs.report))


def main(argv: Sequence[str]) -> None:
    job = parse(argv, __doc__)
    from acw.cluster.joining import connect

    connect()
    train(job)
