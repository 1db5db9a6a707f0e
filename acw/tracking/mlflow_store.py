"""MLflow's store: a sqlite file beside the runs, in S3 too (sqlite_in_s3.py), or a server; and what goes to it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from acw.storage import s3_errors, s3_settings, secrets
from acw.storage.addresses import in_cache, local, shown
from acw.storage.errors import UserError
from acw.storage.files import give_home
from acw.tracking import sqlite_in_s3

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

T = TypeVar("T")
NAME = "acw"  # of the experiment and of the registered model
METRICS_PER_CALL = 1000
ANSWER_SECONDS = 10
# What other programs leave in the environment would have MLflow log to their runs.
STRAY = (
    "MLFLOW_ACTIVE_MODEL_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
    "_MLFLOW_ACTIVE_MODEL_ID",
)


def tracking_uri(root: Path, given: str | None) -> str:
    """The store's URI: the one given, or MLFLOW_TRACKING_URI, or `mlflow.db` under the root, also where that is in S3.
    A password in it goes to the environment, so that no later error or record can hold it.

    Raises UserError for a store that cannot be used: only sqlite files and servers know where artifacts belong, and
    models are registered where their runs are.
    """
    sources = (
        ("--tracking-uri", given),
        ("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI")),
        ("--root", f"sqlite:///{root.absolute() / 'mlflow.db'}"),
    )
    name, uri = next((name, uri.strip()) for name, uri in sources if uri and uri.strip())
    registry = os.environ.get("MLFLOW_REGISTRY_URI", "").strip()
    elsewhere = _usable("MLFLOW_REGISTRY_URI", registry) if registry else ""
    found = _usable(name, uri)
    if elsewhere not in ("", found):
        raise UserError(
            f"MLFLOW_REGISTRY_URI {elsewhere}: acw registers a model in the store of its run, {shown(found)}; unset "
            "it, or name one store in both"
        )
    return found


def recorded(uri: str) -> str:
    """A store's URI from what `shown` has made of it in a record.

    A password that MLFLOW_TRACKING_URI holds for the same server goes to the environment, as by `tracking_uri`.
    """
    ours = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if urlsplit(ours).hostname and urlsplit(ours).hostname == urlsplit(uri).hostname:
        secrets.taken_out(ours)
    in_bucket = uri.startswith("sqlite:///s3://")
    return _usable("registration.json", uri.removeprefix("sqlite:///") if in_bucket else uri)


def _usable(name: str, uri: str) -> str:
    """A URI in the one form that it is compared in."""
    if uri.startswith("s3://"):
        uri = f"sqlite:///{local(uri)}"
    if uri.startswith("sqlite:///"):
        # A folder's name may hold anything; what stands behind a file's is meant for SQLAlchemy.
        if "?" in database_of(uri).name:
            raise UserError(f"{name} {uri}: takes no options; give sqlite:///FILE, and nothing behind it")
        return f"sqlite:///{database_of(uri)}"
    try:
        uri = secrets.taken_out(uri).rstrip("/")
        server = urlsplit(uri).scheme in ("http", "https") and urlsplit(uri).hostname
    except ValueError:
        server = None
    if not server:
        raise UserError(
            f"{name} {uri}: is no store of acw's; give http://HOST:PORT of an MLflow server, sqlite:///FILE or "
            "s3://.../mlflow.db"
        )
    return uri


def ready(root: Path, given: str | None) -> str:
    """The store's URI, as `tracking_uri` gives it, once the store is there and takes what will be logged: called before
    anything is computed. Says which it is where the command line does not.

    Raises UserError, within a minute, for a store that cannot be used.
    """
    uri = tracking_uri(root, given)
    if not given and os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        print(f"MLflow: {shown(uri)} (MLFLOW_TRACKING_URI)", flush=True)
    connect(uri)
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
    return uri.startswith("sqlite:") and in_cache(database_of(uri))


def connect(uri: str) -> tuple[MlflowClient, str]:
    """A client of the store, which becomes this process's, and the id of the experiment, both made if need be.

    What is then logged to a database in S3 is in a copy of it until `publish`.
    Raises UserError if a server does not answer within ANSWER_SECONDS, or refuses, or if a database cannot be used.
    """
    from sqlalchemy.exc import SQLAlchemyError

    for name in STRAY:
        os.environ.pop(name, None)
    mlflow = quiet_mlflow(uri)
    artifacts = None
    if in_s3(uri):
        artifacts = shown(database_of(uri).parent / "mlartifacts")
    elif uri.startswith("sqlite:"):
        try_out(database_of(uri), write=True)
        artifacts = (database_of(uri).parent / "mlartifacts").as_uri()
    else:
        answers(uri)
    try:
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(NAME)
        if experiment is None:
            number = client.create_experiment(NAME, artifact_location=artifacts)
            return connect(uri) if not publish(uri) else (_with_models(uri, client, number), number)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise refused(uri, error) from error
        experiment = client.get_experiment_by_name(NAME)  # another process was faster
    except (SQLAlchemyError, ValueError) as error:  # the latter of a server whose answers are no JSON
        raise refused(uri, error) from error
    if not experiment.experiment_id:
        raise refused(uri, ValueError("an experiment without an id"))
    if experiment.lifecycle_stage != "active":
        number = experiment.experiment_id
        raise UserError(f"{uri}: experiment '{NAME}' is deleted; mlflow experiments restore -x {number}")
    return _with_models(uri, client, experiment.experiment_id), experiment.experiment_id


def _with_models(uri: str, client: MlflowClient, experiment: str) -> MlflowClient:
    """The client; raises UserError for a server older than logged models, which would refuse the model in the end."""
    from mlflow import MlflowException

    if not uri.startswith("sqlite:"):
        try:
            client.search_logged_models([experiment], max_results=1)
        except MlflowException as error:
            if error.error_code not in ("ENDPOINT_NOT_FOUND", "RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                raise refused(uri, error) from error
            raise UserError(
                f"{uri}: this MLflow server knows no logged models, as servers before MLflow 3.0; update it to 3.0 or "
                "newer, or give another --tracking-uri"
            ) from error
    return client


def try_out(file: Path, *, write: bool) -> None:
    """Raises UserError unless a sqlite file can be read or, there or not, written: MLflow would try for minutes."""
    try:
        if write:
            file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(file, timeout=ANSWER_SECONDS, isolation_level=None)) as connection:
            (number,) = connection.execute("PRAGMA user_version").fetchone()
            if write:
                # Written as it was: only what changes something is refused of a file that is read-only.
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"PRAGMA user_version = {number}")
                connection.execute("ROLLBACK")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another --root") from None
    except sqlite3.Error as error:
        reason = "is a folder" if file.is_dir() else str(error)
        raise UserError(f"{file}: MLflow cannot use this database ({reason}); {_remedy(reason)}") from None


def _remedy(reason: str) -> str:
    if "locked" in reason:
        return "another program has it open and locked: wait for it or end it, and run again"
    if "readonly" in reason or "unable to open" in reason:
        return "let this user write it and its folder, or give another --root or --tracking-uri"
    return "name another file by --root or --tracking-uri"


def quiet_mlflow(uri: str) -> Any:
    """The module, quiet, and set to the store."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name, value in s3_settings.mlflow_environment().items():
        os.environ.setdefault(name, value)
    give_home()
    import mlflow

    # A new sqlite file goes through some fifty migrations, each a line.
    for logger in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    store = uri
    if uri.startswith("sqlite:"):
        store = _address(sqlite_in_s3.take(database_of(uri)) if in_s3(uri) else database_of(uri))
    before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(store)
    mlflow.set_registry_uri(store)
    # MLflow notes them in the environment, where the next command would take them for the user's.
    for name, was in before.items():
        os.environ.pop(name, None)
        if was is not None:
            os.environ[name] = was
    return mlflow


