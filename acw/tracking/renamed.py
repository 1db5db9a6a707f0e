"""A run whose categories were named, in MLflow: its files anew, and a version more of the same model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from acw.storage.addresses import shown
from acw.storage.files import fetch, listing, present, write_json
from acw.tracking import mlflow_store, model_card, registry
from acw.tracking.registry import Registration
from acw.tracking.runs import FILES


def log(run: Path) -> int:
    """Registers the model in a finished run's folder once more, and gives its version the aliases of the one before.

    It is the same model, with the same scores, so nothing is to be decided. Raises UserError if the store, which
    registration.json names, cannot be used.
    """
    registered = json.loads(fetch(run / "registration.json").read_text(encoding="utf-8"))
    store = mlflow_store.recorded(registered.pop("store"))
    before = Registration(**registered)
    for path in listing(run / "model"):
        fetch(path)

    def write() -> int:
        client, _ = mlflow_store.connect(store)
        import mlflow  # which is quiet by now

        old = registry.version_of(client, before.version)
        for file in (*FILES, "category_adaptation.csv", "categories.json"):
            if present(run / file):
                client.log_artifact(before.run_id, str(fetch(run / file)))
        with mlflow.start_run(run_id=before.run_id):
            tags = old.tags | {"acw.renamed_from": old.version}
            version = mlflow.register_model(registry.log_model(run), mlflow_store.NAME, tags=tags)
        card = fetch(run / "model" / model_card.FILE)
        text = model_card.description(card.read_text(encoding="utf-8"))
        client.update_model_version(mlflow_store.NAME, version.version, text)
        for alias in old.aliases:
            client.set_registered_model_alias(mlflow_store.NAME, alias, version.version)
        client.set_tag(before.run_id, "acw.version", version.version)
        return int(version.version)

    version = mlflow_store.log(store, write)
    write_json(run / "registration.json", dataclasses.asdict(before) | {"version": version, "store": shown(store)})
    return version
