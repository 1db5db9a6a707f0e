"""Features of frozen backbones, kept in a content-addressed store and read by memory map; extraction.py fills it.

A store is a folder named after what decides its content: the stimuli, the backbone (taps, input scale, weights' hash)
and the format. It holds shards of SHARD_IMAGES images as safetensors, each beside a note of its checksum and version
(`files.version`), and a manifest that is written last. A shard is there whole or not at all, so an interrupted
extraction goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acw.features.backbone import Backbone, FrozenBackbone
from acw.features.resize import nearest_index
from acw.features.tensors import Features
from acw.storage.checksums import fingerprint, sha256_file
from acw.storage.errors import Damaged, UserError
from acw.storage.files import fetch, present, version, write_atomic

FORMAT = 2  # to be raised when a shard changes by more than rounding for the same stimuli and backbone
PLAIN_FORMAT = 1  # shards without the channels' moments, which only a view of several parts reads
SHARD_IMAGES = 16
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FeatureStore:
    """The features of one backbone for all stimuli of one data set.

    folder: where the shards are. images: how many. tap_sizes: per image, ((h_t, w_t), ...); readouts: per image (h, w).
    channels: per tap. Equal tap sizes and readouts make images that can share a batch's tensors.
    """

    folder: Path
    images: int
    channels: tuple[int, ...]
    tap_sizes: tuple[tuple[tuple[int, int], ...], ...]
    readouts: tuple[tuple[int, int], ...]

    def groups(self, indices: Sequence[int] | np.ndarray) -> list[list[int]]:
        """The images split by shape; those of one group fit into one `load`."""
        by_shape = defaultdict(list)
        for index in indices:
            by_shape[self.tap_sizes[index], self.readouts[index]].append(int(index))
        return list(by_shape.values())

    def load(self, indices: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> Features:
        """Features of images of one shape, float32 on the device."""
        readers = [(self._reader(int(index) // SHARD_IMAGES), index) for index in indices]
        taps = [
            _float32([reader.get_tensor(f"{index}.tap{t}") for reader, index in readers], device)
            for t in range(len(self.channels))
        ]
        statistics = torch.stack([reader.get_tensor(f"{index}.statistics") for reader, index in readers]).to(device)
        return Features(taps, statistics[:, 0], statistics[:, 1], self.readouts[indices[0]])

    @property
    def parts(self) -> tuple[FeatureStore, ...]:
        """The stores that this one reads: itself."""
        return (self,)

    def moments(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """(len(indices), 2, C) float32: each channel's mean and mean square over the image, as of `moments_of`."""
        return torch.stack([self._reader(int(i) // SHARD_IMAGES).get_tensor(f"{int(i)}.moments") for i in indices])

    def pooled(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """(len(indices), C) float32: each channel's mean over the image, for category inference."""
        return torch.stack([self._reader(int(i) // SHARD_IMAGES).get_tensor(f"{int(i)}.pooled") for i in indices])

    def _reader(self, shard: int) -> safe_open:
        return open_shard(shard_path(self.folder, shard))


def _float32(tensors: list[Tensor], device: torch.device | str) -> Tensor:
    """Stacked, as float32 on the device, which a CPU does in one pass."""
    if torch.device(device).type != "cpu":
        return torch.stack(tensors).to(device).float()
    result = torch.empty(len(tensors), *tensors[0].shape)
    for row, tensor in zip(result, tensors, strict=True):
        row.copy_(tensor)
    return result


# Tensors are views into the memory map. Only some shards stay mapped, lest a process grow with the data set;
# opening one again costs a fraction of a millisecond.
@functools.lru_cache(maxsize=16)
def open_shard(path: Path) -> safe_open:
    try:
        return safe_open(fetch(path, immutable=True), framework="pt")
    except (OSError, SafetensorError, Damaged) as error:
        raise UserError(
            f"{path}: unreadable features ({error}); run jobs/extract.py again, it recomputes them"
        ) from None


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def open_store(folder: Path) -> FeatureStore:
    """The finished store in a folder; raises UserError where there is none."""
    path = folder / MANIFEST
    if not fetch(path).exists():
        raise UserError(f"{path}: no features there; run jobs/extract.py first")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return FeatureStore(
        folder,
        manifest["images"],
        tuple(manifest["channels"]),
        tuple(tuple((h, w) for h, w in sizes) for sizes in manifest["tap_sizes"]),
        tuple((h, w) for h, w in manifest["readouts"]),
    )


def store_folder(
    root: Path, backbone: Backbone, stimuli_fingerprint: str, weights_sha256: str, joined: bool = False, known: str = ""
) -> Path:
    """The folder of a store; joined: whether a view of several parts will read it, which old ones cannot serve.

    known: the name of the store that a run has read before, to which it keeps, be it an old one.
    """
    identity = {"stimuli": stimuli_fingerprint, "backbone": backbone.fingerprint_fields(), "weights": weights_sha256}
    now, before = (
        root / "features" / f"{backbone.name}-{fingerprint({'format': number, **identity})}"
        for number in (FORMAT, PLAIN_FORMAT)
    )
    if joined or known == now.name:
        return now
    return before if known == before.name or (not present(now / MANIFEST) and present(before / MANIFEST)) else now


def write_shard(folder: Path, shard: int, tensors: dict[str, Tensor]) -> None:
    """Writes a shard atomically, then its note. Raises UserError where that cannot be done."""
    path = shard_path(folder, shard)
    write_atomic(path, lambda temporary: save_file(tensors, temporary))
    _note(path, sha256_file(path))


def _note(path: Path, checksum: str) -> None:
    """Notes beside a shard that the file as it is now has this checksum."""
    write_atomic(path.with_suffix(".sha256"), f"{checksum} {version(path)}")


def _noted(path: Path) -> tuple[str, str]:
    """The checksum and version of a shard by its note; empty where there is none."""
    note = fetch(path.with_suffix(".sha256"))
    checksum, _, noted = note.read_text(encoding="utf-8").strip().partition(" ") if note.exists() else ("", "", "")
    return checksum, noted


def untouched(folder: Path, shard: int) -> bool:
    """Whether a shard has the version that it had when its bytes were known to be right."""
    path = shard_path(folder, shard)
    noted = _noted(path)[1]
    return bool(noted) and noted == version(path)


def intact(folder: Path, shard: int) -> bool:
    """Whether a shard is there and its bytes are those that were written; reads all of it."""
    path = shard_path(folder, shard)
    try:
        return sha256_file(fetch(path)) == _noted(path)[0]
    except (FileNotFoundError, Damaged):
        return False


def verify(folder: Path, shard: int) -> bool:
    """Whether a shard is intact, which is noted: it is then `untouched` again, as after a copy that was not before."""
    if untouched(folder, shard):
        return True
    if not intact(folder, shard):
        return False
    path = shard_path(folder, shard)
    # A store that cannot be written to is as good; its shards are read again the next time.
    with contextlib.suppress(UserError):
        _note(path, _noted(path)[0])
    return True


def compute(model: FrozenBackbone, backbone: Backbone, pixels: np.ndarray) -> tuple[Features, Tensor, Tensor]:
    """Features of uint8 images (B, H, W, 3) of one size, their moments (B, 2, C) and pooled features (B, C)."""
    # Views that PyTorch cannot share, such as read-only or mirrored ones, are copied.
    taps = model.features(torch.from_numpy(np.require(pixels, requirements=["C", "W"])))
    readout = backbone.readout_size((pixels.shape[1], pixels.shape[2]))
    moments = moments_of(taps, readout)
    return described(taps, moments, readout), moments.float(), pool(taps)


def pool(taps: list[Tensor]) -> Tensor:
    return torch.cat([tap.mean((1, 2)) for tap in taps], dim=1)


def describe(taps: list[Tensor], readout: tuple[int, int]) -> Features:
    """Taps with the statistics of the first layer norm, which are the same for every head.

    They are those of the taps resized (nearest) to the readout's grid and concatenated.
    """
    return described(taps, moments_of(taps, readout), readout)


def described(taps: list[Tensor], moments_B2C: Tensor, readout: tuple[int, int]) -> Features:
    """`describe` from the channels' moments, which all have as many cells."""
    mean, square = moments_B2C.mean(2).unbind(1)
    return Features(taps, mean.float(), (square - mean**2).clamp_min(0).float(), readout)


def moments_of(taps: list[Tensor], readout: tuple[int, int]) -> Tensor:
    """(B, 2, C) float64: each channel's mean and mean square, over the taps resized (nearest) to the readout's grid.

    Each cell of a tap counts as often as the resizing repeats it.
    """
    moments = []
    for tap in taps:
        rows, columns = (
            torch.bincount(nearest_index(tap.shape[axis], readout[axis - 1]), minlength=tap.shape[axis])
            for axis in (1, 2)
        )
        # Not to be waited for: a GPU may still be computing the taps.
        share_N = (rows[:, None] * columns[None, :]).flatten().double() / (readout[0] * readout[1])
        share_N = share_N.to(tap.device, non_blocking=True)
        cells_BNC = tap.flatten(1, 2).double()
        moments.append(torch.stack([share_N @ cells_BNC, share_N @ cells_BNC.square()], 1))
    return torch.cat(moments, 2)
