"""Readers of data sets: a CAT2000 folder, pysaliency's HDF5 pair, a folder of images with a CSV, the built-in displays.

Whatever the reader, stimuli come in order of their names and fixations in 0-based px, x to the right and y down.
A fixation is inside its image if 0 <= x < width and 0 <= y < height.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from acw import pysaliency_compat
from acw.data import synthetic
from acw.data.dataset import SYNTHETIC, Dataset, Stimulus
from acw.data.images import SUFFIXES, inspect_image
from acw.data.remote import bring, fitting_reader, names_stimulus
from acw.storage import UserError, fetch, local, mirrored, resolve_inside, shown

READERS = ("hdf5", "cat2000", "csv")
NO_CATEGORY = "all"


@dataclass(frozen=True)
class _Fixations:
    """Fixations as read: index of the image (F,), x and y float64 (F,) in px, subject int (F,) with -1 unknown."""

    image: np.ndarray
    x: np.ndarray
    y: np.ndarray
    subject: np.ndarray


def load_dataset(
    spec: str, *, reader: str | None = None, fixations: str | None = None, drop_outside: bool = False
) -> Dataset:
    """Reads a data set.

    spec: `synthetic`, or a folder: CAT2000's (the one that holds `Stimuli` and `FIXATIONLOCS`, or the one above it),
        one with pysaliency's `stimuli.hdf5` and `fixations.hdf5`, or one of images, to which `fixations` belongs; or
        the `s3://` address of one.
    reader: `hdf5`, `cat2000` or `csv`; without it the first that fits, in this order.
    fixations: a CSV file with the columns image (path in the folder), x, y, and perhaps subject and category.
    drop_outside: leave out fixations that lie outside their image, and say so in the data set's notes.

    Raises UserError, in one line, for whatever is missing, damaged or contradictory.
    """
    if spec == SYNTHETIC:
        if reader or fixations:
            raise UserError("dataset synthetic: is generated, so leave out the reader and the fixations file")
        return synthetic.load()
    folder = local(spec).expanduser().resolve()
    if mirrored(folder):
        reader = bring(folder, reader, fixations is not None)
    elif not folder.is_dir():
        raise UserError(f"dataset {spec}: there is no such folder; correct the path")
    chosen = reader or fitting_reader(folder, lambda name: (folder / name).exists(), fixations is not None)
    if chosen not in READERS:
        raise UserError(f"reader {chosen}: unknown; choose one of {', '.join(READERS)}")
    if fixations and chosen != "csv":
        raise UserError(
            f"dataset {folder}: is read by the {chosen} reader, which takes no fixations file; "
            "choose the reader csv or leave the file out"
        )
    if chosen == "hdf5":
        stimuli, found = _read_hdf5(folder)
    elif chosen == "cat2000":
        stimuli, found = _read_cat2000(folder)
    else:
        stimuli, found = _read_csv(folder, fixations)
    return _assemble(folder, chosen, stimuli, found, drop_outside)


# --- CAT2000 -----------------------------------------------------------------------------------------------------


def _cat2000_root(folder: Path) -> Path | None:
    return next((root for root in (folder, folder / "trainSet") if (root / "Stimuli").is_dir()), None)


def _read_cat2000(folder: Path) -> tuple[list[Stimulus], _Fixations]:
    """CAT2000 as distributed. `fixLocs` marks pixels: x is the column and y the row, as whole numbers, and neither
    subjects nor repeated fixations are known."""
    root = _cat2000_root(folder)
    if root is None:
        raise UserError(f"dataset {folder}: has no folder Stimuli or trainSet/Stimuli; give the folder that has")
    locations = root / "FIXATIONLOCS"
    if not locations.is_dir():
        raise UserError(f"dataset {root}: has no folder FIXATIONLOCS beside Stimuli; add it (trainSet has it)")
    categories = sorted(path for path in (root / "Stimuli").iterdir() if path.is_dir() and path.name != "Output")
    paths = [path for category in categories for path in sorted(category.iterdir()) if is_stimulus(path, {".jpg"})]
    if not paths:
        raise UserError(f"dataset {root}: has no images Stimuli/<Category>/*.jpg; add them")
    expected = {locations / path.parent.name / f"{path.stem}.mat": path for path in paths}
    present = {path for path in locations.glob("*/*.mat") if not path.name.startswith(".")}
    unlocated = [path.relative_to(root) for mat, path in expected.items() if mat not in present]
    _refuse(unlocated, root, "images without a file in FIXATIONLOCS", "add the files or remove the images")
    orphans = sorted(path.relative_to(root) for path in present - set(expected))
    _refuse(orphans, root, "files of fixations without an image in Stimuli", "add the images or remove the files")
    for path in (*expected, *paths):
        resolve_inside(path, folder)
    stimuli = [_stimulus(path, path.relative_to(root).as_posix(), path.parent.name, None) for path in paths]
    pixels = [_fixated_pixels(mat, stimulus.size) for mat, stimulus in zip(expected, stimuli, strict=True)]
    image = np.repeat(np.arange(len(pixels)), [len(places) for places in pixels])
    y, x = np.concatenate(pixels).T.astype(np.float64)
    return stimuli, _Fixations(image, x, y, np.full(len(image), -1))


def _fixated_pixels(path: Path, size: tuple[int, int]) -> np.ndarray:
    """int (n, 2): row and column of the pixels that `fixLocs` marks."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["fixLocs"])
    except Exception as error:  # scipy has no one error for a damaged file
        raise UserError(f"{path}: cannot be read as a MATLAB file up to version 7 ({error}); replace it") from error
    if "fixLocs" not in content:
        raise UserError(f"{path}: has no variable fixLocs; replace it by CAT2000's file")
    marks = np.asarray(content["fixLocs"])
    if marks.shape != size or marks.dtype.kind not in "buif":
        raise UserError(
            f"{path}: fixLocs has shape {marks.shape} and type {marks.dtype}, but its image has {size[0]} rows and "
            f"{size[1]} columns; replace it by a numeric array of the image's size"
        )
    if not np.isfinite(marks).all():
        raise UserError(f"{path}: fixLocs has values that are not finite; replace it by an array of 0 and 1")
    return np.argwhere(marks)


