"""A finished model's model.json: what it is made of, as `Model.save` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from acw.features.backbone import Backbone
from acw.features.zoo import BACKBONES
from acw.storage.errors import UserError
from acw.storage.files import fetch

FORMAT = 5  # of a model with categories that have readouts of their own; of others, SHARED_READOUTS
# Models of before a category could have readouts of its own.
SHARED_READOUTS = 4
# Models of before categories had more than weights.
WEIGHTS_ONLY = 3
# Models of before there were views of several networks: each backbone is one.
BACKBONES_ONLY = 2


def stored_backbone(folder: Path, fields: dict[str, Any]) -> Backbone:
    """One of the backbones that a model.json describes, with its weights in the model's folder or where it names."""
    known = {name: value for name, value in fields.items() if name not in ("source", "weights_sha256")}
    own: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
    return Backbone(**own | {"weights": str(folder / fields["weights"]) if fields["weights"] else fields["source"]})


def describe(folder: Path) -> dict[str, Any]:
    """A model's model.json; raises UserError where there is no model that this version reads."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file, not a model's folder; give the folder of the finished run that it is of")
    path = fetch(folder / "model.json")
    if not path.exists():
        raise UserError(f"{folder}: no model here (model.json is missing); give a finished run's folder or a model URI")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format"]
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no description of a model; copy the model anew") from error
    if version == BACKBONES_ONLY:
        description |= {"views": [[backbone["name"]] for backbone in description["backbones"]], "mirrored": False}
    elif version not in (WEIGHTS_ONLY, SHARED_READOUTS, FORMAT):
        raise UserError(f"{path}: format {version}, this acw reads {FORMAT}; use the acw that wrote it")
    for backbone in description["backbones"]:
        file = Path(backbone["weights"])
        if not backbone["weights"]:
            # What a model names is fetched only if this version knows it: a model may come from anywhere.
            row = BACKBONES.get(backbone["name"])
            if row is None or row.weights != backbone["source"] or not backbone["weights_sha256"]:
                raise UserError(f"{path}: needs other weights of {backbone['name']} than this acw; use its own")
            continue
        # timm would ask a model hub, or another folder, for a name with a colon.
        if file.name != backbone["weights"] or file.suffix != ".safetensors" or ":" in backbone["timm_name"]:
            raise UserError(f"{path}: the weights of {backbone['name']} are not in its folder; copy the model anew")
    return description
