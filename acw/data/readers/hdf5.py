"""pysaliency's HDF5 pair: `stimuli.hdf5` with `FileStimuli`, `fixations.hdf5` with `Fixations` or `FixationTrains`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from acw.data import pysaliency_compat
from acw.data.images import names_stimulus
from acw.data.recording import NO_CATEGORY, Folder, Reader, Recording, stimulus, subjects
from acw.storage.errors import UserError
from acw.storage.file_kinds import recognised
from acw.storage.files import resolve_inside

FILES = ("stimuli.hdf5", "fixations.hdf5")


def _fits(has: Callable[[str], bool], fixations: bool) -> bool:
    return all(map(has, FILES))


def _reads(name: str) -> bool:
    return name in (*FILES, "categories.json") or names_stimulus(PurePosixPath(name))


def _read(folder: Path, fixations: str | None) -> Recording:
    """The attribute `category` holds names, or indices into `category_names` of `categories.json`, or, without that
    file, numbers that go with the images' folders."""
    described, recorded = _hdf5_object(folder, "stimuli.hdf5"), _hdf5_object(folder, "fixations.hdf5")
    if not hasattr(described, "filenames"):
        raise UserError(f"{folder / 'stimuli.hdf5'}: holds no FileStimuli; save the images as files and describe those")
    if not hasattr(recorded, "x"):
        raise UserError(f"{folder / 'fixations.hdf5'}: holds no fixations; save Fixations or FixationTrains there")
    inside = Folder(folder)
    files = [inside.file(str(filename), str(folder / "stimuli.hdf5")) for filename in described.filenames]
    attributes = {name: list(values) for name, values in described.attributes.items()}
    categories = _hdf5_categories(folder, files, attributes.get("category"))
    sources = [_source(value) for value in attributes.get("source", [None] * len(files))]
    stimuli = [
        stimulus(folder, file, category, source)
        for file, category, source in zip(files, categories, sources, strict=True)
    ]
    for shown, shape in zip(stimuli, described.shapes, strict=True):
        if tuple(shape[:2]) != shown.size:
            raise UserError(
                f"{shown.path}: is {shown.size[1]}x{shown.size[0]} px, but stimuli.hdf5 says "
                f"{shape[1]}x{shape[0]}; restore the image that the fixations belong to"
            )
    numbers = np.asarray(recorded.n)
    image = numbers.astype(np.int64)
    if np.any(image != numbers) or any(np.iscomplexobj(values) for values in (recorded.x, recorded.y)):
        raise UserError(f"{folder / 'fixations.hdf5'}: n are whole numbers, x and y real ones; write it again")
    if np.any((image < 0) | (image >= len(stimuli))):
        raise UserError(f"{folder / 'fixations.hdf5'}: names images beyond the {len(stimuli)} of stimuli.hdf5")
    x, y = (np.asarray(values, dtype=np.float64) for values in (recorded.x, recorded.y))
    return Recording(stimuli, image, x, y, subjects(recorded.subjects))


def _hdf5_object(folder: Path, name: str) -> Any:
    import h5py

    from acw.storage.hdf5 import keys_of

    pysaliency = pysaliency_compat.load()
    path = folder / name
    if not path.is_file():
        raise UserError(f"dataset {folder}: has no {name}; add it or choose another reader")
    resolve_inside(path, folder)
    try:
        # Given the open file: given a path, pysaliency may hand out what it read there before.
        with h5py.File(path) as file:
            keys_of(file)  # refuses what is not in the file itself
            _refuse_missing_coordinates(file, path)
            return pysaliency.read_hdf5(file)
    except UserError:
        raise
    except (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = recognised(path, "HDF5") or f"pysaliency cannot read it ({error}); write it again with to_hdf5"
        raise UserError(f"{path}: {reason}") from error


def _refuse_missing_coordinates(file: Any, path: Path) -> None:
    """Counts NaN in coordinates before pysaliency sees them, which pads scanpaths with NaN and fails on any other."""
    prefix = "train_" if "train_xs" in file else ""
    suffix = "s" if prefix else ""
    if f"{prefix}x{suffix}" not in file:
        return
    missing = [np.isnan(file[f"{prefix}{axis}{suffix}"][...]) for axis in "xy"]
    either = missing[0] | missing[1]
    if prefix:
        padding = np.logical_and.accumulate((missing[0] & missing[1])[:, ::-1], axis=1)[:, ::-1]
        either &= ~padding
    if either.any():
        raise UserError(f"{path}: fixations with NaN coordinates: {either.sum()}; remove them")


def _hdf5_categories(folder: Path, files: list[str], values: list[Any] | None) -> list[str]:
    if values is None:
        return [NO_CATEGORY] * len(files)
    if all(isinstance(value, str) for value in values):
        return [str(value) for value in values]
    if not all(isinstance(value, int | np.integer) for value in values):
        raise UserError(f"{folder / 'stimuli.hdf5'}: the attribute category must hold names or indices")
    path = folder / "categories.json"
    if path.is_file():
        try:
            names = [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["category_names"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}: is not like {{"category_names": ["a", "b"]}}; correct or remove it') from error
        if not all(0 <= value < len(names) for value in values):
            raise UserError(f"{path}: has {len(names)} names, too few for the indices in stimuli.hdf5; add the others")
        return [names[value] for value in values]
    folders = [Path(file).parent.name for file in files]
    if not len(set(zip(values, folders, strict=True))) == len(set(values)) == len(set(folders)):
        raise UserError(f"{path}: is missing, and the categories in stimuli.hdf5 are not the images' folders; add it")
    return folders


def _source(value: Any) -> str | None:
    """The collection that an image is from: `osie` for `osie-1003`."""
    return None if value is None else str(value).rpartition("-")[0] or str(value)


# --- Images and CSV ----------------------------------------------------------------------------------------------


READER = Reader("hdf5", _fits, _reads, _read)
