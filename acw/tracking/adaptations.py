"""An adapted model in MLflow: a run that says what was gained on which data, and a version of the registered model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acw.storage.files import fetch
from acw.tracking import mlflow_store, model_card, registry
from acw.tracking.origin import dataset_input, source_tags
from acw.tracking.registry import Registration


def log(uri: str, folder: Path, name: str, record: Mapping[str, Any]) -> Registration:
    """Logs what is in a folder and registers the model in it, as challenger: on which images it is better, the champion
    may never have been asked.

    uri: as `mlflow_store.ready` gives it. folder: with `model/`; name: of the run. record: what adaptation.json holds.
    Raises UserError if the store cannot be used.
    """
    reason = f"adapted from {record['model']}: knows {', '.join(record['categories'])} beside what that knows"

    def write() -> Registration:
        import mlflow

        client, experiment = mlflow_store.connect(uri)
        tags = {"acw.adapted_from": record["model"], "commit": record["commit"], **source_tags(record["commit"])}
        opened = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        client.log_inputs(opened, [dataset_input(record["dataset"])])
        gains = [category["gain_bits"] for category in record["categories"].values()]
        with mlflow.start_run(run_id=opened):
            metric = mlflow_store.metric("gain", sum(gains) / len(gains), 0)
            mlflow_store.log_metrics(client, opened, iter([metric]))
            for file in sorted(path for path in folder.iterdir() if path.is_file()):
                client.log_artifact(opened, str(file))
            origin = {"dataset": record["dataset"]["fingerprint"], "split": "adapted"}
            origin |= {"alias": "challenger", "reason": reason}
            version = mlflow.register_model(registry.log_model(folder), mlflow_store.NAME, tags=origin)
        text = model_card.description(fetch(folder / "model" / model_card.FILE).read_text(encoding="utf-8"))
        client.update_model_version(mlflow_store.NAME, version.version, text)
        client.set_registered_model_alias(mlflow_store.NAME, "challenger", version.version)
        return Registration(opened, int(version.version), "challenger", reason)

    return mlflow_store.log(uri, write)
