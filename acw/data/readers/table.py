"""A folder of images, and a table of fixations with the columns image, x, y and perhaps subject and category."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from acw.data.images import names_stimulus
from acw.data.recording import NO_CATEGORY, Folder, Reader, Recording, is_missing, refuse, stimulus, subjects
from acw.storage.addresses import local
from acw.storage.errors import UserError
from acw.storage.files import fetch

NEEDED = ("image", "x", "y")
KNOWN = (*NEEDED, "subject", "category")
# What stands between columns: as the header has it.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)


def _fits(has: Callable[[str], bool], fixations: bool) -> bool:
    return fixations


def _reads(name: str) -> bool:
    return names_stimulus(PurePosixPath(name))


def _read(folder: Path, fixations: str | None) -> Recording:
    """Every image of the folder has fixations, and every row an image; without categories all have the same."""
    if fixations is None:
        raise UserError(f"dataset {folder}: the reader csv needs a CSV file of fixations (columns image, x, y)")
    table = fetch(local(fixations).expanduser())
    inside = Folder(folder)
    categories: dict[str, str] = {}
    images: list[str] = []
    places: list[tuple[float, float]] = []
    written: list[tuple[str, str]] = []
    labels: list[str] = []
    for line, row in _rows(table):
        where = f"{table}, line {line}"
        file = inside.file(row["image"], where)
        category = row.get("category", NO_CATEGORY)
        if is_missing(category) or categories.setdefault(file, category) != category:
            other = f" and {categories[file]!r}" if file in categories else ""
            raise UserError(f"{where}: {file} has the category {category!r}{other}; give it exactly one")
        images.append(file)
        places.append((_coordinate(row["x"], "x", where), _coordinate(row["y"], "y", where)))
        written.append((row["x"], row["y"]))
        labels.append(row.get("subject", ""))
    for axis, values in enumerate(zip(*written, strict=True)):
        _refuse_thousands(values, "xy"[axis], table)
    unnamed = [file for file in inside.stimuli if file not in categories]
    refuse(unnamed, folder, f"images without a fixation in {table.name}", "add fixations or remove the images")
    stimuli = [stimulus(folder, file, category) for file, category in categories.items()]
    index = {file: number for number, file in enumerate(categories)}
    x, y = np.array(places, dtype=np.float64).reshape(-1, 2).T
    return Recording(stimuli, np.array([index[file] for file in images], dtype=np.int64), x, y, subjects(labels))


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and the known columns of each row; rows without anything in them are left out.

    Raises UserError for a table that is not what a program that writes tables writes: what it would silently mean
    something else by, such as a decimal comma, a second column of a name or a quote that swallows lines.
    """
    text = _text(table)
    delimiter, skipped = _delimiter(text, table)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for _ in range(skipped):
            next(reader)
        columns = _columns(next(reader, []), table)
        start = reader.line_num + 1
        for row in reader:
            line, start = start, reader.line_num + 1
            where = f"{table}, line {line}"
            if reader.line_num > line:
                raise UserError(f'{where}: a quote (") goes on until line {reader.line_num}; close or remove it')
            if any(cell.strip() for cell in row):
                _check_length(row, columns, delimiter, where)
                yield line, {name: cell.strip() for name, cell in zip(columns, row, strict=False) if name in KNOWN}
    except csv.Error as error:
        line = reader.line_num
        raise UserError(
            f'fixations {table}: cannot be read as a CSV file ({error}, near line {line}; is a quote (") not closed '
            "or not doubled?); correct it"
        ) from error


def _text(table: Path) -> str:
    try:
        content = table.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        reason = f"cannot be read as a CSV file ({error.strerror}); correct the path"
        raise UserError(f"fixations {table}: {reason}") from None
    except UnicodeDecodeError as error:
        reason = f"cannot be read as a CSV file in UTF-8 ({error}); save it as that"
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            reason = "is in UTF-16, and cannot be read as a CSV file in UTF-8; save it as that"
        elif content.startswith(b"PK"):
            reason = "is a spreadsheet or a zip archive, and cannot be read as a CSV file; save it as CSV in UTF-8"
        elif content.startswith(b"\x1f\x8b"):
            reason = "is a gzip archive, and cannot be read as a CSV file; unpack it"
        raise UserError(f"fixations {table}: {reason}") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"fixations {table}, line {line}: holds a NUL byte, as damaged files and UTF-16 do; save it as UTF-8"
        )
    return text


def _delimiter(text: str, table: Path) -> tuple[str, int]:
    """What stands between the columns, and how many lines come before the header: one, in which Excel says the former.
    Without that line it is whatever gives the header the most columns that are needed."""
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    if declared := re.fullmatch(r'"?sep=(.)"?', first):
        return declared[1], 1

    def needed(delimiter: str) -> int:
        return sum(name.strip(' "') in NEEDED for name in first.split(delimiter))

    best = max(DELIMITERS, key=needed)
    if not needed(best) and len({name.strip('"') for name in first.split()} & set(NEEDED)) > 1:
        raise UserError(f"{table}: its columns are separated by blanks; save it with commas, semicolons or tabs")
    return best, 0


def _columns(header: list[str], table: Path) -> list[str]:
    columns = [name.strip() for name in header]
    for name in KNOWN:
        if columns.count(name) > 1:
            raise UserError(
                f"{table}: has the column {name!r} {columns.count(name)} times (two eyes?); keep or make one of them"
            )
        if name in NEEDED and name not in columns:
            raise UserError(f"{table}: has no column {name!r} (it has {', '.join(columns)}); add it")
    return columns


def _check_length(row: list[str], columns: list[str], delimiter: str, where: str) -> None:
    if len(row) < len(columns):
        reason = "is it cut short?"
    elif not any(cell.strip() for cell in row[len(columns) :]):
        return
    elif len(row) == len(columns) + 1 and columns[0] in KNOWN and row[0].strip().isdecimal():
        reason = "is the first of them a row's name, as R writes it? write the table without (row.names=FALSE)"
    elif delimiter == ",":
        reason = "are there decimal commas? write decimal points, and quote names that hold commas"
    else:
        reason = f"quote names that hold {DELIMITERS[delimiter]}"
    raise UserError(f"{where}: has {len(row)} fields where the header has {len(columns)}; {reason}")


def _refuse_thousands(values: Sequence[str], axis: str, table: Path) -> None:
    """Raises UserError for a column in which some numbers have three digits after a point and all others none at all:
    German programs write 1290 so, as 1.290, and 512 as 512."""
    pointed = [value for value in values if "." in value]
    if 0 < len(pointed) < len(values) and all(re.fullmatch(r"[+-]?\d{1,3}(\.\d{3})+", value) for value in pointed):
        raise UserError(
            f"{table}: {axis} is {pointed[0]!r} in one line and has no point in others; if the point stands between "
            "thousands, write numbers without, else write all with decimals"
        )


def _coordinate(text: str, axis: str, where: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        if is_missing(text):
            reason = "missing; remove the line"
        elif "," in text and _NUMBER.fullmatch(text.replace(",", "")):
            reason = "with a decimal comma, or one between thousands; write points, and nothing between thousands"
        else:
            reason = "not a number; correct or remove the line"
        raise UserError(f"{where}: {axis} is {text!r}, {reason}")
    return value


READER = Reader("csv", _fits, _reads, _read, takes_fixations=True)
