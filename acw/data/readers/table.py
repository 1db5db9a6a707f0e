"""A folder of images, and a table of fixations: this package's, with the columns image, x, y and perhaps subject and
category, or one of another program, whose columns and lines `Columns` describes."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from acw.data.columns import FIELDS, NEEDED, OWN, Columns, Place
from acw.data.images import names_stimulus
from acw.data.recording import NO_CATEGORY, Folder, Reader, Recording, is_missing, listed, stimulus, subjects
from acw.storage.addresses import local
from acw.storage.errors import UserError
from acw.storage.files import fetch

# What stands between columns: as the header has it.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+", re.ASCII)


@dataclass(frozen=True)
class Header:
    """A table's columns in order; delimiter: what stands between them; place: those of x and y that are read.

    names: field -> its column, of those that are there.
    """

    columns: list[str]
    delimiter: str
    place: Place
    names: dict[str, str]

    def cell(self, row: dict[str, str], name: str, missing: str = "") -> str:
        """What a row has of a field, or `missing` where there is no such column."""
        return row[self.names[name]] if name in self.names else missing


@dataclass
class Gathered:
    """Fixations of one table after the other, in lists of equal length; left out: how many lines, and images by name.

    categories: image -> category, in the order in which images come.
    """

    images: list[str] = field(default_factory=list)
    places: list[tuple[float, float]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    categories: dict[str, str] = field(default_factory=dict)
    without_place: int = 0
    elsewhere: dict[str, int] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """What was left out, in words."""
        if self.without_place:
            yield f"left out {self.without_place} lines without x and y"
        if self.elsewhere:
            images = [f"{name} {count}" for name, count in self.elsewhere.items()]
            yield f"left out {sum(self.elsewhere.values())} fixations on what is not in the folder ({listed(images)})"


def _fits(has: Callable[[str], bool], fixations: bool) -> bool:
    return fixations


def _reads(name: str) -> bool:
    return names_stimulus(PurePosixPath(name))


def _read(folder: Path, fixations: str | None) -> Recording:
    """Every image of the folder has fixations, and every row an image; without categories all have the same."""
    if fixations is None:
        raise UserError(f"dataset {folder}: the reader csv needs a CSV file of fixations (columns image, x, y)")
    return read(folder, fixations, OWN)


def read(folder: Path, fixations: str, columns: Columns) -> Recording:
    """A folder of images with a table of fixations, or a folder of such tables."""
    location = local(fixations).expanduser()
    inside, gathered = Folder(folder), Gathered()
    if columns.own or not location.is_dir():
        location = fetch(location)
        tables = {location: location.name}
        columns = dataclasses.replace(columns, subject_in="")  # a single table may be of many people
    else:
        tables = {path: path.relative_to(location).as_posix() for path in _tables(location, columns)}
    headers = [_gather(path, name, columns, inside, gathered) for path, name in tables.items()]
    if len({header.place.convention for header in headers}) > 1:
        raise UserError(f"fixations {location}: tables give x and y in different units; read them one by one")
    if gathered.elsewhere and not gathered.images:
        names = listed(list(gathered.elsewhere))
        raise UserError(f"fixations {location}: none of their images is in {folder} ({names}); give their folder")
    stimuli = [stimulus(folder, file, category) for file, category in gathered.categories.items()]
    index = {file: number for number, file in enumerate(gathered.categories)}
    x, y = np.array(gathered.places, dtype=np.float64).reshape(-1, 2).T
    notes = list(gathered.notes())
    if headers[0].place.on_screen:
        notes.append("x and y are a screen's: say --screen WxH, unless images filled it")
    return Recording(
        stimuli,
        np.array([index[file] for file in gathered.images], dtype=np.int64),
        x,
        y,
        subjects(gathered.labels),
        convention=headers[0].place.convention,
        unseen=tuple(file for file in inside.stimuli if file not in index),
        table=location.name,
        notes=tuple(notes),
    )


def _tables(location: Path, columns: Columns) -> list[Path]:
    """The tables in a folder, in order of their paths."""
    for pattern in columns.files:
        if found := sorted(path for path in location.rglob(pattern) if path.is_file()):
            return found
    raise UserError(
        f"fixations {location}: the folder has no file {' or '.join(columns.files)}; give a file or another"
    )


def _gather(table: Path, name: str, columns: Columns, inside: Folder, gathered: Gathered) -> Header:
    """Adds a table's fixations; name: its path in the folder of tables."""
    header, rows = _rows(table, columns)
    otherwise = {"image": _named(name, columns.image_in), "subject": _named(name, columns.subject_in)}
    comma = not columns.own and header.delimiter != ","
    written: list[tuple[str, str]] = []
    for line, row in rows if columns.own else _fixations(header, rows, columns, otherwise["image"]):
        where = f"{table}, line {line}"
        image, place = header.cell(row, "image", otherwise["image"]), (header.cell(row, "x"), header.cell(row, "y"))
        if not columns.own and any(map(is_missing, place)):
            gathered.without_place += 1
            continue
        file = _file(inside, image, where, columns)
        if file is None:
            gathered.elsewhere[image] = gathered.elsewhere.get(image, 0) + 1
            continue
        _categorise(file, header.cell(row, "category", NO_CATEGORY), gathered.categories, where)
        gathered.images.append(file)
        gathered.places.append((_coordinate(place[0], "x", where, comma), _coordinate(place[1], "y", where, comma)))
        gathered.labels.append(header.cell(row, "subject", otherwise["subject"]))
        written.append(place)
    for axis, values in enumerate(zip(*written, strict=True)):
        _refuse_thousands(values, "xy"[axis], table)
    return header


