"""The registered model's code: MLflow runs this file where the model is loaded, so the model holds no pickles."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

# A model's folder that is read stays as it is: Python would leave bytecode beside this file and those imported here,
# which lie in the model's folder too.
_before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
try:
    from acw.model import files
    from acw.model.arguments import as_image
    from acw.storage.errors import UserError
finally:
    sys.dont_write_bytecode = _before
with contextlib.suppress(OSError):
    _bytecode = Path(importlib.util.cache_from_source(__file__))
    _bytecode.unlink()
    _bytecode.parent.rmdir()


class Refused(MlflowException, UserError):
    """A request that is the sender's to mend: MLflow's server answers it with status 400 and this one line."""

    def __init__(self, line: str) -> None:
        super().__init__(line, error_code=INVALID_PARAMETER_VALUE)
        self.line = line

    def serialize_as_json(self) -> str:
        """The answer's body, in which MLflow would put all pixels before the message."""
        return json.dumps(json.loads(super().serialize_as_json()) | {"message": self.line})


class DensityModel(PythonModel):
    """uint8 RGB images (B, H, W, 3) of any size in, float32 log-densities (B, H, W) out: natural logs, logsumexp 0."""

    def load_context(self, context: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = files.load(Path(context.artifacts["model"]), device)
        # Now: what is missing for one of them should not come up with the first request.
        self.model.load_backbones()

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Densities of a batch, an array or what JSON makes of one; params["category"] is the images' category, "" to
        infer each image's.

        Raises Refused, a UserError, for an input of other values or another shape, shares of 0..1 included, and for a
        category that the model does not know.
        """
        try:
            images = _batch(model_input)
            category = (params or {}).get("category") or None
            result = np.empty(images.shape[:3], np.float32)
            predictions = self.model.predict_batch(images, [category] * len(images))
            for density, prediction in zip(result, predictions, strict=True):
                density[:] = prediction.log_density
        except ValueError as error:
            raise Refused(str(error)) from error
        return result


def _batch(model_input: np.ndarray | list) -> np.ndarray:
    """uint8 (B, H, W, 3). Raises ValueError for what is none."""
    if not isinstance(model_input, np.ndarray) or model_input.ndim != 4 or not len(model_input):
        if isinstance(model_input, np.ndarray):
            given = f"{model_input.dtype} {model_input.shape}"
        else:
            given = f"{type(model_input).__name__} of {len(model_input)}"
        raise ValueError(f"input {given}: give a batch of RGB images of one size, uint8 (B, H, W, 3)")
    return np.stack([as_image(image, f"inputs[{number}]") for number, image in enumerate(model_input)])


mlflow.models.set_model(DensityModel())
