"""Files that are either whole or absent: atomic writes, checksums, and the error that a user can act on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something that the user can mend. The message is one line that names the thing and the remedy; exit status 2."""


def write_atomic(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Writes a file under a temporary name in its own folder, flushes it to disk and renames it into place.

    `content` is the bytes or text, or a function that writes the file at the path that it is given.
    Raises UserError if the folder cannot be written or the disk is full; no partial file is left then.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        os.close(handle)
        temporary = Path(name)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes the file private; results are meant to be shared like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free the disk or choose another --root") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; NaN and infinities are refused, as JSON has none."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file's text; None becomes an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def resolve_inside(path: Path, folder: Path) -> Path:
    """The path after links. Raises UserError where that is outside of the folder: data from elsewhere is read from its
    own folder only, whatever names and links are in it."""
    found = path.resolve()
    if not found.is_relative_to(folder.resolve()):
        raise UserError(f"{path}: lies outside the folder {folder}, by its name or a link; copy it inside")
    return found


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """The first 16 hexadecimal digits of SHA-256 over a value's canonical JSON: equal values, equal names."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
