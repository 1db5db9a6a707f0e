"""Image files: their size and digest without decoding them, and their pixels."""

from __future__ import annotations

import hashlib
import io
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from PIL import ExifTags, Image

from acw.storage.errors import UserError
from acw.storage.file_kinds import recognised

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

DEPTHS = (8, 10, 12, 14, 16)  # bits of a grey value that cameras, scanners and programs use of 16

# A file that ends like this was written to its end; any other is decoded once to know.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@dataclass(frozen=True)
class Inspected:
    """What a data set keeps of an image file.

    size: (height, width) in px. digest: SHA-256 in hexadecimal of what decides the pixels: the file's bytes and, where
    grey of 16 bits is scaled by fewer, how many. depth: the bits of a grey value that are used. orientation: of EXIF;
    1 is upright, 5 to 8 are turned by 90 degrees.
    """

    size: tuple[int, int]
    digest: str
    depth: int = 8
    orientation: int = 1


def inspect_image(path: Path) -> Inspected:
    """What there is to know of an image file, mostly without decoding it.

    The pixels are decoded only if the file does not end as its format ends, or holds 16 bits a channel.
    Raises UserError as `decode_image` does for what it decodes; for a file that is missing, too large, cut short, or no
    image of the format that its name says, always.
    """
    content = _read(path)
    with _open(content, path) as image:
        size, depth, wide = (image.height, image.width), 8, _is_wide(image)
        if wide or not content.endswith(_ENDINGS.get(image.format or "", b"\0none")):
            _decode(image, path)
        if wide:
            depth = _depth(image, path)
        orientation = _orientation(image)
    digest = hashlib.sha256(content)
    if depth < (16 if wide else 8):
        digest.update(f"{depth} bits".encode())
    return Inspected(size, digest.hexdigest(), depth, orientation)


def decode_image(path: Path) -> np.ndarray:
    """Pixels as uint8 (H, W, 3) RGB, as they are stored: an EXIF rotation is ignored, as CAT2000 needs it.

    Grey, palette and CMYK are converted, transparency is left out. Grey of 16 bits is brought to 8 by the range that it
    uses (`grey_depth`), as cameras and scanners store 10 to 14 bits in 16.
    Raises UserError as `inspect_image` does, and for a file that is damaged, has pixels of 32 bits, or colours of 16
    bits that use fewer.
    """
    with _open(_read(path), path) as image:
        return pixels_of(image, path)


def pixels_of(image: Image.Image, path: Path | str) -> np.ndarray:
    """The same of an image that Pillow has opened; path: what to call it in an error."""
    wide = image.mode.startswith("I;16") or _is_wide(image)
    _decode(image, path)
    depth = _depth(image, path) if wide else 8
    if image.mode.startswith("I;16"):
        return np.repeat(to_8_bits(np.asarray(image).astype(np.uint16), depth)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UserError(f"{path}: has pixels of 32 bits; save it with 8 or 16 bits a channel")
    # Pillow warns where a palette's transparency would be lost on the direct way.
    opaque = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
    try:
        return np.array(opaque.convert("RGB"))
    except ValueError as error:
        raise UserError(f"{path}: has colours in {image.mode}; save it as RGB") from error


def grey_depth(grey: np.ndarray) -> int:
    """How many bits the values of a 16-bit image, uint16, use: the fewest of DEPTHS that hold the largest one."""
    largest = int(grey.max(initial=0))
    return next(depth for depth in DEPTHS if largest < 2**depth)


def to_8_bits(grey: np.ndarray, depth: int) -> np.ndarray:
    """uint8: the highest 8 of the `depth` bits that the values use."""
    return (grey >> (depth - 8)).astype(np.uint8)


def names_stimulus(path: PurePath, suffixes: Iterable[str] = SUFFIXES) -> bool:
    """Whether a file is named like a stimulus, not like CAT2000's saliency maps or what file managers hide."""
    hidden = path.name.startswith(".") or path.stem.endswith("_SaliencyMap") or path.parent.name == "Output"
    return path.suffix.lower() in suffixes and not hidden


def _is_wide(image: Image.Image) -> bool:
    """Whether a file, not decoded yet, holds 16 bits a channel: the raw mode of its tiles says so."""
    return any(
        ";16" in str(part)
        for tile in getattr(image, "tile", ())
        for part in np.atleast_1d(np.array(tile[3], dtype=object))
    )


def _depth(image: Image.Image, path: Path | str) -> int:
    """The bits that the values of a decoded image of 16 bits use. Of colours, Pillow keeps the high bytes alone: fewer
    than 16 bits would come out (nearly) black, and cannot be brought back. Raises UserError there."""
    if image.mode.startswith("I;16"):
        return grey_depth(np.asarray(image).astype(np.uint16))
    if (largest := int(np.asarray(image.convert("RGB")).max())) < 2**6:
        used = 8 + largest.bit_length()
        raise UserError(f"{path}: has 16 bits a channel and uses {used} of them; save it with 8 bits a channel")
    return 16


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF of an image that is fine otherwise; only error messages ask for it
        return 1


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
        found = recognised(path, expected)
        reason = f"it {found}" if found else "rename, replace or remove it"
        raise UserError(f"{path}: not an image in {expected}, as its name says; {reason}") from error
    if image.width * image.height > MOST_PIXELS:
        raise UserError(
            f"{path}: has {image.width}x{image.height} px, more than the {MOST_PIXELS} that an image may have; "
            "scale it down or remove it"
        )
    return image


def _decode(image: Image.Image, path: Path | str) -> None:
    try:
        image.load()
    except Exception as error:  # decoders of damaged data raise whatever they stumble over
        raise UserError(f"{path}: the image is damaged or cut short ({error}); replace it") from error
