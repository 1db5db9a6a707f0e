"""MLflow: a parent run and a child a head bank, the registered model `acw`, and which version is the champion.

The store is a sqlite file beside the runs, in S3 too (`acw.database`), or a server. A run folder is logged once: what a
killed attempt left unfinished is deleted, and a version that it registered is kept and finished.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np

from acw import credentials, database, report, s3
from acw.bootstrap import interval
from acw.recipes import Recipe
from acw.resources import FILE, noted
from acw.storage import UserError, fetch, local, mirrored, present, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities.model_registry import ModelVersion

    from acw.banks import Bank, BankState

NAME = "acw"  # of the experiment and of the registered model
DEFAULT_ROOT = Path("runs")
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
# What loading and prediction import; pinned to the versions in use, with which the scores were measured.
REQUIREMENTS = ("mlflow", "numpy", "pillow", "safetensors", "scipy", "timm", "torch", "torchvision")
METRICS_PER_CALL = 1000
ANSWER_SECONDS = 10

Alias = Literal["champion", "challenger"]


@dataclass(frozen=True)
class Registration:
    """The version of `acw` that a run became; reason: why it has its alias, in words."""

    run_id: str
    version: int
    alias: Alias
    reason: str


def tracking_uri(root: Path, given: str | None) -> str:
    """The store's URI: the one given, or `mlflow.db` under the root, also where that is in S3. A password in it goes
    to the environment, so that no later error or record can hold it.

    Raises UserError for a store that cannot be used: only sqlite files and servers know where artifacts belong.
    """
    uri = given or f"sqlite:///{root.absolute() / 'mlflow.db'}"
    if uri.startswith("s3://"):
        uri = f"sqlite:///{local(uri)}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{_database(uri)}"
    uri = credentials.taken_out(uri)
    if urlsplit(uri).scheme not in ("http", "https"):
        raise UserError(
            f"tracking URI {uri}: give http://HOST:PORT of an MLflow server, sqlite:///FILE or s3://.../mlflow.db"
        )
    return uri


def _database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).absolute()


def _in_s3(uri: str) -> bool:
    return uri.startswith("sqlite:") and mirrored(_database(uri))


def connect(uri: str) -> tuple[MlflowClient, str]:
    """A client of the store, which becomes this process's, and the id of the experiment, both made if need be.

    What is then logged to a database in S3 is in a copy of it until `publish`.
    Raises UserError if a server does not answer within ANSWER_SECONDS, or refuses.
    """
    from sqlalchemy.exc import SQLAlchemyError

    mlflow = _mlflow(uri)
    if _in_s3(uri):
        artifacts = shown(_database(uri).parent / "mlartifacts")
    elif uri.startswith("sqlite:"):
        file = _database(uri)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}); choose another --root") from None
        artifacts = (file.parent / "mlartifacts").as_uri()
    else:
        _answers(uri)
        artifacts = None
    try:
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(NAME)
        if experiment is None:
            number = client.create_experiment(NAME, artifact_location=artifacts)
            return (client, number) if publish(uri) else connect(uri)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise _refused(uri, error) from error
        experiment = client.get_experiment_by_name(NAME)  # another process was faster
    except SQLAlchemyError as error:
        raise _refused(uri, error) from error
    if experiment.lifecycle_stage != "active":
        number = experiment.experiment_id
        raise UserError(f"{uri}: experiment '{NAME}' is deleted; mlflow experiments restore -x {number}")
    return client, experiment.experiment_id


def _mlflow(uri: str) -> Any:
    """The module, quiet, and set to the store."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name, value in s3.Settings.from_environment().mlflow_environment().items():
        os.environ.setdefault(name, value)
    import mlflow

    # A new sqlite file goes through some fifty migrations, each a line.
    for logger in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(f"sqlite:///{database.take(_database(uri))}" if _in_s3(uri) else uri)
    return mlflow


def publish(uri: str) -> bool:
    """Makes what was logged since `connect` the store's; False if another job has changed it meanwhile: log it again.

    Only a database in S3 needs this.
    """
    return not _in_s3(uri) or database.put_back(_database(uri))


def _answers(uri: str) -> None:
    # MLflow itself would try for minutes: it is patient with servers that are overloaded.
    import requests

    try:
        status = requests.get(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS).status_code
    except requests.RequestException as error:
        problem = type(error).__name__
    else:
        if status < 500:
            return
        problem = f"status {status}"
    raise UserError(f"{uri}: no MLflow server answers here ({problem}); start it, or correct --tracking-uri")


def _refused(uri: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"{uri}: MLflow cannot use this store ({reason}); correct the URI or its credentials")


