"""What a reader makes of a data set's files, and what readers have in common."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from acw.data.convention import PX, Convention
from acw.data.dataset import Stimulus
from acw.data.images import inspect_image, names_stimulus
from acw.storage.errors import UserError
from acw.storage.files import resolve_inside

NO_CATEGORY = "all"
# How tables, MATLAB, R and eye trackers write that there is none; compared without regard to case.
MISSING = frozenset({"", ".", "-", "?", "na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "none", "null", "missing"})


@dataclass(frozen=True)
class Recording:
    """Stimuli and the fixations on them as they are stored, before anything is checked, converted or sorted.

    image: int64 (F,), the index of each fixation's stimulus. x, y: float64 (F,), in the file's own units.
    subject: int64 (F,), -1 where unknown. pixels: whether x and y are pixels beyond doubt, as marks in a map are.
    convention: what the format says of x and y. unseen: images of the folder without a fixation in the file `table`.
    notes: what else the user should know of how the files were read.
    """

    stimuli: Sequence[Stimulus]
    image: np.ndarray
    x: np.ndarray
    y: np.ndarray
    subject: np.ndarray
    pixels: bool = False
    convention: Convention = PX
    unseen: tuple[str, ...] = ()
    table: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """One format of data sets. Readers of READERS (acw/data/readers) are tried in their order.

    fits: whether a folder is of this format, told from whether it has files or folders of some names and whether a
        file of fixations comes with it.
    reads: whether the reader may read the file of this name, with slashes, in the folder: what is copied to S3.
    read: reads a folder, with the file of fixations if there is one; raises UserError for whatever is wrong.
    takes_fixations: whether a file of fixations belongs to the format.
    """

    name: str
    fits: Callable[[Callable[[str], bool], bool], bool]
    reads: Callable[[str], bool]
    read: Callable[[Path, str | None], Recording]
    takes_fixations: bool = False


@dataclass(frozen=True)
class Folder:
    """The files of a data set's folder, found by the names that its tables give them."""

    path: Path
    _found: dict[str, str] = field(default_factory=dict)

    def file(self, name: str, where: str) -> str:
        """The relative path, with slashes and after links, of the file that `name` means.

        The same file may be written in several ways: `a.jpg`, `./a.jpg`, and, as file systems differ in it, in another
        Unicode form. Raises UserError, which begins with `where`, if there is none, or it lies outside the folder.
        """
        if name not in self._found:
            self._found[name] = self._find(name, where)
        return self._found[name]

    def _find(self, name: str, where: str) -> str:
        printable(name, where)
        try:
            if not (self.path / name).is_file() and (other := self._by_form.get(_nfc(name))):
                name = other
            file = resolve_inside(self.path / name, self.path)
            if file.is_file():
                return file.relative_to(self.path.resolve()).as_posix()
        except (OSError, RuntimeError) as error:  # a name too long, a circle of links
            raise UserError(f"{where}: {name!r} cannot be a file's name ({error}); correct it") from None
        raise UserError(f"{where}: the image {name} is not in {self.path}{self._hint(name)}; add it or correct it")

    def like(self, name: str) -> list[str]:
        """The relative paths of the images that a program may mean by `name`, which may be a path on another computer,
        without an ending, or in other capitals."""
        last = _nfc(re.split(r"[/\\]", name.strip())[-1]).casefold()
        return self._by_last.get(last, [])

    @cached_property
    def _by_last(self) -> dict[str, list[str]]:
        """Names' last parts, and those without their endings, NFC and case-folded -> relative paths."""
        found: dict[str, list[str]] = {}
        for path in self.stimuli:
            last = _nfc(path.rpartition("/")[2]).casefold()
            for key in (last, last.rpartition(".")[0]):
                found.setdefault(key, []).append(path)
        return found

    @cached_property
    def stimuli(self) -> list[str]:
        """Relative paths, with slashes, of all files that are named like stimuli, in order."""
        return [path.relative_to(self.path).as_posix() for path in sorted(self.path.rglob("*")) if is_stimulus(path)]

    @cached_property
    def _by_form(self) -> dict[str, str]:
        """NFC form -> name, of the names that are the only ones of their form."""
        forms = [_nfc(name) for name in self.stimuli]
        counts = Counter(forms)
        return {form: name for form, name in zip(forms, self.stimuli, strict=True) if counts[form] == 1}

    def _hint(self, name: str) -> str:
        slashed = name.replace("\\", "/")
        for other in self.stimuli:
            if other in (slashed, Path(slashed).name) or Path(other).name == slashed:
                return f" (it has {other})"
            if _nfc(other).casefold() == _nfc(slashed).casefold():
                return f" (it has {other}, which differs in its capitals)"
            if other.rpartition(".")[0] == slashed:
                return f" (it has {other}: names are with their endings)"
        return ""


def is_stimulus(path: Path) -> bool:
    """Whether there is a file that is named like a stimulus."""
    return names_stimulus(path) and path.is_file()


def stimulus(folder: Path, file: str, category: str, source: str | None = None) -> Stimulus:
    """The stimulus of a file of a data set's folder, by its relative path; raises UserError for no sound image."""
    printable(file, f"{folder}: the name of an image")
    printable(category, f"{folder / file}: its category")
    image = inspect_image(folder / file)
    # The same image has the same name whether a reader was given CAT2000's folder or the one above it.
    name = file.removeprefix("trainSet/").removeprefix("Stimuli/")
    return Stimulus(name, str(folder / file), image.size, _nfc(category), source, image.digest, image.orientation)


def printable(text: str, where: str) -> None:
    """Raises UserError for a text with control characters, such as NUL, which no name of an image or category has."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise UserError(
            f"{where}: {text!r} holds a character that cannot be printed; the file may be damaged or in another "
            "encoding than UTF-8: correct it"
        )


def is_missing(value: Any) -> bool:
    """Whether a cell says that there is nothing."""
    return str(value).strip().casefold() in MISSING


def subjects(values: Iterable[Any]) -> np.ndarray:
    """int64 (F,): whole numbers from 0 stay as they are, other labels are numbered in their order, none is -1."""
    labels = np.array([_label(value) for value in values], dtype=str)
    distinct, place = np.unique(labels, return_inverse=True)
    unknown = distinct == ""
    if all(label.isdecimal() and len(label) < 10 for label in distinct[~unknown]):
        numbers = [-1 if missing else int(label) for label, missing in zip(distinct, unknown, strict=True)]
    else:
        numbers = np.where(unknown, -1, np.cumsum(~unknown) - 1).tolist()
    return np.array(numbers, dtype=np.int64)[place] if len(labels) else np.zeros(0, dtype=np.int64)


def _label(value: Any) -> str:
    """A subject's label; empty for none. A number is the same person as `3`, `3.0` and 3."""
    text = str(value).strip()
    if is_missing(text) or text in ("-1", "-1.0"):
        return ""
    whole, dot, rest = text.partition(".")
    return _nfc(whole if dot and whole.isdecimal() and not rest.strip("0") else text)


def refuse(items: Sequence[object], folder: Path, what: str, remedy: str) -> None:
    """Raises UserError if there are any."""
    if items:
        raise UserError(f"dataset {folder}: {what}: {len(items)} ({listed(items)}); {remedy}")


def listed(items: Sequence[object], most: int = 3) -> str:
    """The first few, and how many more there are."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + rest


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
