"""The registered model `acw`: what a version holds, which of them is the champion, and how one is loaded."""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import numpy as np

from acw.evaluation.bootstrap import interval
from acw.evaluation.summary import headline
from acw.model.description import describe
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

Alias = Literal["champion", "challenger"]


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


def _decide(client: MlflowClient, version: ModelVersion, run: Path) -> tuple[Alias, str]:
    """Champion is who is first, or better than the champion on out-of-fold IG, paired by image, beyond chance.

    But never whose scores are not to be believed (`evaluation.doubts`), even if there is no other: who knows better
    sets the alias in MLflow.
    """
    import mlflow

    evaluation = json.loads(fetch(run / "evaluation.json").read_text(encoding="utf-8"))
    doubts = evaluation.get("doubts", {})
    for model in (headline(evaluation), "center_bias"):
        if model in doubts:
            return "challenger", f"never champion: {doubts[model]}"
    out_of_fold = run / "out_of_fold.csv"
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
    return {row["image"]: (row["category"], float(row["IG"])) for row in csv_rows(out_of_fold)}


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
    store = mlflow_store.tracking_uri(DEFAULT_ROOT, None)
    remedy = f"no such model in {store}; set MLFLOW_TRACKING_URI to the right store, or give a run's folder"
    destination = None
    here = store.startswith("sqlite:")
    if here and not present(mlflow_store.database_of(store)):
        raise UserError(f"{uri}: {remedy}")
    mlflow = mlflow_store.quiet_mlflow(store)
    if not here:
        mlflow_store.answers(store)
    elif not mlflow_store.in_s3(store):
        mlflow_store.try_out(mlflow_store.database_of(store), write=False)
    if not here or mlflow_store.in_s3(store):
        destination = tempfile.mkdtemp(prefix="acw-model-")
        # Backbones are read when they are first needed, so the files stay for as long as the process.
        atexit.register(shutil.rmtree, destination, ignore_errors=True)
    try:
        return Path(mlflow.artifacts.download_artifacts(f"{uri.rstrip('/')}/artifacts/model", dst_path=destination))
    except (mlflow.MlflowException, OSError) as error:
        known = mlflow_store.explanation(store, error)
        raise known or UserError(f"{uri}: {remedy} ({str(error).partition(chr(10))[0]})") from error