# --- pysaliency's HDF5 -------------------------------------------------------------------------------------------


def _read_hdf5(folder: Path) -> tuple[list[Stimulus], _Fixations]:
    """pysaliency's `FileStimuli` with `Fixations` or `FixationTrains`. The attribute `category` holds names, or indices
    into `category_names` of `categories.json`, or, without that file, numbers that go with the images' folders."""
    described, recorded = _hdf5_object(folder, "stimuli.hdf5"), _hdf5_object(folder, "fixations.hdf5")
    if not hasattr(described, "filenames"):
        raise UserError(f"{folder / 'stimuli.hdf5'}: holds no FileStimuli; save the images as files and describe those")
    if not hasattr(recorded, "x"):
        raise UserError(f"{folder / 'fixations.hdf5'}: holds no fixations; save Fixations or FixationTrains there")
    files = [_inside(folder, filename) for filename in described.filenames]
    attributes = {name: list(values) for name, values in described.attributes.items()}
    categories = _hdf5_categories(folder, files, attributes.get("category"))
    sources = [_source(value) for value in attributes.get("source", [None] * len(files))]
    stimuli = [
        _stimulus(folder / file, file, category, source)
        for file, category, source in zip(files, categories, sources, strict=True)
    ]
    for stimulus, shape in zip(stimuli, described.shapes, strict=True):
        if tuple(shape[:2]) != stimulus.size:
            raise UserError(
                f"{stimulus.path}: is {stimulus.size[1]}x{stimulus.size[0]} px, but stimuli.hdf5 says "
                f"{shape[1]}x{shape[0]}; restore the image that the fixations belong to"
            )
    image = np.asarray(recorded.n).astype(np.int64)
    if np.any((image < 0) | (image >= len(stimuli))):
        raise UserError(f"{folder / 'fixations.hdf5'}: names images beyond the {len(stimuli)} of stimuli.hdf5")
    return stimuli, _Fixations(image, recorded.x, recorded.y, _subjects(recorded.subjects))


