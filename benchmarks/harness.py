"""What all benchmarks share: alternating timings, medians, a table on stdout and the same figures as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


def alternate(cases: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each case. Each is run once to warm up, then all in turn, `rounds` times.

    Taking turns lets a machine's slow minute fall on all of them, so that ratios hold where seconds do not.
    """
    for case in cases.values():
        case()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def run(description: str, benchmark: Callable[[argparse.Namespace], Figures], **options: Any) -> None:
    """A benchmark's command line: `--threads N`, `--json FILE` and the given options (name=default of its type)."""
    import torch

    from acw.provenance import commit

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": arguments.threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    print("  ".join(f"{name}={value}" for name, value in machine.items()), flush=True)
    figures = benchmark(arguments)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n", encoding="utf-8"
        )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
