"""Scores of the images that were left out of a fold, by that fold's own heads: Table 1 of Galván's ACW has such.

They say less than those of held-out images: heads stopped where these images' scores were best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from acw.cluster.process import compute_with
from acw.data import Dataset, Split
from acw.evaluation.metrics import FLAT
from acw.evaluation.ranks import Ranking
from acw.features.joined import Store
from acw.fusion.category_weights import mix
from acw.model.model import Model

IMAGES_PER_TASK = 16
PROGRESS_SECONDS = 10.0


def validation_scores(
    dataset: Dataset, split: Split, models: Sequence[Model], stores: Sequence[Store]
) -> dict[int, dict[str, float]]:
    """Index -> `loss` (nats per fixation), IG over the fold's KDE, LL, AUC, NSS of each development image.

    models: a fold each, of its own heads, weights and centre biases (`aggregation.fold_models`). stores: in the order
    of the models' backbones. Computed by all cores of the Ray cluster.
    """
    import ray

    @ray.remote(num_cpus=1, max_retries=3)
    def some(model: Model, images: list[int]) -> dict[int, dict[str, float]]:
        compute_with(1)
        with torch.inference_mode():
            return {index: _scores(dataset, index, model, stores) for index in images}

    out = []
    for fold, model in enumerate(models):
        images, shared = split.validation(fold).tolist(), ray.put(model)
        out += [some.remote(shared, images[k : k + IMAGES_PER_TASK]) for k in range(0, len(images), IMAGES_PER_TASK)]
    scores: dict[int, dict[str, float]] = {}
    shown = time.monotonic()
    while out:
        (ready, *_), out = ray.wait(out)
        scores |= ray.get(ready)
        if time.monotonic() - shown > PROGRESS_SECONDS or not out:
            shown = time.monotonic()
            print(f"validation: {len(scores)}/{len(split.development)} images", flush=True)
    return dict(sorted(scores.items()))


def _scores(dataset: Dataset, index: int, model: Model, stores: Sequence[Store]) -> dict[str, float]:
    stimulus = dataset.stimuli[index]
    x, y, _ = dataset.fixations_of(index)
    fixated = y.astype(int), x.astype(int)
    densities = model.stored_log_densities([store.load([index]) for store in stores], stimulus.size)
    weights = torch.from_numpy(model.mixing_weights(stimulus.category, np.empty(0))).float()
    log_density = mix(model.finalizer.upsample(densities, stimulus.size), weights).double()
    density = log_density.exp()
    at_fixations, pixels = density[fixated], density.numel()
    log_likelihood = float(log_density[fixated].mean())
    baseline = float(model.center_bias.of_size(stimulus.size)[fixated].astype(np.float64).mean())
    doubled = Ranking(at_fixations).doubled(density.flatten())
    std = density.std(correction=0)
    return {
        "loss": -log_likelihood,
        "IG": (log_likelihood - baseline) / math.log(2),
        "LL": (log_likelihood + math.log(pixels)) / math.log(2),
        "AUC": float(doubled.sum()) / (2 * len(x) * pixels),
        "NSS": float((at_fixations.mean() - density.mean()) / std) if std * pixels > FLAT else 0.0,
    }
