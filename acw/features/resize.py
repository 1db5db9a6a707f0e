"""Resizing on the grids of features."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_index(source: int, target: int, device: torch.device | str = "cpu") -> Tensor:
    """(target,) int64: which of `source` cells PyTorch's `interpolate(mode="nearest")` takes for each target cell."""
    # Its own float32 arithmetic, which takes the cell before where the quotient is a whole number but for rounding.
    scale = torch.tensor(source, dtype=torch.float32, device=device) / target
    return (torch.arange(target, dtype=torch.float32, device=device) * scale).long().clamp_max(source - 1)
