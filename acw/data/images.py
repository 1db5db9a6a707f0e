"""Image files: their size and digest without decoding them, and their pixels."""

from __future__ import annotations

import hashlib
import io
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from acw.storage.errors import UserError
from acw.storage.file_kinds import recognised

if TYPE_CHECKING:
    from PIL import Image

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
HOT_SHARE = 1e-4  # of an image's pixels that may be brighter than its depth says: the hot ones of a sensor

# A file that ends like this was written to its end; any other is decoded once to know.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

# How pixels are turned upright, by EXIF's orientation: whether rows become columns, and the steps through both then.
_TURNS = {
    1: (False, 1, 1), 2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1),
    5: (True, 1, 1), 6: (True, 1, -1), 7: (True, -1, -1), 8: (True, -1, 1),
}  # fmt: skip

# Between a JPEG's data and its end, libjpeg skips these bytes without a word, unless it still waits for pixels.
_EXTRA = bytes(range(16, 80))


class TooLarge(UserError):
    """An image of more pixels than one may have."""


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
    Raises UserError as `decode_image` does for what it decodes; for a file that is missing, too large, cut short, of
    several pictures, or no image of the format that its name says, always.
    """
    content = _read(path)
    with _open(content, path) as image:
        size, depth, wide = (image.height, image.width), 8, _is_wide(image)
        if wide or not content.endswith(_ENDINGS.get(image.format or "", b"\0none")):
            _decode(image, path)
        if wide:
            depth = _depth(image, path)
        turned = orientation(image)
    digest = hashlib.sha256(content)
    if depth < (16 if wide else 8):
        digest.update(f"{depth} bits".encode())
    return Inspected(size, digest.hexdigest(), depth, turned)


def decode_image(path: Path, *, upright: bool = False) -> np.ndarray:
    """Pixels as uint8 (H, W, 3) RGB, as they are stored: an EXIF rotation is ignored, as CAT2000 needs it, unless they
    are to be upright, as every viewer shows them.

    Grey, palette and CMYK are converted, transparency is left out. Grey of 16 bits is brought to 8 by the range that it
    uses (`grey_depth`), as cameras and scanners store 10 to 14 bits in 16.
    Raises UserError as `inspect_image` does, and for a file that is damaged, has pixels of 32 bits, colours of 16 bits
    that use fewer, grey of 16 bits in which white is 0, no value but 0 and 1, or its shapes in its transparency alone.
    """
    return decode(_read(path), path, upright=upright)


def decode(content: bytes, path: Path, *, upright: bool = False) -> np.ndarray:
    """The same of a file's content; path: what to call it in an error, ending in its format's suffix."""
    with _open(content, path) as image:
        pixels = pixels_of(image, path)
        if image.format == "JPEG" and _ran_out(content, pixels, path):
            raise UserError(f"{path}: the image is damaged: it ends before its pixels do, the rest is grey; replace it")
        transposed, down, right = _TURNS.get(orientation(image), _TURNS[1]) if upright else _TURNS[1]
    return (pixels.swapaxes(0, 1) if transposed else pixels)[::down, ::right]


def size_of(content: bytes, path: Path) -> tuple[int, int]:
    """(H, W) that a file's header states, in px as they are stored. Raises TooLarge, or UserError, as `decode` does for
    what can be seen without decoding it."""
    with _open(content, path) as image:
        return image.height, image.width


def pixels_of(image: Image.Image, path: Path | str) -> np.ndarray:
    """The same of an image that Pillow has opened; path: what to call it in an error."""
    wide = image.mode.startswith("I;16") or _is_wide(image)
    _decode(image, path)
    depth = _depth(image, path) if wide else 8
    if image.mode.startswith("I;16"):
        pixels = np.repeat(to_8_bits(np.asarray(image).astype(np.uint16), depth)[:, :, None], 3, axis=2)
    elif image.mode in ("I", "F"):
        raise UserError(f"{path}: has pixels of 32 bits; save it with 8 or 16 bits a channel")
    else:
        pixels = _rgb(image, path)
    if pixels.max(initial=0) == 1:
        raise UserError(f"{path}: its values are all 0 or 1, nearly black; multiply them by 255 and save it anew")
    return pixels


def _rgb(image: Image.Image, path: Path | str) -> np.ndarray:
    """uint8 (H, W, 3) of an image of 8 bits, without its transparency."""
    # Pillow warns where a palette's transparency would be lost on the direct way.
    clear = image.mode in ("LA", "RGBA") or (image.mode == "P" and "transparency" in image.info)
    whole = image.convert("RGBA") if clear else image
    try:
        pixels = np.array(whole.convert("RGB"))
    except ValueError as error:
        raise UserError(f"{path}: has colours in {image.mode}; save it as RGB") from error
    if clear and shape_is_alpha(np.asarray(whole)):
        raise UserError(f"{path}: is of one colour, and its shapes are in its transparency; save it on its background")
    return pixels


def shape_is_alpha(rgba: np.ndarray) -> bool:
    """Whether pixels (H, W, 4) differ in their transparency alone, so that without it nothing of a picture is left."""
    first = rgba.reshape(-1, 4)[:1]
    return bool(np.all(rgba[..., :3] == first[..., :3]) and np.any(rgba[..., 3] != first[..., 3]))


def grey_depth(grey: np.ndarray) -> int:
    """How many bits the values of a 16-bit image, uint16, use: the fewest of DEPTHS that hold all but HOT_SHARE."""
    hot = math.ceil(HOT_SHARE * grey.size)
    return next(depth for depth in DEPTHS if np.count_nonzero(grey >= 2**depth) <= hot)


def to_8_bits(grey: np.ndarray, depth: int) -> np.ndarray:
    """uint8: the highest 8 of the `depth` bits that the values use; what is brighter is white."""
    return np.minimum(grey >> (depth - 8), 255).astype(np.uint8)


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
    than 16 bits would come out (nearly) black, and cannot be brought back. Raises UserError there, and for grey in
    which white is 0: of how many bits it is 0, the file does not say."""
    from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

    if image.mode.startswith("I;16"):
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0:
            raise UserError(f"{path}: has 16 bits a pixel in which white is 0 (WhiteIsZero); save it with black as 0")
        return grey_depth(np.asarray(image).astype(np.uint16))
    if (largest := int(np.asarray(image.convert("RGB")).max())) < 2**6:
        used = 8 + largest.bit_length()
        raise UserError(f"{path}: has 16 bits a channel and uses {used} of them; save it with 8 bits a channel")
    return 16