def _named(name: str, pattern: str) -> str:
    """What a table's path says by a pattern's group; empty for what it does not."""
    match = re.fullmatch(pattern, name) if pattern else None
    return match[1] if match else ""


def _fixations(
    header: Header, rows: Iterator[tuple[int, dict[str, str]]], columns: Columns, image: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a program's table that are fixations, one line for each; image: the table's, if it is of one."""
    chosen: dict[tuple[str, ...], tuple[int, dict[str, str]]] = {}
    for line, row in rows:
        name = header.cell(row, "image", image)
        counts = all(row[column].casefold() == value for column, value in columns.keep.items() if column in row)
        if is_missing(name) or not counts:
            continue
        parts = [row[column] for column in columns.fixation if column in row]
        key = (name, header.cell(row, "subject"), *parts) if parts else (str(line),)
        if columns.last or key not in chosen:
            chosen[key] = line, row
    yield from chosen.values()


def _file(inside: Folder, image: str, where: str, columns: Columns) -> str | None:
    """The image's relative path; None for what a program showed besides, which is not in the folder."""
    if columns.own:
        return inside.file(image, where)
    found = inside.like(image)
    if len(found) > 1:
        raise UserError(f"{where}: {image} may be any of {listed(found)}; give their names other last parts")
    return found[0] if found else None


def _categorise(file: str, category: str, categories: dict[str, str], where: str) -> None:
    if is_missing(category) or categories.setdefault(file, category) != category:
        other = f" and {categories[file]!r}" if file in categories else ""
        raise UserError(f"{where}: {file} has the category {category!r}{other}; give it exactly one")


def _rows(table: Path, columns: Columns) -> tuple[Header, Iterator[tuple[int, dict[str, str]]]]:
    """The header, and line number and cells by column of each row that has anything in it.

    Raises UserError for a table that is not what a program that writes tables writes: what it would silently mean
    something else by, such as a decimal comma, a second column of a name or a quote that swallows lines.
    """
    text = _text(table, columns)
    delimiter, skipped = _delimiter(text, table, columns)
    # Programs that separate by tabs write a quote where a name or a message has one.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" and not columns.own else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, quoting=quoting)
    with _csv_errors(reader, table):
        for _ in range(skipped):
            next(reader)
        first = next(reader, [])
    header = _header(first, delimiter, table, columns)
    return header, _cells(reader, header, table, columns)


def _cells(reader: Any, header: Header, table: Path, columns: Columns) -> Iterator[tuple[int, dict[str, str]]]:
    wanted = {*header.names.values(), *columns.keep, *columns.fixation}
    start = reader.line_num + 1
    with _csv_errors(reader, table):
        for row in reader:
            line, start = start, reader.line_num + 1
            where = f"{table}, line {line}"
            if reader.line_num > line:
                raise UserError(f'{where}: a quote (") goes on until line {reader.line_num}; close or remove it')
            if any(cell.strip() for cell in row):
                _check_length(row, header, where)
                pairs = zip(header.columns, row, strict=False)
                yield line, {name: cell.strip() for name, cell in pairs if name in wanted}


@contextmanager
def _csv_errors(reader: Any, table: Path) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise UserError(
            f'fixations {table}: cannot be read as a CSV file ({error}, near line {reader.line_num}; is a quote (") '
            "not closed or not doubled?); correct it"
        ) from error


def _text(table: Path, columns: Columns) -> str:
    try:
        content = table.read_bytes()
        wide = not columns.own and content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if wide else "utf-8-sig")
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