def publish(uri: str) -> bool:
    """Makes what was logged since `connect` the store's; False if another job has changed it meanwhile: log it again.

    Only a database in S3 needs this.
    """
    return not in_s3(uri) or sqlite_in_s3.put_back(database_of(uri))


def log(uri: str, write: Callable[[], T]) -> T:
    """What `write` returns, which connects and logs; again where another job has changed a database in S3 meanwhile.

    A server that goes away is waited for, about four minutes a request (MLFLOW_HTTP_REQUEST_MAX_RETRIES).
    Raises UserError if the store cannot be used.
    """
    for _ in range(sqlite_in_s3.ATTEMPTS):
        with s3_errors.explained(shown(database_of(uri)) if in_s3(uri) else uri), explained(uri):
            result = write()
        if publish(uri):
            return result
    raise sqlite_in_s3.contended(database_of(uri))


def answers(uri: str) -> None:
    """Raises UserError unless a server answers, as MLflow's own client would ask it."""
    from mlflow import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        # Left to itself it would try for minutes: it is patient with servers that are overloaded.
        answer = http_request(
            get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=ANSWER_SECONDS, raise_on_status=False
        )
    except MlflowException as error:
        problem = _problem(error)
    else:
        if answer.status_code < 500:
            return
        problem = f"status {answer.status_code}"
    raise UserError(f"{uri}: no MLflow server answers here ({problem}); start it, or correct --tracking-uri")