def _ran_out(content: bytes, pixels: np.ndarray, path: Path) -> bool:
    """Whether a JPEG's data end before its last pixels, as where it was cut or a part of it overwritten.

    libjpeg makes those pixels mid-grey without an error. Where the last ones are that grey, the file is decoded once
    more, with bytes before its end that change a picture only if it is not complete there. Not known of progressive
    ones, whose missing scans make them coarse instead.
    """
    end = _ENDINGS["JPEG"]
    if not content.endswith(end) or np.any(pixels[-8:, -8:] != 128):
        return False
    with _open(content.removesuffix(end) + _EXTRA + end, path) as image:
        return not np.array_equal(pixels_of(image, path), pixels)


def orientation(image: Image.Image) -> int:
    """EXIF's; 1 is upright."""
    from PIL import ExifTags

    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF of an image that is fine otherwise; only error messages ask for it
        return 1


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is no file; replace it by an image")
        if status.st_size > MOST_BYTES:
            raise UserError(
                f"{path}: has {status.st_size / 2**20:.0f} MiB, more than the {MOST_BYTES / 2**20:.0f} that an image "
                "may have; compress it or remove it"
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the image cannot be read ({error.strerror}); add it or correct its name") from error


def _open(content: bytes, path: Path) -> Image.Image:
    from PIL import Image

    expected = FORMATS.get(path.suffix.lower())
    if expected is None:
        raise UserError(f"{path}: images end in {', '.join(sorted(SUFFIXES))}; convert or remove it")
    try:
        image = Image.open(io.BytesIO(content), formats=[expected])
        # Phones put a second view or a depth map behind a JPEG, as MPO: the first is the picture.
        several = image.format != "MPO" and getattr(image, "is_animated", False)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{path}: {error}; scale it down or remove it") from None
    except Exception as error:  # decoders of damaged headers raise whatever they stumble over
        kind = recognised(path, expected)
        reason = f"it {kind}" if kind else "rename, replace or remove it"
        raise UserError(f"{path}: not an image in {expected}, as its name says; {reason}") from error
    if image.width * image.height > MOST_PIXELS:
        raise TooLarge(
            f"{path}: has {image.width}x{image.height} px, more than the {MOST_PIXELS} that an image may have; "
            "scale it down or remove it"
        )
    if several:
        raise UserError(f"{path}: holds several pictures, as animations and documents do; save the one that was shown")
    return image


def _decode(image: Image.Image, path: Path | str) -> None:
    try:
        image.load()
    except Exception as error:  # decoders of damaged data raise whatever they stumble over
        raise UserError(f"{path}: the image is damaged or cut short ({error}); replace it") from error
