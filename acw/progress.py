"""How far a training is, from its checkpoints, and how long it will take: for the job's own lines and `acw status`.

A unit is what one worker trains at a time: a bank of heads, or a fold's system of the joint training. Nothing here
needs torch or Ray, so that a look at a run is quick.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from acw.banks import Bank, checkpoint_path, system_path
from acw.recipes import Recipe

# An epoch takes about as long as the last few did: it gets shorter as heads stop.
RECENT = 3
# A unit that has not written for so many of its own epochs, and so many seconds, is said to be stalled. Ray may take a
# minute to start lost workers again.
STALLED_EPOCHS = 5
STALLED_SECONDS = 120.0


@dataclass(frozen=True)
class Rule:
    """When training stops: after `max_epochs`, or when the rate falls to `min_rate`. After more than `patience` epochs
    without a better validation IG it falls by `factor`."""

    max_epochs: int
    rate: float
    min_rate: float
    patience: int
    factor: float

    def falls(self, rate: float) -> int:
        """How often a rate may fall until it ends the training."""
        falls = 0
        while rate > self.min_rate:
            rate, falls = rate * self.factor, falls + 1
        return falls


@dataclass(frozen=True)
class Unit:
    """A bank or a system: its name, its heads' names, its checkpoint, and when its training ends."""

    name: str
    backbone: str
    heads: tuple[str, ...]
    path: Path
    rule: Rule


def bank_units(recipe: Recipe, banks: Iterable[Bank], folder: Path) -> list[Unit]:
    rule = Rule(recipe.max_epochs, recipe.learning_rate, recipe.min_learning_rate, recipe.lr_patience, recipe.lr_factor)
    return [
        Unit(
            bank.name,
            bank.backbone,
            tuple(f"f{head.fold}s{head.seed}" for head in bank.members),
            checkpoint_path(folder, bank),
            rule,
        )
        for bank in banks
    ]


def system_units(recipe: Recipe, folder: Path) -> list[Unit]:
    rule = Rule(
        recipe.joint_max_epochs,
        recipe.joint_learning_rate,
        recipe.joint_min_learning_rate,
        recipe.joint_patience,
        recipe.lr_factor,
    )
    return [Unit(f"fold{f}", "", (f"f{f}",), system_path(folder, f), rule) for f in range(recipe.folds)]


@dataclass
class Standing:
    """How far a unit is.

    history: its epochs so far. rates, bad_epochs: per head, of the plateau rule; empty before the first epoch.
    written: when its checkpoint was, seconds since 1970; None before the first.
    """

    unit: Unit
    history: list[dict[str, Any]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    bad_epochs: list[int] = field(default_factory=list)
    written: float | None = None

    @property
    def epochs(self) -> int:
        return len(self.history)

    @property
    def done(self) -> int:
        """Heads that train no more."""
        if self.epochs >= self.unit.rule.max_epochs:
            return len(self.unit.heads)
        return sum(rate <= self.unit.rule.min_rate for rate in self.rates)

    @property
    def finished(self) -> bool:
        return self.done == len(self.unit.heads)

    @property
    def gains(self) -> list[float | None]:
        """Each head's best validation IG so far, bit per fixation."""
        columns = zip(*(_row(entry["ig"]) for entry in self.history), strict=True)
        return [max((v for v in column if v is not None), default=None) for column in columns]

    @property
    def ig(self) -> float | None:
        """Mean of `gains`."""
        return mean(gain for gain in self.gains if gain is not None)

    @property
    def images_per_second(self) -> float | None:
        """Of the last epoch; each image once, however many heads it was for."""
        if not self.history or "head_images_per_second" not in self.history[-1]:
            return None
        entry = self.history[-1]
        return entry["head_images_per_second"] / max(1, sum(ig is not None for ig in entry["ig"]))

    @property
    def epoch_seconds(self) -> float | None:
        return mean(entry["seconds"] for entry in self.history[-RECENT:])

    def epochs_left(self, lengths: Sequence[int]) -> tuple[float, int]:
        """How many epochs are to come: as expected, and at most. lengths: epochs of similar units that are done."""
        rule, most = self.unit.rule, self.unit.rule.max_epochs - self.epochs
        if self.finished:
            return 0.0, 0
        falls = [rule.falls(rate) for rate in self.rates or [rule.rate] * len(self.unit.heads)]
        bad = self.bad_epochs or [0] * len(falls)
        # The soonest end: no head that still trains ever gets better again.
        soonest = max(n * (rule.patience + 1) - b for n, b in zip(falls, bad, strict=True) if n)
        longer = [length - self.epochs for length in lengths if length > self.epochs]
        # Without an example: half-way between soonest and latest at first, and nearer the soonest with each fall.
        spread = (most - soonest) / 2 * (max(falls) / rule.falls(rule.rate)) ** 2
        return min(most, max(soonest, mean(longer) or soonest + spread)), most

    def silence(self, now: float, since: float) -> float:
        """Seconds for which nothing was written; since: when the job began that trains it."""
        return max(0.0, now - max(self.written or 0.0, since))

    def stalled(self, now: float, since: float) -> bool:
        """Whether it is silent for much longer than its epochs take."""
        limit = STALLED_EPOCHS * max((entry["seconds"] for entry in self.history[-RECENT:]), default=math.inf)
        return not self.finished and self.silence(now, since) > max(STALLED_SECONDS, limit)


def read(unit: Unit) -> Standing:
    """What a unit's checkpoint says; nothing yet where there is none."""
    try:
        with safe_open(unit.path, framework="numpy") as file:
            metadata = file.metadata()
            history = json.loads(metadata["history"])
            if "numbers" in metadata:
                numbers = json.loads(metadata["numbers"])
                rates, bad_epochs = [numbers["rate"]], [numbers["bad_epochs"]]
            else:
                rates = file.get_tensor("learning_rate").tolist()
                bad_epochs = file.get_tensor("bad_epochs").tolist()
        return Standing(unit, history, rates, bad_epochs, unit.path.stat().st_mtime)
    except (OSError, SafetensorError):
        return Standing(unit)


def seconds_left(units: Sequence[Standing], workers: int, now: float) -> tuple[float, float] | None:
    """Seconds until all units are trained by so many workers: as expected, and at most; None before any epoch.

    Heads stop early: how many epochs a unit has left, its own learning rates and the finished units tell. Workers take
    the units that are under way, then the longest of the others.
    """
    by_backbone = {one.unit.backbone: one.epoch_seconds for one in units if one.epoch_seconds}
    typical = mean(by_backbone.values())
    if typical is None:
        return None
    lengths = [one.epochs for one in units if one.finished]
    waiting: list[tuple[bool, float, float]] = []
    for one in units:
        if not one.finished:
            seconds = one.epoch_seconds or by_backbone.get(one.unit.backbone, typical)
            expected, most = one.epochs_left(lengths)
            begun = min(max(now - one.written, 0.0), seconds) if one.written else 0.0
            waiting.append((one.written is not None, seconds * expected - begun, seconds * most - begun))
    return _makespan(waiting, 1, workers), _makespan(waiting, 2, workers)


def _makespan(waiting: Sequence[tuple], column: int, workers: int) -> float:
    free = [0.0] * max(1, workers)
    for row in sorted(waiting, key=lambda row: (not row[0], -row[column])):
        heapq.heappush(free, heapq.heappop(free) + max(0.0, row[column]))
    return max(free)


def mean(values: Iterable[float | None]) -> float | None:
    """None of none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _row(value: Any) -> list[float | None]:
    """A history's value per head; a system has one."""
    return value if isinstance(value, list) else [value]
