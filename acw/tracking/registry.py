"""The registered model `acw`: what a version holds, which of them is the champion, and how one is loaded."""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np

from acw.evaluation.bootstrap import interval
from acw.evaluation.summary import headline
from acw.model.description import describe
from acw.storage.addresses import shown
from acw.storage.checksums import fingerprint, sha256_file
from acw.storage.errors import UserError
from acw.storage.files import csv_rows, fetch, present
from acw.tracking import mlflow_store
from acw.tracking.mlflow_store import NAME

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DEFAULT_ROOT = Path("runs")
# What networks in ONNX need, too.
ONNX_REQUIREMENTS = ("onnx", "onnxruntime")
# What loading and prediction import; pinned to the versions in use, with which the scores were measured.
REQUIREMENTS = ("mlflow", "numpy", "pillow", "safetensors", "scipy", "timm", "torch", "torchvision")

EVALUATION, OUT_OF_FOLD = "evaluation.json", "out_of_fold.csv"  # of a run
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's errors of what it does not have

T = TypeVar("T")
Alias = Literal["champion", "challenger"]
Decision = tuple[Alias, str]  # and why, in words
ByImage = Mapping[str, tuple[str, float]]  # image -> (category, score)


@dataclass(frozen=True)
class Registration:
    """The version of `acw` that a run became; reason: why it has its alias, in words."""

    run_id: str
    version: int
    alias: Alias
    reason: str


def log_model(run: Path) -> str:
    """Logs the model from code, without pickles, with this package beside it, so that it loads anywhere; its URI."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    # No inputs: by uint8, MLflow would cast what JSON brings, and make black pictures of shares of 0..1 before our code
    # could see them. `served_model` says what it takes.
    signature = ModelSignature(
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1, -1))]),
        params=ParamSchema([ParamSpec("category", DataType.string, "")]),
    )
    package = Path(__file__).parents[1]
    in_onnx = any(not backbone["timm_name"] for backbone in describe(run / "model")["backbones"])
    needed = REQUIREMENTS + (ONNX_REQUIREMENTS if in_onnx else ())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*input example was not provided")  # the signature is written, not inferred
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"model": (run / "model").absolute().as_uri()},  # of a path, MLflow would read `#` and `%20`
            code_paths=[str(package)],
            pip_requirements=[f"{name}=={_public_version(name)}" for name in needed],
            signature=signature,
        )
    return logged.model_uri


def _public_version(package: str) -> str:
    """Without what a build adds, such as +cu130: registries do not have that."""
    return importlib.metadata.version(package).partition("+")[0]


def register_imported(store: str, folder: Path, description: str) -> int:
    """Registers the model in a folder that no run here has trained, as a run of its own; its version, without an alias.

    Repeated with the same model, it returns the version of the first time. Raises UserError if the store cannot be
    used.
    """
    content = [sha256_file(fetch(folder / "model" / file)) for file in ("heads.safetensors", "fusion.safetensors")]
    tags = {"acw.folder": folder.name, "acw.imported": fingerprint(content)}
    tags["reason"] = "imported, compared with no other version yet"

    def write() -> int:
        client, experiment = mlflow_store.connect(store)
        import mlflow  # which is quiet by now

        for version in client.search_model_versions(f"name = '{NAME}'"):
            if version.tags.get("acw.imported") == tags["acw.imported"]:
                return int(version.version)
        with mlflow.start_run(experiment_id=experiment, run_name=folder.name, tags=tags):
            version = mlflow.register_model(log_model(folder), NAME, tags=tags)
        client.update_model_version(NAME, version.version, description)
        return int(version.version)

    return mlflow_store.log(store, write)


def promote(client: MlflowClient, parent: str, version: ModelVersion, run: Path) -> Registration:
    """Sets the version's alias by the champion's rule; run: its folder.

    Decided once: a repeat after a kill keeps to what was noted.
    """
    if "reason" not in version.tags:
        alias, reason = _decide(client, version, run)
        client.set_model_version_tag(NAME, version.version, "alias", alias)
        client.set_model_version_tag(NAME, version.version, "reason", reason)
        version = client.get_model_version(NAME, version.version)
    client.set_registered_model_alias(NAME, version.tags["alias"], version.version)
    decision = {"acw.version": str(version.version)} | {f"acw.{key}": version.tags[key] for key in ("alias", "reason")}
    for key, value in decision.items():  # the reason last: it says that all is done
        client.set_tag(parent, key, value)
    return decided(parent, decision)


def decided(run_id: str, tags: Mapping[str, str]) -> Registration:
    alias: Alias = "champion" if tags["acw.alias"] == "champion" else "challenger"
    return Registration(run_id, int(tags["acw.version"]), alias, tags["acw.reason"])


def _decide(client: MlflowClient, version: ModelVersion, run: Path) -> Decision:
    """Champion is who is first, or better than the champion on out-of-fold IG, paired by image, beyond chance.

    But never whose scores are not to be believed (`doubt`), even if there is no other: who knows better says so by
    `acw promote --force`.
    """
    if reason := doubt(json.loads(fetch(run / EVALUATION).read_text(encoding="utf-8"))):
        return "challenger", reason
    if (champion := champion_of(client)) is None:
        return "champion", "there was no champion"
    for tag, what in (("dataset", "data set"), ("split", "split")):
        if champion.tags.get(tag) != version.tags.get(tag):
            return "challenger", f"not comparable: another {what} than champion version {champion.version}'s"
    with tempfile.TemporaryDirectory() as folder:
        theirs = artifact(client, champion, OUT_OF_FOLD, Path(folder))
        if theirs is None:
            return "challenger", f"not comparable: champion version {champion.version}'s {OUT_OF_FOLD} is gone"
        return compare("out-of-fold IG", _read(run / OUT_OF_FOLD), _read(theirs), champion.version)


def decide_again(client: MlflowClient, version: ModelVersion) -> Decision:
    """The same of a version that is registered, by what its run has logged."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (EVALUATION, OUT_OF_FOLD):
            if artifact(client, version, name, Path(folder)) is None:  # as of a model that was imported
                if champion_of(client) is None:
                    return "champion", "there was no champion"
                return "challenger", f"not comparable: version {version.version} has no {name}; give a --dataset"
        return _decide(client, version, Path(folder))


