"""Loads a finished model, wherever it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from acw import starter

if TYPE_CHECKING:
    import torch

    from acw.model.model import Model

STARTER = (
    "model: acw's starter, trained on 959 photographs of objects and scenes; a run's folder or models:/acw@champion "
    "names another"
)


def load(location: str | Path | None = None, device: torch.device | str = "cpu") -> Model:
    """A finished model, from a run's folder, a model's folder, here or in S3, or an MLflow model URI
    (`models:/acw@champion`); where none is named, the package's starter model, which is said on stderr.

    Raises UserError where there is no model, or no such device (`cpu`, `cuda`, `cuda:N`).
    """
    from acw.model import files
    from acw.model.arguments import as_device

    device = as_device(device)
    return files.load(folder_of(location), device)


def folder_of(location: str | Path | None, store: str | None = None) -> Path:
    """The folder that `load` reads: with model.json where there is a model; what is in MLflow is downloaded, from the
    store that `download_model` takes."""
    from acw.storage.addresses import local
    from acw.storage.files import is_model_uri, present

    if location is None:
        print(STARTER, file=sys.stderr, flush=True)
        return starter.FOLDER
    if is_model_uri(location):
        from acw.tracking.registry import download_model

        return download_model(str(location), store)
    folder = local(location)
    return folder / "model" if present(folder / "model" / "model.json") else folder
