"""A category's own readouts: a model's, trained on by some images of a kind that is new to it.

What draws eyes is in the readouts, and a handful of numbers cannot change it: for heads of scenes that meet objects, 20
images recover 18 % of the lead of heads that know both by numbers, and 46 % so (docs/log.md). A few epochs, and then
back some of the way: heads between those that a model had and those that few images made of them may foretell others of
the kind better than either (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022). How far is best
differs between kinds: `new_category.fit` chooses among SHARES, and may choose none.
Shape suffixes: V views, H x W the density's grid.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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

SHARES = (0.5, 1.0)  # of the way from the model's readouts to the trained ones
RATE = 1e-3  # Adam's
EPOCHS = 5
BATCH = 4  # images
HEAD_IMAGES_AT_ONCE = 240  # that pass together, of one image at least; bounds memory, changes nothing but rounding


@dataclass(frozen=True, eq=False)
class OwnReadouts:
    """heads: of each view all that the model has, a share of the way to what all of the images made of them.

    left_out: of each image (V, H, W) log-densities by such heads that were trained on without it.
    """

    share: float
    heads: dict[str, Parameters]
    left_out: list[Tensor]


def train(study: Study, name: str, images: np.ndarray, fold: np.ndarray, seed: int) -> Iterator[OwnReadouts]:
    """Trains a model's readouts on, on some images of a data set; yields those at each of SHARES.

    name: of the category. fold: (N,) of the N images, each of which is left out once, by all heads. Raises UserError
    where the loss is not finite (Diverged).
    """
    starts, trained = _trained(study, name, images, fold, seed)
    for share in SHARES:
        heads = [
            {view: _between(starts[view], of_fold, share) for view, of_fold in by_view.items()} for by_view in trained
        ]
        left_out = [study.said_by(heads[f], index) for index, f in zip(images.tolist(), fold.tolist(), strict=True)]
        yield OwnReadouts(share, heads[-1], left_out)


def _trained(
    study: Study, name: str, images: np.ndarray, fold: np.ndarray, seed: int
) -> tuple[dict[str, Parameters], list[dict[str, Parameters]]]:
    """The readouts of each view that a model's categories share; and, for each fold, what the other images made of
    them, and last, what all did."""
    model, dataset, folds = study.model, study.dataset, int(fold.max()) + 1
    # A smoothing width that was fixed stays.
    learn_sigma = model.provenance.get("recipe", {}).get("learn_sigma", True)
    recipe = Recipe(
        "own readouts",
        folds=folds,
        batch_size=BATCH,
        learning_rate=RATE,
        max_epochs=EPOCHS,
        learn_sigma=learn_sigma,
        seed=seed,
    )
    of_dataset = np.full(len(dataset.stimuli), -1)
    of_dataset[images] = fold
    # One entry more: of the heads that see all images.
    biases = [[bias] * (folds + 1) for bias in (model.finalizer_bias, model.center_bias)]
    training = TrainingSet(list(study.seen.sizes), of_dataset, dataset.image, dataset.x, dataset.y, *biases)
    starts: dict[str, Parameters] = {}
    trained: list[dict[str, Parameters]] = [{} for _ in range(folds + 1)]
    for number, (view, store) in enumerate(zip(model.names, study.stores, strict=True), 1):
        what = f"{name}: readouts of {view}, {number} of {len(model.names)}, learn from {len(images)} images"
        print(what, file=sys.stderr, flush=True)
        start = concatenate([model.heads[component] for component in model.shared_components(view)])
        count = len(start["log_sigma"])
        members = tuple(Head.of(recipe, f, head) for f in range(folds + 1) for head in range(count))
        batches = Batches(training, store, model.finalizer, model.device)
        batches.at_once = max(1, HEAD_IMAGES_AT_ONCE // len(members))
        strides, _ = coarsest(start, members[-count:], batches, fresh=False)
        every = concatenate([start] * (folds + 1))
        bank = train_briefly(recipe, Bank(view, members), every, batches, strides.repeat(folds + 1))
        starts[view] = start
        for f, of_fold in enumerate(trained):
            of_fold[view] = select(bank, range(f * count, (f + 1) * count))
    return starts, trained


def _between(start: Parameters, end: Parameters, share: float) -> Parameters:
    return {name: value.lerp(end[name], share) for name, value in start.items()}
