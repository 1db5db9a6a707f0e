"""CAT2000 as distributed: `Stimuli/<Category>/*.jpg` and `FIXATIONLOCS/<Category>/*.mat`, maps of fixated pixels."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from acw.data.images import names_stimulus
from acw.data.recording import Reader, Recording, is_stimulus, refuse, stimulus
from acw.storage.errors import UserError
from acw.storage.file_kinds import recognised
from acw.storage.files import resolve_inside

_IMAGE = re.compile(r"(trainSet/)?Stimuli/[^/]+/[^/]+")
_FIXATIONS = re.compile(r"(trainSet/)?FIXATIONLOCS/[^/]+/[^./][^/]*\.mat")
# A map of fixations marks no more than this share of its pixels (CAT2000's at most a thousandth), and counts no more
# than so many at one pixel.
MOST_MARKED = 0.25
MOST_COUNTED = 50
# Fewer marks may be anything. Of more, most are alone and single counts; those of a blurred map, of discs, of squares
# or of an enlarged map touch each other.
MARKS_TO_JUDGE = 10


def _fits(has: Callable[[str], bool], fixations: bool) -> bool:
    return has("Stimuli") or has("trainSet/Stimuli")


def _reads(name: str) -> bool:
    return bool(_FIXATIONS.fullmatch(name) or (_IMAGE.fullmatch(name) and _is_image(PurePosixPath(name))))


def _is_image(path: PurePosixPath | Path) -> bool:
    return names_stimulus(path, {".jpg"})


def _read(folder: Path, fixations: str | None) -> Recording:
    """`fixLocs` marks pixels: x is the column and y the row, as whole numbers. A mark above 1 counts fixations if the
    map's values are small whole numbers, and is one fixation if all marks are equal. Subjects are not known."""
    root = next((root for root in (folder, folder / "trainSet") if (root / "Stimuli").is_dir()), None)
    if root is None:
        raise UserError(f"dataset {folder}: has no folder Stimuli or trainSet/Stimuli; give the folder that has")
    locations = root / "FIXATIONLOCS"
    if not locations.is_dir():
        raise UserError(f"dataset {root}: has no folder FIXATIONLOCS beside Stimuli; add it (trainSet has it)")
    paths = _images(root)
    mats = _mats(root, locations, paths)
    for path in (*mats, *paths):
        resolve_inside(path, folder)
    stimuli = [stimulus(root, path.relative_to(root).as_posix(), path.parent.name) for path in paths]
    marked = [_fixated_pixels(mat, stimulus.size) for mat, stimulus in zip(mats, stimuli, strict=True)]
    image = np.repeat(np.arange(len(marked)), [len(places) for places in marked])
    y, x = np.concatenate(marked).T.astype(np.float64)
    return Recording(stimuli, image, x, y, np.full(len(image), -1), pixels=True)


def _images(root: Path) -> list[Path]:
    categories = sorted(path for path in (root / "Stimuli").iterdir() if path.is_dir() and path.name != "Output")
    files = [path for category in categories for path in sorted(category.iterdir()) if is_stimulus(path)]
    paths = [path for path in files if _is_image(path)]
    if not paths:
        others = f" (it has {files[0].relative_to(root)})" if files else ""
        raise UserError(f"dataset {root}: has no images Stimuli/<Category>/*.jpg{others}; add them")
    return paths


def _mats(root: Path, locations: Path, paths: list[Path]) -> list[Path]:
    """The images' files of fixations, in order; the names of both may be in different Unicode forms."""

    def key(path: Path) -> tuple[str, str]:
        return unicodedata.normalize("NFC", path.parent.name), unicodedata.normalize("NFC", path.stem)

    present = {key(path): path for path in locations.glob("*/*.mat") if not path.name.startswith(".")}
    unlocated = [path.relative_to(root) for path in paths if key(path) not in present]
    refuse(unlocated, root, "images without a file in FIXATIONLOCS", "add the files or remove the images")
    images = set(map(key, paths))
    orphans = sorted(path.relative_to(root) for name, path in present.items() if name not in images)
    refuse(orphans, root, "files of fixations without an image in Stimuli", "add the images or remove the files")
    return [present[key(path)] for path in paths]


