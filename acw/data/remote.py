"""Data sets in S3: which of their files a reader reads, and bringing those to this node."""

from __future__ import annotations

from pathlib import Path

from acw.data.readers import READERS, fitting_reader
from acw.data.statement import STATEMENT
from acw.storage.errors import UserError


def reads(reader: str, name: str) -> bool:
    """Whether a data set of this format may be made of the file of this path, with slashes, in its folder."""
    return name == STATEMENT or READERS[reader].reads(name)


def bring(folder: Path, reader: str | None, fixations: bool) -> str:
    """Makes a folder of the cache hold what the reader needs of a data set in S3, as it is there now; the reader.

    Raises UserError if there is nothing, if it does not fit on this node, or cannot be had.
    """
    from acw.storage import cache

    objects = {path.relative_to(folder).as_posix(): (path, found) for path, found in cache.listing(folder)}
    if not objects:
        raise UserError(
            f"dataset {folder}: there is nothing; correct the address, or upload a folder by: "
            f"python jobs/stage.py FOLDER {folder}"
        )

    def has(name: str) -> bool:
        return any(other == name or other.startswith(f"{name}/") for other in objects)

    chosen = reader or fitting_reader(folder, has, fixations)
    cache.synchronise(folder, dict(objects.values()), lambda name: reads(chosen, name))
    return chosen