def _problem(error: BaseException) -> str:
    """What MLflow's message says of a request that failed, in a word."""
    return next((words for key, words in _PROBLEMS.items() if key in str(error)), type(error).__name__)


_PROBLEMS = {
    "SSLError": "its certificate is not trusted: MLFLOW_TRACKING_SERVER_CERT_PATH names your authority's",
    "ame or service not known": "no such host",
    "NameResolutionError": "no such host",
    "refused": "connection refused",
    "imed out": "no answer in time",
    "timeout": "no answer in time",
    "nvalid url": "no address",
}


def refused(uri: str, error: Exception) -> UserError:
    """Why a store cannot be used, and what to do."""
    if known := explanation(uri, error):
        return known
    reason = str(error).partition("\n")[0]
    if uri.startswith("sqlite:"):
        return UserError(f"{uri}: MLflow cannot use this database ({reason}); {_remedy(reason)}")
    return UserError(
        f"{uri}: does not answer as an MLflow server does ({reason[:200]}); correct --tracking-uri, or see to "
        "the server"
    )


def explanation(uri: str, error: Exception) -> UserError | None:
    """Of a store that is there but for others: for whoever has an account, or another MLflow."""
    code = getattr(error, "error_code", "")
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"):
        return UserError(
            f"{uri}: the MLflow server asks for an account ({code}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of one that may write"
        )
    if "out-of-date database schema" in str(error):
        return UserError(f"{uri}: {_schema(str(error))}; or give another --root or --tracking-uri")
    return None


def _schema(reason: str) -> str:
    """Of a database of another MLflow, which one that was."""
    import mlflow.store.db_migrations

    found = reason.partition("found version ")[2].partition(",")[0]
    known = [path.name for folder in mlflow.store.db_migrations.__path__ for path in Path(folder).rglob("*.py")]
    if any(name.startswith(found) for name in known):
        return "this database is an older MLflow's; copy it, then upgrade it: mlflow db upgrade sqlite:///FILE"
    return f"this database is a newer MLflow's than {mlflow.__version__}, which is here; install that one"


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
        elif "locked" in str(error):
            raise UserError(f"{uri}: the database is locked; {_remedy('locked')}: no head is trained again") from error
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

    # MLflow takes no plus, and no colon on every system: IG.backbone:lite0+lite1 is IG.backbone.lite0.lite1 here.
    name = name.replace(":", ".").replace("+", ".")
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
