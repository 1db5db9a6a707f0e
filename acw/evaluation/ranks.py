"""Ranks of any number of values among a few, for AUC: by the leading bits of a density."""

from __future__ import annotations

import torch
from torch import Tensor


class Ranking:
    """A few positives, against which the rank of any number of values is looked up.

    A density is known by its leading 32 bits, which order like densities and are as fine as the logarithm of a full-HD
    image's density in float32: what these do not tell apart is a tie. A table has the rank of every bin of the bits
    that holds no positive; the few values in the other bins are searched for.
    """

    BINS = 1 << 16

    def __init__(self, positives: Tensor) -> None:
        """positives: float64 (n,), n > 0, not negative, without NaN."""
        assert len(positives)
        self.count = len(positives)
        self.keys = _keys(positives).sort().values
        first, last = int(self.keys[0]), int(self.keys[-1])
        shift = 0
        while (last >> shift) - (first >> shift) >= self.BINS:
            shift += 1
        bins = (self.keys >> shift) - (first >> shift) + 1
        # One bin on either side is for all that is below or above.
        held = torch.bincount(bins, minlength=int(bins[-1]) + 2)
        self.table = torch.where(held > 0, -1, 2 * (self.count - held.cumsum(0))).int()
        self.shift = shift + 32
        self.offset = _ROUND - (((first >> shift) - 1) << self.shift)

    def doubled(self, values: Tensor) -> Tensor:
        """(m,) int32: twice the number of positives above each value, plus the number of its ties; float64 (m,)."""
        bins = values.view(torch.int64) + self.offset
        bins.bitwise_right_shift_(self.shift).clamp_(0, len(self.table) - 1)
        result = self.table.index_select(0, bins)
        unknown = (result < 0).nonzero()[:, 0]
        keys = _keys(values[unknown])
        below, not_above = (torch.searchsorted(self.keys, keys, right=right, out_int32=True) for right in (False, True))
        result[unknown] = 2 * self.count - below - not_above
        return result


_ROUND = 1 << 31


def _keys(densities: Tensor) -> Tensor:
    """int64: the leading 32 bits, rounded, lest the rounding of a mixture part what is equal in all components."""
    return (densities.view(torch.int64) + _ROUND) >> 32