def _hdf5_object(folder: Path, name: str) -> Any:
    import h5py

    from acw.hdf5 import keys_of

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
        raise UserError(f"{path}: pysaliency cannot read it ({error}); write it again with to_hdf5") from error


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


def _read_csv(folder: Path, fixations: str | None) -> tuple[list[Stimulus], _Fixations]:
    if fixations is None:
        raise UserError(f"dataset {folder}: the reader csv needs a CSV file of fixations (columns image, x, y)")
    table = fetch(local(fixations).expanduser())
    files: dict[str, str] = {}  # the same image may be written in several ways: a.jpg, ./a.jpg
    categories: dict[str, str] = {}
    images: list[str] = []
    places: list[tuple[float, float]] = []
    subjects: list[str] = []
    for line, row in _csv_rows(table):
        file = files.get(row["image"]) or files.setdefault(row["image"], _inside(folder, row["image"]))
        if not (folder / file).is_file():
            raise UserError(f"{table}, line {line}: the image {row['image']} is not in {folder}; add it or correct it")
        category = row.get("category", NO_CATEGORY)
        if not category or categories.setdefault(file, category) != category:
            other = f" and {categories[file]!r}" if category else ""
            raise UserError(f"{table}, line {line}: {file} has the category {category!r}{other}; give it exactly one")
        images.append(file)
        places.append((_coordinate(row, "x", table, line), _coordinate(row, "y", table, line)))
        subjects.append(row.get("subject", ""))
    present = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if is_stimulus(path)]
    unnamed = [file for file in present if file not in categories]
    _refuse(unnamed, folder, f"images without a fixation in {table.name}", "add fixations or remove the images")
    stimuli = [_stimulus(folder / file, file, category, None) for file, category in categories.items()]
    index = {file: number for number, file in enumerate(categories)}
    x, y = np.array(places, dtype=np.float64).reshape(-1, 2).T
    image = np.array([index[file] for file in images], dtype=np.int64)
    return stimuli, _Fixations(image, x, y, _subjects(subjects))


def _csv_rows(table: Path) -> Iterable[tuple[int, dict[str, str]]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            columns = [(name or "").strip() for name in reader.fieldnames or []]
            for needed in ("image", "x", "y"):
                if needed not in columns:
                    raise UserError(f"{table}: has no column {needed!r} (it has {', '.join(columns)}); add it")
            reader.fieldnames = columns
            for row in reader:
                yield reader.line_num, {name: row[name].strip() for name in columns}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"fixations {table}: cannot be read as a CSV file in UTF-8 ({error}); correct it") from error


def _coordinate(row: dict[str, str], axis: str, table: Path, line: int) -> float:
    try:
        value = float(row[axis])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{table}, line {line}: {axis} is {row[axis]!r}, not a number; correct or remove the line")
    return value


# --- What all have in common -------------------------------------------------------------------------------------


def is_stimulus(path: Path, suffixes: Iterable[str] = SUFFIXES) -> bool:
    """Whether there is a file that is named like a stimulus."""
    return names_stimulus(path, suffixes) and path.is_file()


def _inside(folder: Path, file: str) -> str:
    """A file's path relative to the data set's folder, after links; a file outside is refused."""
    return resolve_inside(folder / file, folder).relative_to(folder).as_posix()


def _stimulus(path: Path, file: str, category: str, source: str | None) -> Stimulus:
    size, digest = inspect_image(path)
    # The same image has the same name whether a reader was given CAT2000's folder or the one above it.
    name = file.removeprefix("trainSet/").removeprefix("Stimuli/")
    return Stimulus(name, str(path), size, category, source, digest)


