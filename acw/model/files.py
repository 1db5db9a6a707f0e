"""A finished model as a folder of files, and back: numbers and names in safetensors and JSON, never code."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from acw.features import joined, wheels
from acw.features.backbone import FrozenBackbone
from acw.features.view import View
from acw.features.zoo import BACKBONES
from acw.fusion.adaptation import Adaptation
from acw.fusion.classifier import CategoryClassifier
from acw.heads.center_bias import CenterBias
from acw.heads.finalizer import Finalizer
from acw.heads.readout import Parameters
from acw.model.arguments import as_device
from acw.model.description import FORMAT, SHARED_READOUTS, describe, stored_backbone
from acw.model.model import Model
from acw.storage.errors import UserError
from acw.storage.files import fetch, write_atomic, write_json

ADAPTATION = "adaptation/"  # before the names of its arrays
FIELDS = dataclasses.fields(Adaptation)


def save(model: Model, folder: Path, networks: Sequence[FrozenBackbone], compact: bool = False) -> None:
    """Writes the model with its backbones' weights, so that it needs no other file; model.json comes last.

    compact: a few MB instead, with the heads in float16 and the other numbers in float32, and of the backbones only
    where their weights are to be had and which they are. They must be rows of the table as it stands.
    """
    backbones = []
    for backbone, network in zip(model.backbones, networks, strict=True):
        fields = dataclasses.asdict(backbone)
        if compact:
            known = {"weights": "", "weights_sha256": network.weights_sha256}
            backbones.append(fields | known | {"source": BACKBONES[backbone.name].weights})
            continue
        file = f"backbone-{network.weights_sha256[:16]}.safetensors"
        state = network.state()
        write_atomic(folder / file, functools.partial(save_file, state))
        backbones.append(fields | {"weights": file, "source": backbone.weights})
    heads = {f"{name}/{key}": value for name, bank in model.heads.items() for key, value in bank.items()}
    arrays = _arrays(model)
    if compact:
        heads = {name: value.half() for name, value in heads.items()}
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    write_atomic(folder / "heads.safetensors", lambda temporary: save_file(heads, temporary))
    write_atomic(folder / "fusion.safetensors", lambda temporary: save_arrays(arrays, temporary))
    description = {
        "format": FORMAT if model.readouts else SHARED_READOUTS,
        "backbones": backbones,
        "views": [[part.name for part in view.parts] for view in model.views],
        "finalizer": dataclasses.asdict(model.finalizer),
        "systems": model.systems,
        "readouts": model.readouts,
        "mirrored": model.mirrored,
        "categories": model.categories,
        "center_bias": [model.center_bias.bandwidth, model.center_bias.uniform_weight],
        "finalizer_bias": [model.finalizer_bias.bandwidth, model.finalizer_bias.uniform_weight],
        "classifier_accuracy": model.classifier.accuracy,
        "classifier_farthest": model.classifier.farthest if len(model.classifier.centroids) else None,
        "provenance": model.provenance,
    }
    write_json(folder / "model.json", description)


def state_dict(model: Model, networks: Sequence[FrozenBackbone]) -> dict[str, Tensor]:
    """Every tensor of the model by name, such as `heads/lite0/conv0.weight`: for those who want to read a plain
    PyTorch file. What they mean together is in `save`'s model.json."""
    state = {
        f"backbones/{b.name}/{k}": v
        for b, n in zip(model.backbones, networks, strict=True)
        for k, v in n.state().items()
    }
    state |= {f"heads/{name}/{key}": value.cpu() for name, bank in model.heads.items() for key, value in bank.items()}
    # Copied: arrays of Ray's are read-only, of which torch warns.
    return state | {name: torch.tensor(array) for name, array in _arrays(model).items()}


def _arrays(model: Model) -> dict[str, np.ndarray]:
    constants = {f"standards/{name}": t.numpy() for name, t in joined.as_tensors(model.standards).items()}
    arrays = constants | {
        "weights": model.weights,
        "global_weights": model.global_weights,
        "center_bias": model.center_bias.log_density,
        "finalizer_bias": model.finalizer_bias.log_density,
        "classifier.mean": model.classifier.mean,
        "classifier.scale": model.classifier.scale,
        "classifier.weight": model.classifier.weight,
        "classifier.bias": model.classifier.bias,
        "classifier.centroids": model.classifier.centroids,
    }
    if model.adaptation is not None:
        arrays |= {f"{ADAPTATION}{field.name}": getattr(model.adaptation, field.name) for field in FIELDS}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def load(folder: Path, device: torch.device | str = "cpu") -> Model:
    """The model of a folder that `save` wrote; raises UserError where there is none, or a damaged one.

    It may come from anywhere: numbers and names are all that is taken from it, never code.
    """
    try:
        return _read(folder, describe(folder), as_device(device))
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{folder}: the model cannot be read ({error}); correct its files' permissions") from error
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{folder}: this model is damaged ({reason}); copy it anew") from error


def _read(folder: Path, description: dict[str, Any], device: torch.device) -> Model:
    described = description["backbones"]
    backbones = {entry["name"]: stored_backbone(folder, entry) for entry in described}
    views = [View(tuple(backbones[name] for name in parts)) for parts in description["views"]]
    stacked = load_file(fetch(folder / "heads.safetensors"), device=str(device))
    heads: dict[str, Parameters] = defaultdict(dict)
    for key, value in stacked.items():
        component, _, name = key.rpartition("/")
        heads[component][name] = value.float()
    finalizer = description["finalizer"]
    arrays = load_arrays(fetch(folder / "fusion.safetensors"))
    classifier = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith("classifier.")}
    constants = {n.partition("/")[2]: torch.from_numpy(a) for n, a in arrays.items() if n.startswith("standards/")}
    of_adaptation = {n.removeprefix(ADAPTATION): array for n, array in arrays.items() if n.startswith(ADAPTATION)}
    return Model(
        views,
        heads,
        Finalizer(**finalizer | {"steps": tuple(tuple(step) for step in finalizer["steps"])}),
        description["categories"],
        arrays["weights"],
        arrays["global_weights"],
        CenterBias(arrays["center_bias"], *description["center_bias"]),
        CenterBias(arrays["finalizer_bias"], *description["finalizer_bias"]),
        CategoryClassifier(
            **classifier,
            accuracy=description["classifier_accuracy"],
            farthest=description.get("classifier_farthest") or math.inf,
        ),
        description["provenance"],
        description["systems"],
        description.get("readouts", []),
        joined.from_tensors(constants),
        description["mirrored"],
        Adaptation(**of_adaptation) if of_adaptation else None,
        # What a source's own hash pins needs no other one, which goes by how a graph is written again.
        {e["name"]: e["weights_sha256"] for e in described if not e["weights"] and wheels.parse(e["source"]) is None},
        device,
    )
