"""What a step of a job took: time, memory, images; printed, kept beside the results and logged."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """seconds: wall clock. images: how many were worked on, summed over backbones; 0 where all was there already.

    peak_rss: the largest resident memory that any one process of the step has had, in bytes.
    """

    seconds: float
    images: int
    peak_rss: int

    def __str__(self) -> str:
        rate = f", {self.images / self.seconds:.1f} images/s" if self.images and self.seconds else ""
        return f"{self.seconds:.0f} s{rate}, at most {self.peak_rss / 2**30:.2f} GiB in one process"


def peak_rss() -> int:
    """The most resident memory that this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
