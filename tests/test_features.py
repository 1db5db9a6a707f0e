"""The feature store: what it holds is what a plain computation gives, and no accident costs more than a shard."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acw.data import Stimulus
from acw.features import batch_size, extraction, store
from acw.features.backbone import Backbone
from acw.features.batch_size import Begun, Pace, Variant
from acw.features.extraction import write_shards
from acw.features.store import SHARD_IMAGES, FeatureStore, intact, open_shard, open_store, shard_path, untouched, verify
from acw.storage.errors import UserError

BACKBONE = Backbone("stub", "stub", ("fine", "coarse", "odd"), "random", long_side=64, stride=10.0)
SIZES = [(60, 80), (80, 60), (60, 80), (75, 100)]
IMAGES = 2 * SHARD_IMAGES + 5
CHANNELS = (3, 6, 2)


class Noise(Stimulus):
    """An image of noise, the same each time it is read."""

    def pixels(self) -> np.ndarray:
        return np.random.default_rng(int(self.digest)).integers(0, 256, (*self.size, 3), dtype=np.uint8)


class Stub:
    """A network whose taps are coarser and finer than the readout and have values of very different sizes."""

    weights_sha256 = "0" * 64
    backbone = BACKBONE
    half = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def features(self, images: torch.Tensor, channels_last: bool = True) -> list[torch.Tensor]:
        rgb = images.permute(0, 3, 1, 2).float() * self.scale
        tall = images.shape[1] > images.shape[2]
        fine = F.adaptive_avg_pool2d(rgb, (11, 9) if tall else (9, 11)) * 7.123
        coarse = F.adaptive_avg_pool2d(torch.cat([rgb, rgb.square() / 999], 1), (4, 3) if tall else (3, 4))
        odd = F.adaptive_max_pool2d(rgb[:, :2] / 3e4, (7, 5) if tall else (5, 7))
        return [tap.permute(0, 2, 3, 1).contiguous() for tap in (fine, coarse, odd)]


STIMULI = [Noise(f"{i}.png", "", SIZES[i % len(SIZES)], "all", None, str(i)) for i in range(IMAGES)]


def write(shards: Sequence[int], folder: Path, stimuli: Sequence[Stimulus] = STIMULI, scale: float = 1.0) -> None:
    write_shards(Stub(scale), BACKBONE, stimuli, shards, folder, Pace(torch.device("cpu")))  # type: ignore[arg-type]


class Extraction:
    """`extract` with the Ray tasks replaced by a loop, which counts shards and can be killed after some."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.written: list[int] = []
        self.kill_after = IMAGES

        def write_all(doubtful: dict[Backbone, list[int]], stimuli: Any, folders: Any, *rest: Any) -> tuple[int, int]:
            for backbone, shards in doubtful.items():
                for shard in shards:
                    if verify(folders[backbone.name], shard):
                        continue
                    if len(self.written) == self.kill_after:
                        raise KeyboardInterrupt
                    write([shard], folders[backbone.name])
                    self.written.append(shard)
            return len(self.written), 0

        monkeypatch.setattr(extraction, "load_backbone", lambda *args: Stub())
        monkeypatch.setattr(extraction, "_extract_shards", write_all)

    def __call__(self, kill_after: int = IMAGES) -> FeatureStore:
        self.written.clear()
        self.kill_after = kill_after
        stores, cost = extraction.extract(self.root, [BACKBONE], STIMULI, "fingerprint")
        assert cost.images == len(self.written)
        return stores["stub"]

    @property
    def folder(self) -> Path:
        return store.store_folder(self.root, BACKBONE, "fingerprint", Stub.weights_sha256)


@pytest.fixture
def extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extraction:
    return Extraction(tmp_path, monkeypatch)


