"""MLflow's store: a sqlite file beside the runs, in S3 too (`acw.database`), or a server; and what goes to it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from acw import credentials, database, s3
from acw.storage import UserError, local, mirrored, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

T = TypeVar("T")
NAME = "acw"  # of the experiment and of the registered model
METRICS_PER_CALL = 1000
ANSWER_SECONDS = 10


def tracking_uri(root: Path, given: str | None) -> str:
    """The store's URI: the one given, or `mlflow.db` under the root, also where that is in S3. A password in it goes
    to the environment, so that no later error or record can hold it.

    Raises UserError for a store that cannot be used: only sqlite files and servers know where artifacts belong.
    """
    uri = given or f"sqlite:///{root.absolute() / 'mlflow.db'}"
    if uri.startswith("s3://"):
        uri = f"sqlite:///{local(uri)}"
    if uri.startswith("sqlite:///"):
        # A folder's name may hold anything; what stands behind a file's is meant for SQLAlchemy.
        if "?" in database_of(uri).name:
            raise UserError(f"tracking URI {uri}: takes no options; give sqlite:///FILE, and nothing behind it")
        return f"sqlite:///{database_of(uri)}"
    uri = credentials.taken_out(uri)
    if urlsplit(uri).scheme not in ("http", "https"):
        raise UserError(
            f"tracking URI {uri}: give http://HOST:PORT of an MLflow server, sqlite:///FILE or s3://.../mlflow.db"
        )
    return uri


def database_of(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).absolute()


@functools.cache
def _address(database: Path) -> str:
    """What SQLAlchemy and MLflow take for a database: where `?` or `%20` is in its path, which SQLAlchemy would read as
    something else and MLflow, when it is quoted, as another folder, a link that goes at exit leads there."""
    from sqlalchemy.engine import make_url

    plain = f"sqlite:///{database}"
    if make_url(plain).database == str(database):
        return plain
    link = Path(tempfile.mkdtemp(prefix="acw-mlflow-")) / "store"
    link.symlink_to(database.parent)
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    return f"sqlite:///{link / database.name}"


def in_s3(uri: str) -> bool:
    return uri.startswith("sqlite:") and mirrored(database_of(uri))


def connect(uri: str) -> tuple[MlflowClient, str]:
    """A client of the store, which becomes this process's, and the id of the experiment, both made if need be.

    What is then logged to a database in S3 is in a copy of it until `publish`.
    Raises UserError if a server does not answer within ANSWER_SECONDS, or refuses.
    """
    from sqlalchemy.exc import SQLAlchemyError

    mlflow = quiet_mlflow(uri)
    if in_s3(uri):
        artifacts = shown(database_of(uri).parent / "mlartifacts")
    elif uri.startswith("sqlite:"):
        file = database_of(uri)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}); choose another --root") from None
        artifacts = (file.parent / "mlartifacts").as_uri()
    else:
        answers(uri)
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


def quiet_mlflow(uri: str) -> Any:
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
    store = uri
    if uri.startswith("sqlite:"):
        store = _address(database.take(database_of(uri)) if in_s3(uri) else database_of(uri))
    mlflow.set_tracking_uri(store)
    return mlflow


def publish(uri: str) -> bool:
    """Makes what was logged since `connect` the store's; False if another job has changed it meanwhile: log it again.

    Only a database in S3 needs this.
    """
    return not in_s3(uri) or database.put_back(database_of(uri))


def log(uri: str, write: Callable[[], T]) -> T:
    """What `write` returns, which connects and logs; again where another job has changed a database in S3 meanwhile.

    A server that goes away is waited for, about four minutes a request (MLFLOW_HTTP_REQUEST_MAX_RETRIES).
    Raises UserError if the store cannot be used.
    """
    for _ in range(database.ATTEMPTS):
        with s3.explained(shown(database_of(uri)) if in_s3(uri) else uri), explained(uri):
            result = write()
        if publish(uri):
            return result
    raise database.contended(database_of(uri))


def answers(uri: str) -> None:
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


@contextlib.contextmanager
def no_more_patience() -> Iterator[None]:
    """After an error no request is repeated: that the run has failed would be told a dead server for minutes too."""
    try:
        yield
    except Exception:
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        raise


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """A store that goes away or fills up while it is written as one line; a rerun then finds all that was computed."""
    import mlflow
    from sqlalchemy.exc import SQLAlchemyError

    rerun = "run the same command again: no head is trained again"
    try:
        yield
    except (mlflow.MlflowException, SQLAlchemyError, OSError) as error:
        if urlsplit(uri).scheme in ("http", "https"):
            try:
                answers(uri)
            except UserError:
                raise UserError(f"{uri}: the MLflow server has gone away; start it and {rerun}") from error
        elif isinstance(error, OSError) or "disk is full" in str(error):
            reason = getattr(error, "strerror", None) or "the disk is full"
            raise UserError(f"{uri}: cannot be written ({reason}); free the disk and {rerun}") from error
        raise


def runs_of(client: MlflowClient, experiment: str, tag: str, value: str) -> list[Run]:
    """The experiment's runs whose tag has this value, which may hold anything: MLflow's filters take no quotes."""
    # Names end with what tells them apart. `_` and `%` would stand for anything in a filter.
    end = re.search(r"[0-9A-Za-z-]*$", value)
    found = client.search_runs([experiment], f"tags.`{tag}` LIKE '%{end[0] if end else ''}'")
    return [run for run in found if run.data.tags[tag] == value]


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
