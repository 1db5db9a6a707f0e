"""What eye trackers and published data sets write, each by a name, for `--columns NAME`.

Where a format is from is said at each. What is not here is read by naming its columns,
`--columns image=Bild,x=X,y=Y,subject=VP`, or by a JSON file of the same; a name may come first, for all that is not
named: `--columns dataviewer,image=photo`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from acw.data import scanpaths
from acw.data.columns import FIELDS, Columns, Place
from acw.data.convention import Convention
from acw.data.readers import table
from acw.data.recording import Recording
from acw.storage.addresses import local
from acw.storage.errors import UserError
from acw.storage.files import fetch

SHARE = Convention(units="share")

# A report of fixations of SR Research's Data Viewer: Analysis > Reports > Fixation Report. Tab-separated, "." for what
# is missing, px of the screen from its upper left corner (EyeLink Data Viewer User's Manual, whose names CURRENT_FIX_X,
# CURRENT_FIX_Y and RECORDING_SESSION_LABEL are). Which variable of a trial names the image is the experimenter's
# choice; one that is not among these is said by `dataviewer,image=NAME`.
DATAVIEWER = Columns(
    image=("image", "IMAGE", "TRIAL_IMAGE", "image_name", "imagefile", "picture", "stimulus"),
    places=(Place("CURRENT_FIX_X", "CURRENT_FIX_Y", on_screen=True),),
    subject=("RECORDING_SESSION_LABEL", "DATA_FILE"),
    category=("category", "CATEGORY"),
    files=("*.txt", "*.tsv", "*.xls", "*.csv"),
)

# Tobii Pro Lab's data export, "single standard file (.tsv)": a line a sample, in UTF-8 or UTF-16, with the decimal sign
# of the computer. A fixation's lines say Fixation, its number and its place; newer versions have units in brackets.
# MCS is the coordinate system of the medium, the image, in px or as shares; DACS that of the display area, the screen,
# from the upper left corner (Tobii Pro Lab User's Manual, "Data export"; columns as GazePlotter's documentation lists
# them). Without brackets px are the screen's. Tobii Studio's own names are those in one word.
TOBII = Columns(
    image=("Presented Stimulus name", "Presented Media name", "MediaName"),
    places=(
        Place("Fixation point X [MCS px]", "Fixation point Y [MCS px]"),
        Place("Fixation point X [MCS norm]", "Fixation point Y [MCS norm]", SHARE),
        Place("Fixation point X (MCSpx)", "Fixation point Y (MCSpx)"),
        Place("Fixation point X (MCSnorm)", "Fixation point Y (MCSnorm)", SHARE),
        Place("FixationPointX (MCSpx)", "FixationPointY (MCSpx)"),
        Place("Fixation point X [DACS px]", "Fixation point Y [DACS px]", on_screen=True),
        Place("Fixation point X", "Fixation point Y", on_screen=True),
    ),
    subject=("Participant name", "ParticipantName", "Recording name"),
    keep={"Eye movement type": "fixation", "GazeEventType": "fixation"},
    fixation=("Recording name", "RecordingName", "Eye movement type index", "FixationIndex"),
    files=("*.tsv", "*.txt"),
)

# Gazepoint Analysis's CSV, a file a person: `NAME_fixations.csv` or, with a line a sample, `NAME_all_gaze.csv`. FPOGX
# and FPOGY are shares of the screen from its upper left corner, FPOGID counts fixations, FPOGV says whether the line is
# valid; a fixation's place is settled in its last line (Open Gaze API by Gazepoint, version 2.0).
GAZEPOINT = Columns(
    image=("MEDIA_NAME",),
    places=(Place("FPOGX", "FPOGY", SHARE, on_screen=True),),
    subject=("USER", "SESSION_ID"),
    keep={"FPOGV": "1"},
    fixation=("FPOGID",),
    last=True,
    files=("*_fixations.csv", "*_all_gaze.csv"),
    subject_in=r"(.+?)(?:_fixations|_all_gaze)?\.csv",
)

# Pupil Player's export of the surface tracker, `fixations_on_surface_NAME.csv`, a file a surface, which is named as the
# image; a line a frame of the world camera in which a fixation was. Shares of the surface from its lower left corner;
# on_surf says whether it is on the surface (docs.pupil-labs.com/core, "Surface coordinate system"). In a folder of
# recordings the first folder below is the person. The `fixations.csv` of the whole recording has shares of the camera's
# frame, not of an image.
PUPIL = Columns(
    image=(),
    places=(Place("norm_pos_x", "norm_pos_y", Convention(units="share", y_axis="up")),),
    subject=("subject", "recording id"),
    keep={"on_surf": "true"},
    certain={
        "on_surf": "so it is not of a surface but of the camera's frame; export the surface tracker's "
        "fixations_on_surface_NAME.csv"
    },
    fixation=("fixation_id",),
    files=("fixations_on_surface_*.csv",),
    image_in=r"(?:.*/)?fixations_on_surface_(.+?)(?:_\d+\.\d+)?\.csv",
    subject_in=r"([^/]+)/.*",
)

TABLES: dict[str, Columns] = {"dataviewer": DATAVIEWER, "tobii": TOBII, "gazepoint": GAZEPOINT, "pupil": PUPIL}
OTHERS: dict[str, Callable[[Path, Path], Recording]] = {
    "salicon": scanpaths.salicon,
    "coco": scanpaths.coco,
    "osie": scanpaths.osie,
}
NAMES = (*TABLES, *OTHERS)


def read(folder: Path, fixations: str, columns: str) -> Recording:
    """A folder of images, and fixations as a program has written them.

    columns: a name of NAMES; or columns by field, `image=A,x=B,y=C,subject=D,category=E`, of which those that are not
        named are called as the field is; or both; or a JSON file of such an object, where the name is its `preset`.
    Raises UserError for whatever is wrong in them.
    """
    name, given = _said(columns)
    if name in OTHERS:
        if given:
            raise UserError(f"--columns {columns}: {name} is no table, so it has no columns to name; leave them out")
        return OTHERS[name](folder, fetch(local(fixations).expanduser()))
    return table.read(folder, fixations, _with(TABLES[name] if name else Columns(), given))


def _said(columns: str) -> tuple[str, Mapping[str, str]]:
    """The name of NAMES, or an empty one, and the columns by field."""
    given: dict[str, Any] = {}
    if columns.endswith(".json"):
        given = _file(columns)
        name = given.pop("preset", "")
    else:
        first, *others = [part.strip() for part in columns.split(",")]
        name, pairs = ("", [first, *others]) if "=" in first else (first, others)
        for pair in pairs:
            field, separator, column = (part.strip() for part in pair.partition("="))
            if not separator or field in given:
                raise UserError(f"--columns {columns}: '{pair}' is not FIELD=COLUMN, each field once; see --help")
            given[field] = column
    if name and name not in NAMES:
        raise UserError(
            f"--columns {columns}: {name} is unknown; choose one of {', '.join(NAMES)}, or FIELD=COLUMN,..."
        )
    if unknown := given.keys() - set(FIELDS):
        raise UserError(f"--columns {columns}: no field {', '.join(sorted(unknown))}; fields are {', '.join(FIELDS)}")
    if not all(isinstance(column, str) and column for column in given.values()):
        raise UserError(f"--columns {columns}: a column's name is a text; correct it")
    return name, given


def _file(location: str) -> dict[str, Any]:
    path = fetch(local(location).expanduser())
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--columns {path}: cannot be read as JSON in UTF-8 ({error}); correct it") from None
    if not isinstance(given, dict):
        raise UserError(
            f'--columns {path}: is no JSON object such as {{"image": "Bild", "x": "X", "y": "Y"}}; correct it'
        )
    return given


def _with(columns: Columns, given: Mapping[str, str]) -> Columns:
    """With these columns in place of its own; x and y of all its places' conventions keep the first's."""
    own: dict[str, Any] = {field: (given[field],) for field in ("image", "subject", "category") if field in given}
    if "x" in given or "y" in given:
        first = columns.places[0]
        own["places"] = (dataclasses.replace(first, x=given.get("x", first.x), y=given.get("y", first.y)),)
    return dataclasses.replace(columns, **own)
