"""Files from http:// and https:// addresses, of bounded size and time."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from acw.storage.errors import UserError

SILENT_SECONDS = 20.0  # that a server may say nothing
SECONDS = 120.0  # that a download may take in all
CHUNK = 2**16
RESERVED = ":/?#[]@!$&'()*+,;=%"  # what stays as it is in an address


def shown(address: str) -> str:
    """An address without what may be a secret: the name and password before its host, and what is behind `?`."""
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def download(address: str, path: Path, most_bytes: int) -> str:
    """Writes what is at an address to a file; the content type that the server states, such as `image/jpeg`.

    Raises UserError if it cannot be had, is larger than most_bytes, or takes longer than SECONDS.
    """
    request = urllib.request.Request(urllib.parse.quote(address, safe=RESERVED), headers={"User-Agent": "acw"})
    try:
        with urllib.request.urlopen(request, timeout=SILENT_SECONDS) as answer, path.open("wb") as file:
            stated = int(answer.headers.get("Content-Length") or 0)
            end, size = time.monotonic() + SECONDS, 0
            while chunk := b"" if stated > most_bytes else answer.read1(CHUNK):
                size += file.write(chunk)
                if size > most_bytes:
                    break
                if time.monotonic() > end:
                    raise UserError(f"{shown(address)}: takes longer than {SECONDS:.0f} s; download it first")
            if max(size, stated) > most_bytes:
                limit = most_bytes / 2**20
                raise UserError(f"{shown(address)}: has more than {limit:.0f} MiB; download and scale it down first")
            if size < stated:
                raise UserError(f"{shown(address)}: the connection ended after {size} of {stated} bytes; try again")
            return answer.headers.get_content_type()
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{shown(address)}: the server answers {error.code} {error.reason}; correct the address"
        ) from None
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{shown(address)}: cannot be downloaded ({reason}); correct the address, or try later"
        ) from error
