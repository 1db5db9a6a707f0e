"""A run in MLflow: a parent run with its scores and files, a child run a head bank, and the model in the registry.

A run's folder is one run, however often its jobs were interrupted: it is found by the folder's name, started by the
first job that works on it, filled while heads train (epochs.py) and finished with the scores and the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acw.cluster.costs import FILE, noted
from acw.recipes import Recipe
from acw.report import figures
from acw.report.weights import weights_of
from acw.storage.files import fetch, present
from acw.tracking import mlflow_store, model_card, registry
from acw.tracking.epochs import Children, EpochLog, bank_part, system_part
from acw.tracking.mlflow_store import log_metrics, log_params, metric
from acw.tracking.origin import dataset_input, source_tags
from acw.tracking.registry import Registration

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

    from acw.training.bank import Bank, BankState
    from acw.training.joint import SystemState

FILES = (
    "recipe.json",
    "evaluation.json",
    "per_image.csv",
    "category_weights.csv",
    "category_weights_history.csv",
    "out_of_fold.csv",
    "report.html",
)
DECIDED = "acw.reason"  # the tag that is set last: all of the run is there


@contextlib.contextmanager
def under_way(uri: str, run: Path, recipe: Recipe, record: Mapping[str, Any]) -> Iterator[EpochLog]:
    """While a job works on a run's folder: the run is RUNNING, FAILED or KILLED if the job ends too early. Yields what
    takes the epochs. A run that is finished stays as it is.

    uri: as `tracking_uri` gives it. record: what recipe.json holds. To a database in S3, which can only be replaced as
    a whole, epochs are sent with the scores. Raises UserError if the store cannot be used.
    """

    def start() -> tuple[Run, Children]:
        client, experiment = mlflow_store.connect(uri)
        opened = _open(client, experiment, run, recipe, record)
        return opened, Children(client, experiment, opened.info.run_id)

    opened, children = mlflow_store.log(uri, start)
    decided = DECIDED in opened.data.tags
    epochs = EpochLog(None if decided or mlflow_store.in_s3(uri) else children, recipe)
    try:
        yield epochs
    except BaseException as error:  # Ctrl-C, or SIGTERM, which Ray makes an exit, too
        epochs.close()
        if not decided:
            _end_early(uri, opened.info.run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    epochs.close()


def _end_early(uri: str, run_id: str, status: str) -> None:
    def write() -> None:
        client, _ = mlflow_store.connect(uri)
        client.set_terminated(run_id, status)

    # What ended the job is told, not what the store has to say to it.
    with contextlib.suppress(Exception):
        mlflow_store.log(uri, write)


def log_run(
    uri: str,
    run: Path,
    recipe: Recipe,
    banks: Mapping[Bank, BankState],
    evaluation: Mapping[str, Any],
    systems: Sequence[SystemState] = (),
) -> Registration:
    """Logs what a finished run's folder holds, registers its model and decides on its alias. Repeated, it returns what
    was decided.

    uri: as `tracking_uri` gives it. run: the folder with FILES, `model/` and recipe.json; its name identifies the run.
    evaluation: the content of evaluation.json. systems: of a joint training, by fold. Leaves weights.png and curves.png
    in the folder. Raises UserError if the store cannot be used.
    """

    def write() -> Registration:
        client, experiment = mlflow_store.connect(uri)
        record = json.loads(fetch(run / "recipe.json").read_text(encoding="utf-8"))
        opened = _open(client, experiment, run, recipe, record)
        parent = opened.info.run_id
        if DECIDED in opened.data.tags:
            client.set_terminated(parent, "FINISHED", opened.info.end_time)
            return registry.decided(parent, opened.data.tags)
        with mlflow_store.no_more_patience():
            children = Children(client, experiment, parent)
            for bank, state in banks.items():
                children.log(bank_part(bank), state.history)
            for fold, system in enumerate(systems):
                children.log(system_part(fold), system.history)
            children.end()
            return _finish(client, opened, run, record, evaluation, banks)

    return mlflow_store.log(uri, write)


def _open(client: MlflowClient, experiment: str, run: Path, recipe: Recipe, record: Mapping[str, Any]) -> Run:
    """The folder's run, made if need be, RUNNING and with all that is known before any result; one that is finished as
    it is."""
    attempts = mlflow_store.runs_of(client, experiment, "acw.folder", run.name)
    if not attempts:
        attempts = [client.create_run(experiment, run_name=run.name, tags=_origin(run, record))]
    opened = min(attempts, key=lambda attempt: DECIDED not in attempt.data.tags)
    if DECIDED in opened.data.tags:
        return opened
    run_id = opened.info.run_id
    from mlflow.entities import RunTag

    client.update_run(run_id, status="RUNNING")
    tags = {"commit": record["commit"], "command": record["command"], **source_tags(record["commit"])}
    tags |= {f"version.{package}": version for package, version in record["versions"].items()}
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    # Fields that say only how to compute may differ from the interrupted job's: those of the first are kept.
    fields = (field.name for field in dataclasses.fields(recipe))
    log_params(client, run_id, {name: getattr(recipe, name) for name in fields if name not in opened.data.params})
    client.log_inputs(run_id, [dataset_input(record["dataset"])])
    return opened


def _origin(run: Path, record: Mapping[str, Any]) -> dict[str, str]:
    return {"dataset": record["dataset"]["fingerprint"], "split": record["split_hash"], "acw.folder": run.name}


def _finish(
    client: MlflowClient,
    opened: Run,
    run: Path,
    record: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    banks: Mapping[Bank, BankState],
) -> Registration:
    """Scores and files, and last the registered version: where that is, all is."""
    import mlflow

    parent = opened.info.run_id
    # The run is FINISHED when the block ends, FAILED if that is by an error.
    with mlflow.start_run(run_id=parent):
        version = next(iter(client.search_model_versions(f"run_id = '{parent}'")), None)
        if version is None:
            known = opened.data.metrics  # of an attempt that was killed
            new = (point for point in (*_scores(evaluation), *_costs(run)) if known.get(point.key) != point.value)
            log_metrics(client, parent, new)
            _log_files(client, parent, run, banks)
            for model in client.search_logged_models([opened.info.experiment_id], f"source_run_id = '{parent}'"):
                client.delete_logged_model(model.model_id)
            version = mlflow.register_model(registry.log_model(run), mlflow_store.NAME, tags=_origin(run, record))
        card = run / "model" / model_card.FILE
        if not version.description and present(card):
            text = model_card.description(fetch(card).read_text(encoding="utf-8"))
            client.update_model_version(mlflow_store.NAME, version.version, text)
        return registry.promote(client, parent, version, run)


def _log_files(client: MlflowClient, parent: str, run: Path, banks: Mapping[Bank, BankState]) -> None:
    figures.save(figures.weights_heat_map(weights_of(run)), run / "weights.png")
    if banks:
        curves = figures.head_curves({bank: state.history for bank, state in banks.items()})
        figures.save(figures.training_curves(curves), run / "curves.png")
    for file in (
        *(run / name for name in FILES),
        *run.glob("category_adaptation.csv"),
        *run.glob(FILE),
        *sorted(run.glob("*.png")),
    ):
        client.log_artifact(parent, str(file))


def _scores(evaluation: Mapping[str, Any]) -> Iterator[Metric]:
    """METRIC.MODEL, such as IG.category_weights: the mean over held-out images."""
    for model, scores in evaluation["models"].items():
        for name, score in scores["overall"].items():
            yield metric(f"{name}.{model}", score["mean"], 0)


def _costs(run: Path) -> Iterator[Metric]:
    """What the steps took, such as cost.heads.seconds."""
    for step, cost in noted(run).items():
        yield metric(f"cost.{step}.seconds", cost["seconds"], 0)
        yield metric(f"cost.{step}.images_per_second", cost["images"] / cost["seconds"], 0)
        yield metric(f"cost.{step}.peak_rss_gib", cost["peak_rss"] / 2**30, 0)
