"""Gives a finished model one more category: a handful of numbers, fitted to some images of a kind that is new to it.

What they gain is measured on images that they were not fitted on, at the fixations, over the model as it is, which
infers a category for each. Shape suffixes as in `acw.fusion.adaptation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acw.fusion import adaptation_fit
from acw.fusion.adaptation import Adaptation, Numbers
from acw.fusion.adaptation_fit import Maps, adaptation_of, area, fit_new, on_grid, own_on_grid, theta_of
from acw.fusion.category_weights import dealt
from acw.fusion.classifier import CategoryClassifier
from acw.model.model import Model
from acw.storage.errors import UserError

FEWEST = 10  # images


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model says of N images, and where people looked in them.

    log_densities: of each (C, H, W), the components' on its grid. pooled: (N, D) features. fixations: of each x and y,
    in px; sizes: (height, width), in px.
    """

    log_densities: Sequence[Tensor]
    pooled: np.ndarray
    fixations: Sequence[tuple[np.ndarray, np.ndarray]]
    sizes: Sequence[tuple[int, int]]

    def subset(self, chosen: np.ndarray) -> Seen:
        log_densities, fixations, sizes = (
            [values[index] for index in chosen.tolist()] for values in (self.log_densities, self.fixations, self.sizes)
        )
        return Seen(log_densities, self.pooled[chosen], fixations, sizes)


@dataclass(frozen=True, eq=False)
class NewCategory:
    """adaptation: the numbers of the category and, in the last row, of all images, which are the model's own.

    area: how many times as large a part of its images the category's density fills as by the numbers for all.
    strength: of the prior. gain: (N,) nats per fixation over the model as it is, of each image by numbers that were
    fitted without it.
    """

    adaptation: Adaptation
    area: float
    strength: float
    gain: np.ndarray

    @property
    def pays(self) -> bool:
        return adaptation_fit.pays(self.gain)


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


def fit(model: Model, seen: Seen, seed: int) -> NewCategory:
    """The category of all of the images, two at least.

    Raises UserError for a model without a centre bias.
    """
    if model.center_bias.bandwidth is None:
        raise UserError(
            "the model has no centre bias yet, from which a category could differ; have it taken from your images: "
            "acw run cat2000_iie --heads MODEL --dataset DATA"
        )
    own = [model.center_bias] * len(seen.sizes)
    maps = Maps.of([on_grid(of_image) for of_image in seen.log_densities], seen.fixations, seen.sizes, own)
    fold = dealt(np.zeros(len(maps), np.int64), 1, seed)
    left_out = np.empty(len(maps))
    for number in np.unique(fold):
        outside = np.flatnonzero(fold == number)
        inside = maps.subset(np.flatnonzero(fold != number))
        numbers = _fitted(inside, model, seed)[0].row(0)
        left_out[outside] = log_likelihood(model, seen.subset(outside), [numbers] * len(outside))
    adaptation, strength, filled = _fitted(maps, model, seed)
    return NewCategory(adaptation, filled, strength, left_out - as_it_is(model, seen))


def _fitted(maps: Maps, model: Model, seed: int) -> tuple[Adaptation, float, float]:
    """The numbers of a category and of all, the strength of the prior, and `NewCategory.area`."""
    for_all, own = known(model).alone(), own_on_grid(maps)[None]
    overall = theta_of(for_all.row(-1))
    theta, strength = fit_new(maps, overall, seed)
    if math.isinf(strength):  # to the last digit those for all, of which `theta_of` keeps no share of 0
        same = {name: values[[-1, -1]] for name, values in vars(for_all).items() if name != "own"}
        return Adaptation(**same, own=own), strength, 1.0
    fitted = adaptation_of([theta, overall], own, len(model.components))
    return for_all.beside(fitted), strength, area(maps, theta, overall)


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
    numbers = known(model)
    for category in categories:
        numbers = numbers.beside(category.adaptation)
    before = model.provenance.get("adapted", [])
    return dataclasses.replace(
        model,
        categories=[*model.categories, *names],
        weights=numbers.weights[:-1],
        adaptation=numbers,
        classifier=classifier,
        provenance=model.provenance | {"adapted": [*before, record]},
    )
