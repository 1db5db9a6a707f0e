"""Image files: their size and digest without decoding them, and their pixels."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from acw.storage import UserError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

# A file that ends like this was written to its end; any other is decoded once to know.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def inspect_image(path: Path) -> tuple[tuple[int, int], str]:
    """Size (height, width) in px and SHA-256 of the bytes of an image file.

    The pixels are decoded only if the file does not end as its format ends.
    Raises UserError for a file that is missing, is not an image, or is cut short.
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
    Raises UserError for a file that is missing, damaged, cut short, or has pixels of 32 bits.
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
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the image cannot be read ({error.strerror}); add it or correct its name") from error


def _open(content: bytes, path: Path) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not an image that Pillow can read; replace or remove it") from error


def _decode(image: Image.Image, path: Path) -> None:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path}: the image is damaged or cut short ({error}); replace it") from error
