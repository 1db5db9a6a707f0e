"""How far a training is, from its checkpoints, and how long it will take: for the job's own lines and `acw status`.

A unit is what one worker trains at a time: a bank of heads, or a fold's system of the joint training. Nothing here
needs torch or Ray, so that a look at a run is quick.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from acw.cluster import event_log
from acw.recipes import Recipe
from acw.storage.files import fetch
from acw.training.bank import Bank, above, checkpoint_path, system_path
from acw.training.scheduler import soonest_end

# An epoch takes about as long as the last few did: it gets shorter as heads stop.
RECENT = 3
# A unit that has not written for so many of its own epochs, and so many seconds, is said to be stalled. Ray may take a
# minute to start lost workers again.
STALLED_EPOCHS = 5
STALLED_SECONDS = 120.0
# The second in the logs of earlier versions.
BANK_STARTED = ("bank started", "bank begun")


@dataclass(frozen=True)
class Unit:
    """A bank or a system: its name, its heads' names, its checkpoint.

    rule: when its training ends, by the fields of a recipe that say so for banks.
    """

    name: str
    backbone: str
    heads: tuple[str, ...]
    path: Path
    rule: Recipe

    def falls(self, rate: float) -> int:
        """How often a rate may fall until it ends the training."""
        falls = 0
        while above(rate, self.rule.min_learning_rate):
            rate, falls = rate * self.rule.lr_factor, falls + 1
        return falls


def recorded_recipe(fields: Mapping[str, Any]) -> Recipe:
    """A recipe as a run has recorded it, perhaps with another version's fields."""
    known = {field.name for field in dataclasses.fields(Recipe)}
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items() if n in known}
    return Recipe(**values)


def bank_units(recipe: Recipe, banks: Iterable[Bank], folder: Path) -> list[Unit]:
    return [
        Unit(
            bank.name,
            bank.backbone,
            tuple(f"f{head.fold}s{head.seed}" for head in bank.members),
            checkpoint_path(folder, bank),
            recipe,
        )
        for bank in banks
    ]


def system_units(recipe: Recipe, folder: Path) -> list[Unit]:
    rule = dataclasses.replace(
        recipe,
        max_epochs=recipe.joint_max_epochs,
        learning_rate=recipe.joint_learning_rate,
        min_learning_rate=recipe.joint_min_learning_rate,
        lr_patience=recipe.joint_patience,
    )
    return [Unit(f"fold{f}", "", (f"f{f}",), system_path(folder, f), rule) for f in range(recipe.folds)]


@dataclass
class Progress:
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
    def stopped(self) -> list[bool]:
        """Which heads train no more."""
        if self.epochs >= self.unit.rule.max_epochs:
            return [True] * len(self.unit.heads)
        return [not above(rate, self.unit.rule.min_learning_rate) for rate in self.rates]

    @property
    def done(self) -> int:
        return sum(self.stopped)

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
        return mean(self.gains)

    @property
    def images_per_second(self) -> float | None:
        return images_per_second(self.history[-1]) if self.history else None

    @property
    def epoch_seconds(self) -> float | None:
        return mean(entry["seconds"] for entry in self.history[-RECENT:])

    def epochs_left(self, lengths: Sequence[int]) -> tuple[float, int]:
        """How many epochs are to come: as expected, and at most. lengths: epochs of similar units that are done."""
        most = self.unit.rule.max_epochs - self.epochs
        if self.finished:
            return 0.0, 0
        soonest, expected = map(max, zip(*self._head_epochs(), strict=True))
        longer = [length - self.epochs for length in lengths if length > self.epochs]
        return min(most, max(soonest, mean(longer) or expected)), most

    @property
    def head_epochs_left(self) -> float:
        """How many epochs its heads have left, all together, as expected from their own learning rates."""
        return sum(expected for _, expected in self._head_epochs())

    def _head_epochs(self) -> list[tuple[float, float]]:
        """Of each head the epochs that are left, at least and as expected."""
        rule, most = self.unit.rule, self.unit.rule.max_epochs - self.epochs
        count = len(self.unit.heads)
        found: list[tuple[float, float]] = []
        for rate, bad in zip(self.rates or [rule.learning_rate] * count, self.bad_epochs or [0] * count, strict=True):
            falls = self.unit.falls(rate)
            # It ends soonest if it never gets better again; half-way between that and the latest end at first, and
            # nearer the soonest with each fall.
            soonest = min(most, max(1, falls * (rule.lr_patience + 1) - bad)) if falls else 0
            found.append((soonest, soonest + (most - soonest) / 2 * (falls / self.unit.falls(rule.learning_rate)) ** 2))
        return found

    def stalled(self, now: float, started: float, usual: float | None = None) -> bool:
        """Whether it has been silent for much longer than its epochs take.

        started: when a worker began with it. usual: what others' epochs take, seconds, for one before its first.
        """
        longest = max((entry["seconds"] for entry in self.history[-RECENT:]), default=usual)
        if self.finished or longest is None:
            return False
        return now - max(self.written or 0.0, started) > max(STALLED_SECONDS, STALLED_EPOCHS * longest)


