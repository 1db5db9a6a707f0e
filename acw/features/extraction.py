"""Extraction: Ray tasks compute the backbones' features of a data set, once, and fill the stores (store.py).

Networks compute in float32 on every device, so that a store depends on the machine by rounding at most. What is stored
is rounded to float16, by 2e-4 of its size; TF32 would err by 3 to 26 times that, bfloat16 by 25 to 290 times, depending
on the backbone; only those that bear it (`Backbone.half`) compute in it, and the manifest says so. Within a task,
decoding, computing and writing overlap.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acw.cluster import event_log
from acw.cluster.allocation import allocate
from acw.cluster.costs import Cost, peak_rss
from acw.cluster.process import compute_with, give_back_when_idle
from acw.data import Stimulus
from acw.features.backbone import Backbone, FrozenBackbone, load_backbone
from acw.features.batch_size import Begun, Pace, Variant
from acw.features.store import (
    MANIFEST,
    SHARD_IMAGES,
    FeatureStore,
    described,
    moments_of,
    open_shard,
    open_store,
    pool,
    shard_path,
    store_folder,
    untouched,
    verify,
    write_shard,
)
from acw.storage.errors import UserError
from acw.storage.files import fetch, remove, write_json

# The most that a task writes: between two tasks a GPU waits for the last shard of the first to be written.
SHARDS_PER_TASK = {"CPU": 4, "GPU": 32}
PROGRESS_SECONDS = 5.0
CHECKS_AT_ONCE = 16


def extract(
    root: Path,
    backbones: Sequence[Backbone],
    stimuli: Sequence[Stimulus],
    stimuli_fingerprint: str,
    workers: int = 0,
    accelerator: str = "auto",
    gpus_per_worker: float = 1.0,
    joined: Collection[str] = (),
    known: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, FeatureStore], Cost]:
    """Fills the backbones' stores by tasks on the Ray cluster, on GPUs or parts of them where `cluster.wants_gpus`.

    Shards that are there and intact are kept. One whose version is as noted (size and time of change, or the object's
    ETag) is not read for that: files are replaced whole and flushed before they are noted, so that only a disk that
    returns other bytes than it was given could deceive, and that is for file systems to detect. Any other shard is
    read, by the tasks.
    joined: names of those that views of several parts read. known: by name, the folders that a run has read before.
    Returns the stores by the backbones' names, and what it cost. Raises UserError for weights that cannot be had, an
    image that cannot be decoded, or a root that cannot be written.
    """
    start = time.monotonic()
    hashes = {backbone.name: load_backbone(backbone).weights_sha256 for backbone in backbones}
    folders = {
        b.name: store_folder(root, b, stimuli_fingerprint, hashes[b.name], b.name in joined, known.get(b.name, ""))
        for b in backbones
    }
    shards = range(-(-len(stimuli) // SHARD_IMAGES))
    doubtful = {b: _doubtful(folders[b.name], shards) for b in backbones}
    images, peak = 0, 0
    precisions: dict[str, set[str]] = defaultdict(set)
    if any(doubtful.values()):
        how = workers, accelerator, gpus_per_worker
        images, peak = _extract_shards(doubtful, stimuli, folders, hashes, precisions, *how)
        open_shard.cache_clear()
    stores = {b.name: _finished(folders[b.name], b, stimuli, hashes[b.name], precisions[b.name]) for b in backbones}
    return stores, Cost(time.monotonic() - start, images, max(peak, peak_rss()))


def extract_here(
    root: Path,
    network: Callable[[Backbone], FrozenBackbone],
    backbones: Sequence[Backbone],
    stimuli: Sequence[Stimulus],
    stimuli_fingerprint: str,
    joined: Collection[str] = (),
) -> dict[str, FeatureStore]:
    """As `extract`, in this process and without Ray, for few images; network: what gives a backbone's."""
    shards = range(-(-len(stimuli) // SHARD_IMAGES))
    stores = {}
    for number, backbone in enumerate(backbones, 1):
        loaded = network(backbone)
        folder = store_folder(root, backbone, stimuli_fingerprint, loaded.weights_sha256, backbone.name in joined)
        missing, pace = [shard for shard in shards if not verify(folder, shard)], Pace(loaded.device)
        for at in range(0, len(missing), SHARDS_PER_TASK["CPU"]):
            what = f"features: {backbone.name}, {number} of {len(backbones)}, {at} of {len(missing)} shards done"
            print(what, file=sys.stderr, flush=True)
            write_shards(loaded, backbone, stimuli, missing[at : at + SHARDS_PER_TASK["CPU"]], folder, pace)
        open_shard.cache_clear()
        stores[backbone.name] = _finished(folder, backbone, stimuli, loaded.weights_sha256, {loaded.precision})
    return stores


def _finished(
    folder: Path, backbone: Backbone, stimuli: Sequence[Stimulus], weights_sha256: str, precisions: Collection[str]
) -> FeatureStore:
    """The store of shards that are all there, with its manifest."""
    if not fetch(folder / MANIFEST).exists():
        made = {"weights_sha256": weights_sha256, "computed_in": sorted(precisions)}
        write_json(folder / MANIFEST, made | _manifest(folder, backbone, stimuli))
    return open_store(folder)


def _doubtful(folder: Path, shards: Sequence[int]) -> list[int]:
    # Where they are in S3, that takes requests.
    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
        return [s for s, good in zip(shards, pool.map(lambda s: untouched(folder, s), shards), strict=True) if not good]


def _manifest(folder: Path, backbone: Backbone, stimuli: Sequence[Stimulus]) -> dict[str, Any]:
    tap_sizes, channels = [], []
    for index in range(len(stimuli)):
        reader = open_shard(shard_path(folder, index // SHARD_IMAGES))
        shapes = [reader.get_slice(f"{index}.tap{t}").get_shape() for t in range(len(backbone.taps))]
        tap_sizes.append([shape[:2] for shape in shapes])
        channels = [shape[2] for shape in shapes]
    return {
        "backbone": backbone.fingerprint_fields(),
        "images": len(stimuli),
        "channels": channels,
        "tap_sizes": tap_sizes,
        "readouts": [list(backbone.readout_size(stimulus.size)) for stimulus in stimuli],
        "stimuli": [stimulus.digest for stimulus in stimuli],
    }


def _extract_shards(
    doubtful: dict[Backbone, list[int]],
    stimuli: Sequence[Stimulus],
    folders: dict[str, Path],
    hashes: dict[str, str],
    precisions: dict[str, set[str]],
    workers: int,
    accelerator: str,
    gpus_per_worker: float,
) -> tuple[int, int]:
    """Has Ray tasks check shards and write those that are missing, backbone by backbone; prints how far they are.

    Tasks take whatever nodes the cluster has or starts; at most `workers` are out at a time, unless that is 0.
    Returns how many images were computed and the largest memory of a worker, in bytes; notes in which precisions.
    """
    import ray

    total = sum(map(len, doubtful.values()))
    allocation = allocate(total, workers, accelerator, gpus_per_worker)
    gpus = allocation.gpus

    @ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3, max_calls=0)
    def write(stimuli: Sequence[Stimulus], backbone: Backbone, shards: Sequence[int]) -> tuple[str, int, int, int, str]:
        compute_with(1)
        missing, precision = [shard for shard in shards if not verify(folders[backbone.name], shard)], ""
        if missing:
            # A GPU that Ray only pretends to have, as in tests, is no CUDA device.
            cuda = gpus > 0 and torch.cuda.is_available()
            model, pace = _loaded_backbone(backbone, "cuda" if cuda else "cpu")
            if model.weights_sha256 != hashes[backbone.name]:
                raise UserError(f"{backbone.name}: the weights on this node differ from those on the head node")
            precision = model.precision
            decoders = max(1, int(gpus * _cores_per_gpu())) if cuda else 1
            write_shards(model, backbone, stimuli, missing, folders[backbone.name], pace, decoders)
            give_back_when_idle()
        computed = sum(len(_indices(stimuli, shard)) for shard in missing)
        return backbone.name, len(shards), computed, peak_rss(), precision

    most = SHARDS_PER_TASK["GPU" if gpus else "CPU"]
    waiting = _parts(doubtful, min(most, -(-total // (2 * allocation.workers))), allocation.workers)
    shared = ray.put(stimuli)
    out: list[Any] = []
    start = shown = time.monotonic()
    done = images = peak = 0
    while waiting or out:
        while waiting and (not workers or len(out) < workers):
            out.append(write.remote(shared, *waiting.pop()))
        (ready, *_), out = ray.wait(out)
        name, shards, computed, memory, precision = ray.get(ready)
        precisions[name] |= {precision} - {""}
        done, images, peak = done + shards, images + computed, max(peak, memory)
        if time.monotonic() - shown > PROGRESS_SECONDS or done == total:
            shown = time.monotonic()
            rate, left = images / (shown - start), (total - done) * (shown - start) / done / 60
            print(f"features: {done}/{total} shards, now {name}, {rate:.1f} images/s, {left:.1f} min left", flush=True)
            figures = {"done": done, "total": total, "images_per_second": rate, "minutes_left": left}
            event_log.event("features", backbone=name, **figures)
    return images, peak


def _parts(doubtful: dict[Backbone, list[int]], size: int, workers: int) -> list[tuple[Backbone, list[int]]]:
    """The shards in parts of that size, the first to be done at the end; the last ones single, lest all wait for one
    worker's."""
    parts = [(b, shards[at : at + size]) for b, shards in doubtful.items() for at in range(0, len(shards), size)][::-1]
    last = [(b, [shard]) for b, shards in parts[:workers] for shard in shards[::-1]]
    return last + parts[workers:]


# Tasks run in processes that Ray keeps, backbone by backbone: one is loaded once a process, and alone in memory.
@functools.lru_cache(maxsize=1)
def _loaded_backbone(backbone: Backbone, device: str) -> tuple[FrozenBackbone, Pace]:
    return load_backbone(backbone, device), Pace(torch.device(device))


def _cores_per_gpu() -> float:
    """Of this task's node. A task asks Ray for one core only, so that it fits on whatever node is started for it."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return resources["CPU"] / resources["GPU"]


def write_shards(
    model: FrozenBackbone,
    backbone: Backbone,
    stimuli: Sequence[Stimulus],
    shards: Sequence[int],
    folder: Path,
    pace: Pace,
    decoders: int = 1,
) -> None:
    """Computes and stores the features of the images of some shards, each atomically; the manifest is gone by then.

    `decoders` threads decode images ahead, another one writes a shard while the next is computed. What is in memory at
    a time does not grow with the number of shards.
    """
    remove(folder / MANIFEST)
    sizes = [_by_size(stimuli, shard) for shard in shards]
    groups = list(itertools.chain(*sizes))
    with ThreadPoolExecutor(decoders) as readers, ThreadPoolExecutor(1) as writer:
        images = [stimuli[index] for index in itertools.chain(*groups)]
        pixels = _decoded(readers, images, decoders + max(pace.sizes))
        computed = _computed(model, backbone, stimuli, groups, pixels, pace)
        writing: Future[None] | None = None
        for shard, parts in zip(shards, sizes, strict=True):
            tensors: dict[str, Tensor] = {}
            for entries in itertools.islice(computed, sum(map(len, parts))):
                tensors |= entries
            if writing:
                writing.result()
            writing = writer.submit(write_shard, folder, shard, tensors)
        if writing:
            writing.result()


def _indices(stimuli: Sequence[Stimulus], shard: int) -> range:
    return range(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, len(stimuli)))


def _by_size(stimuli: Sequence[Stimulus], shard: int) -> list[list[int]]:
    """The images of a shard, split by size."""
    by_size = defaultdict(list)
    for index in _indices(stimuli, shard):
        by_size[stimuli[index].size].append(index)
    return list(by_size.values())


def _decoded(pool: ThreadPoolExecutor, stimuli: Sequence[Stimulus], ahead: int) -> Iterator[np.ndarray]:
    """The images' pixels in order, read by the pool before they are asked for, but no more than `ahead` of them."""
    waiting: deque[Future[np.ndarray]] = deque()
    for stimulus in stimuli:
        waiting.append(pool.submit(stimulus.pixels))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _computed(
    model: FrozenBackbone,
    backbone: Backbone,
    stimuli: Sequence[Stimulus],
    groups: Sequence[Sequence[int]],
    pixels: Iterator[np.ndarray],
    pace: Pace,
) -> Iterator[dict[str, Tensor]]:
    """What is stored of each image of the groups, in order; a GPU computes the next ones while these are fetched."""
    order = itertools.chain(*groups)
    start = functools.partial(_begin, model, backbone)
    begun: deque[Begun] = deque()

    def finished(still: int) -> Iterator[dict[str, Tensor]]:
        while len(begun) > still:
            *taps, statistics, moments, pooled = begun.popleft()()
            for position in range(len(pooled)):
                index = next(order)
                # Those of float16 are finite where all features are.
                if not statistics[position].isfinite().all():
                    raise UserError(
                        f"{backbone.name}: features of {stimuli[index].name} overflow float16; check that the weights "
                        "and the preprocessing belong together"
                    )
                entries = {f"{index}.tap{t}": tap[position] for t, tap in enumerate(taps)}
                numbers = {"statistics": statistics, "moments": moments, "pooled": pooled}
                yield entries | {f"{index}.{name}": values[position] for name, values in numbers.items()}

    for group in groups:
        left = len(group)
        while left:
            variant = pace.choose(left)
            left -= variant.images
            images = torch.from_numpy(np.stack([next(pixels) for _ in range(variant.images)]))
            begun += pace.begin(images, variant, start)
            yield from finished(still=1)
    yield from finished(still=0)


def _begin(model: FrozenBackbone, backbone: Backbone, images: Tensor, variant: Variant) -> Begun:
    """Starts computing what is stored of uint8 images (B, H, W, 3) of one size.

    Results: the taps in float16; in float32 the layer norm's statistics (B, 2), the channels' moments (B, 2, C) and the
    pooled features (B, C).
    """
    taps = model.features(images, variant.channels_last)
    halved = [tap.half() for tap in taps]
    # Statistics of what is stored, so that training sees a layer norm of exactly its own input.
    readout = backbone.readout_size((images.shape[1], images.shape[2]))
    moments = moments_of([tap.float() for tap in halved], readout)
    features = described(halved, moments, readout)
    computed = [*halved, torch.stack([features.mean, features.variance], dim=1), moments.float(), pool(taps)]
    if not computed[0].is_cuda:
        return lambda: computed
    # In a stream of their own, so that the device can go on with the next images; into page-locked memory.
    copying = torch.cuda.Stream(computed[0].device)
    copying.wait_stream(torch.cuda.current_stream(computed[0].device))
    with torch.cuda.stream(copying):
        copies = [tensor.to("cpu", non_blocking=True) for tensor in computed]
        copied = copying.record_event()

    def results() -> list[Tensor]:
        copied.synchronize()
        computed.clear()  # not before, lest what is computed next is given this memory
        return copies

    return results
