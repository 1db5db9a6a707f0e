"""A category's own readouts: a model's, trained on by some images of a kind that is new to it.

What draws eyes is in the readouts, and a handful of numbers cannot change it: for heads of scenes that meet objects, 20
images recover 8 % of the lead of heads that know both by numbers, and 46 % so (docs/log.md). A few epochs at a low
rate, as more of either forgets what the model knows. How much is best differs between kinds: `new_category.fit` chooses
among RATES, and may choose none.
Shape suffixes: V views, H x W the density's grid.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from acw.heads.readout import Parameters, concatenate, select
from acw.model.study import Study
from acw.recipes import Recipe
from acw.training.bank import Bank, Head
from acw.training.batches import Batches, TrainingSet
from acw.training.loss import coarsest
from acw.training.trainer import train_briefly

RATES = (3e-4, 1e-3)  # Adam's
EPOCHS = 5
BATCH = 4  # images
HEAD_IMAGES_AT_ONCE = 240  # that pass together; bounds memory, changes nothing but rounding


@dataclass(frozen=True, eq=False)
class OwnReadouts:
    """heads: of each view all that the model has, trained on by all of the images. rate: at which.

    left_out: of each image (V, H, W) log-densities by such heads that were trained on without it.
    """

    rate: float
    heads: dict[str, Parameters]
    left_out: list[Tensor]


def train(study: Study, images: np.ndarray, fold: np.ndarray, rate: float, seed: int) -> OwnReadouts:
    """Trains a model's readouts on, on some images of a data set.

    fold: (N,) of the N images, each of which is left out once, by all heads.
    """
    model, dataset, folds = study.model, study.dataset, int(fold.max()) + 1
    recipe = Recipe("own readouts", folds=folds, batch_size=BATCH, learning_rate=rate, max_epochs=EPOCHS, seed=seed)
    of_dataset = np.full(len(dataset.stimuli), -1)
    of_dataset[images] = fold
    # One entry more: of the heads that see all images.
    biases = [[bias] * (folds + 1) for bias in (model.finalizer_bias, model.center_bias)]
    training = TrainingSet(list(study.seen.sizes), of_dataset, dataset.image, dataset.x, dataset.y, *biases)
    heads: list[dict[str, Parameters]] = [{} for _ in range(folds + 1)]
    for number, (name, store) in enumerate(zip(model.names, study.stores, strict=True), 1):
        what = f"readouts: {name}, {number} of {len(model.names)}, learn at {rate:g} from {len(images)} images"
        print(what, file=sys.stderr, flush=True)
        start = concatenate([model.heads[component] for component in model.shared_components(name)])
        count = len(start["log_sigma"])
        members = tuple(Head.of(recipe, f, head) for f in range(folds + 1) for head in range(count))
        batches = Batches(training, store, model.finalizer, model.device)
        batches.at_once = max(1, HEAD_IMAGES_AT_ONCE // len(members))
        strides, _ = coarsest(start, members[-count:], batches, fresh=False)
        every = concatenate([start] * (folds + 1))
        trained = train_briefly(recipe, Bank(name, members), every, batches, strides.repeat(folds + 1))
        for f, of_fold in enumerate(heads):
            of_fold[name] = select(trained, range(f * count, (f + 1) * count))
    left_out = [study.by(heads[f], index) for index, f in zip(images.tolist(), fold.tolist(), strict=True)]
    return OwnReadouts(rate, heads[-1], left_out)
