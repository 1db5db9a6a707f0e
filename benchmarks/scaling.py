"""Training 1, 2 and 4 times the images: seconds an image stay, and so does the memory.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --images 256 --json scaling.json

Stores of random features of ResNeXt-50's shape at the paper's readout, 8x15 cells of full-HD images, in a temporary
folder (0.6 MB an image); each is trained on by a bank of 15 heads for two epochs in a process of its own, whose peak
resident memory, memory-mapped features included, and second epoch count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import numpy as np
import torch
from safetensors.torch import save_file

from acw.cluster.process import compute_with
from acw.features.store import SHARD_IMAGES, FeatureStore, describe, shard_path
from acw.heads.center_bias import fixed_gaussian
from acw.recipes import derive, named_recipe
from acw.training.bank import plan_banks
from acw.training.batches import TrainingSet
from acw.training.trainer import train_epochs

SIZE, READOUT, FIXATIONS = (1080, 1920), (8, 15), 300
TAPS = ((8, 15, 512), (8, 15, 512), (8, 15, 512), (4, 8, 1024))


def write_store(folder: Path, images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for first in range(0, images, SHARD_IMAGES):
        tensors = {}
        for index in range(first, min(first + SHARD_IMAGES, images)):
            taps = [torch.rand(1, *shape, generator=generator).half() for shape in TAPS]
            features = describe([tap.float() for tap in taps], READOUT)
            tensors |= {f"{index}.tap{t}": tap[0] for t, tap in enumerate(taps)}
            tensors[f"{index}.statistics"] = torch.stack([features.mean[0], features.variance[0]])
        save_file(tensors, shard_path(folder, first // SHARD_IMAGES))


def train(folder: Path, images: int) -> None:
    """What the process of its own does: prints the second epoch's seconds and the peak memory as JSON."""
    compute_with(1)
    generator = np.random.default_rng(0)
    recipe = derive(named_recipe("cat2000"), {"backbones": "resnext50_32x4d", "max_epochs": 2})
    fixations = images * FIXATIONS
    training_set = TrainingSet(
        [SIZE] * images,
        (np.arange(images) % recipe.folds).astype(np.int8),
        np.repeat(np.arange(images), FIXATIONS),
        (generator.random(fixations) * SIZE[1]).astype(np.float32),
        (generator.random(fixations) * SIZE[0]).astype(np.float32),
        [fixed_gaussian()] * recipe.folds,
        [fixed_gaussian()] * recipe.folds,
    )
    channels = tuple(shape[2] for shape in TAPS)
    sizes = tuple(shape[:2] for shape in TAPS)
    store = FeatureStore(folder, images, channels, (sizes,) * images, (READOUT,) * images)
    (bank,) = plan_banks(recipe)
    *_, state = train_epochs(recipe, bank, training_set, store, folder, torch.device("cpu"))
    print(json.dumps({name: state.history[-1][name] for name in ("seconds", "peak_rss")}))


def benchmark(arguments: argparse.Namespace) -> harness.Figures:
    figures: harness.Figures = {}
    for times in (1, 2, 4):
        images = times * arguments.images
        with tempfile.TemporaryDirectory() as folder:
            write_store(Path(folder), images)
            command = [sys.executable, __file__, "--child", folder, "--images", str(images)]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout)
        figures[f"{images} images: ms an image"] = result["seconds"] / images * 1e3
        figures[f"{images} images: peak GiB"] = result["peak_rss"] / 2**30
    peaks = [value for name, value in figures.items() if "peak" in name]
    figures["memory of 2x / 1x"], figures["memory of 4x / 2x"] = peaks[1] / peaks[0], peaks[2] / peaks[1]
    return figures


if __name__ == "__main__":
    if "--child" in sys.argv:
        train(Path(sys.argv[sys.argv.index("--child") + 1]), int(sys.argv[sys.argv.index("--images") + 1]))
    else:
        harness.run(__doc__, benchmark, images=320)
