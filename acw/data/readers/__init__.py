"""Readers of data sets, one file a format. A new one is a file here and a line in READERS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from acw.data.readers import cat2000, hdf5, table
from acw.data.recording import Reader
from acw.storage.errors import UserError

# By name, in the order in which they are tried on a folder: where it is both, the HDF5 pair wins.
READERS: dict[str, Reader] = {module.READER.name: module.READER for module in (hdf5, cat2000, table)}


def fitting_reader(folder: Path, has: Callable[[str], bool], fixations: bool) -> str:
    """The reader of a folder, which has files or folders of some names and perhaps comes with a file of fixations."""
    for name, reader in READERS.items():
        if reader.fits(has, fixations):
            return name
    raise UserError(
        f"dataset {folder}: fits none of the readers {', '.join(READERS)}: it holds neither stimuli.hdf5 and "
        "fixations.hdf5, nor CAT2000's Stimuli and FIXATIONLOCS; "
        "give one of these, or a folder of images together with a CSV of fixations (columns image, x, y)"
    )
