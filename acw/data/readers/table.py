"""A folder of images, and a table of fixations with the columns image, x, y and perhaps subject and category."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator
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
        labels.append(row.get("subject", ""))
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
    try:
        delimiter = _delimiter(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = _columns(next(reader, []), table, delimiter)
        start = 2
        for row in reader:
            line, start = start, reader.line_num + 1
            where = f"{table}, line {line}"
            if reader.line_num > line:
                raise UserError(f'{where}: a quote (") goes on until line {reader.line_num}; close or remove it')
            if any(cell.strip() for cell in row):
                _check_length(row, len(columns), delimiter, where)
                yield line, {name: cell.strip() for name, cell in zip(columns, row, strict=False) if name in KNOWN}
    except csv.Error as error:
        line = reader.line_num
        raise UserError(
            f'fixations {table}: cannot be read as a CSV file ({error}, near line {line}; is a quote (") not closed '
            "or not doubled?); correct it"
        ) from error


def _text(table: Path) -> str:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"fixations {table}: cannot be read as a CSV file in UTF-8 ({error}); correct it") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"fixations {table}, line {line}: holds a NUL byte, as damaged files and UTF-16 do; save it as UTF-8"
        )
    return text


def _delimiter(text: str) -> str:
    """What stands between the header's columns: whatever gives the most columns that are needed."""
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    return max(DELIMITERS, key=lambda delimiter: sum(name.strip(' "') in NEEDED for name in header.split(delimiter)))


def _columns(header: list[str], table: Path, delimiter: str) -> list[str]:
    columns = [name.strip() for name in header]
    for name in KNOWN:
        if columns.count(name) > 1:
            raise UserError(
                f"{table}: has the column {name!r} {columns.count(name)} times (two eyes?); keep or make one of them"
            )
        if name in NEEDED and name not in columns:
            raise UserError(f"{table}: has no column {name!r} (it has {', '.join(columns)}); add it")
    return columns


def _check_length(row: list[str], columns: int, delimiter: str, where: str) -> None:
    if len(row) < columns:
        reason = "is it cut short?"
    elif not any(cell.strip() for cell in row[columns:]):
        return
    elif delimiter == ",":
        reason = "are there decimal commas? write decimal points, and quote names that hold commas"
    else:
        reason = f"quote names that hold {DELIMITERS[delimiter]}"
    raise UserError(f"{where}: has {len(row)} fields where the header has {columns}; {reason}")


def _coordinate(text: str, axis: str, where: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        if is_missing(text):
            reason = "missing; remove the line"
        elif "," in text and _NUMBER.fullmatch(text.replace(",", ".", 1)):
            reason = "with a decimal comma; write decimal points"
        else:
            reason = "not a number; correct or remove the line"
        raise UserError(f"{where}: {axis} is {text!r}, {reason}")
    return value


READER = Reader("csv", _fits, _reads, _read, takes_fixations=True)
