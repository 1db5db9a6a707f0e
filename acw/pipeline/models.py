"""Lists the versions of the registered model: their aliases, and their scores on the held-out images of their data.

Scores of different data sets are not to be compared: acw promote VERSION --dataset FOLDER compares two versions on one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acw.pipeline.options import Parser, root_folder
from acw.storage.addresses import shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

METRICS = ("LL", "NSS", "AUC")  # after IG
REMEDY = "give --root or --tracking-uri of the runs whose models are meant"


def add_options(parser: Parser) -> None:
    add_store_options(parser)


def add_store_options(parser: Parser) -> None:
    """Where the registered model is; `store_of` takes it from the parsed options."""
    about = "folder, or s3://BUCKET/PREFIX, of runs, which has MLflow's store unless another is named (default: runs)"
    parser.add_argument("--root", default="runs", metavar="PATH", help=about)
    about = "MLflow server or sqlite:///FILE (default: MLFLOW_TRACKING_URI, else sqlite under the root, in S3 too)"
    parser.add_argument("--tracking-uri", metavar="URI", help=about)


def store_of(options: Mapping[str, Any]) -> tuple[str, MlflowClient]:
    """The store that options name, and a client of it; raises UserError where there is none."""
    from acw.tracking import mlflow_store, registry

    store = mlflow_store.tracking_uri(root_folder(options["root"]), options["tracking_uri"])
    return store, registry.open_store(store, REMEDY)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    store, client = store_of(parser.read(argv))
    from acw.tracking.registry import versions_of

    versions = versions_of(client)
    print(f"{shown(store)}: {len(versions) or 'no'} versions of the model", flush=True)
    if versions:
        header = f"{'version':>7}  {'alias':10}  {'IG, bit':24}" + "".join(f"{name:>8}" for name in METRICS)
        print(f"{header}  {'registered':10}  data set, run")
    for version in versions:
        print("\n".join(_lines(client, version)), flush=True)


def _lines(client: MlflowClient, version: ModelVersion) -> Iterator[str]:
    """A version's row, and why it has its alias."""
    from acw.evaluation.summary import headline
    from acw.tracking.registry import EVALUATION, artifact

    with tempfile.TemporaryDirectory() as folder:
        path = artifact(client, version, EVALUATION, Path(folder))
        evaluation = json.loads(path.read_text(encoding="utf-8")) if path else {}
    overall = evaluation.get("models", {}).get(headline(evaluation), {}).get("overall", {})
    gain = "{:.3f} [{:.3f}, {:.3f}]".format(overall["IG"]["mean"], *overall["IG"]["ci95"]) if "IG" in overall else "-"
    others = "".join(f"{overall[name]['mean']:8.3f}" if name in overall else f"{'-':>8}" for name in METRICS)
    day = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).date().isoformat()
    about = [evaluation.get("dataset", {}).get("name", ""), version.tags.get("acw.folder", "")]
    alias = ", ".join(sorted(version.aliases))
    yield f"{version.version:>7}  {alias:10}  {gain:24}{others}  {day}  {', '.join(filter(None, about))}".rstrip()
    if reason := version.tags.get("reason"):
        yield f"{'':9}{'forced: ' if version.tags.get('forced') == 'true' else ''}{reason}"
