"""What the service takes: so many bytes, pixels, seconds and requests. Whatever is more, or no image, is refused with a
status and one sentence.

400: an empty, damaged or unusable image; 408: too slow to arrive or to be answered; 413: too many bytes, pixels or
scans; 415: not of a format that is read; 503, with Retry-After: as many requests wait as may.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
from fastapi import HTTPException, Request

from acw.data.images import TooLarge, decode, size_of
from acw.storage.errors import UserError

MOST_BYTES = 2**25
MOST_PIXELS = 2**25
SECONDS_TO_SEND = 30.0
SECONDS_TO_ANSWER = 120.0
# A replica's: requests that it has, and pixels of those that are decoded, whose turn others await. What one pixel takes
# until it is answered is some 30 bytes.
MOST_REQUESTS = 64
MOST_PIXELS_AT_ONCE = 2**26
# Of what is refused, so much is read and thrown away: a client that still sends would not read why.
DRAINED_BYTES = 2**28
# A progressive JPEG of a megabyte may have thousands of scans, each of which takes as long as the picture is large.
MOST_SCANS = 100
_SCAN = b"\xff\xda"

# The first bytes of a file -> its ending. A name or a header is the sender's to choose, these decide what it is.
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF87a", ".gif"),
    (b"GIF89a", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)
FORMATS = ("JPEG", "PNG", "WebP", "GIF", "TIFF", "BMP")


class Queue:
    """Requests that are being answered, and the pixels that they have in memory."""

    def __init__(self) -> None:
        self.requests, self._pixels = 0, 0
        self._freed = asyncio.Condition()

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Refuses at once where too many wait."""
        if self.requests >= MOST_REQUESTS:
            line = f"{MOST_REQUESTS} requests are waiting, as many as may; try again in a moment"
            raise HTTPException(503, line, {"Retry-After": "2"})
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextlib.asynccontextmanager
    async def room(self, pixels: int) -> AsyncIterator[None]:
        """Waits until an image of so many pixels may be decoded."""
        async with self._freed:
            await self._freed.wait_for(lambda: self._pixels + pixels <= MOST_PIXELS_AT_ONCE)
            self._pixels += pixels
        try:
            yield
        finally:
            self._pixels -= pixels
            async with self._freed:
                self._freed.notify_all()


async def body(request: Request) -> bytes:
    """What a request sends, if that is not too much and does not take too long."""
    chunks: list[bytes] = []
    sent = 0
    try:
        async with asyncio.timeout(SECONDS_TO_SEND):
            async for chunk in request.stream():
                sent += len(chunk)
                if sent > MOST_BYTES:
                    chunks.clear()
                    if sent > DRAINED_BYTES:
                        break
                else:
                    chunks.append(chunk)
    except TimeoutError:
        raise HTTPException(
            408, f"the image did not arrive within {SECONDS_TO_SEND:.0f} seconds; send it anew"
        ) from None
    if sent > MOST_BYTES:
        raise HTTPException(413, f"the request has more than {MOST_BYTES // 2**20} MiB; compress or scale the image")
    return b"".join(chunks)


def checked(content: bytes) -> tuple[Path, int]:
    """A name that says the format of an image, and how many pixels it has; refuses what is none or too large."""
    name = Path(f"image{_suffix(content)}")
    if name.suffix == ".jpg" and (scans := content.count(_SCAN)) > MOST_SCANS:
        raise HTTPException(413, f"the JPEG has {scans} scans, more than the {MOST_SCANS} it may; save it anew")
    try:
        height, width = size_of(content, name)
    except TooLarge:
        raise HTTPException(413, _too_large("more")) from None
    except UserError as error:
        raise HTTPException(400, _sentence(error, name)) from None
    if height * width > MOST_PIXELS:
        raise HTTPException(413, _too_large(f"{width} x {height}"))
    return name, height * width


def decoded(content: bytes, name: Path) -> np.ndarray:
    """uint8 (H, W, 3) RGB, upright; refuses a damaged image, and one whose values say nothing."""
    try:
        return decode(content, name, upright=True)
    except UserError as error:
        raise HTTPException(400, _sentence(error, name)) from None


def _suffix(content: bytes) -> str:
    if not content:
        raise HTTPException(400, "the request has no image; send the bytes of one, or a form with a file")
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    for signature, suffix in _SIGNATURES:
        if content.startswith(signature):
            return suffix
    raise HTTPException(415, f"this is none of the image formats that are read: {', '.join(FORMATS)}; convert it")


def _too_large(found: str) -> str:
    return f"the image has {found} pixels, and may have {MOST_PIXELS // 10**6} million; scale it down"


def _sentence(error: UserError, name: Path) -> str:
    return " ".join(str(error).removeprefix(f"{name}: ").split())