def _fixated_pixels(path: Path, size: tuple[int, int]) -> np.ndarray:
    """int (n, 2): row and column of the pixels that `fixLocs` marks, as often as it says."""
    marks = _stored(path)
    if marks.shape != size or marks.dtype.kind not in "buif":
        turned = ", transposed" if marks.shape == size[::-1] else ""
        raise UserError(
            f"{path}: fixLocs has shape {marks.shape} and type {marks.dtype}, but its image has {size[0]} rows and "
            f"{size[1]} columns{turned}; replace it by a numeric array of the image's size"
        )
    if not np.isfinite(marks).all():
        raise UserError(f"{path}: fixLocs has values that are not finite; replace it by an array of 0 and 1")
    if reason := _no_map_of_fixations(marks):
        raise UserError(
            f"{path}: fixLocs is no map of fixations, {reason}; replace it by an array of 0 and 1 (or how many)"
        )
    places = np.argwhere(marks)
    counts = marks[tuple(places.T)].astype(np.int64)
    return np.repeat(places, counts if len(set(counts.tolist())) > 1 else 1, axis=0)


def _stored(path: Path) -> np.ndarray:
    from scipy.io import loadmat
    from scipy.sparse import issparse

    try:
        content: dict[str, Any] = loadmat(path, variable_names=["fixLocs"])
    except Exception as error:  # scipy has no one error for a damaged file
        kind = recognised(path)
        reason = f"it {kind}" if kind else f"({error}); replace it"
        raise UserError(f"{path}: cannot be read as a MATLAB file up to version 7: {reason}") from error
    if "fixLocs" not in content:
        raise UserError(f"{path}: has no variable fixLocs; replace it by CAT2000's file")
    marks = content["fixLocs"]
    return marks.toarray() if issparse(marks) else np.asarray(marks)


def _no_map_of_fixations(marks: np.ndarray) -> str | None:
    """Why an array (H, W) cannot be one, or None."""
    marked = marks != 0
    share = float(marked.mean())
    values = np.unique(marks[marked])
    if len(values) and values[0] < 0:
        return f"as it has values below 0, down to {values[0]:g}"
    if len(values) > 1 and (values[-1] > MOST_COUNTED or np.any(values != np.floor(values))):
        return f"as it has {len(values)} different values from {values[0]:g} to {values[-1]:g} (a blurred map?)"
    if share > MOST_MARKED:
        return f"as it marks {share:.0%} of the pixels (a blurred map, or an inverted one?)"
    if marked.sum() >= MARKS_TO_JUDGE and _areas(marked):
        return "as its marks are areas and not pixels (a blurred map, discs, or an enlarged map?)"
    marks = marks[marked]
    if len(marks) >= MARKS_TO_JUDGE and np.any(marks != marks[0]) and np.sum(marks > 1) > np.sum(marks == 1):
        return "as most of its marks are above 1 (numbers of subjects, or in order?)"
    return None


def _areas(marked: np.ndarray) -> bool:
    """Whether most marks lie within others, or most groups of touching marks have the same size, of 4 or more."""
    from scipy.ndimage import label

    inner = marked[1:-1, 1:-1] & marked[:-2, 1:-1] & marked[2:, 1:-1] & marked[1:-1, :-2] & marked[1:-1, 2:]
    if inner.sum() > 0.5 * marked.sum():
        return True
    sizes = np.bincount(label(marked, np.ones((3, 3)))[0][marked])[1:]
    usual = int(np.bincount(sizes).argmax())
    return len(sizes) >= 3 and usual >= 4 and bool(np.mean(sizes == usual) >= 0.5)


READER = Reader("cat2000", _fits, _reads, _read)