def log_run(
    uri: str, run: Path, recipe: Recipe, banks: Mapping[Bank, BankState], evaluation: Mapping[str, Any]
) -> Registration:
    """Logs a finished run folder, registers its model and decides on its alias. Repeated, it returns what was decided.

    uri: as `tracking_uri` gives it. run: the folder with FILES, `model/` and recipe.json; its name identifies the run.
    evaluation: the content of evaluation.json. Leaves weights.png and curves.png in the folder.
    A server that goes away is waited for, about four minutes a request (MLFLOW_HTTP_REQUEST_MAX_RETRIES).
    Raises UserError if the store cannot be used.
    """
    for _ in range(database.ATTEMPTS):
        with s3.explained(shown(_database(uri)) if _in_s3(uri) else uri), _explained(uri):
            registration = _log_run(uri, run, recipe, banks, evaluation)
        if publish(uri):
            return registration
    raise database.contended(_database(uri))


def _log_run(
    uri: str, run: Path, recipe: Recipe, banks: Mapping[Bank, BankState], evaluation: Mapping[str, Any]
) -> Registration:
    client, experiment = connect(uri)
    import mlflow

    record = json.loads(fetch(run / "recipe.json").read_text())
    parent = version = None
    for attempt in client.search_runs([experiment], f'tags."acw.folder" = "{run.name}"'):
        if "acw.reason" in attempt.data.tags:
            client.set_terminated(attempt.info.run_id, "FINISHED", attempt.info.end_time)
            return _decided(attempt.info.run_id, attempt.data.tags)
        versions = client.search_model_versions(f"run_id = '{attempt.info.run_id}'")
        if versions:
            parent, version = attempt.info.run_id, versions[0]
        else:
            _discard(client, experiment, attempt.info.run_id)
    parent = parent or _new_parent(client, experiment, run, recipe, record)
    # The run is RUNNING until the block ends, FAILED if that is by an error.
    with mlflow.start_run(run_id=parent), _no_more_patience():
        if version is None:
            version = _log(client, experiment, parent, run, record, banks, evaluation)
        return _promote(client, parent, version, run)


@contextlib.contextmanager
def _no_more_patience() -> Iterator[None]:
    """After an error no request is repeated: that the run has failed would be told a dead server for minutes too."""
    try:
        yield
    except Exception:
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        raise


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """A store that goes away or fills up while it is written as one line; a rerun then finds all that was computed."""
    import mlflow
    from sqlalchemy.exc import SQLAlchemyError

    rerun = "run the same command again: no head is trained again"
    try:
        yield
    except (mlflow.MlflowException, SQLAlchemyError, OSError) as error:
        if urlsplit(uri).scheme in ("http", "https"):
            try:
                _answers(uri)
            except UserError:
                raise UserError(f"{uri}: the MLflow server has gone away; start it and {rerun}") from error
        elif isinstance(error, OSError) or "disk is full" in str(error):
            reason = getattr(error, "strerror", None) or "the disk is full"
            raise UserError(f"{uri}: cannot be written ({reason}); free the disk and {rerun}") from error
        raise


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
    report.weights_figure(run / "category_weights.csv", run / "weights.png")
    if banks:
        report.curves_figure({bank: state.history for bank, state in banks.items()}, run / "curves.png")
    for file in (*(run / name for name in FILES), *run.glob(FILE), *sorted(run.glob("*.png"))):
        client.log_artifact(parent, str(file))
    return mlflow.register_model(_log_model(run), NAME, tags=_origin(run, record))


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


def metric(name: str, value: float, step: int) -> Metric:
    from mlflow.entities import Metric

    return Metric(name, value, int(time.time() * 1000), step)


def log_metrics(client: MlflowClient, run_id: str, metrics: Iterator[Metric]) -> None:
    everything = list(metrics)
    for start in range(0, len(everything), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=everything[start : start + METRICS_PER_CALL])


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    client.log_batch(run_id, params=[Param(name, text(value)) for name, value in values.items()])


