"""What `acw predict` takes beyond the model: its start, and each image's file, overlay and PNG.

    python benchmarks/predict_command.py --model RUN --images FOLDER                   # 100 images, one thread
    python benchmarks/predict_command.py --model RUN --images FOLDER --threads 2 --count 20

One image by the command in a process of its own, with the share of it that imports take; then images by the command's
`predict` and by `Model.predict_batch` in turn. The first of each is left out, as files and weights are then read.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import harness
from harness import Figures

import acw
from acw.pipeline.predict import predict
from acw.pipeline.sources import sources


def benchmark(arguments: argparse.Namespace) -> Figures:
    images = sources([arguments.images])[: arguments.count]
    with tempfile.TemporaryDirectory() as folder:
        figures = _start(arguments, images[0].location, folder)
        model = acw.load(arguments.model)

        def command() -> None:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
                assert predict(model, images, Path(folder), ["overlay"], None) == 0

        batch = [image.location for image in images]
        cases = {"predict_batch": lambda: deque(model.predict_batch(batch), 0), "acw predict": command}
        seconds = harness.alternate(cases, arguments.rounds)
    figures |= {f"{name}, {len(images)} images, s": value for name, value in seconds.items()}
    figures["acw predict / predict_batch"] = seconds["acw predict"] / seconds["predict_batch"]
    return figures


def _start(arguments: argparse.Namespace, image: str, out: str) -> Figures:
    """Of the command on one image, when its files were read before."""
    line = ["-m", "acw.cli", "predict", image, "--model", arguments.model, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    taken = []
    for _ in range(1 + arguments.rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, *line], check=True, capture_output=True, env=environment)
        taken.append(time.perf_counter() - start)
    timed = [sys.executable, "-X", "importtime", *line]
    told = subprocess.run(timed, check=True, capture_output=True, env=environment, encoding="utf-8").stderr
    own = re.findall(r"^import time:\s+(\d+) \|", told, re.M)
    return {
        "acw predict, 1 image, s": statistics.median(taken[1:]),
        "of that imports (while timed), s": sum(map(int, own)) / 1e6,
    }


if __name__ == "__main__":
    harness.run(__doc__, benchmark, model="", images="", count=100, rounds=3)
