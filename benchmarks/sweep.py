"""A sweep of 32 configurations as a user meets it, through Ray Tune: one population in one bank against 32 trials.

    python benchmarks/sweep.py                          # the built-in displays, one worker of all cores, 3 minutes
    python benchmarks/sweep.py --backbone lite2_fine    # a finer readout
    python benchmarks/sweep.py --long-side 226          # the paper's coarse one
    python benchmarks/sweep.py --dataset FOLDER --epochs 3   # your images: minutes, beside which Ray's start is little

Both ways train the same number of heads for the same epochs, on features that are extracted before. Ray's start is
timed by a sweep of one configuration and left out of both. In so few epochs no head stops early (`RUNGS` in
acw/search/population.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

JOBS = Path(__file__).resolve().parents[1] / "jobs"


def benchmark(arguments: argparse.Namespace) -> harness.Figures:
    with tempfile.TemporaryDirectory() as root:
        recipe = ["gaze", "--dataset", arguments.dataset] if arguments.dataset else ["demo"]
        recipe += ["--backbones", arguments.backbone, "--long-side", arguments.long_side, "--root", root]
        recipe += ["--workers", 1, "--max-epochs", arguments.epochs]

        def seconds(job: str, *more: object) -> float:
            start = time.perf_counter()
            command = [sys.executable, str(JOBS / f"{job}.py"), *map(str, [*recipe, *more])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

        def sweep(seed: int, population: int, samples: int) -> float:
            # Another seed, and with it another split, is another search; the features are the same.
            return seconds("tune", "--seed", seed, "--heads-per-worker", population, "--samples", samples)

        count = arguments.configurations
        seconds("extract", "--heads-per-worker", 1)
        first = sweep(0, 1, 1)
        # With them the recipe's own configuration, in the same bank or as a trial of its own.
        apart, together = sweep(1, 1, count - 1), sweep(2, count, count - 1)
        start = min(first, sweep(3, 1, 1))  # the first one may find nothing in the disk's cache
    # A sweep of one is its start and two trials: its own and the recipe's.
    one = (apart - start) / (count - 2)
    return {
        "configurations": count,
        "sweep of one, s": start,
        "one trial a configuration, s": apart,
        "one population, s": together,
        "whole sweeps, ratio": apart / together,
        "without the start, ratio": count * one / (together - start + 2 * one),
    }


if __name__ == "__main__":
    harness.run(__doc__, benchmark, configurations=32, epochs=2, backbone="lite0", long_side=0, dataset="")