def in_hand(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The units that workers have, each the one that it began with last, and since when (Unix time), by a run's log."""
    hands: dict[Any, tuple[str, float]] = {}
    for event in events:
        if event["event"] in ("worker group started", "crew gathered"):
            hands.clear()
        elif event["event"] in BANK_STARTED:
            hands[event.get("worker", event["bank"])] = event["bank"], event_log.seconds(event)
    return dict(hands.values())


def read(unit: Unit) -> Progress:
    """What a unit's checkpoint says; nothing yet where there is none, or one of before the first epoch."""
    try:
        with safe_open(fetch(unit.path), framework="numpy") as file:
            metadata = file.metadata()
            history = json.loads(metadata["history"])
            if not history:
                return Progress(unit)
            if "numbers" in metadata:
                numbers = json.loads(metadata["numbers"])
                rates, bad_epochs = [numbers["rate"]], [numbers["bad_epochs"]]
            else:
                rates = file.get_tensor("learning_rate").tolist()
                bad_epochs = file.get_tensor("bad_epochs").tolist()
        # A copy of a checkpoint in S3 is as old as its download.
        written = history[-1].get("time", unit.path.stat().st_mtime)
        return Progress(unit, history, rates, bad_epochs, written)
    except (OSError, SafetensorError):
        return Progress(unit)


def seconds_left(all_progress: Sequence[Progress], workers: int, now: float | None) -> tuple[float, float] | None:
    """Seconds until all units are trained by so many workers: as expected, and at most; None before any epoch.

    Heads stop early: how many epochs a unit has left, its own learning rates and the finished units tell. Banks take
    turns (`scheduler.Scheduler`); of systems, workers take those that are under way, then the longest of the others.
    now: None where nobody works.
    """
    by_backbone = {
        progress.unit.backbone: progress.epoch_seconds for progress in all_progress if progress.epoch_seconds
    }
    typical = mean(by_backbone.values())
    if typical is None:
        return None
    lengths = [progress.epochs for progress in all_progress if progress.finished]
    waiting: list[tuple[bool, float, float]] = []
    for progress in all_progress:
        if not progress.finished:
            seconds = progress.epoch_seconds or by_backbone.get(progress.unit.backbone, typical)
            expected, most = progress.epochs_left(lengths)
            spent = min(max(now - progress.written, 0.0), seconds) if progress.written and now else 0.0
            left = [max(0.0, seconds * epochs - spent) for epochs in (expected, most)]
            waiting.append((progress.written is not None, left[0], left[1]))
    workers = max(1, workers)
    if all_progress[0].unit.backbone:
        return soonest_end([row[1] for row in waiting], workers), soonest_end([row[2] for row in waiting], workers)
    return _makespan(waiting, 1, workers), _makespan(waiting, 2, workers)


def _makespan(waiting: Sequence[tuple], column: int, workers: int) -> float:
    free = [0.0] * workers
    for row in sorted(waiting, key=lambda row: (not row[0], -row[column])):
        heapq.heappush(free, heapq.heappop(free) + row[column])
    return max(free)


def summary(all_progress: Sequence[Progress], workers: int, now: float | None) -> dict[str, Any]:
    """Of all units together, as JSON's values: heads, rate of those under way, validation IG, minutes left.

    now: None where nobody works.
    """
    left = seconds_left(all_progress, workers, now)
    under_way = [progress.images_per_second for progress in all_progress if not progress.finished]
    rates = [rate for rate in under_way if rate is not None]
    return {
        "done": sum(progress.done for progress in all_progress),
        "total": sum(len(progress.unit.heads) for progress in all_progress),
        "banks_done": sum(progress.finished for progress in all_progress),
        "banks": len(all_progress),
        "epochs": sorted({progress.epochs for progress in all_progress if progress.epochs}),
        "max_epochs": all_progress[0].unit.rule.max_epochs,
        "images_per_second": sum(rates) if rates and now else None,
        "validation_ig": mean(gain for progress in all_progress for gain in progress.gains),
        "minutes_left": left and left[0] / 60,
        "minutes_at_most": left and left[1] / 60,
    }


def summary_line(what: str, figures: Mapping[str, Any], *, ended: bool = False) -> str:
    """The `summary` of a training of heads or of a joint training, for people."""
    banks = f"heads and {figures['banks_done']}/{figures['banks']} banks"
    parts = [f"{figures['done']}/{figures['total']} {'systems' if what == 'joint training' else banks} done"]
    if epochs := figures["epochs"]:
        parts.append(f"epoch {epochs[0]}-{epochs[-1]} of at most {figures['max_epochs']}")
    if figures["images_per_second"] is not None:
        parts.append(f"{figures['images_per_second']:.1f} images/s")
    if figures["validation_ig"] is not None:
        parts.append(f"validation IG {figures['validation_ig']:.4f} bit")
    if not ended and figures["minutes_left"] is not None:
        parts.append(f"about {figures['minutes_left']:.1f} min left, at most {figures['minutes_at_most']:.1f}")
    return ", ".join(parts)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def images_per_second(entry: dict[str, Any]) -> float | None:
    """Of an epoch of a bank; each image counts once, however many heads it was for."""
    if "head_images_per_second" not in entry:
        return None
    return entry["head_images_per_second"] / max(1, sum(ig is not None for ig in entry["ig"]))


def epoch_fields(unit: Unit, entry: dict[str, Any]) -> dict[str, Any]:
    """An epoch as an event of the log: what it was of, how fast, and the validation IG of each head that took part."""
    rate = images_per_second(entry)
    return {
        "bank": unit.name,
        "backbone": unit.backbone,
        "epoch": entry["epoch"],
        "seconds": entry["seconds"],
        "images_per_second": rate and round(rate, 1),
        "ig": {head: ig for head, ig in zip(unit.heads, _row(entry["ig"]), strict=True) if ig is not None},
        **{name: entry[name] for name in ("node", "gpus", "device") if name in entry},
    }


def mean(values: Iterable[float | None]) -> float | None:
    """None of none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _row(value: Any) -> list[float | None]:
    """A history's value per head; a system has one."""
    return value if isinstance(value, list) else [value]


def search_line(figures: Mapping[str, Any]) -> str:
    """How far a search is, as `tuner.ProgressReporter.figures` has it, without the time left; for people."""
    parts = [f"{figures['done']}/{figures['total']} configurations done"]
    if best := figures["best"]:
        parts[0] += f", best {best['ig']:.4f} bit"
    if training := ", ".join(f"{one['configurations']} in epoch {one['epoch']}" for one in figures["training"]):
        parts.append(f"training {training} of at most {figures['max_epochs']}")
    return "; ".join(parts)


def written(value: Any) -> str:
    """A field's value as a person reads it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


def written_fields(fields: Mapping[str, Any]) -> str:
    """A configuration's fields as a person reads them."""
    return ", ".join(f"{name} {written(value)}" for name, value in fields.items()) or "the recipe itself"
