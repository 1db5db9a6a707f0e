"""A small training set with the features of a stub network, for tests of what trains on them.

As a script it is a job that trains a recipe's 60 heads on it, on the cluster that RAY_ADDRESS names:
`tiny_training.py FOLDER [field=value ...]`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from acw.cli import run
from acw.data import Stimulus
from acw.features import extraction, store
from acw.features.backbone import Backbone, FrozenBackbone
from acw.features.batch_size import Pace
from acw.features.store import FeatureStore, shard_path
from acw.heads import finalizer
from acw.heads.center_bias import GRID, CenterBias
from acw.recipes import Recipe, derive
from acw.training.bank import Bank, Head, plan_banks
from acw.training.batches import TrainingSet
from acw.training.trainer import train_epochs

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(
    Recipe("tiny"),
    backbones=("lite0", "lite1", "lite2", "lite2_fine"),
    batch_size=4,
    max_epochs=3,
    learning_rate=5e-3,
)
MEMBERS = tuple(Head.of(RECIPE, fold, seed) for fold in range(RECIPE.folds) for seed in range(RECIPE.seeds))
BANK = Bank("stub", MEMBERS)
# Two shapes, neither of them a multiple of the density's cell.
SIZES = [(125, 163), (98, 131)]
IMAGES = 36
BACKBONE = Backbone("stub", "stub", ("fine", "coarse"), "random", long_side=64, stride=10.0)


class Spots(Stimulus):
    """A dark image with bright spots, the same each time it is read."""

    def pixels(self) -> np.ndarray:
        generator = np.random.default_rng(zlib.crc32(self.name.encode()))
        blocks = generator.random((4, 5, 3)) ** 4
        return (255 * np.kron(blocks, np.ones((33, 34, 1)))[: self.size[0], : self.size[1]]).astype(np.uint8)


class StubNetwork:
    """Averages over cells, and their products with each other, in place of a backbone."""

    weights_sha256 = "0" * 64

    def features(self, images: torch.Tensor, channels_last: bool = True) -> list[torch.Tensor]:
        channels = images.permute(0, 3, 1, 2).float() / 64
        taps = [F.adaptive_avg_pool2d(channels, size) for size in ((10, 14), (3, 5))]
        return [torch.cat([tap, tap * tap.roll(1, 1)], 1).permute(0, 2, 3, 1).contiguous() for tap in taps]


def stimuli() -> list[Stimulus]:
    return [Spots(f"{i}.png", "", SIZES[i % 2], "all", None, "") for i in range(IMAGES)]


def make_store(folder: Path) -> FeatureStore:
    """The store, which is filled unless it is full."""
    network, images = cast(FrozenBackbone, StubNetwork()), stimuli()
    shards = range(-(-IMAGES // store.SHARD_IMAGES))
    if not shard_path(folder, shards[-1]).exists():
        extraction.write_shards(network, BACKBONE, images, shards, folder, Pace(CPU))
    readouts = tuple(BACKBONE.readout_size(image.size) for image in images)
    return FeatureStore(folder, IMAGES, (6, 6), (((10, 14), (3, 5)),) * IMAGES, readouts)


def random_bias(seed: int) -> CenterBias:
    coarse = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, (GRID, GRID), mode="bicubic")[0, 0]
    return CenterBias(finalizer.normalise(smooth).numpy(), None, None)


def make_training_set() -> TrainingSet:
    """Every sixth image held out; 5 to 20 fixations on the brightest spots of each image."""
    generator = np.random.default_rng(0)
    image, x, y = [], [], []
    for index, stimulus in enumerate(stimuli()):
        brightness = stimulus.pixels().astype(float).mean(2).ravel() ** 2
        count = generator.integers(5, 20)
        pixel = generator.choice(len(brightness), count, p=brightness / brightness.sum())
        image.append(np.full(count, index, dtype=np.int32))
        y.append((pixel // stimulus.size[1] + generator.random(count)).astype(np.float32))
        x.append((pixel % stimulus.size[1] + generator.random(count)).astype(np.float32))
    fold = (np.arange(IMAGES) % 6 - 1).astype(np.int8)
    biases = [random_bias(seed) for seed in range(2 * RECIPE.folds)]
    sizes = [stimulus.size for stimulus in stimuli()]
    columns = np.concatenate(image), np.concatenate(x), np.concatenate(y)
    return TrainingSet(sizes, fold, *columns, biases[: RECIPE.folds], biases[RECIPE.folds :])


def stores_of(recipe: Recipe, folder: Path) -> dict[str, FeatureStore]:
    """The same features under the name of every backbone."""
    return dict.fromkeys(recipe.backbones, make_store(folder / "features"))


def train_alone(recipe: Recipe, folder: Path) -> None:
    """Trains all banks of a recipe in this process, one after the other, with one thread: what a cluster must equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stores = stores_of(recipe, folder)
    for bank in plan_banks(recipe):
        for _ in train_epochs(recipe, bank, make_training_set(), stores[bank.backbone], folder, CPU):
            pass
    torch.set_num_threads(threads)


def main(argv: Sequence[str]) -> None:
    from acw.cluster.joining import connect
    from acw.training.distributed import train

    folder = Path(argv[0])
    recipe = derive(RECIPE, dict(word.split("=") for word in argv[1:]))
    connect()
    train(recipe, make_training_set(), stores_of(recipe, folder), folder)
    print("trained", flush=True)


if __name__ == "__main__":
    run(main)
