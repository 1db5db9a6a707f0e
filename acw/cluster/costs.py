"""What a step of a job took: time, memory, images; printed, kept beside the results and logged."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acw.cluster import event_log
from acw.storage.files import fetch, write_json

FILE = "resources.json"


@dataclass(frozen=True)
class Cost:
    """seconds: wall clock. images: how many were worked on, each as often as `unit` says; 0 where all was there.

    peak_rss: the largest resident memory that any one process of the step has had, in bytes.
    """

    seconds: float
    images: int
    peak_rss: int
    unit: str = "images"

    def __add__(self, other: Cost) -> Cost:
        """Of two steps one after the other."""
        peak = max(self.peak_rss, other.peak_rss)
        return Cost(self.seconds + other.seconds, self.images + other.images, peak, self.unit)

    def __str__(self) -> str:
        rate = f", {self.images / self.seconds:.1f} {self.unit}/s" if self.images and self.seconds else ""
        return f"{self.seconds:.0f} s{rate}, at most {self.peak_rss / 2**30:.2f} GiB in one process"


def peak_rss() -> int:
    """The most resident memory that this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def note(run: Path, step: str, cost: Cost) -> None:
    """Prints a step's cost and keeps it in the run's folder; a step that had nothing left to do keeps its old entry."""
    print(f"{step}: {cost}", flush=True)
    event_log.event("cost", step=step, **dataclasses.asdict(cost))
    if cost.images:
        write_json(run / FILE, noted(run) | {step: dataclasses.asdict(cost) | {"cores": _cores()}})


def _cores() -> int:
    """Of the Ray cluster that this process is on, if CPUs do its work; else 0."""
    import ray

    resources = ray.cluster_resources() if ray.is_initialized() else {}
    return 0 if resources.get("GPU") else int(resources.get("CPU", 0))


def noted(run: Path) -> dict[str, Any]:
    """What `note` has kept: step -> fields of its cost, and the cores that it had; empty where nothing is."""
    path = fetch(run / FILE)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
