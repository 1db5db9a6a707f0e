"""Which files of a data set its reader reads, by their names alone: what is copied to S3 and from there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath, PurePosixPath

from acw.data.images import SUFFIXES
from acw.storage import UserError

_HDF5 = ("stimuli.hdf5", "fixations.hdf5", "categories.json")
_CAT2000_IMAGE = re.compile(r"(trainSet/)?Stimuli/[^/]+/[^/]+")
_CAT2000_FIXATIONS = re.compile(r"(trainSet/)?FIXATIONLOCS/[^/]+/[^./][^/]*\.mat")


def names_stimulus(path: PurePath, suffixes: Iterable[str] = SUFFIXES) -> bool:
    """Not so CAT2000's saliency maps, nor what file managers hide among images."""
    hidden = path.name.startswith(".") or path.stem.endswith("_SaliencyMap") or path.parent.name == "Output"
    return path.suffix.lower() in suffixes and not hidden


def reads(reader: str, name: str) -> bool:
    """Whether a reader may read the file of this path, with slashes, in the data set's folder."""
    if reader == "cat2000" and not _CAT2000_IMAGE.fullmatch(name):
        return bool(_CAT2000_FIXATIONS.fullmatch(name))
    if reader == "hdf5" and name in _HDF5:
        return True
    return names_stimulus(PurePosixPath(name), {".jpg"} if reader == "cat2000" else SUFFIXES)


def fitting_reader(folder: Path, has: Callable[[str], bool], fixations: bool) -> str:
    """The reader of a folder, which has files or folders of some names and perhaps comes with a file of fixations."""
    if all(map(has, _HDF5[:2])):
        return "hdf5"
    if has("Stimuli") or has("trainSet/Stimuli"):
        return "cat2000"
    if fixations:
        return "csv"
    raise UserError(
        f"dataset {folder}: holds neither stimuli.hdf5 and fixations.hdf5, nor CAT2000's Stimuli and FIXATIONLOCS; "
        "give one of these, or a folder of images together with a CSV of fixations (columns image, x, y)"
    )


def bring(folder: Path, reader: str | None, fixations: bool) -> str:
    """Makes a folder of the mirror hold what the reader needs of a data set in S3, as it is there now; the reader.

    Raises UserError if there is nothing, if it does not fit on this node, or cannot be had.
    """
    from acw import mirror

    objects = {path.relative_to(folder).as_posix(): (path, found) for path, found in mirror.listing(folder)}
    if not objects:
        raise UserError(
            f"dataset {folder}: there is nothing; correct the address, or upload a folder by: "
            f"python jobs/stage.py FOLDER {folder}"
        )

    def has(name: str) -> bool:
        return any(other == name or other.startswith(f"{name}/") for other in objects)

    chosen = reader or fitting_reader(folder, has, fixations)
    mirror.synchronise(folder, dict(objects.values()), lambda name: reads(chosen, name))
    return chosen
