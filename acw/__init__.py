"""DeepGaze IIE with adaptive category weighting: predicts, as a probability density, where people look in an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from acw.model import Model


def load(location: str | Path, device: str = "cpu") -> Model:
    """A finished model, from a run's folder, a model's folder or an MLflow model URI (`models:/acw@champion`).

    Raises UserError where there is no model.
    """
    from acw.model import Model

    if ":/" in str(location):
        from acw.tracking import download_model

        return Model.load(download_model(str(location)), device)
    folder = Path(location)
    return Model.load(folder / "model" if (folder / "model").is_dir() else folder, device)
