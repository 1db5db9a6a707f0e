"""A search in MLflow: a parent run, and a child run a configuration with its curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from acw.recipes import Recipe
from acw.search.space import Search, Trialled
from acw.tracking import mlflow_store
from acw.tracking.origin import source_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

FILES = ("overlay.json", "search.json", "report.html")
RUNS_AT_ONCE = 50_000  # the most that MLflow gives; no search has as many configurations


def log(uri: str, found: Search, recipe: Recipe, origin: Mapping[str, Any], *, ended: bool) -> None:
    """Logs the configurations that have ended, each once, whatever interrupted this before.

    uri: as `tracking.tracking_uri` gives it. origin: what the search was made with and on. ended: whether nothing more
    comes; the files of the search's folder are logged then, too. Raises UserError if the store cannot be used.
    """

    def write() -> None:
        client, experiment = mlflow_store.connect(uri)
        parent = _parent(client, experiment, found, recipe, origin)
        _children(client, experiment, parent, found)
        if ended:
            _end(client, parent, found)

    mlflow_store.log(uri, write)


def _parent(client: MlflowClient, experiment: str, found: Search, recipe: Recipe, origin: Mapping[str, Any]) -> str:
    name = found.folder.name
    known = mlflow_store.runs_of(client, experiment, "acw.search", name)
    if known:
        client.update_run(known[0].info.run_id, status="RUNNING")
        return known[0].info.run_id
    tags = {"acw.search": name} | {key: str(origin[key]) for key in ("dataset", "split", "commit")}
    tags |= source_tags(origin["commit"])
    parent = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    params = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    mlflow_store.log_params(
        client, parent, params | {"search.space": found.space.name, "search.folds": origin["folds"]}
    )
    return parent


def _children(client: MlflowClient, experiment: str, parent: str, found: Search) -> None:
    there: set[str] = set()
    condition = f"tags.\"mlflow.parentRunId\" = '{parent}'"
    for run in client.search_runs([experiment], condition, max_results=RUNS_AT_ONCE):
        if run.info.status == "FINISHED":
            there.add(run.data.tags["acw.configuration"])
        else:
            client.delete_run(run.info.run_id)  # what was killed in its midst
    for one in sorted(found.trialled, key=lambda one: one.number):
        if str(one.number) not in there:
            name = f"configuration {one.number}" if one.number else "the recipe itself"
            tags = {"mlflow.parentRunId": parent, "acw.configuration": str(one.number)}
            tags["acw.state"] = one.outcome.state
            child = client.create_run(experiment, run_name=name, tags=tags).info.run_id
            mlflow_store.log_params(client, child, one.fields)
            mlflow_store.log_metrics(client, child, _curves(one))
            client.set_terminated(child, "FINISHED")


def _curves(one: Trialled) -> Iterator[Metric]:
    """Validation IG after each epoch, of each backbone and their mean; and the best. Bits per fixation."""
    curves = one.outcome.curves
    for epoch, values in enumerate(zip(*curves.values(), strict=True)):
        yield mlflow_store.metric("ig", sum(values) / len(values), epoch)
        for backbone, value in zip(curves, values, strict=True):
            yield mlflow_store.metric(f"ig.{backbone}", value, epoch)
    if one.outcome.ig is not None:
        yield mlflow_store.metric("ig.best", one.outcome.ig, 0)


def _end(client: MlflowClient, parent: str, found: Search) -> None:
    best, own = found.trialled[0], next(one for one in found.trialled if one.number == 0)
    metrics = [mlflow_store.metric("ig.best", best.ig, 0)]
    metrics += [mlflow_store.metric("ig.recipe", own.ig, 0)] if math.isfinite(own.ig) else []
    metrics += [mlflow_store.metric(f"importance.{name}", value, 0) for name, value in found.importance().items()]
    mlflow_store.log_metrics(client, parent, iter(metrics))
    client.set_tag(parent, "acw.best", str(best.number))
    for file in FILES:
        client.log_artifact(parent, str(found.folder / file))
    client.set_terminated(parent, "FINISHED")
