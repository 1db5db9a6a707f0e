"""One view's features of a batch of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Standard:
    """What brings each channel to mean 0 and variance 1 over the training images. mean, scale: (C,) float32."""

    mean: Tensor
    scale: Tensor

    def to(self, device: torch.device) -> Standard:
        return Standard(self.mean.to(device), self.scale.to(device))


@dataclass
class Features:
    """One view's features of B images of one shape.

    taps: a tensor (B, h_t, w_t, C_t) float32 per tap, each at its own resolution, as the networks gave it.
    mean, variance: (B,) float32, over channels and cells of the taps resized to `readout`, standardised and
    concatenated. readout: (h, w), the grid that the taps are resized to. standard: of the concatenated channels, where
    the view has several parts; the others' are read as they are.
    """

    taps: list[Tensor]
    mean: Tensor
    variance: Tensor
    readout: tuple[int, int]
    standard: Standard | None = None