def plain(index: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """An image's taps, and all of them resized to the readout and concatenated (C, h, w), in float64."""
    taps = [tap[0] for tap in Stub().features(torch.from_numpy(STIMULI[index].pixels())[None])]
    stored = [tap.half().double() for tap in taps]
    readout = BACKBONE.readout_size(STIMULI[index].size)
    resized = [F.interpolate(tap.permute(2, 0, 1)[None], readout, mode="nearest")[0] for tap in stored]
    return taps, torch.cat(resized)


def test_the_store_holds_what_a_plain_computation_gives(extract: Extraction) -> None:
    store = extract()
    assert store.images == IMAGES
    assert store.channels == CHANNELS
    for group in store.groups(range(IMAGES)):
        loaded, pooled = store.load(group), store.pooled(group)
        assert [tap.dtype for tap in loaded.taps] == [torch.float32] * 3
        for position, index in enumerate(group):
            taps, resized = plain(index)
            assert loaded.readout == resized.shape[1:]
            for actual, expected in zip(loaded.taps, taps, strict=True):
                assert actual[position].equal(expected.half().float())
            assert loaded.mean[position].item() == pytest.approx(resized.mean().item(), rel=1e-6)
            assert loaded.variance[position].item() == pytest.approx(resized.var(unbiased=False).item(), rel=1e-6)
            torch.testing.assert_close(pooled[position], torch.cat([tap.mean((0, 1)) for tap in taps]))


def test_groups_are_the_images_of_one_shape(extract: Extraction) -> None:
    store = extract()
    chosen = [30, 3, 1, 2, 7, 5, 0]
    # 60x80 and 75x100 have one input size, and so one shape of features; 80x60 has another.
    assert sorted(store.groups(chosen)) == [[1, 5], [30, 3, 2, 7, 0]]


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_killed_extraction_goes_on_where_it_stopped(extract: Extraction, killed_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        extract(kill_after=killed_after)
    with pytest.raises(UserError, match=r"jobs/extract\.py"):
        open_store(extract.folder)
    store = extract()
    assert extract.written == list(range(killed_after, 3))
    assert store.load([IMAGES - 1]).taps[0].shape[0] == 1
    again = extract()
    assert extract.written == []
    assert again == store


def test_a_finished_store_is_not_read_again(extract: Extraction, monkeypatch: pytest.MonkeyPatch) -> None:
    extract()
    monkeypatch.setattr(store, "sha256_file", lambda path: pytest.fail(f"{path} is read"))
    extract()
    assert extract.written == []


@pytest.mark.parametrize("change", ["copied", "noted by an older version"])
def test_a_shard_that_may_have_changed_is_read_once(extract: Extraction, change: str) -> None:
    extract()
    path = shard_path(extract.folder, 1)
    if change == "copied":
        os.utime(path, ns=(0, 0))
    else:
        note = path.with_suffix(".sha256")
        note.write_text(note.read_text(encoding="utf-8").split()[0], encoding="utf-8")
    assert not untouched(extract.folder, 1)
    extract()
    assert extract.written == []
    assert untouched(extract.folder, 1)


def test_a_shard_without_its_checksum_is_not_there(extract: Extraction) -> None:
    """The process was killed between the two writes."""
    extract()
    shard_path(extract.folder, 1).with_suffix(".sha256").unlink()
    extract()
    assert extract.written == [1]


@pytest.mark.parametrize("damage", ["flipped bit", "flipped bits", "truncated", "gone", "other content"])
def test_a_damaged_shard_is_found_and_computed_again(extract: Extraction, damage: str) -> None:
    store = extract()
    images = range(SHARD_IMAGES, 2 * SHARD_IMAGES)
    expected = [store.load([index]) for index in images]
    path = shard_path(extract.folder, 1)
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped bit":
        content[-9] ^= 1
    if damage == "flipped bits":
        half = len(content) // 2
        content[half:] = bytes(byte ^ 1 for byte in content[half:])
    if damage == "truncated":
        content = content[: len(content) // 2]
    if damage == "other content":
        content = bytearray(shard_path(extract.folder, 0).read_bytes())
    if damage != "gone":
        path.write_bytes(content)
    open_shard.cache_clear()
    if damage == "flipped bits":
        damaged = [store.load([index]) for index in images]  # this process has the damaged file open from now on
        assert any(not one.taps[0].equal(other.taps[0]) for one, other in zip(damaged, expected, strict=True))
    if damage in ("truncated", "gone"):
        with pytest.raises(UserError, match=r"unreadable features .* run jobs/extract\.py again"):
            store.load([SHARD_IMAGES])
    repaired = extract()
    assert extract.written == [1]
    for index, before in zip(images, expected, strict=True):
        after = repaired.load([index])
        assert all(one.equal(other) for one, other in zip(after.taps, before.taps, strict=True))
        assert after.variance.equal(before.variance)


def test_the_folder_is_named_after_all_that_decides_the_content(tmp_path: Path) -> None:
    def folder(backbone: Backbone = BACKBONE, stimuli: str = "a", weights: str = "b") -> Path:
        return store.store_folder(tmp_path, backbone, stimuli, weights)

    changes = {"taps": ("fine",), "long_side": 65, "stride": 9.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    others = [folder(dataclasses.replace(BACKBONE, **{name: value})) for name, value in changes.items()]  # type: ignore[arg-type]
    assert len({folder(), folder(stimuli="c"), folder(weights="c"), *others}) == 3 + len(others)
    # Where weights were found says nothing about them; their hash does.
    assert folder(dataclasses.replace(BACKBONE, weights="elsewhere")) == folder()


def test_features_beyond_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stub: features of 0\.png overflow float16"):
        write([0], tmp_path, scale=100.0)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_store_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no features there; run jobs/extract\.py first"):
        open_store(tmp_path)


def test_an_image_that_cannot_be_read_costs_its_own_shard(tmp_path: Path) -> None:
    class Damaged(Noise):
        def pixels(self) -> np.ndarray:
            raise UserError("17.png: the image is damaged")

    stimuli = [*STIMULI[:17], Damaged("17.png", "", SIZES[1], "all", None, "17"), *STIMULI[18:]]
    with pytest.raises(UserError, match=r"17\.png: the image is damaged"):
        write([0, 1, 2], tmp_path, stimuli)
    assert [intact(tmp_path, shard) for shard in range(3)] == [True, False, False]
    assert len(list(tmp_path.iterdir())) == 2


def test_images_are_decoded_ahead_but_not_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, only so many lie in memory."""
    lock = threading.Lock()
    waiting, most = 0, 0

    class Counted(Noise):
        def pixels(self) -> np.ndarray:
            nonlocal waiting, most
            with lock:
                waiting += 1
                most = max(most, waiting)
            return super().pixels()

    def computed(self: Stub, images: torch.Tensor, channels_last: bool = True) -> list[torch.Tensor]:
        nonlocal waiting
        ahead.wait(timeout=60)
        with lock:
            waiting -= len(images)
        return real(self, images)

    real, ahead = Stub.features, threading.Event()
    threading.Timer(0.2, ahead.set).start()  # time to decode more than is allowed, were it allowed
    monkeypatch.setattr(Stub, "features", computed)
    chosen = Pace(torch.device("cpu"))
    monkeypatch.setattr(chosen, "choose", lambda available: Variant(min(4, available), True))
    monkeypatch.setattr(chosen, "begin", lambda images, variant, start: [start(images, variant)])
    stimuli = [Counted(f"{i}.png", "", SIZES[0], "all", None, str(i)) for i in range(IMAGES)]
    write_shards(Stub(), BACKBONE, stimuli, range(3), tmp_path, chosen, decoders=2)  # type: ignore[arg-type]
    assert waiting == 0
    assert 4 < most <= 1 + 2 + 2 * max(chosen.sizes)


# --- Pace --------------------------------------------------------------------------------------------------------


class Device:
    """Takes a given time for a batch, by a clock of its own, and doubles the images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Variant], float]) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.begun: list[Variant] = []
        monkeypatch.setattr(batch_size.time, "perf_counter", lambda: self.now)

    def start(self, images: torch.Tensor, variant: Variant) -> Begun:
        self.begun.append(variant)
        self.now += self.seconds(variant)
        return lambda: [images * 2]

    def run(self, chosen: Pace, batches: int = 60) -> Variant:
        """The variant that is left after some batches, of which none got wrong results."""
        for number in range(batches):
            variant = chosen.choose(available=16)
            images = torch.full((variant.images, 1, 1, 1), number + 1.0)
            results = torch.cat([begun()[0] for begun in chosen.begin(images, variant, self.start)])
            assert results.equal(images * 2)
        return chosen.choose(available=16)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_pace_is_the_fastest_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    overhead = Device(monkeypatch, lambda variant: 5.0 + variant.images)
    assert overhead.run(Pace(CPU)) == Variant(4, True)
    per_image = {Variant(1, False): 4.0, Variant(4, False): 3.0, Variant(16, False): 3.5, Variant(4, True): 2.0}
    mixed = Device(monkeypatch, lambda variant: variant.images * per_image.get(variant, 9.0))
    assert mixed.run(Pace(GPU)) == Variant(4, True)
    assert set(mixed.begun[-40:]) == {Variant(4, True)}
    chosen = Pace(GPU)
    mixed.run(chosen)
    assert chosen.choose(available=3) == Variant(1, False)


def test_pace_tries_no_larger_batches_once_they_cost_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Device(monkeypatch, lambda variant: variant.images**2)
    assert cache.run(Pace(CPU)) == Variant(1, True)
    assert max(variant.images for variant in cache.begun) == 2


@pytest.mark.parametrize(("fault", "device"), [("other bits", CPU), ("no memory", CPU), ("no memory", GPU)])
def test_pace_avoids_what_cannot_be_used(monkeypatch: pytest.MonkeyPatch, fault: str, device: torch.device) -> None:
    """Even what the variant has computed so far is not used."""

    class Faulty(Device):
        def start(self, images: torch.Tensor, variant: Variant) -> Begun:
            begun = super().start(images, variant)
            if variant.images == 1:
                return begun
            if fault == "no memory":
                raise torch.OutOfMemoryError
            return lambda: [result * (1 + 1e-6) for result in begun()]

    chosen = Faulty(monkeypatch, lambda variant: 1.0).run(Pace(device))
    assert chosen.images == 1
