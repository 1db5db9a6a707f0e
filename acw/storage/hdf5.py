"""HDF5 files from elsewhere: opened to be read, and held to what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from acw.storage.errors import UserError
from acw.storage.file_kinds import recognised


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to read from. Raises UserError where it is missing or damaged, also while it is read."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; correct the path")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        found = recognised(path, "HDF5")
        reason = f"it {found}" if found else f"({error}); write it anew"
        raise UserError(f"{path}: no HDF5 file that can be read whole: {reason}") from error


def keys_of(file: h5py.File) -> list[str]:
    """The names of all arrays in a file, with those of their groups: `Street/001.jpg`.

    Raises UserError if one of them is not in the file: HDF5 can present the bytes of any other file as an array.
    """
    keys: list[str] = []

    def check(key: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise UserError(f"{file.filename}: {key} is stored in another file; write it anew, whole")
            keys.append(key)

    def check_link(key: str, link: Any) -> None:
        if isinstance(link, h5py.ExternalLink):
            raise UserError(f"{file.filename}: {key} is a link to another file; write it anew, whole")

    file.visititems(check)
    file.visititems_links(check_link)
    return keys
