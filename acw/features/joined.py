"""Features of a view of several networks: each channel standardised, all of them side by side.

Networks differ in the size of their features by orders of magnitude, and a readout's first layer norm knows only one
size. So each channel is brought to mean 0 and variance 1 by constants of the training images (`Standard`), before the
layer norm, whose statistics of an image are then sums over the channels' own moments. No feature is changed for that:
the readout folds the constants into its first layer.
Shape suffixes: B images, C channels of all parts together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acw.features.store import FeatureStore
from acw.features.tensors import Features, Standard
from acw.features.view import View, finest
from acw.storage.errors import UserError
from acw.storage.files import fetch, write_atomic

FILE = "standards.safetensors"  # in a run's folder
# Of the median of its layer, which a channel's scale is at least: some channels are all but silent on the training
# images, and a whisper of theirs on another image must not drown the rest.
LEAST_SCALE = 0.05
SMALLEST_SCALE = 1e-6  # where a whole layer is silent


def standard_of(store: FeatureStore, images: Sequence[int] | np.ndarray) -> Standard:
    """The constants of a network's channels over some images, those of training: images count equally."""
    total_2C = torch.zeros(2, sum(store.channels), dtype=torch.float64)
    for index in images:
        total_2C += store.moments([index])[0]
    mean_C, square_C = total_2C / len(images)
    deviation_C = (square_C - mean_C.square()).clamp_min(0).sqrt()
    layers = deviation_C.split(store.channels)
    floors = [layer.median().mul(LEAST_SCALE).clamp_min(SMALLEST_SCALE) for layer in layers]
    scale_C = torch.cat([layer.maximum(floor) for layer, floor in zip(layers, floors, strict=True)])
    return Standard(mean_C.float(), scale_C.float())


def beside_each_other(parts: Sequence[Standard]) -> Standard:
    """The constants of several networks' channels as one view's."""
    return Standard(torch.cat([part.mean for part in parts]), torch.cat([part.scale for part in parts]))


def join(
    parts: Sequence[Features], moments: Sequence[Tensor], standard: Standard, readout: tuple[int, int]
) -> Features:
    """The parts' features of the same images as one view's.

    moments: of each part (B, 2, C_part), as `store.moments_of` gives them. The layer norm's statistics are over each
    part's own grid, every channel counting alike.
    """
    device = parts[0].taps[0].device
    standard = standard.to(device)
    moments_B2C = torch.cat(list(moments), 2).to(device).double()
    mean_C, scale_C = standard.mean.double(), standard.scale.double()
    first_BC, square_BC = moments_B2C.unbind(1)
    mean_B = ((first_BC - mean_C) / scale_C).mean(1)
    square_B = ((square_BC - 2 * mean_C * first_BC + mean_C.square()) / scale_C.square()).mean(1)
    variance_B = (square_B - mean_B.square()).clamp_min(0)
    taps = [tap for part in parts for tap in part.taps]
    return Features(taps, mean_B.float(), variance_B.float(), readout, standard)


@dataclass(frozen=True)
class JoinedStore:
    """The features of a view of several networks for all stimuli of one data set; a `FeatureStore` to those who read.

    Nothing is stored for it: it reads its parts' stores.
    """

    parts: tuple[FeatureStore, ...]
    standard: Standard

    @property
    def images(self) -> int:
        return self.parts[0].images

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(count for part in self.parts for count in part.channels)

    @functools.cached_property
    def tap_sizes(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        of_parts = zip(*(part.tap_sizes for part in self.parts), strict=True)
        return tuple(tuple(size for sizes in of_image for size in sizes) for of_image in of_parts)

    @functools.cached_property
    def readouts(self) -> tuple[tuple[int, int], ...]:
        return tuple(map(finest, zip(*(part.readouts for part in self.parts), strict=True)))

    def load(self, indices: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> Features:
        """As `FeatureStore.load`."""
        parts = [part.load(indices, device) for part in self.parts]
        moments = [part.moments(indices) for part in self.parts]
        return join(parts, moments, self.standard, self.readouts[indices[0]])


Store = FeatureStore | JoinedStore


def parts_of(stores: Iterable[Store]) -> list[FeatureStore]:
    """The stores that some views' stores read, each once, in order."""
    return list({part.folder: part for store in stores for part in store.parts}.values())


def parts_beside_others(views: Iterable[View]) -> set[str]:
    """The names of the networks that views of several parts read."""
    return {part.name for view in views for part in view.parts if len(view.parts) > 1}


def standards(
    views: Iterable[View], stores: Mapping[str, FeatureStore], images: Sequence[int] | np.ndarray
) -> dict[str, Standard]:
    """The constants of the views of several parts, by the views' names; stores: by the parts' names."""
    views = list(views)
    of_parts = {name: standard_of(stores[name], images) for name in parts_beside_others(views)}
    return {
        view.name: beside_each_other([of_parts[part.name] for part in view.parts])
        for view in views
        if len(view.parts) > 1
    }


def write_standards(path: Path, constants: Mapping[str, Standard]) -> None:
    """Leaves the constants of a run's views in a file, atomically."""
    write_atomic(path, functools.partial(save_file, as_tensors(constants)))


def read_standards(path: Path) -> dict[str, Standard]:
    return from_tensors(load_file(path)) if fetch(path).exists() else {}


def as_tensors(constants: Mapping[str, Standard]) -> dict[str, Tensor]:
    """The constants as named tensors, `VIEW/mean` and `VIEW/scale`."""
    tensors = {f"{name}/mean": standard.mean for name, standard in constants.items()}
    return tensors | {f"{name}/scale": standard.scale for name, standard in constants.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Standard]:
    names = dict.fromkeys(name.rpartition("/")[0] for name in tensors)
    return {name: Standard(tensors[f"{name}/mean"], tensors[f"{name}/scale"]) for name in names}


def of_views(
    views: Sequence[View], stores: Mapping[str, FeatureStore], constants: Mapping[str, Standard]
) -> dict[str, Store]:
    """The stores of views, by name, from those of their parts; raises UserError where constants are missing."""
    if lacking := [view.name for view in views if len(view.parts) > 1 and view.name not in constants]:
        raise UserError(
            f"{FILE}: has no constants of {', '.join(lacking)}; run jobs/extract.py with the same arguments"
        )
    return {
        view.name: stores[view.name]
        if len(view.parts) == 1
        else JoinedStore(tuple(stores[part.name] for part in view.parts), constants[view.name])
        for view in views
    }
