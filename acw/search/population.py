"""A population of configurations: heads that differ in fields of the recipe, trained in one bank a backbone.

After RUNGS epochs only the best share of its configurations goes on (successive halving). All is in the banks'
checkpoints: an interrupted population goes on where it stopped, with the same configurations.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from acw.features.joined import Store
from acw.recipes import Recipe, derive
from acw.training.bank import HYPERPARAMETERS, Bank, BankState, Head, above, checkpoint_path, stored
from acw.training.batches import TrainingSet
from acw.training.trainer import Diverged, train_epochs

# After these epochs only one in REDUCTION_FACTOR of a population's configurations goes on.
RUNGS = (3, 9, 27)
REDUCTION_FACTOR = 3
# The learning rate of a head whose configuration does not go on; that of one whose loss is not finite is 0.
PRUNED = -1.0

State = Literal["training", "finished", "stopped", "diverged"]


@dataclass(frozen=True)
class Population:
    """Configurations that are trained together: values of a recipe's fields.

    common: what all of them share; own: each one's fields that a bank can mix. first: the number of the first
    configuration in the search; number 0 is the recipe itself.
    """

    number: int
    first: int
    common: dict[str, Any]
    own: list[dict[str, Any]]

    @property
    def fields(self) -> list[dict[str, Any]]:
        return [self.common | own for own in self.own]


@dataclass(frozen=True)
class Outcome:
    """What became of a configuration so far.

    ig: bits per fixation on validation images, the mean over backbones and folds of each head's best epoch; None before
    there is one. epochs: how many it was trained. state: "stopped" where others were better. curves: per backbone the
    folds' mean IG after each epoch, in which a head that has stopped keeps its last.
    """

    ig: float | None
    epochs: int
    state: State
    curves: dict[str, list[float]]


def train_population(
    recipe: Recipe,
    population: Population,
    folds: Sequence[int],
    training_set: TrainingSet,
    stores: Mapping[str, Store],
    folder: Path,
    device: torch.device,
    location: Mapping[str, Any] | None = None,
) -> Iterator[list[Outcome]]:
    """Trains a population from its checkpoints in the folder, or from the start; yields outcomes after each epoch.

    stores: by backbone, as for the recipe with the population's common fields. location: as in `train_epochs`.
    """
    recipe = derive(recipe, population.common)
    assert all(set(own) <= set(HYPERPARAMETERS) for own in population.own)
    heads = tuple(Head.of(derive(recipe, own), fold, 0) for own in population.own for fold in folds)
    banks = [Bank(name, heads) for name in stores]
    states = {bank: _state(folder, bank) for bank in banks}
    development = without_held_out(training_set)
    try:
        for rung in [*(rung for rung in RUNGS if rung < recipe.max_epochs), recipe.max_epochs]:
            stage = dataclasses.replace(recipe, max_epochs=rung)
            running = {
                bank: train_epochs(stage, bank, development, stores[bank.backbone], folder, device, location)
                for bank in banks
            }
            for epoch in range(1, rung + 1):
                # After an interruption some banks may be an epoch ahead of others.
                behind = [bank for bank, state in states.items() if state is None or len(state.history) < epoch]
                advanced = {bank: state for bank in behind if (state := next(running[bank], None)) is not None}
                states |= advanced
                if advanced:
                    yield outcomes(recipe, population, len(folds), states)
            # Nobody goes beyond a rung before all that stop there are noted.
            if all(state is not None and len(state.history) <= rung < recipe.max_epochs for state in states.values()):
                _halve(recipe, population, len(folds), states, folder, rung)
    except Diverged:
        # Of a population whose heads are all alike; elsewhere only the head in question stops.
        yield [Outcome(None, 0, "diverged", {}) for _ in population.own]
        return
    yield outcomes(recipe, population, len(folds), states)


def without_held_out(training_set: TrainingSet) -> TrainingSet:
    """The same without any fixation on a held-out image, so that nothing can be chosen on one by mistake."""
    kept = training_set.fold[training_set.image] >= 0
    columns = {name: getattr(training_set, name)[kept] for name in ("image", "x", "y")}
    return dataclasses.replace(training_set, **columns)


def outcomes(
    recipe: Recipe, population: Population, folds: int, states: Mapping[Bank, BankState | None]
) -> list[Outcome]:
    """Of each configuration, from the banks' states; a bank has `folds` heads of each."""
    result = []
    for number in range(len(population.own)):
        mine = range(number * folds, (number + 1) * folds)
        # (backbones x folds) columns of validation IG, NaN where a head no longer trains.
        curves = {bank.backbone: _curves(state, mine) for bank, state in states.items() if state is not None}
        rates = [float(state.learning_rate[head]) for state in states.values() if state is not None for head in mine]
        epochs = max((int(np.isfinite(curve).any(1).sum()) for curve in curves.values()), default=0)
        best = [
            float(np.nanmax(column)) for curve in curves.values() for column in curve.T if np.isfinite(column).any()
        ]
        known = len(best) == len(states) * folds
        filled = {name: [round(v, 5) for v in _held(curve, epochs).mean(1).tolist()] for name, curve in curves.items()}
        result.append(
            Outcome(
                sum(best) / len(best) if known else None,
                epochs,
                _state_of(recipe, rates, epochs),
                filled if known else {},
            )
        )
    return result


def _state_of(recipe: Recipe, rates: Sequence[float], epochs: int) -> State:
    if 0.0 in rates:
        return "diverged"
    if PRUNED in rates:
        return "stopped"
    training = any(above(rate, recipe.min_learning_rate) for rate in rates) and epochs < recipe.max_epochs
    return "training" if training else "finished"


def _curves(state: BankState, heads: Sequence[int]) -> np.ndarray:
    """(epochs, heads) float64; NaN where a head no longer trains."""
    values = [[entry["ig"][head] for head in heads] for entry in state.history]
    return np.array(values, dtype=float).reshape(len(values), len(heads))


def _held(curve: np.ndarray, epochs: int) -> np.ndarray:
    """The same over so many epochs, in which a head that has stopped keeps its last value, as does a whole bank."""
    curve = np.pad(curve[:epochs], ((0, max(epochs - len(curve), 0)), (0, 0)), constant_values=np.nan)
    for before, after in itertools.pairwise(curve):
        after[np.isnan(after)] = before[np.isnan(after)]
    return curve


def _halve(
    recipe: Recipe,
    population: Population,
    folds: int,
    states: Mapping[Bank, BankState | None],
    folder: Path,
    rung: int,
) -> None:
    """Lets the best configurations that still train go on, and the recipe itself, by which the others are measured.

    Done again after an interruption in its midst, it stops the same ones.
    """
    ended = outcomes(recipe, population, folds, states)
    alive = [
        n for n, outcome in enumerate(ended) if outcome.epochs == rung and outcome.state in ("training", "stopped")
    ]
    alive = [number for number in alive if population.first + number > 0]
    alive.sort(key=lambda number: -(ended[number].ig or -math.inf))
    stop = [n * folds + k for n in alive[math.ceil(len(alive) / REDUCTION_FACTOR) :] for k in range(folds)]
    for bank, state in states.items():
        if state is not None and stop:
            # One whose rate has fallen too low has ended by itself.
            training = above(state.learning_rate, recipe.min_learning_rate)
            state.learning_rate[[head for head in stop if training[head]]] = PRUNED
            state.save(checkpoint_path(folder, bank))


def _state(folder: Path, bank: Bank) -> BankState | None:
    path = checkpoint_path(folder, bank)
    return BankState.load(path) if stored(path) else None
