"""Files that are fetched from elsewhere once a node and then kept, as weights are: below ACW_CACHE, else ~/.cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from acw.storage.addresses import cache_folder
from acw.storage.errors import UserError

FOLDER = "acw-weights"


def kept(name: str, bring: Callable[[Path], None]) -> Path:
    """The file of a name, brought if it is not here yet, by one process at a time.

    bring: writes the file at the path that it is given, whole and right, or raises. The name says all that the content
    depends on. Raises UserError where the folder cannot be written.
    """
    folder = cache_folder() / FOLDER
    path = folder / name
    if path.exists():
        return path
    from filelock import FileLock  # late, as a model that is served fetches nothing

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            if not path.exists():
                bring(path)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror or error}; set ACW_CACHE to a folder with room for weights"
        ) from error
    return path