def doubt(evaluation: Mapping[str, Any]) -> str:
    """Why a model of such scores is never the champion (`summary.doubts`); empty where nothing speaks against it."""
    doubts = evaluation.get("doubts", {})
    return next((f"never champion: {doubts[n]}" for n in (headline(evaluation), "center_bias") if n in doubts), "")


def compare(what: str, ours: ByImage, theirs: ByImage, champion: str) -> Decision:
    """Whether ours is better than a champion's, paired by image, beyond chance; what: the score, in bit."""
    if ours.keys() != theirs.keys():
        return "challenger", f"not comparable: other development images than champion version {champion}'s"
    difference = np.array([score - theirs[image][1] for image, (_, score) in ours.items()])
    mean, low, high = interval(difference, np.array([category for category, _ in ours.values()]))
    reason = (
        f"{what} {mean:+.4f} bit/fixation against champion version {champion}, 95 % interval {low:+.4f} to {high:+.4f}"
    )
    return ("champion" if low > 0 else "challenger"), reason


def crown(client: MlflowClient, version: ModelVersion, before: ModelVersion | None, reason: str, forced: bool) -> None:
    """Makes a version the champion by a decision of later than its registration, and notes why; before: the champion
    that the decision was made against. Raises UserError if meanwhile another has become it."""
    now = champion_of(client)
    if (now and now.version) != (before and before.version):
        raise UserError(f"{NAME}: another version has become the champion meanwhile; run the same command again")
    noted = {"alias": "champion", "reason": reason, "forced": str(forced).lower()}
    for key, value in noted.items():
        client.set_model_version_tag(NAME, version.version, key, value)
        if version.run_id:
            client.set_tag(version.run_id, f"acw.{key}", value)
    client.set_registered_model_alias(NAME, "champion", version.version)
    if "challenger" in version.aliases:
        client.delete_registered_model_alias(NAME, "challenger")


