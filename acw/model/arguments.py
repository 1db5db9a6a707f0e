"""What callers hand to a finished model, brought to the one form that it computes with, or refused in one line.

Everything here is looked at once, at the boundary. What cannot be told apart from a mistake is refused: shares of 0..1
taken for grey values make a black picture, of which every model has a density.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from PIL import Image

from acw.data.images import decode_image, grey_depth, pixels_of, shape_is_alpha, to_8_bits
from acw.storage.addresses import local
from acw.storage.errors import UserError
from acw.storage.files import fetch

DEVICES = ("cpu", "cuda")  # Apple's `mps` has no float64, in which statistics of the features are summed
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_OTHERS = "grey (H, W), RGBA, a PIL image, a path and a torch tensor (3, H, W) do as well"


def as_image(image: Any, name: str = "") -> np.ndarray:
    """uint8 (H, W, 3) RGB of an image as people have it in hand: a path, a PIL image, an array or a torch tensor.

    Arrays are grey (H, W) or (H, W, 1), RGB or RGBA, whose transparency is left out as `decode_image` does it; tensors,
    on any device, may have the channels first. They hold whole numbers 0..255, of any integer type, or 16 bits in
    uint16. name: what to call the image in an error.
    Raises ValueError for anything else, floats included, and UserError for a file that cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        if "://" in (path := os.fspath(image)) and not path.startswith("s3://"):
            raise UserError(f"{path}: images are read from files and from s3://; download it first")
        pixels = decode_image(fetch(local(path)))
    elif isinstance(image, Image.Image):
        if getattr(image, "tile", None) and getattr(image, "fp", None) is None:
            raise _refused(name, "a PIL image whose file was closed before it was read", "call its load() before")
        pixels = pixels_of(image, name or "image")
    elif isinstance(image, np.ndarray | torch.Tensor):
        pixels = _bytes(_channels(_array(image, name), name), name)
    else:
        raise _refused(name, type(image).__name__, _OTHERS)
    if not pixels.size:
        raise _refused(name, f"of {pixels.shape[0]} x {pixels.shape[1]} px", "give one that has pixels")
    if pixels.max() == 1:
        raise _refused(name, "of values that are all 0 or 1", "were they 0..1? multiply by 255 before rounding")
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def _refused(name: str, found: str, remedy: str) -> ValueError:
    return ValueError(f"{name}{': ' * bool(name)}an image is uint8 (H, W, 3) RGB, not {found}; {remedy}")


def _array(image: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    """The same as an array, channels last where a tensor has them first."""
    if isinstance(image, np.ndarray):
        return image
    tensor = image.detach().cpu()
    array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if array.ndim != 3 or array.shape[0] not in CHANNELS:
        return array
    if array.shape[2] in CHANNELS:
        raise _refused(name, f"a tensor {array.shape}, in which either end could be the channels", "give an array")
    return array.transpose(1, 2, 0)


def _channels(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W, 1) or (H, W, 3) of an array that has the shape of an image."""
    shaped = array[:, :, None] if array.ndim == 2 else array
    if shaped.ndim == 3 and shaped.shape[2] in CHANNELS:
        if shaped.shape[2] == 4 and shaped.size and shape_is_alpha(shaped):
            raise _refused(name, "of one colour with shapes in its transparency", "put it on its background first")
        return shaped[:, :, :3]
    if array.ndim == 4:
        remedy = "predict_batch takes several images"
    elif array.ndim == 3 and array.shape[0] in CHANNELS:
        remedy = "channels come last: image.transpose(1, 2, 0)"
    else:
        remedy = _OTHERS
    raise _refused(name, f"{array.dtype} {array.shape}", remedy)


def _bytes(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 of an array whose values are certain to be grey values."""
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8, copy=False)
    if array.dtype.kind not in "iuf":
        remedy = "turn a mask to grey: image.astype('uint8') * 255" if array.dtype == bool else _OTHERS
        raise _refused(name, f"{array.dtype} {array.shape}", remedy)
    low, high = array.min(), array.max()
    found = f"{array.dtype} {array.shape} of values {low:.5g} to {high:.5g}"
    if array.dtype.kind == "f":
        if not np.isfinite([low, high]).all():
            raise _refused(name, found, "replace what is no number")
        if low >= 0 and high <= 1:
            remedy = "multiply by 255 first: (255 * image).round().astype('uint8')"
        elif low >= 0 and high <= 255:
            remedy = "if these are grey values of 0 to 255: image.round().astype('uint8')"
        else:
            remedy = "undo what was done to its pixels, such as subtracting their mean"
        raise _refused(name, found, remedy)
    if array.dtype == np.uint16:
        return to_8_bits(array, grey_depth(array))
    if low < 0 or high > 255:
        raise _refused(name, found, "scale it to 0..255")
    return array.astype(np.uint8)


