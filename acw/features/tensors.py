"""One backbone's features of a batch of images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Features:
    """One backbone's features of B images of one shape.

    taps: a tensor (B, h_t, w_t, C_t) float32 per tap, each at its own resolution.
    mean, variance: (B,) float32, over channels and cells of the taps resized to `readout` and concatenated.
    readout: (h, w), the grid that the taps are resized to.
    """

    taps: list[Tensor]
    mean: Tensor
    variance: Tensor
    readout: tuple[int, int]
