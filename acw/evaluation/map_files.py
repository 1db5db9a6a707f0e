"""Maps in files: NPY arrays, and grey values of PNG and JPEG, looked at before they are believed."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from acw.data.images import orientation
from acw.storage.errors import UserError
from acw.storage.file_kinds import recognised

# Between the greatest and the least of R, G and B, of 255; and the share of pixels that may be above it. What JPEG's
# chroma or a slight tint makes of a grey map is far below, every colour map with a hue is far above.
COLOUR, COLOURED_SHARE = 24, 1e-3
# As Pillow refuses larger images: a few bytes of a file can say that an array has terabytes.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)


def read_npy(path: Path) -> np.ndarray:
    """float64 (H, W) of an NPY file; raises UserError for what cannot be read whole, or is no map."""
    try:
        # Mapped, so that a file's header alone allocates nothing, and one cut short is noticed.
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        found = recognised(path, "NPY")
        reason = f"it {found}" if found else f"({error}); write it anew"
        raise UserError(f"{path}: no NPY file that can be read whole: {reason}") from error
    if not isinstance(stored, np.ndarray):
        raise UserError(f"{path}: holds several arrays, as NPZ does; save one array with numpy.save")
    check_array(stored, str(path))
    return np.array(stored, dtype=np.float64)


def read_grey(path: Path) -> np.ndarray:
    """float64 (H, W), grey values as they are stored, of 8 or 16 bits.

    Raises UserError for what cannot be read or is turned by EXIF, for several pictures, for colours, and where some
    pixels are more transparent than others.
    """
    colours: np.ndarray | None
    alpha: np.ndarray
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            image.load()
            odd = orientation(image) != 1 or getattr(image, "is_animated", False)
            if image.mode.startswith("I"):
                grey = np.asarray(image).astype(np.float64)
                colours, alpha = None, grey != image.info.get("transparency")  # at most one value is transparent
            else:
                # Pillow warns where a palette's transparency would be lost on the direct way.
                whole = image.convert("RGBA")
                grey = np.asarray(whole.convert("L")).astype(np.float64)
                colours, alpha = np.asarray(whole)[..., :3], np.asarray(whole)[..., 3]
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: no PNG or JPEG that can be read whole ({error}); write it anew") from error
    if odd:
        raise UserError(f"{path}: is turned by EXIF or holds several pictures; save the saliency map itself, upright")
    if alpha.min() < alpha.max():
        raise UserError(
            f"{path}: some of its pixels are more transparent than others, so what it shows depends on what is behind; "
            "save the saliency map itself, in grey without an alpha channel"
        )
    if colours is not None:
        coloured = np.count_nonzero(np.ptp(colours, axis=2) > COLOUR) / grey.size
        if coloured > COLOURED_SHARE:
            raise UserError(
                f"{path}: is coloured ({coloured:.1%} of its pixels), as by a colour map or drawn over its image, and "
                "the brightness of a colour is not its saliency; save the saliency map itself, in grey or as NPY"
            )
    return grey


def check_array(stored: np.ndarray | h5py.Dataset, where: str) -> None:
    """Raises UserError for what is no array of numbers (H, W), before it is read."""
    if stored.ndim != 2 or stored.dtype.kind not in "buif" or not 0 < stored.size <= MOST_PIXELS:
        raise UserError(
            f"{where}: holds {stored.dtype} of shape {stored.shape}; store real numbers (height, width), "
            f"of at most {MOST_PIXELS} px"
        )
