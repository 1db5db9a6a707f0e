"""Files of whole data sets that are no tables: scanpaths in JSON and MATLAB's format, as pysaliency reads them, too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from acw.data.convention import Convention
from acw.data.recording import NO_CATEGORY, Folder, Recording, listed, stimulus, subjects
from acw.storage.errors import UserError
from acw.storage.file_kinds import recognised


@dataclass(frozen=True)
class Scanpath:
    """A person's fixations on an image: its name, a label of the person, x and y, and a folder that the image is in, by
    which images of the same name are told apart."""

    image: str
    subject: str
    x: Sequence[float]
    y: Sequence[float]
    folder: str = ""


def salicon(folder: Path, file: Path) -> Recording:
    """SALICON's annotations, `fixations_train2014.json` and `fixations_val2014.json` of the release 2015r1.

    `images` have `id` and `file_name`; `annotations` have `image_id`, `worker_id` and `fixations`, each [row, column]
    in px from 1 (salicon-api's `buildFixMap`; its release 1.0 had [x, y] of every sample, and is not meant).
    """
    content = _json(file)
    with _Shape(file, "SALICON's JSON, an object with images and annotations"):
        names = {image["id"]: image["file_name"] for image in content["images"]}
        paths = [
            Scanpath(names[entry["image_id"]], str(entry.get("worker_id", "")), *_columns(entry["fixations"])[::-1])
            for entry in content["annotations"]
        ]
    return _recording(folder, file, paths, Convention(first_px=1))


def coco(folder: Path, file: Path) -> Recording:
    """COCO-Search18's and COCO-FreeView's fixations: a list of trials, `{"name", "subject", "task", "X", "Y", ...}`.

    px of images that were brought to 1680x1050 with bars; the first fixation is that on the cross in the middle, before
    the image, and is left out (readme.txt of the data; the images that go with it have bars, too). Of an image that is
    in several tasks' folders, the one in the folder of its task is meant.
    """
    content = _json(file)
    with _Shape(file, "COCO-Search18's or COCO-FreeView's JSON, a list of objects with name, subject, X and Y"):
        paths = [
            Scanpath(trial["name"], str(trial["subject"]), trial["X"][1:], trial["Y"][1:], str(trial.get("task", "")))
            for trial in content
        ]
    note = f"left out the first fixation of each of {len(paths)} trials, which is on the cross"
    return _recording(folder, file, paths, Convention(), note)


def osie(folder: Path, file: Path) -> Recording:
    """OSIE's `fixations.mat`: a cell array `fixations` of images with `img` and `subjects`, with `fix_x` and `fix_y`.

    px of the image. Other data sets have been brought into this form, MIT1003 among them. MIT1003's own files,
    `DATA/SUBJECT/IMAGE.mat`, hold samples of the tracker, in which the authors' MATLAB code finds fixations; pysaliency
    runs it (`pysaliency.get_mit1003`) and writes a folder of stimuli.hdf5 and fixations.hdf5.
    """
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(file, simplify_cells=True)
    except Exception as error:  # scipy has no one error for a damaged file
        reason = recognised(file) or f"({error}); replace it"
        raise UserError(f"fixations {file}: cannot be read as a MATLAB file up to version 7: {reason}") from error
    names = [name for name in content if not name.startswith("__")]
    if any(isinstance(content[name], dict) and "DATA" in content[name] for name in names):
        raise UserError(
            f"fixations {file}: holds MIT1003's samples, not fixations; have pysaliency.get_mit1003(location=FOLDER) "
            "find them, which needs MATLAB or Octave, and give FOLDER/MIT1003 without --fixations"
        )
    if "fixations" not in content:
        raise UserError(f"fixations {file}: has no variable fixations (it has {', '.join(names)}); give OSIE's file")
    with _Shape(file, "OSIE's MAT, a cell array of structures with img and subjects"):
        paths = [
            Scanpath(
                str(image["img"]), str(number), *(np.atleast_1d(seen[axis]).tolist() for axis in ("fix_x", "fix_y"))
            )
            for image in _several(content["fixations"])
            for number, seen in enumerate(_several(image["subjects"]))
        ]
    return _recording(folder, file, paths, Convention())


class _Shape:
    """Turns whatever is raised by a file that is not of the expected shape into a UserError."""

    def __init__(self, file: Path, expected: str) -> None:
        self.file, self.expected = file, expected

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError, IndexError, AttributeError)):
            what = f"{type(error).__name__} {error}"
            raise UserError(f"fixations {self.file}: is not {self.expected} ({what}); give such a file") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"fixations {file}: cannot be read as JSON in UTF-8 ({error}); correct it") from None


def _columns(pairs: Iterable[Sequence[float]]) -> tuple[list[float], list[float]]:
    first, second = [], []
    for one, other in pairs:
        first.append(float(one))
        second.append(float(other))
    return first, second


def _several(value: Any) -> Iterator[Any]:
    """A cell array's elements: MATLAB writes an array of one as its element."""
    return iter(value if isinstance(value, (list, np.ndarray)) else [value])


def _recording(folder: Path, file: Path, paths: Sequence[Scanpath], convention: Convention, *notes: str) -> Recording:
    """Raises UserError if none of the scanpaths is on an image of the folder."""
    inside = Folder(folder)
    index: dict[str, int] = {}
    elsewhere: Counter[str] = Counter()
    image: list[int] = []
    kept: list[Scanpath] = []
    for path in paths:
        with _Shape(file, f"a file of scanpaths, as x and y of {path.image!r} are not as many numbers"):
            pairs = np.array([path.x, path.y], dtype=np.float64)
            if pairs.ndim != 2 or not np.isfinite(pairs).all():
                raise ValueError(f"{len(path.x)} and {len(path.y)}")
        found = _image(inside, path)
        if found is None:
            elsewhere[path.image] += len(path.x)
        elif path.x:
            image += [index.setdefault(found, len(index))] * len(path.x)
            kept.append(path)
    if not index:
        raise UserError(f"fixations {file}: none of its images is in {folder} ({listed(list(elsewhere))}); give theirs")
    if elsewhere:
        names = listed([f"{name} {count}" for name, count in elsewhere.items()])
        notes = (*notes, f"left out {elsewhere.total()} fixations on what is not in the folder ({names})")
    x, y = (np.concatenate([np.asarray(getattr(path, axis), dtype=np.float64) for path in kept]) for axis in "xy")
    labels = [path.subject for path in kept for _ in path.x]
    return Recording(
        [stimulus(folder, name, NO_CATEGORY) for name in index],
        np.array(image, dtype=np.int64),
        x,
        y,
        subjects(labels),
        convention=convention,
        unseen=tuple(name for name in inside.stimuli if name not in index),
        table=file.name,
        notes=notes,
    )


def _image(inside: Folder, path: Scanpath) -> str | None:
    found = inside.like(path.image)
    if len(found) > 1:
        task = path.folder.replace("_", " ").casefold()
        found = [name for name in found if Path(name).parent.name.replace("_", " ").casefold() == task]
        if len(found) != 1:
            raise UserError(f"{inside.path}: has {path.image} in several folders; give each image another name")
    return found[0] if found else None
