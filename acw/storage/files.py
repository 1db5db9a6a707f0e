"""Files that are either whole or absent, here or in S3: fetched, listed, and written atomically.

Everything takes paths. What is in S3 has a path too, that of its copy on this node: `addresses.local` gives it,
`write_atomic` uploads what is written there, and whoever reads what another process or node may have written fetches
it first. For any other path, `fetch` and its like do nothing but look at the disk.
"""

from __future__ import annotations

import atexit
import csv
import errno
import io
import json
import os
import re
import secrets
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from acw.storage.addresses import in_cache
from acw.storage.errors import UserError

FULL_BYTES = 2**16  # as few as this are left of a full disk


def give_home() -> None:
    """Has an arbitrary user id, which no home directory belongs to, name one that is not there.

    Programs then do without what they would keep there; MLflow could not even be imported.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/nonexistent"


def is_model_uri(location: str | Path) -> bool:
    """Whether MLflow is meant, as by `models:/acw@champion`, not a path, which may hold `:/` somewhere, or S3."""
    return re.match(r"(?!s3:)[A-Za-z][\w+.-]*:/", str(location)) is not None


def fetch(path: Path, *, immutable: bool = False) -> Path:
    """The same path, where now the newest version of what is in S3 is; `exists` then tells whether there is any.

    immutable: an untouched copy is taken as it is. Raises Damaged if the object is, UserError if it cannot be had.
    """
    if in_cache(path):
        from acw.storage import cache

        cache.fetch(path, immutable)
    return path


def version(path: Path) -> str:
    """What is another whenever a file is: its size and time of change, or the object's ETag. Empty without a file."""
    if in_cache(path):
        from acw.storage import cache

        return cache.etag(path) or ""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def present(path: Path) -> bool:
    """Whether a file is there, without fetching it."""
    return version(path) != ""


def listing(folder: Path) -> list[Path]:
    """All files below a folder, in order; of those in S3, which need not be here, without fetching them."""
    if in_cache(folder):
        from acw.storage import cache

        return sorted(path for path, _ in cache.listing(folder))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove(path: Path) -> None:
    """Deletes a file, there or not."""
    if in_cache(path):
        from acw.storage import cache

        cache.remove(path)
    else:
        path.unlink(missing_ok=True)


def ray_storage() -> dict[str, Any]:
    """What ray.train.RunConfig takes so that Ray keeps its own files where they are of use: on the driver's node, until
    its exit.

    Our checkpoints are all that outlasts a driver, so no other node reads these files, and none need be in S3. Ray
    makes the folder, as who may be another user.
    """
    path = Path(tempfile.gettempdir()) / f"acw-ray-{secrets.token_hex(4)}"
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return {"storage_path": str(path)}


def write_atomic(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Writes a file under a temporary name in its own folder, flushes it to disk and renames it into place.

    `content` is the bytes or text, or a function that writes the file at the path that it is given. What belongs to S3
    is uploaded before it is renamed. Raises UserError if the folder cannot be written, the disk is full or S3 does not
    take it; no partial file is left then.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".partial")
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
        if in_cache(path):
            from acw.storage import cache

            cache.put(temporary, path)
        else:
            temporary.replace(path)
    except Exception as error:
        # Of a full disk, safetensors and torch have errors of their own to tell.
        if not (isinstance(error, OSError) or os.strerror(errno.ENOSPC) in str(error) or _full(path.parent)):
            raise
        known = error if isinstance(error, OSError) else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if in_cache(path):
            from acw.storage import cache

            raise UserError(cache.write_failure(path, known)) from error
        remedy = "shorten its name" if known.errno == errno.ENAMETOOLONG else "free the disk or choose another --root"
        raise UserError(f"{path}: cannot be written ({known.strerror or known}); {remedy}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _full(folder: Path) -> bool:
    """Whether a disk has no room; asked before a file that filled it is deleted."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize < FULL_BYTES


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; NaN and infinities are refused, as JSON has none."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Of a CSV file with a header: a dictionary a row, by the columns' names."""
    with fetch(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file's text; None becomes an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def refuse_undecodable(name: str | Path, what: str) -> None:
    """Raises UserError for a name whose bytes are no UTF-8, as of an archive from another system: no result could hold
    it."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        shown_name = str(name).encode(errors="backslashreplace").decode()
        raise UserError(
            f"{what} {shown_name}: its name is not UTF-8; rename it (convmv -f latin1 -t utf8 does so for a whole "
            "folder)"
        ) from None


def plain_name(text: str) -> str:
    """A text as part of a file's name that means the same in a path, an address and a filter, on any disk: letters and
    digits of any script, spaces, points, `_` and `-`; at most 100 bytes, for names have 255 in all."""
    plain = re.sub(r"[^\w .-]", "_", unicodedata.normalize("NFC", text))
    return plain.encode()[:100].decode(errors="ignore").strip()


def resolve_inside(path: Path, folder: Path) -> Path:
    """The path after links. Raises UserError where that is outside of the folder: data from elsewhere is read from its
    own folder only, whatever names and links are in it."""
    found = path.resolve()
    if not found.is_relative_to(folder.resolve()):
        raise UserError(f"{path}: lies outside the folder {folder}, by its name or a link; copy it inside")
    return found