def paired(images: Any, categories: Iterable[str | None] | None) -> Iterator[tuple[Any, str | None]]:
    """Several images, each with its category or None; raises ValueError for what is one image, or categories for all,
    at once, and where the ones end before the others when it comes to that."""
    shape = tuple(images.shape) if isinstance(images, np.ndarray | torch.Tensor) else None
    if isinstance(images, str | bytes) or not isinstance(images, Iterable) or (shape and len(shape) != 4):
        found = f"an array {shape}" if shape else type(images).__name__
        raise ValueError(f"predict_batch takes several images, not {found}; predict takes one")
    if isinstance(categories, str):
        raise ValueError(f"categories are one an image, not '{categories}' for all; give a list")
    return ((image, None) for image in images) if categories is None else _zipped(images, categories)


def _zipped(images: Iterable[Any], categories: Iterable[str | None]) -> Iterator[tuple[Any, str | None]]:
    nothing: Any = object()
    for number, (image, category) in enumerate(zip_longest(images, categories, fillvalue=nothing)):
        if image is nothing or category is nothing:
            ended, others = ("images", "categories") if image is nothing else ("categories", "images")
            raise ValueError(f"predict_batch: the {ended} end after {number}, there are more {others}; give as many")
        yield image, category


def as_center_bias(center_bias: Any, size: tuple[int, int]) -> np.ndarray:
    """float64 (H, W), up to a constant, of a centre bias given as an array or a tensor for an image of `size` px.

    Raises ValueError for what is no finite natural log-density of that size; one that is nowhere negative is taken for
    a density or a map, unless it is constant.
    """
    wanted = f"a centre bias is a natural log-density, finite floats {size} as the image"
    if not isinstance(center_bias, np.ndarray | torch.Tensor):
        raise ValueError(f"{wanted}, not {type(center_bias).__name__}; give an array or a torch tensor")
    if isinstance(center_bias, torch.Tensor):
        tensor = center_bias.detach().cpu()
        center_bias = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    if center_bias.shape != size or center_bias.dtype.kind != "f":
        raise ValueError(f"{wanted}, not {center_bias.dtype} {center_bias.shape}; bring it to that size and type")
    values = center_bias.astype(np.float64)
    if holes := int(np.isneginf(values).sum()):
        raise ValueError(
            f"{wanted}, not -inf as at {holes} of its {values.size} pixels, where its density is 0; mix the density "
            "with a little of a uniform one before the logarithm"
        )
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{wanted}, not NaN or +inf as at {bad} of its {values.size} pixels; correct them")
    if values.min() >= 0 and values.min() < values.max():
        raise ValueError(
            f"{wanted}, not a density or a map, which is nowhere negative; give np.log of a density that is positive "
            "everywhere, or subtract its maximum if it is a log-density up to a constant"
        )
    return values


def as_device(device: Any) -> torch.device:
    """A device to compute on; raises UserError for one that is not here, or on which acw does not compute."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device {device!r}: there is no such thing; give 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type not in DEVICES:
        raise UserError(f"device '{found}': acw computes on 'cpu' and 'cuda', in float32 and float64; give one of them")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"device '{found}': this machine has no GPU that torch can use; give 'cpu'")
        if (found.index or 0) >= count:
            raise UserError(f"device '{found}': GPUs here are 'cuda:0' to 'cuda:{count - 1}'; give one of them")
    return found if found.type == "cuda" else torch.device("cpu")