def _read(out_of_fold: Path) -> ByImage:
    """image -> (category, IG)."""
    return {row["image"]: (row["category"], float(row["IG"])) for row in csv_rows(out_of_fold)}


# --- Looking things up -------------------------------------------------------------------------------------------


def champion_of(client: MlflowClient) -> ModelVersion | None:
    """The champion, or None where there is none."""
    return _if_there(lambda: client.get_model_version_by_alias(NAME, "champion"))


def version_of(client: MlflowClient, number: int) -> ModelVersion:
    """A version by its number; raises UserError where there is none."""
    found = _if_there(lambda: client.get_model_version(NAME, str(number)))
    if found is None:
        raise UserError(f"{NAME}: has no version {number}; `acw models` lists those that it has")
    return found


def versions_of(client: MlflowClient) -> list[ModelVersion]:
    """All versions, the newest first."""
    found = client.search_model_versions(f"name = '{NAME}'")
    # A search leaves aliases out.
    whole = [client.get_model_version(NAME, version.version) for version in found]
    return sorted(whole, key=lambda version: -int(version.version))


def artifact(client: MlflowClient, version: ModelVersion, name: str, folder: Path) -> Path | None:
    """A file that a version's run has logged, downloaded to a folder; None where there is none."""
    import mlflow

    try:
        if version.run_id and name in [file.path for file in client.list_artifacts(version.run_id)]:
            return Path(client.download_artifacts(version.run_id, name, str(folder)))
    except mlflow.MlflowException as error:  # of a run that was deleted for good
        if error.error_code not in NOT_THERE:
            raise
    return None


def _if_there(ask: Callable[[], T]) -> T | None:
    import mlflow

    try:
        return ask()
    except mlflow.MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        return None


def open_store(store: str, remedy: str) -> MlflowClient:
    """A client of a store that is there, to read; raises UserError, which ends in the remedy, where it is not."""
    here = store.startswith("sqlite:")
    if here and not present(mlflow_store.database_of(store)):
        raise UserError(f"{shown(store)}: there is no such store; {remedy}")
    mlflow = mlflow_store.quiet_mlflow(store)
    if not here:
        mlflow_store.answers(store)
    elif not mlflow_store.in_s3(store):
        mlflow_store.try_out(mlflow_store.database_of(store), write=False)
    return mlflow.MlflowClient()


def download_model(uri: str, store: str | None = None) -> Path:
    """Local folder, with model.json, of `models:/acw@champion`, `models:/acw/3` or `runs:/RUN_ID/model`.

    store: as `tracking_uri` gives it; otherwise MLFLOW_TRACKING_URI, or the sqlite file under `runs/`. Files of one
    here are read in place; what a server sends is deleted at exit. Raises UserError where there is no such store or
    model.
    """
    if urlsplit(uri).scheme not in ("models", "runs"):
        raise UserError(
            f"{uri}: no model URI; give models:/{NAME}@champion, models:/{NAME}/VERSION or runs:/RUN_ID/model"
        )
    store = store or mlflow_store.tracking_uri(DEFAULT_ROOT, None)
    remedy = "set MLFLOW_TRACKING_URI to the right store, or give a run's folder"
    open_store(store, remedy)
    import mlflow  # which is quiet by now

    destination = None
    if not store.startswith("sqlite:") or mlflow_store.in_s3(store):
        destination = tempfile.mkdtemp(prefix="acw-model-")
        # Backbones are read when they are first needed, so the files stay for as long as the process.
        atexit.register(shutil.rmtree, destination, ignore_errors=True)
    try:
        return Path(mlflow.artifacts.download_artifacts(f"{uri.rstrip('/')}/artifacts/model", dst_path=destination))
    except (mlflow.MlflowException, OSError) as error:
        known = mlflow_store.explanation(store, error)
        raise known or UserError(
            f"{uri}: no such model in {store}; {remedy} ({str(error).partition(chr(10))[0]})"
        ) from error
