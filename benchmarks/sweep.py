"""A sweep of 32 configurations as a user meets it, through Ray Tune: one population in one bank against 32 trials.

    python benchmarks/sweep.py                          # the built-in displays, one worker, some 5 minutes
    python benchmarks/sweep.py --backbone lite2_fine    # a finer readout
    python benchmarks/sweep.py --long-side 226          # the paper's coarse one

Both ways train the same number of heads for the same epochs, on features that are extracted before. Ray's start is
timed by a sweep of one configuration and left out of both.
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
        recipe = ["demo", "--backbones", arguments.backbone, "--long_side", arguments.long_side, "--root", root]
        recipe += ["--workers", 1, "--max_epochs", arguments.epochs]

        def seconds(job: str, *more: object) -> float:
            start = time.perf_counter()
            command = [sys.executable, str(JOBS / f"{job}.py"), *map(str, [*recipe, *more])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

        def sweep(population: int, samples: int) -> float:
            return seconds("tune", "--heads_per_worker", population, "--samples", samples)

        count = arguments.configurations
        seconds("extract", "--heads_per_worker", 1)
        start = sweep(1, 1)
        apart, together = sweep(1, count), sweep(count, count)
    # A sweep of one is its start and one trial.
    one = (apart - start) / (count - 1)
    return {
        "configurations": count,
        "sweep of one, s": start,
        "one trial a configuration, s": apart,
        "one population, s": together,
        "whole sweeps, ratio": apart / together,
        "without the start, ratio": count * one / (together - start + one),
    }


if __name__ == "__main__":
    harness.run(__doc__, benchmark, configurations=32, epochs=2, backbone="lite0", long_side=0)
