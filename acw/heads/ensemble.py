"""Mixtures of normalised densities on a grid, in bounded memory: the heads of a bank, the components of a model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from acw.features.tensors import Features
from acw.heads.finalizer import Finalizer, normalise, smoothing
from acw.heads.readout import Parameters, readout

LOG2_E = math.log2(math.e)
# Cells of heads' scores that are worked on at a time: as many as a CPU's cache holds, and enough to keep a GPU busy.
CELLS_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}
# A mixture's density below which float32's underflow, at 1e-38 a term, may cost more than rounding.
UNDERFLOW = 1e-28


@torch.no_grad()
def ensemble(
    parameters: Parameters, features: Features, bias_HW: Tensor, finalizer: Finalizer, area_HW: Tensor | None = None
) -> Tensor:
    """(B, H, W): the uniform mixture of K heads' densities, normalised on the grid of the centre bias given.

    area_HW: of the grid's cells, where they differ (`Finalizer.area`).
    """
    priority_KBhw = readout(parameters, features)
    heads = len(priority_KBhw)
    # As `finalizer.finalize`, but what all images share is computed once, and the maps of few heads and images at once.
    grid = (bias_HW.shape[0], bias_HW.shape[1])
    vertical_KHh, horizontal_KWw = smoothing(parameters, priority_KBhw, grid, finalizer)
    bias_weight_K = parameters["center_bias_weight"][:, None, None, None]
    uniform_K = bias_HW.new_full((heads,), 1 / heads)
    maps_at_once = CELLS_AT_ONCE[bias_HW.device.type] // bias_HW.numel()
    heads_at_once = min(max(maps_at_once, 1), heads)

    def scores(some_KBhw: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, heads, heads_at_once):
            some = slice(start, start + heads_at_once)
            smooth_KBHW = vertical_KHh[some, None] @ (some_KBhw[some] @ horizontal_KWw[some, None].mT)
            yield smooth_KBHW.addcmul_(bias_weight_K[some], bias_HW), uniform_K[some]

    images = priority_KBhw.split(max(maps_at_once // heads_at_once, 1), dim=1)
    return torch.cat([mixture(functools.partial(scores, some), area_HW) for some in images])


def mixture(parts: Callable[[], Iterable[tuple[Tensor, Tensor]]], area_HW: Tensor | None = None) -> Tensor:
    """(B, H, W): log sum_k w_k p_k, of K densities that are each normalised over (H, W) first.

    parts() gives, for some of the K at a time, their log-densities up to a constant each (k, B, H, W), which are
    overwritten, and their weights (k,). It is called again where float32 cannot add densities so small. area_HW: how
    much each cell counts in a density's sum, if not all alike.
    """
    total_B1N = None
    for log_p_KBHW, weight_K in parts():
        p_KBN = log_p_KBHW.flatten(2)
        # PyTorch's exp takes three times as long as its exp2 on some CPUs.
        p_KBN.sub_(p_KBN.amax(2, keepdim=True)).mul_(LOG2_E).exp2_()
        mass_KB = p_KBN.sum(2) if area_HW is None else p_KBN @ area_HW.flatten()
        share_BK = (weight_K[:, None] / mass_KB).T
        if total_B1N is None:
            total_B1N = torch.zeros_like(p_KBN[0])[:, None]
        total_B1N.baddbmm_(share_BK[:, None], p_KBN.transpose(0, 1))
    assert total_B1N is not None
    if total_B1N.amin() < UNDERFLOW:
        return _mixture_of_logs(parts, area_HW)
    return total_B1N.log_().view(log_p_KBHW.shape[1:])


def _mixture_of_logs(parts: Callable[[], Iterable[tuple[Tensor, Tensor]]], area_HW: Tensor | None) -> Tensor:
    """`mixture` without leaving the logarithms: slower, and right for densities of any size."""
    total_BHW = None
    for log_p_KBHW, weight_K in parts():
        weighted = normalise(log_p_KBHW, area_HW) + weight_K.log()[:, None, None, None]
        part_BHW = weighted.logsumexp(0)
        total_BHW = part_BHW if total_BHW is None else torch.logaddexp(total_BHW, part_BHW)
    assert total_BHW is not None
    return total_BHW
