"""Does `jobs/predict.py` predict every image exactly once, and how fast, if its driver is killed half-way?

    python benchmarks/predict_many.py --images 20000                  # kill -9 at half of the shards

Small images, 96x64 px, and a model of one small view with random weights.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import harness
import numpy as np
import pyarrow.parquet as pq
from harness import Figures
from job_runs import command
from PIL import Image
from test_model import backbone
from three_nodes import finish, running

from acw.features.backbone import load_backbone
from acw.features.view import View
from acw.fusion.classifier import CategoryClassifier
from acw.heads.center_bias import fixed_gaussian
from acw.heads.finalizer import Finalizer
from acw.heads.readout import new_heads
from acw.model import files
from acw.model.model import Model

SIZE = (64, 96)
A_SHARD = 128


def benchmark(arguments: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        numbers = np.random.default_rng(0)
        for number in range(arguments.images):
            path = folder / "images" / f"{number // 1000:03d}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(numbers.integers(0, 256, (8, 12, 3), dtype=np.uint8))
            coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC).save(path)
        _save_model(folder / "model")
        return _killed(folder, arguments)


def _save_model(folder: Path) -> None:
    small = backbone("lite0", 96)
    network = load_backbone(small)
    channels = sum(network.channels)
    even = np.ones(1)
    classifier = CategoryClassifier(
        np.zeros(channels), np.ones(channels), np.zeros((1, channels)), np.zeros(1), accuracy=1.0
    )
    model = Model(
        views=[View((small,))],
        heads={"lite0": new_heads(channels, 10.0, range(15))},
        finalizer=Finalizer(),
        categories=["all"],
        weights=even[None],
        global_weights=even,
        center_bias=fixed_gaussian(),
        finalizer_bias=fixed_gaussian(),
        classifier=classifier,
        provenance={"recipe": {"name": "made up"}, "dataset": None},
    )
    files.save(model, folder, [network])


def _killed(folder: Path, arguments: argparse.Namespace) -> Figures:
    """The command is killed when half of the shards are there, and given again."""
    out, log = folder / "out", folder / "log"
    line = command("predict", folder / "images", out, "--model", folder / "model", "--shard-images", A_SHARD)
    half = -(-arguments.images // A_SHARD) // 2
    start = time.monotonic()
    with running(line, log) as driver:
        while len(list(out.glob("shard-*.parquet"))) < half:
            assert driver.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.2)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    killed = time.monotonic()
    told = finish(line, log, status=0)
    end = time.monotonic()
    print(told)
    images = [image for path in out.glob("shard-*.parquet") for image in pq.read_table(path)["image"].to_pylist()]
    expected = sorted(str(path) for path in (folder / "images").rglob("*.jpg"))
    size = sum(path.stat().st_size for path in out.glob("shard-*.parquet"))
    return {
        "images": len(expected),
        "every image exactly once": sorted(images) == expected,
        "until the kill, s": killed - start,
        "the same command again, s": end - killed,
        "images/s over both": len(expected) / (end - start),
        "bytes an image": size / len(images),
        "peak memory of the driver, GiB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    harness.run(__doc__, benchmark, images=20000)
