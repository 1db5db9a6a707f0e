"""Where a run comes from, in the words that MLflow's pages show: the program, its commit, and the data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

# Of `Dataset.summary`, what MLflow shows as the profile of a data set.
PROFILE = ("images", "fixations", "subjects", "categories", "reader", "licence")
UNKNOWN = "unknown"  # commit, as `provenance.commit` gives it


def source_tags(commit: str) -> dict[str, str]:
    """Tags for the columns "Source" and "Version" of MLflow's tables; commit: as `provenance.commit` gives it."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "python", "mlflow.source.type": "LOCAL"}
    plain = commit.partition("+")[0]
    return tags if plain == UNKNOWN else tags | {"mlflow.source.git.commit": plain}


def dataset_input(summary: Mapping[str, Any]) -> DatasetInput:
    """A data set as an input of a run: its name, its fingerprint and where it lies. No data are copied.

    summary: as `Dataset.summary` gives it, or an older record of it.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    location = str(summary.get("location", ""))
    kind, source = "code", json.dumps({"tags": {"dataset": location}})  # what this program draws
    if "/" in location:
        kind, source = "s3" if location.startswith("s3://") else "local", json.dumps({"uri": location})
    digest = summary["fingerprint"]
    profile = json.dumps({name: summary[name] for name in PROFILE if name in summary}, ensure_ascii=False)
    dataset = Dataset(summary.get("name") or digest, digest, kind, source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
