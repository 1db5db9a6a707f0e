"""Image files: their size and digest without decoding them, and their pixels."""

from __future__ import annotations

import hashlib
import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from acw.storage import UserError

# Only these decoders are ever tried, each on the files that are named so: Pillow has some thirty others, one of which
# runs Ghostscript.
FORMATS = {
    ".bmp": "BMP", ".gif": "GIF", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF",
    ".webp": "WEBP",
}  # fmt: skip
SUFFIXES = frozenset(FORMATS)
# A file is read and decoded whole, so both are limited before: what a few kilobytes unpack to could fill any memory.
MOST_PIXELS = 2**26
MOST_BYTES = 2**29

# A file that ends like this was written to its end; any other is decoded once to know.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def inspect_image(path: Path) -> tuple[tuple[int, int], str]:
    """Size (height, width) in px and SHA-256 of the bytes of an image file.

    The pixels are decoded only if the file does not end as its format ends.
    Raises UserError for a file that is missing, too large, cut short, or no image of the format that its name says.
    """
    content = _read(path)
    with _open(content, path) as image:
        size = (image.height, image.width)
        if not content.endswith(_ENDINGS.get(image.format or "", b"\0none")):
            _decode(image, path)
    return size, hashlib.sha256(content).hexdigest()


def decode_image(path: Path) -> np.ndarray:
    """Pixels as uint8 (H, W, 3) RGB, as they are stored: an EXIF rotation is ignored, as CAT2000 needs it.

    Grey, palette and CMYK are converted, transparency is left out, 16-bit grey keeps its high byte.
    Raises UserError as `inspect_image` does, and for a file that is damaged or has pixels of 32 bits.
    """
    with _open(_read(path), path) as image:
        _decode(image, path)
        if image.mode.startswith("I;16"):
            grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: has pixels of 32 bits; save it with 8 or 16 bits a channel")
        # Pillow warns where a palette's transparency would be lost on the direct way.
        opaque = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        return np.array(opaque.convert("RGB"))


def _read(path: Path) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is no file; replace it by an image")
        if found.st_size > MOST_BYTES:
            raise UserError(
                f"{path}: has {found.st_size / 2**20:.0f} MiB, more than the {MOST_BYTES / 2**20:.0f} that an image "
                "may have; compress it or remove it"
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the image cannot be read ({error.strerror}); add it or correct its name") from error


def _open(content: bytes, path: Path) -> Image.Image:
    expected = FORMATS.get(path.suffix.lower())
    if expected is None:
        raise UserError(f"{path}: images end in {', '.join(sorted(SUFFIXES))}; convert or remove it")
    try:
        image = Image.open(io.BytesIO(content), formats=[expected])
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}; scale it down or remove it") from None
    except Exception as error:  # decoders of damaged headers raise whatever they stumble over
        raise UserError(
            f"{path}: not an image in {expected}, as its name says; rename, replace or remove it"
        ) from error
    if image.width * image.height > MOST_PIXELS:
        raise UserError(
            f"{path}: has {image.width}x{image.height} px, more than the {MOST_PIXELS} that an image may have; "
            "scale it down or remove it"
        )
    return image


def _decode(image: Image.Image, path: Path) -> None:
    try:
        image.load()
    except Exception as error:  # decoders of damaged data raise whatever they stumble over
        raise UserError(f"{path}: the image is damaged or cut short ({error}); replace it") from error
