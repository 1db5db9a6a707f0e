"""The loss of heads: the negative log-likelihood of the fixations, in nats per fixation, each image counting equally.

`image_loss` is what training minimises, of single heads (trainer.py) and of a fold's mixture (joint.py). The likelihood
needs the log-density at the fixations and one normaliser an image, so no full-resolution map is made: the normaliser
is a sum over coarse cells, whose error `coarsest` keeps below a tolerance. The plain way is `finalize`, `normalise` and
the values of that map at the fixations; a test holds both together.
Shape suffixes: K heads, B images, h x w a readout grid, H x W the density's grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from acw.heads import readout as bank_of_heads
from acw.heads.finalizer import Finalizer, smoothing
from acw.heads.readout import Parameters
from acw.training.bank import Head
from acw.training.batches import Batch, Batches

# The loss's normaliser is a sum over cells of one of these lengths (image px), the first whose error is within the
# tolerance (nats per fixation, of the mean over images, for the worst head), measured on some images against a sum over
# much finer cells; or over the finest of these, where halving them has come to nothing: sums converge. Fresh heads are
# smoother than they will be at the end of their first epoch, so what is measured on them promises nothing.
COARSE_CELLS = (32.0, 24.0, 16.0, 8.0, 4.0)
REFERENCE_CELL = 2.0
FRESH_CELL = 8.0
LOSS_TOLERANCE = 1e-4
SETTLED = LOSS_TOLERANCE / 10
CHECKED_IMAGES = 16
# Of the reference's fine cells there are many.
CHECKED_AT_ONCE = 2


def image_loss(log_likelihood: Tensor) -> Tensor:
    """What a step makes smaller, of each image: (..., B) from the mean log-density at its fixations, nats, (..., B)."""
    return -log_likelihood


def log_likelihood(
    parameters: Parameters, folds: Tensor, batch: Batch, batches: Batches, strides: Tensor | float = 1.0
) -> Tensor:
    """(K, B) float32: mean natural-log density per px at an image's fixations, in nats per fixation.

    folds: (K,) of the heads, whose centre biases are added. strides: of the normaliser's sum, in cells of the density
    grid, one a head or one for all.
    """
    return likelihood_of(bank_of_heads.readout(parameters, batch.features), parameters, folds, batch, batches, strides)


def likelihood_of(
    priority: Tensor,
    parameters: Parameters,
    folds: Tensor,
    batch: Batch,
    batches: Batches,
    strides: Tensor | float = 1.0,
) -> Tensor:
    """`log_likelihood` of the heads' priority maps (K, B, h, w)."""
    device = batches.device
    strides = torch.as_tensor(strides, dtype=torch.float32).expand(len(folds))
    bias_KB = batches.at_fixations("finalizer_bias", batch)[folds.to(device)]
    coarse_biases = []
    for stride in sorted(set(strides.tolist())):
        mine = torch.nonzero(strides == stride)[:, 0]
        of_folds = batches.bias("finalizer_bias", batch.grid, stride)
        coarse_biases.append((mine.to(device), of_folds[folds[mine].to(device)]))
    per_cell_KB = per_cell_log_likelihood(
        parameters, priority, bias_KB, coarse_biases, batch.target_BHW, batches.finalizer
    )
    return per_cell_KB - batch.log_area_B


def strides_of(how: Finalizer, cells: Sequence[float]) -> list[float]:
    """Lengths in px as multiples of the density grid's cell; a density with steps has nothing between its cells."""
    strides = [cell / how.cell for cell in cells]
    return strides if how.upsampling != "nearest" else [*(s for s in strides if s > 1), 1.0]


