"""Uploads that are no image that can be predicted, or strange ones that can, of many kinds, made at random."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")


def encoded(pixels: np.ndarray, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def malformed(kind: str, numbers: random.Random) -> tuple[bytes, tuple[int, ...]]:
    """An upload, and the statuses that may answer it; 200 where it is strange but an image."""
    make, statuses = _MAKERS[kind]
    return make(numbers), statuses


def _pixels(numbers: random.Random, channels: int = 3, high: int = 256) -> np.ndarray:
    seeded = np.random.default_rng(numbers.randrange(2**32))
    height, width = numbers.randint(20, 90), numbers.randint(20, 90)
    return seeded.integers(0, high, (height, width, channels), dtype=np.uint8 if high <= 256 else np.uint16)


def _whole(numbers: random.Random) -> bytes:
    return encoded(_pixels(numbers), numbers.choice(FORMATS))


def _truncated(numbers: random.Random) -> bytes:
    """Of a format that does not allow it; at least its first bytes are there."""
    content = encoded(_pixels(numbers), numbers.choice(("JPEG", "PNG", "WEBP", "TIFF", "BMP")))
    return content[: numbers.randint(16, int(0.7 * len(content)))]


def _overwritten(numbers: random.Random) -> bytes:
    content = bytearray(_whole(numbers))
    for _ in range(numbers.randint(1, 40)):
        content[numbers.randrange(len(content))] = numbers.randrange(256)
    return bytes(content)


def _wrong_type(numbers: random.Random) -> bytes:
    return numbers.choice(
        (
            b"%PDF-1.7\n" + numbers.randbytes(500),
            b"<!doctype html><html><body>Log in</body></html>",
            b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
            b"PK\x03\x04" + numbers.randbytes(500),
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + numbers.randbytes(50),
            b"\x00\x00\x00\x18ftypheic" + numbers.randbytes(400),
            b"8BPS\x00\x01" + numbers.randbytes(300),
            b"\x1f\x8b" + numbers.randbytes(300),
            b'{"image": "none"}',
            b"x,y\n1,2\n",
        )
    )


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, content: bytes, *more: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def _bomb(numbers: random.Random) -> bytes:
    """Few bytes, many pixels."""
    side = numbers.choice((6000, 12_000, 30_000))
    return _png(side, side, zlib.compress(bytes(numbers.randint(10**6, 10**7)), 1))


def _huge_header(numbers: random.Random) -> bytes:
    """Sizes that nothing could have, in the header of each format."""
    side = numbers.choice((2**16 - 1, 2**30, 2**31 - 1))
    small = min(side, 2**16 - 1)
    frame = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", small, small) + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    return numbers.choice(
        (
            _png(side, side, zlib.compress(b"")),
            b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
            b"GIF89a" + struct.pack("<HHBBB", small, small, 0, 0, 0) + b";",
            b"\xff\xd8" + frame + b"\xff\xd9",
        )
    )


def _text_bomb(numbers: random.Random) -> bytes:
    """A PNG whose text or colour profile unpacks to hundreds of megabytes."""
    packed = zlib.compress(bytes(numbers.randint(10**7, 10**8)), 9)
    name = numbers.choice((b"zTXt", b"iCCP"))
    return _png(30, 30, zlib.compress(bytes(30 * 91)), _chunk(name, b"note\0\0" + packed))


def _animated(numbers: random.Random) -> bytes:
    frames = [Image.fromarray(_pixels(numbers)).resize((40, 30)) for _ in range(numbers.randint(2, 5))]
    buffer = io.BytesIO()
    frames[0].save(buffer, numbers.choice(("GIF", "WEBP", "PNG", "TIFF")), save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _cmyk(numbers: random.Random) -> bytes:
    buffer = io.BytesIO()
    form = numbers.choice(("JPEG", "TIFF"))
    Image.fromarray(_pixels(numbers, 4), "CMYK").save(buffer, form)
    return buffer.getvalue()


def _deep(numbers: random.Random) -> bytes:
    """Grey of 16 bits."""
    return encoded(_pixels(numbers, 1, 2 ** numbers.randint(9, 16))[:, :, 0].astype(np.uint16), "PNG")


def _nearly_black(numbers: random.Random) -> bytes:
    return encoded(_pixels(numbers, 3, 2) | np.uint8(0), "PNG")


def _scans(numbers: random.Random) -> bytes:
    """A JPEG of hundreds of scans, each of which is decoded over the whole picture."""
    content = encoded(_pixels(numbers), "JPEG", progressive=True)
    at = content.rindex(b"\xff\xda")
    return content[:at] + content[at:-2] * numbers.randint(150, 900) + b"\xff\xd9"


_MAKERS: dict[str, tuple[Callable[[random.Random], bytes], tuple[int, ...]]] = {
    "truncated": (_truncated, (400, 413, 415)),
    "overwritten": (_overwritten, (200, 400, 413, 415)),
    "wrong type": (_wrong_type, (415,)),
    "bomb": (_bomb, (413,)),
    "huge header": (_huge_header, (400, 413)),
    "text bomb": (_text_bomb, (200, 400)),
    "animated": (_animated, (400,)),
    "CMYK": (_cmyk, (200,)),
    "16 bits": (_deep, (200,)),
    "nearly black": (_nearly_black, (400,)),
    "many scans": (_scans, (413,)),
    "zero bytes": (lambda _: b"", (400,)),
    "only zeros": (lambda numbers: bytes(numbers.randint(1, 10**5)), (415,)),
    "random bytes": (lambda numbers: numbers.randbytes(numbers.randint(1, 10**5)), (415, 400)),
}
KINDS = tuple(_MAKERS)
