"""Features of frozen backbones: computed once, kept in a content-addressed store, read by memory map.

A store is a folder named after what decides its content: the stimuli, the backbone (taps, input scale, weights' hash)
and the format. It holds shards of SHARD_IMAGES images as safetensors, each beside its checksum, and a manifest that is
written last. A shard is there whole or not at all, so an interrupted extraction goes on where it stopped.
"""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acw.backbones import Backbone, FrozenBackbone, load_backbone
from acw.cluster import wants_gpus
from acw.data import Stimulus
from acw.heads import Features, nearest_index
from acw.storage import UserError, fingerprint, sha256_file, write_atomic, write_json

FORMAT = 1  # to be raised when the bytes of a shard change for the same stimuli and backbone
SHARD_IMAGES = 16
# Through a backbone in one pass: more would need more memory and, on a CPU, save no time.
IMAGES_AT_ONCE = 4
PROGRESS_SECONDS = 5.0


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
            torch.stack([reader.get_tensor(f"{index}.tap{t}") for reader, index in readers]).to(device).float()
            for t in range(len(self.channels))
        ]
        statistics = torch.stack([reader.get_tensor(f"{index}.statistics") for reader, index in readers]).to(device)
        return Features(taps, statistics[:, 0], statistics[:, 1], self.readouts[indices[0]])

    def pooled(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """(len(indices), C) float32: each channel's mean over the image, for category inference."""
        return torch.stack([self._reader(int(i) // SHARD_IMAGES).get_tensor(f"{int(i)}.pooled") for i in indices])

    def _reader(self, shard: int) -> safe_open:
        return _open_shard(shard_path(self.folder, shard))


# Tensors are views into the memory map. Only some shards stay mapped, lest a process grow with the data set;
# opening one again costs a fraction of a millisecond.
@functools.lru_cache(maxsize=16)
def _open_shard(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: unreadable features ({error}); run jobs/extract.py again, it recomputes them"
        ) from None


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def open_store(folder: Path) -> FeatureStore:
    """The finished store in a folder; raises UserError where there is none."""
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{path}: no features there; run jobs/extract.py first")
    manifest = json.loads(path.read_text())
    return FeatureStore(
        folder,
        manifest["images"],
        tuple(manifest["channels"]),
        tuple(tuple((h, w) for h, w in sizes) for sizes in manifest["tap_sizes"]),
        tuple((h, w) for h, w in manifest["readouts"]),
    )


def store_folder(root: Path, backbone: Backbone, stimuli_fingerprint: str, weights_sha256: str) -> Path:
    identity = {
        "format": FORMAT,
        "stimuli": stimuli_fingerprint,
        "backbone": backbone.fingerprint_fields(),
        "weights": weights_sha256,
    }
    return root / "features" / f"{backbone.name}-{fingerprint(identity)}"


def compute(model: FrozenBackbone, backbone: Backbone, pixels: np.ndarray) -> tuple[Features, Tensor]:
    """Features of uint8 images (B, H, W, 3) of one size, and their pooled features (B, C)."""
    # Views that PyTorch cannot share, such as read-only or mirrored ones, are copied.
    taps = model.features(torch.from_numpy(np.require(pixels, requirements=["C", "W"])))
    readout = backbone.readout_size((pixels.shape[1], pixels.shape[2]))
    return describe(taps, readout), torch.cat([tap.mean((1, 2)) for tap in taps], dim=1)


def describe(taps: list[Tensor], readout: tuple[int, int]) -> Features:
    """Taps with the statistics of the first layer norm, which are the same for every head.

    They are those of the taps resized (nearest) to the readout's grid and concatenated: each cell of a tap counts as
    often as the resizing repeats it.
    """
    total = torch.zeros(len(taps[0]), dtype=torch.float64, device=taps[0].device)
    squares = total.clone()
    for tap in taps:
        rows, columns = (
            torch.bincount(nearest_index(tap.shape[axis], readout[axis - 1]), minlength=tap.shape[axis])
            for axis in (1, 2)
        )
        repeats = (rows[:, None] * columns[None, :]).to(tap.device, torch.float64)
        total += (tap.sum(3, dtype=torch.float64) * repeats).sum((1, 2))
        squares += (tap.double().square().sum(3) * repeats).sum((1, 2))
    count = readout[0] * readout[1] * sum(tap.shape[3] for tap in taps)
    mean = total / count
    return Features(taps, mean.float(), (squares / count - mean**2).clamp_min(0).float(), readout)


def write_shard(
    model: FrozenBackbone, backbone: Backbone, stimuli: Sequence[Stimulus], shard: int, folder: Path
) -> None:
    """Computes and stores the features of the images of one shard, atomically, with its checksum beside it."""
    indices = range(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, len(stimuli)))
    by_size = defaultdict(list)
    for index in indices:
        by_size[stimuli[index].size].append(index)
    tensors: dict[str, Tensor] = {}
    groups = [g[start : start + IMAGES_AT_ONCE] for g in by_size.values() for start in range(0, len(g), IMAGES_AT_ONCE)]
    for group in groups:
        features, pooled = compute(model, backbone, np.stack([stimuli[index].pixels() for index in group]))
        halved = [tap.half() for tap in features.taps]
        if not all(torch.isfinite(tap).all() for tap in halved):
            raise UserError(
                f"{backbone.name}: features of {stimuli[group[0]].name} or its neighbours overflow float16; "
                "check that the weights and the preprocessing belong together"
            )
        # Statistics of what is stored, so that training sees a layer norm of exactly its own input.
        features = describe([tap.float() for tap in halved], features.readout)
        for position, index in enumerate(group):
            tensors |= {f"{index}.tap{t}": tap[position].cpu().contiguous() for t, tap in enumerate(halved)}
            tensors[f"{index}.statistics"] = torch.stack([features.mean[position], features.variance[position]]).cpu()
            tensors[f"{index}.pooled"] = pooled[position].float().cpu()
    path = shard_path(folder, shard)
    write_atomic(path, lambda temporary: save_file(tensors, temporary))
    write_atomic(path.with_suffix(".sha256"), sha256_file(path))


def intact(folder: Path, shard: int) -> bool:
    """Whether a shard is there and its bytes are those that were written."""
    path = shard_path(folder, shard)
    checksum = path.with_suffix(".sha256")
    return path.exists() and checksum.exists() and sha256_file(path) == checksum.read_text()


def extract(
    root: Path,
    backbones: Sequence[Backbone],
    stimuli: Sequence[Stimulus],
    stimuli_fingerprint: str,
    workers: int = 0,
    accelerator: str = "auto",
) -> dict[str, FeatureStore]:
    """Fills the backbones' stores by tasks on the Ray cluster, on GPUs where `cluster.wants_gpus`.

    Shards that are there and intact are kept. Returns the stores by the backbones' names. Raises UserError for weights
    that cannot be had, an image that cannot be decoded, or a root that cannot be written.
    """
    hashes = {backbone.name: load_backbone(backbone).weights_sha256 for backbone in backbones}
    folders = {b.name: store_folder(root, b, stimuli_fingerprint, hashes[b.name]) for b in backbones}
    shards = range(-(-len(stimuli) // SHARD_IMAGES))
    missing = [(b, shard) for b in backbones for shard in shards if not intact(folders[b.name], shard)]
    for backbone in {backbone for backbone, _ in missing}:
        (folders[backbone.name] / "manifest.json").unlink(missing_ok=True)
    if missing:
        _extract_shards(missing, stimuli, folders, hashes, workers, wants_gpus(accelerator))
        _open_shard.cache_clear()
    stores = {}
    for backbone in backbones:
        manifest = folders[backbone.name] / "manifest.json"
        if not manifest.exists():
            write_json(manifest, _manifest(manifest.parent, backbone, stimuli, hashes[backbone.name]))
        stores[backbone.name] = open_store(manifest.parent)
    return stores


def _manifest(folder: Path, backbone: Backbone, stimuli: Sequence[Stimulus], weights_sha256: str) -> dict[str, Any]:
    tap_sizes, channels = [], []
    for index in range(len(stimuli)):
        reader = _open_shard(shard_path(folder, index // SHARD_IMAGES))
        shapes = [reader.get_slice(f"{index}.tap{t}").get_shape() for t in range(len(backbone.taps))]
        tap_sizes.append([shape[:2] for shape in shapes])
        channels = [shape[2] for shape in shapes]
    return {
        "backbone": backbone.fingerprint_fields(),
        "weights_sha256": weights_sha256,
        "images": len(stimuli),
        "channels": channels,
        "tap_sizes": tap_sizes,
        "readouts": [list(backbone.readout_size(stimulus.size)) for stimulus in stimuli],
        "stimuli": [stimulus.digest for stimulus in stimuli],
    }


def _extract_shards(
    missing: Sequence[tuple[Backbone, int]],
    stimuli: Sequence[Stimulus],
    folders: dict[str, Path],
    hashes: dict[str, str],
    workers: int,
    gpu: bool,
) -> None:
    """Has Ray tasks write the missing shards, backbone by backbone, and prints how far they are.

    Tasks take whatever nodes the cluster has or starts; at most `workers` are out at a time, unless that is 0.
    """
    import ray

    @ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=3, max_calls=0)
    def write(stimuli: Sequence[Stimulus], backbone: Backbone, shard: int) -> str:
        torch.set_num_threads(1)
        # A GPU that Ray only pretends to have, as in tests, is no CUDA device.
        model = _loaded_backbone(backbone, "cuda" if gpu and torch.cuda.is_available() else "cpu")
        if model.weights_sha256 != hashes[backbone.name]:
            raise UserError(f"{backbone.name}: the weights on this node differ from those on the head node")
        write_shard(model, backbone, stimuli, shard, folders[backbone.name])
        return backbone.name

    shared = ray.put(stimuli)
    waiting = list(missing)[::-1]
    out: list[Any] = []
    start = shown = time.monotonic()
    done = 0
    while waiting or out:
        while waiting and (not workers or len(out) < workers):
            out.append(write.remote(shared, *waiting.pop()))
        (ready, *_), out = ray.wait(out)
        name, done = ray.get(ready), done + 1
        if time.monotonic() - shown > PROGRESS_SECONDS or done == len(missing):
            shown = time.monotonic()
            rate, left = done * SHARD_IMAGES / (shown - start), (len(missing) - done) * (shown - start) / done / 60
            print(
                f"features: {done}/{len(missing)} shards, now {name}, {rate:.1f} images/s, {left:.1f} min left",
                flush=True,
            )


# Tasks run in processes that Ray keeps, backbone by backbone: one is loaded once a process, and alone in memory.
@functools.lru_cache(maxsize=1)
def _loaded_backbone(backbone: Backbone, device: str) -> FrozenBackbone:
    return load_backbone(backbone, device)
