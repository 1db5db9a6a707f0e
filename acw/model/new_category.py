"""Gives a finished model one more category: a handful of numbers, fitted to some images of a kind that is new to it,
and readouts of its own where these pay, too.

What that gains is measured on images that it was not fitted on, at the fixations, over the model as it is, which
infers a category for each. Shape suffixes as in `acw.fusion.adaptation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acw.fusion.adaptation import Adaptation, Numbers
from acw.fusion.adaptation_fit import Maps, adaptation_of, area, fit_new, on_grid, own_on_grid, theta_of
from acw.fusion.category_weights import dealt
from acw.fusion.classifier import CategoryClassifier
from acw.model.model import Model
from acw.model.own_readouts import OwnReadouts
from acw.model.study import Seen
from acw.storage.errors import UserError

FEWEST = 10  # images


@dataclass(frozen=True, eq=False)
class NewCategory:
    """adaptation: the numbers of the category and, in the last row, of all images, which are the model's own; weights
    are of the model's components that all categories share or, with readouts of its own, of those, one a view.

    area: how many times as large a part of its images the category's density fills as by the numbers for all.
    strength: of the prior. gain: (N,) nats per fixation over the model as it is, of each image by readouts and numbers
    that were fitted without it, chosen by the other images' gains.
    """

    adaptation: Adaptation
    area: float
    strength: float
    gain: np.ndarray
    readouts: OwnReadouts | None = None

    @property
    def pays(self) -> bool:
        """Whether the mean gain is above 0.

        No more is asked: it is measured without favour to what was chosen, and at 20 images a standard error is half of
        what photographs of an unseen category gain. Where there is nothing to gain, nothing is lost (docs/log.md).
        """
        return bool(self.gain.mean() > 0)


def known(model: Model) -> Adaptation:
    """A model's numbers of each category and of all images; those that only mix where it has no others."""
    if model.adaptation is not None:
        return model.adaptation
    return Adaptation.none(np.concatenate([model.weights, model.global_weights[None]]))


def as_it_is(model: Model, seen: Seen) -> np.ndarray:
    """(N,) mean log-density per px at the fixations of each image, in nats, its category inferred."""
    if model.adaptation is not None:
        shares = model.classifier.shares(seen.pooled)
    else:
        shares = np.column_stack([model.classifier.probabilities(seen.pooled), np.zeros(len(seen.pooled))])
    return log_likelihood(model, seen, [known(model).of(of_image) for of_image in shares])


def fold_of(images: int, seed: int) -> np.ndarray:
    """(N,) int64: the fold that each image is in, which readouts and numbers are fitted without, and scored on."""
    return dealt(np.zeros(images, np.int64), 1, seed)


