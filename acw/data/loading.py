"""Reads a data set: chooses the reader, converts and checks what it read, and puts it in order.

Whatever the reader, stimuli come in order of their names and fixations in px from 0, x to the right and y down. A
fixation is inside its image if 0 <= x < width and 0 <= y < height.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from acw.data import exports, plausibility, synthetic
from acw.data.convention import Convention, Origin, Units, YAxis, scale_of, screen_of
from acw.data.coordinates import MOST_DROPPED, inside, placed
from acw.data.dataset import SYNTHETIC, Dataset
from acw.data.plausibility import degree
from acw.data.readers import READERS, fitting_reader
from acw.data.recording import Recording, printable, refuse
from acw.data.remote import bring
from acw.data.statement import STATEMENT, read_statement
from acw.storage.addresses import in_cache, local, shown
from acw.storage.errors import UserError

TABLE = "csv"  # the reader of a folder of images with a file of fixations
REMOVE_UNSEEN = "add fixations or remove the images"


@dataclass(frozen=True)
class Reading:
    """What a reader made of a data set's files, before anything in it is checked, and how the user says it is meant.

    reader: its name. convention: of x and y. share: of the fixations, how many may lie outside their image.
    """

    folder: Path
    reader: str
    recording: Recording
    convention: Convention
    share: float

    @property
    def where(self) -> str:
        """How errors begin."""
        return f"dataset {self.folder}"


def load_dataset(spec: str, **options: Any) -> Dataset:
    """Reads a data set.

    spec: `synthetic`, or what `read_files` takes; options: as there.
    Raises UserError, in one line, for whatever is missing, damaged, contradictory or implausible.
    """
    if spec == SYNTHETIC:
        if any(options.get(name) for name in ("reader", "fixations", "columns")):
            raise UserError("dataset synthetic: is generated, so leave out the reader and the fixations file")
        return synthetic.load()
    return assembled(read_files(spec, **options))


def read_files(
    spec: str,
    *,
    reader: str | None = None,
    fixations: str | None = None,
    columns: str | None = None,
    units: Units | None = None,
    origin: Origin | None = None,
    y_axis: YAxis | None = None,
    first_px: int | None = None,
    screen: str | None = None,
    scale: str | None = None,
    drop_outside: bool | float = False,
) -> Reading:
    """Reads a data set's files.

    spec: a folder: CAT2000's (the one that holds `Stimuli` and `FIXATIONLOCS`, or the one above it), one with
        pysaliency's `stimuli.hdf5` and `fixations.hdf5`, or one of images, to which `fixations` belongs; or the
        `s3://` address of one.
    reader: a name of READERS; without it the first that fits, in their order.
    fixations: a CSV file with the columns image (path in the folder), x, y, and perhaps subject and category; or what
        `columns` says.
    columns: the program that wrote `fixations`, by its name, or other names of columns, see `acw.data.exports`.
    units, origin, y_axis, first_px, screen, scale: how x and y are written, see `Convention`; None: as `columns` has
        it, and px from the images' upper left corner otherwise.
    drop_outside: leave out fixations that lie outside their image, up to this share of all (True: a tenth), and say so
        in the data set's notes.

    Raises UserError, in one line, for what is missing or damaged, and for options that cannot be meant.
    """
    printable(spec, "dataset")
    folder = local(spec).expanduser().resolve()
    if reader is not None and reader not in READERS:
        raise UserError(f"reader {reader}: unknown; choose one of {', '.join(READERS)}")
    if columns and not fixations:
        raise UserError(f"--columns {columns}: is about a file of fixations; give it by --fixations FILE")
    reader = reader or (TABLE if columns else None)
    if in_cache(folder):
        reader = bring(folder, reader, fixations is not None)
    elif not folder.is_dir():
        raise UserError(f"dataset {spec}: there is no such folder; correct the path")
    chosen = reader or fitting_reader(folder, lambda name: (folder / name).exists(), fixations is not None)
    if fixations and not READERS[chosen].takes_fixations:
        raise UserError(
            f"dataset {folder}: is read by the {chosen} reader, which takes no fixations file; "
            f"choose the reader {TABLE} or leave the file out"
        )
    said = {
        "units": units, "origin": origin, "y_axis": y_axis, "first_px": first_px,
        "screen": screen_of(screen) if screen else None, "scale": scale_of(scale) if scale else None,
    }  # fmt: skip
    Convention().replaced(**said)  # what is mistyped is refused before anything is read
    share = _droppable(drop_outside)
    if columns and fixations:
        recording = exports.read(folder, fixations, columns)
    else:
        recording = READERS[chosen].read(folder, fixations)
    return Reading(folder, chosen, recording, recording.convention.replaced(**said), share)


def _droppable(drop_outside: bool | float) -> float:
    """The share of the fixations that may lie outside. A whole number is refused: 1 may mean yes, or all."""
    if isinstance(drop_outside, bool | np.bool_):
        return MOST_DROPPED if drop_outside else 0.0
    if not isinstance(drop_outside, float | np.floating) or not 0 <= drop_outside <= 1:
        raise UserError(f"--drop-outside {drop_outside}: give the share of fixations that may be left out, such as 0.1")
    return float(drop_outside)


def assembled(reading: Reading) -> Dataset:
    """The data set that files hold. Raises UserError for what contradicts itself or cannot be meant."""
    folder, recording, convention, where = reading.folder, reading.recording, reading.convention, reading.where
    if recording.unseen:
        refuse(recording.unseen, folder, f"images without a fixation in {recording.table}", REMOVE_UNSEEN)
    if not recording.stimuli or not len(recording.image):
        raise UserError(f"{where}: holds no image with fixations; add some")
    names = [stimulus.name for stimulus in recording.stimuli]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: has the image {max(names, key=names.count)} twice; list every image once")
    plausibility.refuse_repeated(recording, where)
    places = placed(recording, convention, where)
    kept, dropped = inside(recording, places, convention, reading.share, where)
    order = sorted(range(len(names)), key=names.__getitem__)
    stimuli = tuple(recording.stimuli[index] for index in order)
    image = np.argsort(order)[recording.image]
    unseen = [stimuli[index].name for index in np.setdiff1d(np.arange(len(stimuli)), image[kept])]
    refuse(unseen, folder, "images without a fixation", REMOVE_UNSEEN)
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(image[rows], kind="stable")]
    statement = read_statement(folder)
    widths = [stimulus.size[1] for stimulus in stimuli]
    stated = statement.pixels_per_degree
    return Dataset(
        name=statement.name or (folder.parent.name if folder.name == "trainSet" else folder.name),
        reader=reading.reader,
        location=shown(folder),
        stimuli=stimuli,
        image=image[rows].astype(np.int32),
        x=places.x[rows],
        y=places.y[rows],
        subject=recording.subject[rows].astype(np.int32),
        # One degree of visual angle, where it is known; else CAT2000's share of the width, 40 of 1920 px.
        blur_sigma=degree(stated, max(widths), str(folder / STATEMENT)) if stated else float(np.mean(widths)) / 48,
        notes=(*recording.notes, *convention.note, *dropped, *plausibility.oddities(recording, places)),
        licence=statement.licence,
    )