def _subjects(values: Iterable[Any]) -> np.ndarray:
    """int (F,): whole numbers from 0 stay as they are, other labels are numbered in their order, none is -1."""
    labels = np.array([str(value) for value in values], dtype=str)
    distinct, place = np.unique(labels, return_inverse=True)
    unknown = np.isin(distinct, ["", "nan", "None", "-1"])
    if all(label.isdecimal() and len(label) < 10 for label in distinct[~unknown]):
        numbers = [-1 if missing else int(label) for label, missing in zip(distinct, unknown, strict=True)]
    else:
        numbers = np.where(unknown, -1, np.cumsum(~unknown) - 1).tolist()
    return np.array(numbers, dtype=np.int64)[place] if len(labels) else np.zeros(0, dtype=np.int64)


def _assemble(folder: Path, reader: str, stimuli: Sequence[Stimulus], found: _Fixations, drop_outside: bool) -> Dataset:
    if not stimuli:
        raise UserError(f"dataset {folder}: holds no image with fixations; add some")
    names = [stimulus.name for stimulus in stimuli]
    if len(set(names)) < len(names):
        raise UserError(f"dataset {folder}: has the image {max(names, key=names.count)} twice; list every image once")
    order = sorted(range(len(stimuli)), key=names.__getitem__)
    stimuli = [stimuli[index] for index in order]
    image = np.argsort(order)[found.image]
    height, width = np.array([stimulus.size for stimulus in stimuli])[image].T
    inside = (found.x >= 0) & (found.x < width) & (found.y >= 0) & (found.y < height)
    outside = [
        f"{stimuli[image[i]].name} x={found.x[i]:g} y={found.y[i]:g} in {width[i]}x{height[i]}"
        for i in np.flatnonzero(~inside)
    ]
    if outside and not drop_outside:
        raise UserError(
            f"dataset {folder}: fixations outside their image: {len(outside)} of {len(inside)} "
            f"({_listed(outside)}); correct them, or leave them out with --drop-outside (drop_outside=True)"
        )
    kept = np.flatnonzero(inside)
    kept = kept[np.argsort(image[kept], kind="stable")]
    unseen = [stimuli[index].name for index in np.setdiff1d(np.arange(len(stimuli)), image[kept])]
    _refuse(unseen, folder, "images without a fixation", "add fixations or remove the images")
    # Rounding to float32 must not carry a fixation over the edge.
    x, y = (
        np.minimum(values[kept].astype(np.float32), np.nextafter(edge[kept].astype(np.float32), np.float32(0)))
        for values, edge in ((found.x, width), (found.y, height))
    )
    name = folder.parent.name if folder.name == "trainSet" else folder.name
    return Dataset(
        name=name,
        reader=reader,
        location=shown(folder),
        stimuli=tuple(stimuli),
        image=image[kept].astype(np.int32),
        x=x,
        y=y,
        subject=found.subject[kept].astype(np.int32),
        blur_sigma=_blur_sigma(name, reader, stimuli),
        notes=(f"dropped {len(outside)} fixations outside their image (at the user's request)",) if outside else (),
    )


def _blur_sigma(name: str, reader: str, stimuli: Sequence[Stimulus]) -> float:
    """px: about one degree of visual angle where it is known, else 1/48 of the mean width, which is CAT2000's ratio."""
    if reader == "cat2000" and all(stimulus.size == (1080, 1920) for stimulus in stimuli):
        return 40.0
    if name == "gaze":
        return 30.0
    return float(np.mean([stimulus.size[1] for stimulus in stimuli])) / 48


def _refuse(items: Sequence[object], folder: Path, what: str, remedy: str) -> None:
    if items:
        raise UserError(f"dataset {folder}: {what}: {len(items)} ({_listed(items)}); {remedy}")


def _listed(items: Sequence[object], most: int = 3) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + rest
