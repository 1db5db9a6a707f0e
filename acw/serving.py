"""The registered model's code: MLflow runs this file where the model is loaded, so the model holds no pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from acw.model import Model
from acw.storage import UserError


class DensityModel(PythonModel):
    """uint8 RGB images (B, H, W, 3) of any size in, float32 log-densities (B, H, W) out: natural logs, logsumexp 0."""

    def load_context(self, context: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Model.load(Path(context.artifacts["model"]), device)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Densities of a batch; params["category"] is the images' category, "" to infer each image's.

        Raises UserError for an input of another type or shape, and for a category that the model does not know.
        """
        images = np.asarray(model_input)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
            raise UserError(f"input {images.dtype} {images.shape}: give a batch of RGB images, uint8 (B, H, W, 3)")
        category = (params or {}).get("category") or None
        result = np.empty(images.shape[:3], np.float32)
        for density, prediction in zip(result, self.model.predict_batch(images, [category] * len(images)), strict=True):
            density[:] = prediction.log_density
        return result


mlflow.models.set_model(DensityModel())
