"""Files from http:// and https:// addresses, of bounded size and time; large ones go on where they were interrupted."""

from __future__ import annotations

import contextlib
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from acw.storage.errors import UserError

SILENT_SECONDS = 20.0  # that a server may say nothing
SECONDS = 120.0  # that a download may take in all
CHUNK = 2**16
RESERVED = ":/?#[]@!$&'()*+,;=%"  # what stays as it is in an address
REMEDY = "correct the address, or try later"
# Of a large file, how often in a row a connection may end; and for how long it is waited then.
INTERRUPTIONS, PAUSE_SECONDS = 5, 2.0
PARTIAL, ETAG = ".partial", ".etag"  # behind the name of a file that is not whole yet, and of what tells its versions

UNSATISFIABLE = 416  # status: the file ends before the part that was asked for


class Interrupted(UserError):
    """A download whose connection ended before the file did."""


def shown(address: str) -> str:
    """An address without what may be a secret: the name and password before its host, and what is behind `?`."""
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def download(address: str, path: Path, most_bytes: int) -> str:
    """Writes what is at an address to a file; the content type that the server states, such as `image/jpeg`.

    Raises UserError if it cannot be had, is larger than most_bytes, or takes longer than SECONDS.
    """
    end = time.monotonic() + SECONDS

    def in_time(*_: int) -> None:
        if time.monotonic() > end:
            raise UserError(f"{shown(address)}: takes longer than {SECONDS:.0f} s; download it first")

    with _answer(address, {}, REMEDY) as answer, path.open("wb") as file:
        _receive(answer, file, address, most_bytes, 0, in_time)
        return answer.headers.get_content_type()


def download_large(
    address: str, path: Path, most_bytes: int, told: Callable[[int, int], None], remedy: str = REMEDY
) -> None:
    """Writes what is at an address to `path`, which then is whole.

    Until then it is beside it, and is gone on with, after an interruption by whatever, if the server still has the same
    version; a few times at once, then by the next call. told: is called with the bytes that are here and those that
    there are (0: not known). Raises UserError, which ends in the remedy, where it cannot be had, or is larger than
    most_bytes.
    """
    partial, etag = (path.with_name(path.name + ending) for ending in (PARTIAL, ETAG))
    left = INTERRUPTIONS
    while True:
        before = _size(partial)
        try:
            _go_on(address, partial, etag, most_bytes, told, remedy)
        except Interrupted as error:
            left = INTERRUPTIONS if _size(partial) > before else left - 1
            if not left:
                raise UserError(f"{error}; the same command goes on from there; or {remedy}") from error
            time.sleep(PAUSE_SECONDS)
        else:
            partial.replace(path)
            etag.unlink(missing_ok=True)
            return


def _go_on(
    address: str, partial: Path, etag: Path, most_bytes: int, told: Callable[[int, int], None], remedy: str
) -> None:
    have = _size(partial)
    version = etag.read_text(encoding="utf-8") if have and etag.exists() else ""
    # Without a version, the parts of two could be put together.
    part = {"Range": f"bytes={have}-", "If-Range": version} if version else {}
    with _answer(address, part, remedy) as answer:
        if answer.status == UNSATISFIABLE:
            if (answer.headers.get("Content-Range") or "").endswith(f"/{have}"):
                return  # it was whole
            partial.unlink()
            raise Interrupted(f"{shown(address)}: is shorter than what is here of it")
        start = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range") or "")
        goes_on = answer.status == http.client.PARTIAL_CONTENT and start is not None and int(start[1]) == have
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{shown(address)}: is a page, not the file, as where a proxy asks to log in; {remedy}")
        if not goes_on:
            stated = answer.headers.get("ETag") or ""
            etag.write_text("" if stated.startswith("W/") else stated, encoding="utf-8")
        with partial.open("ab") as file:
            if not goes_on:
                file.truncate(0)
            _receive(answer, file, address, most_bytes, have if goes_on else 0, told)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def _answer(address: str, headers: dict[str, str], remedy: str) -> Iterator[Any]:
    """The server's answer to a request of an address; what goes wrong with it, until it is left, as a UserError."""
    request = urllib.request.Request(
        urllib.parse.quote(address, safe=RESERVED), headers={"User-Agent": "acw"} | headers
    )
    try:
        with _opened(request) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{shown(address)}: the server answers {error.code} {error.reason}; correct the address"
        ) from None
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "reason", error)
        raise UserError(f"{shown(address)}: cannot be downloaded ({reason}); {remedy}") from error


def _opened(request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=SILENT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == UNSATISFIABLE:
            return error  # which is an answer, too
        raise


def _receive(
    answer: Any, file: IO[bytes], address: str, most_bytes: int, size: int, told: Callable[[int, int], None]
) -> None:
    """Writes an answer to a file that has `size` bytes; told: see `download_large`. Raises UserError if the file is too
    large, Interrupted if it does not come whole."""
    length = int(answer.headers.get("Content-Length") or 0)
    stated = size + length if length else 0
    try:
        while chunk := b"" if stated > most_bytes else answer.read1(CHUNK):
            size += file.write(chunk)
            if size > most_bytes:
                break
            told(size, stated)
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise Interrupted(f"{shown(address)}: the connection ended after {size} bytes ({error}); try again") from error
    if max(size, stated) > most_bytes:
        limit = most_bytes / 2**20
        raise UserError(f"{shown(address)}: has more than {limit:.0f} MiB; download and scale it down first")
    if size < stated:
        raise Interrupted(f"{shown(address)}: the connection ended after {size} of {stated} bytes; try again")