def _log_model(run: Path) -> str:
    """Logs the model from code, without pickles, with this package beside it, so that it loads anywhere; its URI."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1, -1))]),
        params=ParamSchema([ParamSpec("category", DataType.string, "")]),
    )
    package = Path(__file__).parent
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*input example was not provided")  # the signature is written, not inferred
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "serving.py"),
            artifacts={"model": str(run / "model")},
            code_paths=[str(package)],
            pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
            signature=signature,
        )
    return logged.model_uri


def _public_version(package: str) -> str:
    """Without what a build adds, such as +cu130: registries do not have that."""
    return importlib.metadata.version(package).partition("+")[0]


def _promote(client: MlflowClient, parent: str, version: ModelVersion, run: Path) -> Registration:
    """Sets the version's alias by the champion's rule. Decided once: a repeat after a kill keeps to what was noted."""
    if "reason" not in version.tags:
        alias, reason = _decide(client, version, run / "out_of_fold.csv")
        client.set_model_version_tag(NAME, version.version, "alias", alias)
        client.set_model_version_tag(NAME, version.version, "reason", reason)
        version = client.get_model_version(NAME, version.version)
    client.set_registered_model_alias(NAME, version.tags["alias"], version.version)
    decision = {"acw.version": str(version.version)} | {f"acw.{key}": version.tags[key] for key in ("alias", "reason")}
    for key, value in decision.items():  # the reason last: it says that all is done
        client.set_tag(parent, key, value)
    return _decided(parent, decision)


def _decided(run_id: str, tags: Mapping[str, str]) -> Registration:
    alias: Alias = "champion" if tags["acw.alias"] == "champion" else "challenger"
    return Registration(run_id, int(tags["acw.version"]), alias, tags["acw.reason"])


def _decide(client: MlflowClient, version: ModelVersion, out_of_fold: Path) -> tuple[Alias, str]:
    """Champion is who is first, or better than the champion on out-of-fold IG, paired by image, beyond chance."""
    import mlflow

    try:
        champion = client.get_model_version_by_alias(NAME, "champion")
    except mlflow.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return "champion", "there was no champion"
    for tag, what in (("dataset", "data set"), ("split", "split")):
        if champion.tags.get(tag) != version.tags[tag]:
            return "challenger", f"not comparable: another {what} than champion version {champion.version}'s"
    run_id = champion.run_id
    if run_id is None or out_of_fold.name not in [file.path for file in client.list_artifacts(run_id)]:
        return "challenger", f"not comparable: champion version {champion.version}'s {out_of_fold.name} is gone"
    with tempfile.TemporaryDirectory() as folder:
        theirs = client.download_artifacts(run_id, out_of_fold.name, folder)
        return _compare(_read(out_of_fold), _read(Path(theirs)), champion.version)


def _compare(
    ours: Mapping[str, tuple[str, float]], theirs: Mapping[str, tuple[str, float]], champion: str
) -> tuple[Alias, str]:
    if ours.keys() != theirs.keys():
        return "challenger", f"not comparable: other development images than champion version {champion}'s"
    difference = np.array([ig - theirs[image][1] for image, (_, ig) in ours.items()])
    mean, low, high = interval(difference, np.array([category for category, _ in ours.values()]))
    reason = (
        f"out-of-fold IG {mean:+.4f} bit/fixation against champion version {champion}, "
        f"95 % interval {low:+.4f} to {high:+.4f}"
    )
    return ("champion" if low > 0 else "challenger"), reason


def _read(out_of_fold: Path) -> dict[str, tuple[str, float]]:
    """image -> (category, IG)."""
    with out_of_fold.open(newline="", encoding="utf-8") as file:
        return {row["image"]: (row["category"], float(row["IG"])) for row in csv.DictReader(file)}


def download_model(uri: str) -> Path:
    """Local folder, with model.json, of `models:/acw@champion`, `models:/acw/3` or `runs:/RUN_ID/model`.

    The store is MLFLOW_TRACKING_URI, or the sqlite file under `runs/`, where the files are read in place; what a server
    sends is deleted at exit.
    Raises UserError where there is no such store or model.
    """
    if urlsplit(uri).scheme not in ("models", "runs"):
        raise UserError(
            f"{uri}: no model URI; give models:/{NAME}@champion, models:/{NAME}/VERSION or runs:/RUN_ID/model"
        )
    store = tracking_uri(DEFAULT_ROOT, os.environ.get("MLFLOW_TRACKING_URI"))
    remedy = f"no such model in {store}; set MLFLOW_TRACKING_URI to the right store, or give a run's folder"
    destination = None
    here = store.startswith("sqlite:")
    if here and not present(_database(store)):
        raise UserError(f"{uri}: {remedy}")
    if not here or _in_s3(store):
        if not here:
            _answers(store)
        destination = tempfile.mkdtemp(prefix="acw-model-")
        # Backbones are read when they are first needed, so the files stay for as long as the process.
        atexit.register(shutil.rmtree, destination, ignore_errors=True)
    mlflow = _mlflow(store)
    try:
        return Path(mlflow.artifacts.download_artifacts(f"{uri.rstrip('/')}/artifacts/model", dst_path=destination))
    except (mlflow.MlflowException, OSError) as error:
        raise UserError(f"{uri}: {remedy} ({str(error).partition(chr(10))[0]})") from error
