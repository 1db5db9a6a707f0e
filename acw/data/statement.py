"""What a data set's folder may say of itself, in `acw.json`:

    {"pixels_per_degree": 30, "name": "gaze", "licence": "MIT"}

Every key is optional. One degree of visual angle is the width of the Gaussian of CC, KLDiv and SIM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from acw.data.recording import printable
from acw.storage.errors import UserError

STATEMENT = "acw.json"


@dataclass(frozen=True)
class Statement:
    """pixels_per_degree: px of the images; name: instead of the folder's; licence: in words. None where not stated."""

    pixels_per_degree: float | None = None
    name: str | None = None
    licence: str | None = None


def read_statement(folder: Path) -> Statement:
    """A folder's statement; an empty one where there is none. Raises UserError for a file that is no such statement."""
    path = folder / STATEMENT
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Statement()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON in UTF-8 ({error}); correct or remove it") from None
    fields = set(Statement.__dataclass_fields__)
    if not isinstance(stated, dict) or not stated.keys() <= fields:
        raise UserError(f"{path}: is no JSON object with keys of {', '.join(sorted(fields))}; correct it")
    pixels = stated.get("pixels_per_degree")
    if pixels is not None and (isinstance(pixels, bool) or not isinstance(pixels, int | float) or not pixels > 0):
        raise UserError(f"{path}: pixels_per_degree is {pixels!r}; give px of one degree of visual angle, above 0")
    for key in ("name", "licence"):
        if key in stated and not (isinstance(stated[key], str) and stated[key].strip()):
            raise UserError(f"{path}: {key} is {stated[key]!r}; give a text")
        printable(stated.get(key, ""), f"{path}: {key}")
    return Statement(**stated)
