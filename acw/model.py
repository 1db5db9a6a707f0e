"""A finished model: frozen backbones, trained heads, category weights. One line loads it, one line predicts.

model = acw.load("runs/gaze-.../")                        # or an MLflow URI: models:/acw@champion
prediction = model.predict(image, category="Street")      # uint8 (H, W, 3); the category may be left out
prediction.log_density                                     # (H, W) float32, natural log, logsumexp 0
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from acw import heads as bank_of_heads
from acw.backbones import Backbone, FrozenBackbone, load_backbone
from acw.categories import CategoryClassifier
from acw.center_bias import CenterBias
from acw.features import compute
from acw.fusion import mix
from acw.heads import Features, Parameters
from acw.storage import UserError, write_atomic, write_json
from acw.training import density_grid

FORMAT = 1
# Heads of a bank that predict at once; bounds memory, does not change a number beyond rounding.
HEADS_AT_ONCE = 15


@dataclass(frozen=True)
class Prediction:
    """log_density: (H, W) float32, natural logs, logsumexp 0. categories: name -> p(category | image).

    weights: backbone -> share in the mixture.
    """

    log_density: np.ndarray
    categories: dict[str, float]
    weights: dict[str, float]


@dataclass
class Model:
    """All that prediction needs, and where it comes from.

    heads: per backbone the stacked parameters of its K heads. weights: (G, B) float64, rows of `categories`, columns of
    `backbones`. center_bias: the stored KDE, baseline of IG; finalizer_bias: what the heads add, it or the paper's.
    provenance: recipe, seeds, versions, commit, data set, split.
    """

    backbones: list[Backbone]
    heads: dict[str, Parameters]
    density_cell: float
    categories: list[str]
    weights: np.ndarray
    global_weights: np.ndarray
    center_bias: CenterBias
    finalizer_bias: CenterBias
    classifier: CategoryClassifier
    provenance: dict[str, Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _loaded: dict[str, FrozenBackbone] = field(default_factory=dict, repr=False)

    def predict(self, image: np.ndarray, category: str | None = None) -> Prediction:
        """The density of one image, uint8 (H, W, 3) RGB of any size.

        Without a category, the weights are `sum_c p(c | image) w[c]`. Raises UserError for a category that the model
        does not know, ValueError for an array that is no such image.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an image is uint8 (H, W, 3) RGB, not {image.dtype} {image.shape}")
        log_densities, pooled = self.backbone_log_densities(image)
        probabilities = self.classifier.probabilities(pooled[None])[0]
        weights = self.mixing_weights(category, probabilities)
        full = bank_of_heads.upsample(log_densities, (image.shape[0], image.shape[1]))
        density = bank_of_heads.normalise(mix(full, torch.from_numpy(weights).float().to(full.device)))
        return Prediction(
            density.cpu().numpy(),
            dict(zip(self.categories, probabilities.tolist(), strict=True)),
            dict(zip(self.names, weights.tolist(), strict=True)),
        )

    @property
    def names(self) -> list[str]:
        return [backbone.name for backbone in self.backbones]

    def mixing_weights(self, category: str | None, probabilities: np.ndarray) -> np.ndarray:
        """(B,) weights for a category, or for p(category | image) (G,) where it is not known."""
        if category is None:
            return probabilities @ self.weights
        if category not in self.categories:
            raise UserError(f"unknown category '{category}'; the model knows {', '.join(self.categories)}, or none")
        return self.weights[self.categories.index(category)]

    def backbone_log_densities(self, image: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """(B, H, W) each backbone's density on the grid, and (D,) pooled features, of one uint8 image (H, W, 3)."""
        grid = density_grid((image.shape[0], image.shape[1]), self.density_cell)
        densities, pooled = [], []
        for backbone in self.backbones:
            features, means = compute(self._network(backbone), backbone, image[None])
            densities.append(self.ensemble(backbone.name, features, grid)[0])
            pooled.append(means[0].double().cpu().numpy())
        return torch.stack(densities), np.concatenate(pooled)

    def ensemble(self, backbone: str, features: Features, grid: tuple[int, int]) -> Tensor:
        """(B, H, W): the mean density of all heads on a backbone, on the grid."""
        bias = torch.from_numpy(self.finalizer_bias.of_size(grid)).to(self.device)
        return ensemble(self.heads[backbone], features, bias, self.density_cell)

    def load_backbones(self) -> None:
        """Loads all networks now, so that a copy of the model on another machine needs no file."""
        for backbone in self.backbones:
            self._network(backbone)

    def _network(self, backbone: Backbone) -> FrozenBackbone:
        if backbone.name not in self._loaded:
            self._loaded[backbone.name] = load_backbone(backbone, self.device)
        return self._loaded[backbone.name]

    def save(self, folder: Path, networks: Sequence[FrozenBackbone]) -> None:
        """Writes the model with its backbones' weights, so that it needs no other file; model.json comes last."""
        backbones = []
        for backbone, network in zip(self.backbones, networks, strict=True):
            file = f"backbone-{network.weights_sha256[:16]}.safetensors"
            state = network.state()
            write_atomic(folder / file, functools.partial(save_file, state))
            backbones.append(dataclasses.asdict(backbone) | {"weights": file, "source": backbone.weights})
        heads = {f"{name}/{key}": value for name, bank in self.heads.items() for key, value in bank.items()}
        write_atomic(folder / "heads.safetensors", lambda temporary: save_file(heads, temporary))
        arrays = {
            "weights": self.weights,
            "global_weights": self.global_weights,
            "center_bias": self.center_bias.log_density,
            "finalizer_bias": self.finalizer_bias.log_density,
            "classifier.mean": self.classifier.mean,
            "classifier.scale": self.classifier.scale,
            "classifier.weight": self.classifier.weight,
            "classifier.bias": self.classifier.bias,
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_atomic(folder / "fusion.safetensors", lambda temporary: save_arrays(arrays, temporary))
        description = {
            "format": FORMAT,
            "backbones": backbones,
            "density_cell": self.density_cell,
            "categories": self.categories,
            "center_bias": [self.center_bias.bandwidth, self.center_bias.uniform_weight],
            "finalizer_bias": [self.finalizer_bias.bandwidth, self.finalizer_bias.uniform_weight],
            "classifier_accuracy": self.classifier.accuracy,
            "provenance": self.provenance,
        }
        write_json(folder / "model.json", description)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Model:
        """The model of a folder that `save` wrote; raises UserError where there is none."""
        path = folder / "model.json"
        if not path.exists():
            raise UserError(
                f"{folder}: no model here (model.json is missing); give a finished run's folder or a model URI"
            )
        description = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise UserError(
                f"{path}: format {description['format']}, this acw reads {FORMAT}; use the acw that wrote it"
            )
        backbones = []
        for fields in description["backbones"]:
            fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if name != "source"}
            backbones.append(Backbone(**fields | {"weights": str(folder / fields["weights"])}))
        stacked = load_file(folder / "heads.safetensors", device=str(device))
        arrays = load_arrays(folder / "fusion.safetensors")
        classifier = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith("classifier.")}
        return cls(
            backbones,
            {
                b.name: {k.partition("/")[2]: v for k, v in stacked.items() if k.startswith(f"{b.name}/")}
                for b in backbones
            },
            description["density_cell"],
            description["categories"],
            arrays["weights"],
            arrays["global_weights"],
            CenterBias(arrays["center_bias"], *description["center_bias"]),
            CenterBias(arrays["finalizer_bias"], *description["finalizer_bias"]),
            CategoryClassifier(**classifier, accuracy=description["classifier_accuracy"]),
            description["provenance"],
            torch.device(device),
        )


@torch.no_grad()
def ensemble(parameters: Parameters, features: Features, bias_HW: Tensor, cell: float) -> Tensor:
    """(B, H, W): the uniform mixture of K heads' densities, normalised on the grid of the centre bias given."""
    count = len(parameters["log_sigma"])
    parts = []
    for start in range(0, count, HEADS_AT_ONCE):
        some = bank_of_heads.select(parameters, range(start, min(start + HEADS_AT_ONCE, count)))
        bias = bias_HW.expand(len(some["log_sigma"]), -1, -1)
        scores = bank_of_heads.finalize(some, bank_of_heads.readout(some, features), bias, cell)
        parts.append(bank_of_heads.normalise(scores))
    return bank_of_heads.log_mean_exp(torch.cat(parts))
