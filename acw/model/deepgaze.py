"""The authors' checkpoint of DeepGaze IIE (`deepgaze2e.pth`) as an `acw` model: its networks and its 120 trained heads.

    acw import-deepgaze --download

One code path for what we train and what they trained: the recipe `deepgaze_iie` builds the same backbones, readouts and
finalizer. The weights are even, as theirs. `acw.load` takes the folder; so does a recipe's `--heads`, which adds the
centre bias that scores and submissions need. Linardos, Kuemmerer, Press, Bethge, ICCV 2021, and the published PyTorch
code (`deepgaze_pytorch`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from acw.features.backbone import load_backbone
from acw.features.weights import DEEPGAZE_IIE_PREFIXES, read_weights
from acw.fusion.classifier import CategoryClassifier
from acw.heads.center_bias import CenterBias, flat
from acw.heads.readout import WIDTHS, Parameters, stack
from acw.model.model import Model
from acw.provenance import provenance
from acw.recipes import derive, named_recipe
from acw.storage.checksums import fingerprint
from acw.storage.errors import UserError

ALL = "all"  # the one category of a model that knows none
DOWNSCALE = 2.0  # image px per cell of the density's grid
# Readout layer -> where the checkpoint keeps it: three layers make the "saliency network", three the "fixation
# selection network", which was made for a scanpath model too and so names its layers' parts.
_SALIENCY, _SELECTION = "saliency_networks", "fixation_selection_networks"


def check(path: Path) -> None:
    """Raises UserError for a file that is not the checkpoint, or not all of it: every part of the archive by its own
    checksum, and the tensors of all networks and heads."""
    state = read_weights(str(path))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path}: is damaged in {damaged}; run the same command again")
    for number, prefix in enumerate(DEEPGAZE_IIE_PREFIXES.values()):
        if not any(key.startswith(prefix) for key in state):
            raise _other(str(path), prefix)
        _heads(state, number, str(path))


def import_checkpoint(path: str, center_bias: CenterBias | None = None, bias_of: str = "") -> Model:
    """The model of a checkpoint, a file or s3://BUCKET/KEY, its networks loaded.

    The file holds no centre bias. Without any, the model has the uniform one: `predict` takes another, and the recipe
    `deepgaze_iie` with `--heads` takes one from a data set's training images. One that is given is what heads add and
    the baseline of IG; bias_of: whose fixations it is of. Raises UserError for a file that is not this checkpoint.
    """
    state = read_weights(path)
    recipe = derive(
        named_recipe("deepgaze_iie"),
        {"weights": [f"{name}=deepgaze2e:{path}" for name in DEEPGAZE_IIE_PREFIXES]},
    )
    backbones = recipe.backbone_values
    networks = {backbone.name: load_backbone(backbone) for backbone in backbones}
    pooled = sum(sum(network.channels) for network in networks.values())
    record: dict[str, Any] = provenance(recipe) | {
        "dataset": {"name": bias_of, "fingerprint": fingerprint(bias_of)} if center_bias else None,
        "imported": path,
        "heads": "trained elsewhere, by DeepGaze IIE's authors",
    }
    even = np.full(len(backbones), 1 / len(backbones))
    return Model(
        views=recipe.views,
        heads={name: _heads(state, number, path) for number, name in enumerate(DEEPGAZE_IIE_PREFIXES)},
        finalizer=recipe.finalizer,
        categories=[ALL],
        weights=even[None],
        global_weights=even,
        center_bias=center_bias or flat(),
        finalizer_bias=center_bias or flat(),
        classifier=CategoryClassifier(np.zeros(pooled), np.ones(pooled), np.zeros((1, pooled)), np.zeros(1), 1.0),
        provenance=record,
        _loaded=networks,
    )


def _heads(state: Mapping[str, Tensor], number: int, path: str) -> Parameters:
    """The heads on a backbone, stacked."""
    prefix = f"models.{number}.finalizers."
    count = len({key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)})
    if not count:
        raise _other(path, prefix)
    try:
        return stack([_head(state, f"models.{number}", str(head)) for head in range(count)])
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing; give the authors' deepgaze2e.pth") from None


def _other(path: str, missing: str) -> UserError:
    return UserError(f"{path}: no checkpoint of DeepGaze IIE ({missing}* is missing); give the authors' deepgaze2e.pth")


def _head(state: Mapping[str, Tensor], model: str, head: str) -> Parameters:
    def of(network: str, key: str) -> Tensor:
        return state[f"{model}.{network}.{head}.{key}"].float()

    result = {}
    for layer in range(len(WIDTHS)):
        network, own = (_SALIENCY, layer) if layer < 3 else (_SELECTION, layer - 3)
        # The selection network's first layer has the saliency part of two inputs, of which this model has one.
        norm, conv = f"layernorm{own}", f"conv{own}"
        if layer == 3:
            norm, conv = f"{norm}.layernorm_part0", f"{conv}.conv_part0"
        result[f"conv{layer}.weight"] = of(network, f"{conv}.weight").flatten(1)
        if layer < len(WIDTHS) - 1:
            result[f"conv{layer}.bias"] = of(network, f"bias{own}.bias")
            result |= {f"norm{layer}.{name}": of(network, f"{norm}.{name}") for name in ("weight", "bias")}
    # Theirs is in cells of the grid at half the image's size.
    sigma = of("finalizers", "gauss.sigma") * DOWNSCALE
    result["log_sigma"] = sigma.log().reshape(())
    result["center_bias_weight"] = of("finalizers", "center_bias_weight").reshape(())
    return result
