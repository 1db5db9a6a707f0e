"""Dropout of a readout's input channels (Srivastava et al. 2014): what keeps heads that read many from overfitting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from acw.heads.readout import Parameters
from acw.training.bank import Head

FIRST = "conv0.weight"


def dropped(parameters: Parameters, members: Sequence[Head], seed: int, epoch: int, step: int) -> Parameters:
    """The heads of a training step, each without some of its normalised input channels and with the rest larger.

    As the first convolution is linear, a channel that is 0 is a weight that is 0. Which ones: a function of the
    recipe's seed, the head's fold and seed, the epoch and the step within it, so that a head is trained alike in
    whatever bank, and again.
    """
    if not any(head.dropout for head in members):
        return parameters
    weight_KOC = parameters[FIRST]
    kept_KC = torch.ones(len(members), weight_KOC.shape[2])
    for kept_C, head in zip(kept_KC, members, strict=True):
        if head.dropout:
            drawn = np.random.default_rng([seed, head.fold, head.seed, epoch, step]).random(len(kept_C))
            kept_C.copy_(torch.from_numpy((drawn >= head.dropout) / (1 - head.dropout)))
    return parameters | {FIRST: weight_KOC * kept_KC[:, None].to(weight_KOC.device)}
