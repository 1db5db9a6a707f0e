"""How images go through a network fastest on the machine at hand: tried out on the first ones, then kept to."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Computing that was begun: to be called for its results, tensors on the CPU that have the images first.
Begun = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Variant:
    """How many images at once, and in which memory layout."""

    images: int
    channels_last: bool


class Pace:
    """Chooses the variant for each batch of a network's images, by the time that the first batches took.

    All variants compute in float32. More images at once help where kernels are too small for the device, and cost time
    where activations outgrow what the caches or the allocator keep: they grow only while that pays. On a CPU,
    `channels_last` is faster for every backbone, and a variant must give bit for bit what single images give, so that
    features computed again are the same. A GPU's kernels may round differently, by less than float16 shows.
    """

    TRIES = 3
    GAIN = 0.95  # of the time: for less, a larger batch is not worth its memory

    def __init__(self, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.sizes = (1, 4, 16) if gpu else (1, 2, 4)
        self.layouts = (False, True) if gpu else (True,)
        self.plainest = Variant(1, self.layouts[0])
        # In units of a tensor's largest value: there, float16 has steps of this size.
        self.tolerance = 2.0**-10 if gpu else 0.0
        self._seconds: dict[Variant, list[float]] = defaultdict(list)

    def choose(self, available: int) -> Variant:
        """The variant for the next images, when `available` of one size are left: one to be tried, or the fastest."""
        tried = []
        for layout in self.layouts:
            before = math.inf
            for variant in (Variant(size, layout) for size in self.sizes if size <= available):
                if len(self._seconds[variant]) < self.TRIES:
                    return variant
                if self._fastest(variant) >= self.GAIN * before:
                    break
                tried.append(variant)
                before = self._fastest(variant)
        return min(tried, key=self._fastest)

    def begin(self, images: Tensor, variant: Variant, start: Callable[[Tensor, Variant], Begun]) -> list[Begun]:
        """Has `start` begin with images (B, H, W, 3) in a variant, and measures that if it is still being tried.

        One result, or one per image where the variant turns out to need too much memory or to compute something else.
        """
        seconds = self._seconds[variant]
        begin = time.perf_counter()
        try:
            begun = start(images, variant)
            if len(seconds) >= self.TRIES:
                return [begun]
            results = begun()
            seconds.append((time.perf_counter() - begin) / images.numel())
            known = len(seconds) > 1 or variant == self.plainest
            usable = known or self._agree(results, start(images[:1], self.plainest)())
        except torch.OutOfMemoryError:
            if variant == self.plainest:
                raise
            usable = False
        if usable:
            return [begun]
        seconds += [math.inf] * self.TRIES
        return [start(image[None], self.plainest) for image in images]

    def _fastest(self, variant: Variant) -> float:
        seconds = self._seconds[variant]
        return math.inf if math.inf in seconds else min(seconds)

    def _agree(self, results: Sequence[Tensor], single: Sequence[Tensor]) -> bool:
        """Whether the first of the images has got what it gets alone."""
        return all(
            bool((ours[0] - theirs[0]).abs().max() <= self.tolerance * theirs[0].abs().max())
            for ours, theirs in zip(results, single, strict=True)
        )