def _delimiter(text: str, table: Path, columns: Columns) -> tuple[str, int]:
    """What stands between the columns, and how many lines come before the header: one, in which Excel says the former.
    Without that line it is whatever gives the header the most columns that are needed."""
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    if declared := re.fullmatch(r'"?sep=(.)"?', first):
        return declared[1], 1
    wanted = columns.looked_for

    def needed(delimiter: str) -> int:
        return sum(name.strip(' "') in wanted for name in first.split(delimiter))

    best = max(DELIMITERS, key=needed)
    if not needed(best) and len({name.strip('"') for name in first.split()} & wanted) > 1:
        raise UserError(f"{table}: its columns are separated by blanks; save it with commas, semicolons or tabs")
    return best, 0


def _header(first: list[str], delimiter: str, table: Path, columns: Columns) -> Header:
    """Raises UserError for a table without a column that is needed, or with two of a name that is read."""
    there = [name.strip().strip('"') if not columns.own else name.strip() for name in first]
    place = next((place for place in columns.places if place.x in there and place.y in there), columns.places[0])
    candidates = {
        "image": columns.image, "x": (place.x,), "y": (place.y,), "subject": columns.subject,
        "category": columns.category,
    }  # fmt: skip
    names = {}
    for field_name, those in candidates.items():
        found = next((name for name in those if name in there), None)
        if found is not None and there.count(found) > 1:
            raise UserError(
                f"{table}: has the column {found!r} {there.count(found)} times (two eyes?); keep or make one of them"
            )
        if found is not None:
            names[field_name] = found
        elif field_name in NEEDED and those:
            other = "" if columns.own else f"; or say which has the {field_name}: --columns ...,{field_name}=NAME"
            raise UserError(f"{table}: has no column {those[0]!r} (it has {', '.join(there)}); add it{other}")
    for name in columns.certain:
        if name not in there:
            raise UserError(f"{table}: has no column {name!r} (it has {', '.join(there)}), {columns.certain[name]}")
    return Header(there, delimiter, place, names)


def _check_length(row: list[str], header: Header, where: str) -> None:
    columns, delimiter = header.columns, header.delimiter
    if len(row) < len(columns):
        reason = "is it cut short?"
    elif not any(cell.strip() for cell in row[len(columns) :]):
        return
    elif len(row) == len(columns) + 1 and columns[0] in FIELDS and row[0].strip().isdecimal():
        reason = "is the first of them a row's name, as R writes it? write the table without (row.names=FALSE)"
    elif delimiter == ",":
        reason = "are there decimal commas? write decimal points, and quote names that hold commas"
    else:
        reason = f"quote names that hold {DELIMITERS[delimiter]}"
    raise UserError(f"{where}: has {len(row)} fields where the header has {len(columns)}; {reason}")


def _refuse_thousands(values: Sequence[str], axis: str, table: Path) -> None:
    """Raises UserError for a column in which some numbers have three digits after a point and all others none at all:
    German programs write 1290 so, as 1.290, and 512 as 512."""
    values = [value.replace(",", ".") for value in values]
    pointed = [value for value in values if "." in value]
    if 0 < len(pointed) < len(values) and all(re.fullmatch(r"[+-]?\d{1,3}(\.\d{3})+", value) for value in pointed):
        raise UserError(
            f"{table}: {axis} is {pointed[0]!r} in one line and has no point in others; if the point stands between "
            "thousands, write numbers without, else write all with decimals"
        )


def _coordinate(text: str, axis: str, where: str, comma: bool) -> float:
    """comma: whether a decimal comma may be meant, as nothing else is separated by commas."""
    if comma and _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
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