@torch.no_grad()
def coarsest(parameters: Parameters, members: Sequence[Head], batches: Batches, fresh: bool) -> tuple[Tensor, Tensor]:
    """(K,) each head's coarsest sum, in cells of the density grid, whose loss is within LOSS_TOLERANCE, or the finest;
    (K,) the errors, nats. Fresh heads have FRESH_CELL."""
    folds = torch.tensor([head.fold for head in members])
    development = np.flatnonzero(batches.training_set.fold >= 0)
    chosen = development[np.linspace(0, len(development) - 1, min(CHECKED_IMAGES, len(development))).astype(int)]
    passes = batches.passes(chosen, CHECKED_AT_ONCE)

    def mean_of(strides: Sequence[float]) -> Tensor:
        mean_SK = torch.zeros(len(strides), len(members), dtype=torch.float64, device=batches.device)
        for batch in batches.ahead(passes):
            priority = bank_of_heads.readout(parameters, batch.features)
            for row, stride in zip(mean_SK, strides, strict=True):
                row += likelihood_of(priority, parameters, folds, batch, batches, stride).double().sum(1) / len(chosen)
        return mean_SK

    strides = strides_of(batches.finalizer, (FRESH_CELL,) if fresh else COARSE_CELLS)
    finest = strides_of(batches.finalizer, (REFERENCE_CELL,))[-1]
    mean_SK = mean_of(strides)
    exact_K = mean_SK[-1]
    if strides[-1] > finest and (fresh or bool(((mean_SK[-2] - exact_K).abs() > SETTLED).any())):
        exact_K = mean_of([finest])[0]
    errors_SK = (mean_SK - exact_K).abs().cpu()
    good_SK = errors_SK < LOSS_TOLERANCE
    good_SK[0 if fresh else -1] = True
    first_K = good_SK.int().argmax(0)
    return torch.tensor(strides)[first_K], errors_SK.gather(0, first_K[None])[0]


def per_cell_log_likelihood(
    parameters: Mapping[str, Tensor],
    priority_KBhw: Tensor,
    bias_KB: Tensor,
    coarse_biases: Sequence[tuple[Tensor, Tensor]],
    target_BHW: Tensor,
    finalizer: Finalizer,
) -> Tensor:
    """(K, B) float32: mean natural-log density per cell of the density grid, over each image's fixations.

    target_BHW are the fixations T on the density grid, as weights that sum to 1; bias_KB <T, b> of each head's centre
    bias b on that grid. With s the unnormalised log-density, it is <T, s> - logsumexp(s), and no map of s on that grid
    is made: the first part is exact on the readout's own grid, where T comes by the transposed finalizer, and the
    normaliser is a sum over the cells of another grid, which for so smooth a function differs little
    (`coarsest` measures how much). coarse_biases: of each such grid which heads (indices, int64 (k,)) have it,
    and b, sampled there, of those (k, H, W); together they are all heads.
    """
    height, width = target_BHW.shape[1:]
    heads, images = priority_KBhw.shape[:2]
    vertical_KHh, horizontal_KWw = smoothing(parameters, priority_KBhw, (height, width), finalizer)
    bias_weight_K = parameters["center_bias_weight"]
    # One matrix product an image for all heads, and one a head for all images.
    half_BKhW = (vertical_KHh.mT.reshape(-1, height) @ target_BHW).view(images, heads, -1, width)
    target_KBhw = half_BKhW.transpose(0, 1).reshape(heads, -1, width) @ horizontal_KWw
    at_fixations = (target_KBhw.view_as(priority_KBhw) * priority_KBhw).sum((2, 3))
    at_fixations = at_fixations + bias_weight_K[:, None] * bias_KB
    parts = []
    for heads_k, bias_kHW in coarse_biases:
        # Of all heads, no copies.
        vertical, horizontal, priority, weight = (
            value if len(heads_k) == heads else value.index_select(0, heads_k)
            for value in (vertical_KHh, horizontal_KWw, priority_KBhw, bias_weight_K)
        )
        coarse = bias_kHW.shape[1:]
        if coarse != (height, width):
            vertical = finalizer.sampling(height, coarse[0], vertical.device) @ vertical
            horizontal = finalizer.sampling(width, coarse[1], vertical.device) @ horizontal
        scores_kBHW = vertical[:, None] @ (priority @ horizontal.mT[:, None])
        scores_kBHW = torch.addcmul(scores_kBHW, weight[:, None, None, None], bias_kHW[:, None])
        parts.append(torch.logsumexp(scores_kBHW, (2, 3)) + math.log(height * width / coarse.numel()))
    normaliser_KB = torch.cat(parts)
    if len(parts) > 1:
        normaliser_KB = normaliser_KB.index_select(0, torch.cat([heads_k for heads_k, _ in coarse_biases]).argsort())
    return at_fixations - normaliser_KB
