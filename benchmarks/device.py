"""What gpu.py measures on: the device, at which sizes, how it is timed, and what is kept of what does not hold."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import torch
from harness import Figures
from torch import Tensor

from acw.cluster.costs import peak_rss
from acw.features.zoo import BACKBONE_SETS

# Device against CPU, in float32: of features in units of a layer's largest value, of gradients in units of a bank's
# largest one; losses and log-densities in nats, scores in their own units.
TOLERANCE = 1e-4
# The largest come last: of 420 million parameters, drawing them at random takes longer than all that is measured.
MODERN = sorted(
    (part for view in BACKBONE_SETS["modern"] for part in view.split("+")), key=lambda name: "rn50x64" in name
)


@dataclass(frozen=True)
class Sizes:
    """What is computed; sizes in px. matrix: side; copied: bytes; images: of an extraction and of a batch predicted."""

    matrix: int
    copied: int
    paper: tuple[str, ...]
    modern: tuple[str, ...]
    image: tuple[int, int]
    predicted: tuple[tuple[int, int], ...]
    images: tuple[int, int]
    heads: int
    steps: int
    rounds: int


FULL = Sizes(
    8192, 2**30, BACKBONE_SETS["paper"], tuple(MODERN), (1080, 1920), ((600, 800), (1080, 1920)), (64, 8), 30, 10, 3
)
TINY = Sizes(128, 2**20, ("resnext50_32x4d",), ("dinov2_s",), (96, 128), ((64, 80), (96, 128)), (4, 2), 2, 1, 1)


@dataclass
class Bench:
    """The device, how it is timed, and what was found not to hold."""

    device: torch.device
    sizes: Sizes
    failures: list[str]

    def seconds(self, case: Callable[[], object]) -> float:
        """Median seconds of a case, to its end on the device."""

        def to_the_end() -> None:
            case()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return harness.alternate({"case": to_the_end}, self.sizes.rounds)["case"]

    def equal(self, what: str, difference: float) -> Figures:
        """A difference between device and CPU, which must be within TOLERANCE."""
        if not difference <= TOLERANCE:  # NaN is no equality
            self.failures.append(f"{what}: device and CPU differ by {difference:.2g}, more than {TOLERANCE:g}")
        return {f"{what}: device against CPU, float32": difference}

    def same(self, what: str, first: Sequence[Tensor], second: Sequence[Tensor]) -> Figures:
        """Two runs on the device, which must be equal to the last bit."""
        equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        if not equal:
            self.failures.append(f"{what}: two runs on the device differ")
        return {f"{what}: two runs equal to the last bit": equal}

    def section(self, name: str, figures: Callable[[], Figures]) -> Figures:
        """A section's figures, seconds and peak memory; where it fails, the failure is kept and the others go on."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start, result = time.perf_counter(), {}
        try:
            result = figures()
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_rss()
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.1f} s", flush=True)
        return result | {f"{name}, peak memory, GiB": peak / 2**30, f"{name}, benchmark's seconds": seconds}