def check(model: Model) -> None:
    """Raises UserError for a model that no category can be given."""
    if model.center_bias.bandwidth is None:
        raise UserError(
            "the model has no centre bias yet, from which a category could differ; have it taken from your images: "
            "acw run cat2000_iie --heads MODEL --dataset DATA"
        )


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A category by some readouts.

    theta: its numbers as they are fitted to `maps`; adaptation: as they are used. left_out: (N,) nats per fixation of
    each image by numbers that were fitted without it.
    """

    readouts: OwnReadouts | None
    maps: Maps
    adaptation: Adaptation
    strength: float
    theta: Tensor
    left_out: np.ndarray


def fit(model: Model, seen: Seen, seed: int, readouts: Iterable[OwnReadouts] = ()) -> NewCategory:
    """The category of all of the images, two at least.

    readouts: of the same images by `fold_of`. Of these and the shared ones, the category has those that foretell images
    best which they have not seen.
    """
    for_all, shared = known(model).only([]), model.shared.ravel()
    # Nobody else's readouts, which weigh nothing in the numbers for all.
    for_all = dataclasses.replace(for_all, weights=for_all.weights[:, shared])
    candidates = [_by(model, None, seen.only(shared), for_all, seed)]
    of_views = dataclasses.replace(for_all, weights=for_all.weights.reshape(1, len(model.names), -1).sum(2))
    for own in readouts:
        of_own = dataclasses.replace(seen, log_densities=own.left_out)
        candidates.append(_by(model, own, of_own, of_views, seed))
    gain_MN = np.stack([candidate.left_out for candidate in candidates]) - as_it_is(model, seen)
    best = candidates[gain_MN.mean(1).argmax()]
    # Told of each image is what would have been chosen by the others.
    fold, gain = fold_of(len(seen.sizes), seed), np.empty(len(seen.sizes))
    for number in np.unique(fold):
        outside = fold == number
        gain[outside] = gain_MN[gain_MN[:, ~outside].mean(1).argmax(), outside]
    filled = area(best.maps, best.theta, candidates[0].maps, theta_of(for_all.row(-1)))
    return NewCategory(best.adaptation, filled, best.strength, gain, best.readouts)


def _by(model: Model, readouts: OwnReadouts | None, seen: Seen, for_all: Adaptation, seed: int) -> _Candidate:
    """The category by these readouts, or those of all; seen, for_all: of the densities and weights of these alone."""
    maps = _maps(model, seen)
    fold, left_out = fold_of(len(maps), seed), np.empty(len(maps))
    for number in np.unique(fold):
        outside = np.flatnonzero(fold == number)
        numbers = _fitted(maps.subset(np.flatnonzero(fold != number)), for_all, seed)[0].row(0)
        left_out[outside] = log_likelihood(model, seen.subset(outside), [numbers] * len(outside))
    return _Candidate(readouts, maps, *_fitted(maps, for_all, seed), left_out)


def _maps(model: Model, seen: Seen) -> Maps:
    biases = [model.center_bias] * len(seen.sizes)
    return Maps.of([on_grid(of_image) for of_image in seen.log_densities], seen.fixations, seen.sizes, biases)


def _fitted(maps: Maps, for_all: Adaptation, seed: int) -> tuple[Adaptation, float, Tensor]:
    """The numbers of a category and of all, the strength of the prior, and the former as they are fitted."""
    own, overall = own_on_grid(maps)[None], theta_of(for_all.row(-1))
    theta, strength = fit_new(maps, overall, seed)
    if math.isinf(strength):  # to the last digit those for all, of which `theta_of` keeps no share of 0
        same = {name: values[[-1, -1]] for name, values in vars(for_all).items() if name != "own"}
        return Adaptation(**same, own=own), strength, overall
    return for_all.beside(adaptation_of([theta, overall], own, len(for_all.weights[-1]))), strength, theta


def log_likelihood(model: Model, seen: Seen, numbers: Sequence[Numbers]) -> np.ndarray:
    """(N,) by numbers for each image."""
    result = []
    with torch.no_grad():
        for own, log_densities, (x, y), size in zip(
            numbers, seen.log_densities, seen.fixations, seen.sizes, strict=True
        ):
            adapted = model.adapted_on_grid(log_densities, own, size)
            result.append(model.finalizer.at_pixels(adapted, x, y, size).mean())
    return np.array(result)


def extended(
    model: Model, names: Sequence[str], categories: Sequence[NewCategory], classifier: CategoryClassifier, record: Any
) -> Model:
    """The model with the categories behind its own, of which nothing changes; classifier: knows them, too.

    record: what its provenance says of them, as JSON.
    """
    views, before = model.names, len(model.components) // len(model.names)
    with_own = {name: category.readouts for name, category in zip(names, categories, strict=True) if category.readouts}
    each = before + len(with_own)

    def widened(weights: np.ndarray, first: int) -> np.ndarray:
        """(..., C) of all components: those given are, of each view, number `first` and the following."""
        of_view = weights.reshape(*weights.shape[:-1], len(views), -1)
        result = np.zeros((*of_view.shape[:-1], each))
        result[..., first : first + of_view.shape[-1]] = of_view
        return result.reshape(*weights.shape[:-1], -1)

    numbers = dataclasses.replace(known(model), weights=widened(known(model).weights, 0))
    for name, category in zip(names, categories, strict=True):
        first = before + list(with_own).index(name) if name in with_own else 0
        new = category.adaptation
        numbers = numbers.beside(dataclasses.replace(new, weights=widened(new.weights, first)))
    heads = {f"{view}@{name}": own.heads[view] for name, own in with_own.items() for view in views}
    return dataclasses.replace(
        model,
        heads=model.heads | heads,
        readouts=[*model.readouts, *with_own],
        categories=[*model.categories, *names],
        weights=numbers.weights[:-1],
        global_weights=widened(model.global_weights, 0),
        adaptation=numbers,
        classifier=classifier,
        provenance=model.provenance | {"adapted": [*model.provenance.get("adapted", []), record]},
    )
