"""A run in MLflow: a parent run with its scores and files, a child run a head bank, and the model in the registry.

A run folder is logged once: what a killed attempt left unfinished is deleted, and a version that it registered is kept
and finished.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acw.cluster.costs import FILE, noted
from acw.recipes import Recipe
from acw.report import figures
from acw.storage.files import fetch
from acw.tracking import mlflow_store, registry
from acw.tracking.mlflow_store import log_metrics, log_params, metric
from acw.tracking.registry import Registration

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities.model_registry import ModelVersion

    from acw.training.bank import Bank, BankState

FILES = (
    "recipe.json",
    "evaluation.json",
    "per_image.csv",
    "category_weights.csv",
    "category_weights_history.csv",
    "out_of_fold.csv",
    "report.html",
)
EPOCH_METRICS = ("loss", "ig", "learning_rate", "sigma", "center_bias_weight")


def log_run(
    uri: str, run: Path, recipe: Recipe, banks: Mapping[Bank, BankState], evaluation: Mapping[str, Any]
) -> Registration:
    """Logs a finished run folder, registers its model and decides on its alias. Repeated, it returns what was decided.

    uri: as `tracking_uri` gives it. run: the folder with FILES, `model/` and recipe.json; its name identifies the run.
    evaluation: the content of evaluation.json. Leaves weights.png and curves.png in the folder. Raises UserError if the
    store cannot be used.
    """
    return mlflow_store.log(uri, lambda: _log_run(uri, run, recipe, banks, evaluation))


def _log_run(
    uri: str, run: Path, recipe: Recipe, banks: Mapping[Bank, BankState], evaluation: Mapping[str, Any]
) -> Registration:
    client, experiment = mlflow_store.connect(uri)
    import mlflow

    record = json.loads(fetch(run / "recipe.json").read_text(encoding="utf-8"))
    parent = version = None
    for attempt in mlflow_store.runs_of(client, experiment, "acw.folder", run.name):
        if "acw.reason" in attempt.data.tags:
            client.set_terminated(attempt.info.run_id, "FINISHED", attempt.info.end_time)
            return registry.decided(attempt.info.run_id, attempt.data.tags)
        versions = client.search_model_versions(f"run_id = '{attempt.info.run_id}'")
        if versions:
            parent, version = attempt.info.run_id, versions[0]
        else:
            _discard(client, experiment, attempt.info.run_id)
    parent = parent or _new_parent(client, experiment, run, recipe, record)
    # The run is RUNNING until the block ends, FAILED if that is by an error.
    with mlflow.start_run(run_id=parent), mlflow_store.no_more_patience():
        if version is None:
            version = _log(client, experiment, parent, run, record, banks, evaluation)
        return registry.promote(client, parent, version, run)


def _discard(client: MlflowClient, experiment: str, parent: str) -> None:
    for model in client.search_logged_models([experiment], f"source_run_id = '{parent}'"):
        client.delete_logged_model(model.model_id)
    for child in client.search_runs([experiment], f"tags.\"mlflow.parentRunId\" = '{parent}'"):
        client.delete_run(child.info.run_id)
    client.delete_run(parent)


def _origin(run: Path, record: Mapping[str, Any]) -> dict[str, str]:
    return {"dataset": record["dataset"]["fingerprint"], "split": record["split_hash"], "acw.folder": run.name}


def _new_parent(client: MlflowClient, experiment: str, run: Path, recipe: Recipe, record: Mapping[str, Any]) -> str:
    tags = _origin(run, record) | {"commit": record["commit"], "command": record["command"]}
    tags |= {f"version.{package}": version for package, version in record["versions"].items()}
    parent = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
    log_params(client, parent, {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)})
    return parent


def _log(
    client: MlflowClient,
    experiment: str,
    parent: str,
    run: Path,
    record: Mapping[str, Any],
    banks: Mapping[Bank, BankState],
    evaluation: Mapping[str, Any],
) -> ModelVersion:
    """Scores, children and files, and last the registered version: where that is, all is."""
    import mlflow

    log_metrics(client, parent, _scores(evaluation))
    log_metrics(client, parent, _costs(run))
    for bank, state in banks.items():
        _log_bank(client, experiment, parent, bank, state)
    figures.weights_figure(run / "category_weights.csv", run / "weights.png")
    if banks:
        figures.curves_figure({bank: state.history for bank, state in banks.items()}, run / "curves.png")
    for file in (*(run / name for name in FILES), *run.glob(FILE), *sorted(run.glob("*.png"))):
        client.log_artifact(parent, str(file))
    return mlflow.register_model(registry.log_model(run), mlflow_store.NAME, tags=_origin(run, record))


def _log_bank(client: MlflowClient, experiment: str, parent: str, bank: Bank, state: BankState) -> None:
    child = client.create_run(experiment, run_name=bank.name, tags={"mlflow.parentRunId": parent}).info.run_id
    folds, seeds = sorted({head.fold for head in bank.members}), sorted({head.seed for head in bank.members})
    log_params(client, child, {"backbone": bank.backbone, "folds": folds, "seeds": seeds, "heads": len(bank.members)})
    log_metrics(client, child, _curves(bank, state))
    client.set_terminated(child, "FINISHED")


def _curves(bank: Bank, state: BankState) -> Iterator[Metric]:
    """Per epoch the means over the heads that still train, and each head's validation IG."""
    for entry in state.history:
        for name in EPOCH_METRICS:
            yield metric(name, float(np.mean([value for value in entry[name] if value is not None])), entry["epoch"])
        for head, ig in zip(bank.members, entry["ig"], strict=True):
            if ig is not None:
                yield metric(f"ig/fold{head.fold}-seed{head.seed}", ig, entry["epoch"])


def _scores(evaluation: Mapping[str, Any]) -> Iterator[Metric]:
    """METRIC.MODEL, such as IG.category_weights: the mean over held-out images."""
    for model, scores in evaluation["models"].items():
        for name, score in scores["overall"].items():
            # MLflow takes no colon on every system: backbone:lite0 is backbone.lite0 here.
            yield metric(f"{name}.{model.replace(':', '.')}", score["mean"], 0)


def _costs(run: Path) -> Iterator[Metric]:
    """What the steps took, such as cost.heads.seconds."""
    for step, cost in noted(run).items():
        yield metric(f"cost.{step}.seconds", cost["seconds"], 0)
        yield metric(f"cost.{step}.images_per_second", cost["images"] / cost["seconds"], 0)
        yield metric(f"cost.{step}.peak_rss_gib", cost["peak_rss"] / 2**30, 0)
