"""The feature store: what it holds is what a plain computation gives, and no accident costs more than a shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acw import features
from acw.backbones import Backbone
from acw.data import Stimulus
from acw.features import SHARD_IMAGES, FeatureStore, extract, open_store, shard_path
from acw.storage import UserError

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

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        rgb = images.permute(0, 3, 1, 2).float() * self.scale
        tall = images.shape[1] > images.shape[2]
        fine = F.adaptive_avg_pool2d(rgb, (11, 9) if tall else (9, 11)) * 7.123
        coarse = F.adaptive_avg_pool2d(torch.cat([rgb, rgb.square() / 999], 1), (4, 3) if tall else (3, 4))
        odd = F.adaptive_max_pool2d(rgb[:, :2] / 3e4, (7, 5) if tall else (5, 7))
        return [tap.permute(0, 2, 3, 1).contiguous() for tap in (fine, coarse, odd)]


STIMULI = [Noise(f"{i}.png", "", SIZES[i % len(SIZES)], "all", None, str(i)) for i in range(IMAGES)]


class Extraction:
    """`extract` with the Ray tasks replaced by a loop, which counts shards and can be killed after some."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.written: list[int] = []
        self.kill_after = IMAGES
        real = features.write_shard

        def write_all(missing: Sequence[tuple[Backbone, int]], stimuli: Any, folders: Any, *rest: Any) -> None:
            for done, (backbone, shard) in enumerate(missing):
                if done == self.kill_after:
                    raise KeyboardInterrupt
                real(Stub(), backbone, stimuli, shard, folders[backbone.name])  # type: ignore[arg-type]
                self.written.append(shard)

        monkeypatch.setattr(features, "load_backbone", lambda *args: Stub())
        monkeypatch.setattr(features, "wants_gpus", lambda accelerator: False)
        monkeypatch.setattr(features, "_extract_shards", write_all)

    def __call__(self, kill_after: int = IMAGES) -> FeatureStore:
        self.written.clear()
        self.kill_after = kill_after
        return extract(self.root, [BACKBONE], STIMULI, "fingerprint")["stub"]

    @property
    def folder(self) -> Path:
        return features.store_folder(self.root, BACKBONE, "fingerprint", Stub.weights_sha256)


@pytest.fixture
def extraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extraction:
    return Extraction(tmp_path, monkeypatch)


def plain(index: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """An image's taps, and all of them resized to the readout and concatenated (C, h, w), in float64."""
    taps = [tap[0] for tap in Stub().features(torch.from_numpy(STIMULI[index].pixels())[None])]
    stored = [tap.half().double() for tap in taps]
    readout = BACKBONE.readout_size(STIMULI[index].size)
    resized = [F.interpolate(tap.permute(2, 0, 1)[None], readout, mode="nearest")[0] for tap in stored]
    return taps, torch.cat(resized)


def test_the_store_holds_what_a_plain_computation_gives(extraction: Extraction) -> None:
    store = extraction()
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


def test_groups_are_the_images_of_one_shape(extraction: Extraction) -> None:
    store = extraction()
    chosen = [30, 3, 1, 2, 7, 5, 0]
    # 60x80 and 75x100 have one input size, and so one shape of features; 80x60 has another.
    assert sorted(store.groups(chosen)) == [[1, 5], [30, 3, 2, 7, 0]]


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_killed_extraction_goes_on_where_it_stopped(extraction: Extraction, killed_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        extraction(kill_after=killed_after)
    with pytest.raises(UserError, match=r"jobs/extract\.py"):
        open_store(extraction.folder)
    store = extraction()
    assert extraction.written == list(range(killed_after, 3))
    assert store.load([IMAGES - 1]).taps[0].shape[0] == 1
    again = extraction()
    assert extraction.written == []
    assert again == store


def test_a_shard_without_its_checksum_is_not_there(extraction: Extraction) -> None:
    """The process was killed between the two writes."""
    extraction()
    shard_path(extraction.folder, 1).with_suffix(".sha256").unlink()
    extraction()
    assert extraction.written == [1]


@pytest.mark.parametrize("damage", ["flipped bit", "flipped bits", "truncated", "gone", "other content"])
def test_a_damaged_shard_is_found_and_computed_again(extraction: Extraction, damage: str) -> None:
    store = extraction()
    images = range(SHARD_IMAGES, 2 * SHARD_IMAGES)
    expected = [store.load([index]) for index in images]
    path = shard_path(extraction.folder, 1)
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
        content = bytearray(shard_path(extraction.folder, 0).read_bytes())
    if damage != "gone":
        path.write_bytes(content)
    features._open_shard.cache_clear()
    if damage == "flipped bits":
        damaged = [store.load([index]) for index in images]  # this process has the damaged file open from now on
        assert any(not one.taps[0].equal(other.taps[0]) for one, other in zip(damaged, expected, strict=True))
    if damage in ("truncated", "gone"):
        with pytest.raises(UserError, match=r"unreadable features .* run jobs/extract\.py again"):
            store.load([SHARD_IMAGES])
    repaired = extraction()
    assert extraction.written == [1]
    for index, before in zip(images, expected, strict=True):
        after = repaired.load([index])
        assert all(one.equal(other) for one, other in zip(after.taps, before.taps, strict=True))
        assert after.variance.equal(before.variance)


def test_the_folder_is_named_after_all_that_decides_the_content(tmp_path: Path) -> None:
    def folder(backbone: Backbone = BACKBONE, stimuli: str = "a", weights: str = "b") -> Path:
        return features.store_folder(tmp_path, backbone, stimuli, weights)

    changes = {"taps": ("fine",), "long_side": 65, "stride": 9.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    others = [folder(dataclasses.replace(BACKBONE, **{name: value})) for name, value in changes.items()]  # type: ignore[arg-type]
    assert len({folder(), folder(stimuli="c"), folder(weights="c"), *others}) == 3 + len(others)
    # Where weights were found says nothing about them; their hash does.
    assert folder(dataclasses.replace(BACKBONE, weights="elsewhere")) == folder()


def test_features_beyond_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stub: features of 0\.png .* overflow float16"):
        features.write_shard(Stub(scale=100.0), BACKBONE, STIMULI, 0, tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_store_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no features there; run jobs/extract\.py first"):
        open_store(tmp_path)
