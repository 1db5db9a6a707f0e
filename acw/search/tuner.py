"""Runs a search on Ray Tune: a population is a trial, its proposals come from Optuna, ASHA ends the weaker ones."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from acw.cluster import event_log
from acw.cluster.allocation import Allocation, allocate, location_of
from acw.cluster.process import compute_with
from acw.data import Dataset, Split
from acw.features.joined import Store
from acw.features.view import View
from acw.recipes import Recipe, derive
from acw.search.population import REDUCTION_FACTOR, RUNGS, Outcome, Population, train_population
from acw.search.space import Search, Trialled
from acw.storage.addresses import shown
from acw.storage.errors import UserError
from acw.storage.files import ray_storage
from acw.training.batches import TrainingSet
from acw.training.progress import search_line, written
from acw.training.training_set import finalizer_bias

# A trial whose node is lost starts again from its checkpoints, and loses an epoch at most.
MAX_FAILURES = 10
PROGRESS_SECONDS = 5.0
# In the table after each population.
SHOWN = 8
# What Tune is told of a population whose configurations have no IG, bits: worse than all.
FAILED = -100.0


@dataclass(frozen=True)
class Work:
    """What every trial gets. stores: the features by the views of a recipe, for all recipes of the space."""

    recipe: Recipe
    folds: tuple[int, ...]
    dataset: Dataset
    split: Split
    training_set: TrainingSet
    stores: dict[tuple[View, ...], dict[str, Store]]
    folder: Path


def run(work: Work, search: Search, ended: Callable[[], None]) -> None:
    """Trains all populations that are missing; `ended` is called after each of them.

    Raises UserError for what a user can mend, and a trial's own error after too many lost workers.
    """
    waiting = len(search.waiting) + len(search.missing)
    if not waiting:
        return
    from ray import tune

    # Tune looks in vain for the results that it has not been let write, and says so for each trial.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    recipe = work.recipe
    allocation = allocate(waiting, recipe.workers, recipe.accelerator, recipe.gpus_per_worker)
    reporter = ProgressReporter(search, recipe, allocation)
    proposals = _proposals(search, reporter, ended)
    # Our own files hold all that is to be kept.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Tune's own would let Ctrl-C pass for the search's end.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, work=work, allocation=allocation),
            {"cpu": allocation.cpus, "gpu": allocation.gpus},
        ),
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=_scheduler(recipe, search),
            num_samples=waiting,
            max_concurrent_trials=allocation.workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            # Named anew each time: what an earlier attempt left there is of no use, and has pickles.
            name=time.strftime("%Y%m%d-%H%M%S"),
            **ray_storage(),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    )
    results = tuner.fit()
    if proposals.failure:
        raise UserError(proposals.failure)
    if results.num_errors:
        raise results.errors[0]
    if search.waiting or search.missing:
        raise UserError(f"{shown(search.folder)}: the search was interrupted; go on with it by --resume")


def _trial(config: dict[str, Any], work: Work, allocation: Allocation) -> None:
    """What a trial does: trains one population, reports all of its configurations after each epoch."""
    import ray
    from ray import tune

    population = Population(**config["population"])
    recipe = derive(work.recipe, population.common)
    biases = [
        finalizer_bias(recipe, work.dataset, work.split.training(fold), work.training_set.baseline[fold])
        for fold in range(recipe.folds)
    ]
    compute_with(allocation.cpus)
    device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
    location = location_of(allocation, device)
    event_log.to_stderr(work.folder.name)
    event_log.event("population started", population=population.number, **location)
    try:
        for outcomes in train_population(
            work.recipe,
            population,
            work.folds,
            dataclasses.replace(work.training_set, finalizer_bias=biases),
            work.stores[tuple(recipe.views)],
            work.folder / "populations" / f"{population.number:03d}",
            device,
            location,
        ):
            tune.report(_report(outcomes) | {"location": [location]})  # Tune takes dictionaries apart
    except UserError as error:
        # Raised, it would be tried again with the same end, as if a node had been lost.
        tune.report({"ig": FAILED, "epoch": 0, "failure": str(error)})


def _report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "ig": max((outcome.ig for outcome in outcomes if outcome.ig is not None), default=FAILED),
        "epoch": max(outcome.epochs for outcome in outcomes),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def _proposals(search: Search, reporter: ProgressReporter, ended: Callable[[], None]) -> Any:
    """Tune's view of the search: suggests its populations, interrupted ones first, and tells it their ends."""
    from ray.tune.search import Searcher

    class Proposals(Searcher):
        def __init__(self) -> None:
            super().__init__(metric="ig", mode="max")
            self.failure = ""
            self._interrupted = search.waiting
            self._population: dict[str, Population] = {}

        def suggest(self, trial_id: str) -> Any:
            if self.failure:
                return Searcher.FINISHED
            population = self._interrupted.pop(0) if self._interrupted else search.propose()
            self._population[trial_id] = population
            return {"population": dataclasses.asdict(population)}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            self.failure = self.failure or result.get("failure", "")
            if "outcomes" in result:
                alive = sum(outcome["state"] == "training" for outcome in result["outcomes"])
                reporter.epoch(self._population[trial_id], result["epoch"], alive, result["ig"], *result["location"])

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            if error or not result or "outcomes" not in result:
                return
            population = self._population[trial_id]
            try:
                search.finish(population, [Outcome(**outcome) for outcome in result["outcomes"]])
            except UserError as error:  # which Tune would take for the trial's, and try that again
                self.failure = str(error)
                return
            reporter.finished(population)
            ended()

        def save(self, checkpoint_path: str) -> None:
            """Nothing: all is in the search's folder, and read from there by the next attempt."""

        def restore(self, checkpoint_path: str) -> None:
            raise AssertionError("Tune's own checkpoints are not used")

    return Proposals()


def _scheduler(recipe: Recipe, search: Search) -> Any:
    """ASHA over populations by their best configuration, which knows of those that earlier attempts finished."""
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    class Halving(ASHAScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            action = super().on_trial_result(tune_controller, trial, result)
            # The recipe's own configuration is trained to its end: others are measured by it.
            own = trial.config["population"]["first"] == 0 and result["epoch"] < recipe.max_epochs
            return TrialScheduler.CONTINUE if own else action

    grace = min(RUNGS[0], recipe.max_epochs)
    scheduler = Halving(
        "epoch", "ig", "max", max_t=recipe.max_epochs, grace_period=grace, reduction_factor=REDUCTION_FACTOR
    )
    controller: Any = None  # which ASHA does not ask for anything
    for number, outcomes in search.finished.items():
        population = dataclasses.asdict(search.proposed[number])
        trial: Any = SimpleNamespace(trial_id=f"earlier-{number}", config={"population": population})
        scheduler.on_trial_add(controller, trial)
        for epoch, ig in enumerate(best_so_far(outcomes), 1):
            scheduler.on_trial_result(controller, trial, {"epoch": epoch, "ig": ig})
    return scheduler


def best_so_far(outcomes: Sequence[Outcome]) -> list[float]:
    """The best IG of any of the configurations after each epoch, bits."""
    means = [
        [sum(values) / len(values) for values in zip(*outcome.curves.values(), strict=True)] for outcome in outcomes
    ]
    best: list[float] = []
    for epoch in range(max(map(len, means), default=0)):
        best.append(max([mean[epoch] for mean in means if len(mean) > epoch] + best[-1:]))
    return best


class ProgressReporter:
    """Says how far a search is: a line while populations train, a table of the best configurations after each."""

    def __init__(self, search: Search, recipe: Recipe, allocation: Allocation) -> None:
        self.search, self.recipe, self.allocation = search, recipe, allocation
        self._start = self._shown = time.monotonic()
        self._epochs: dict[int, int] = {}
        self._first: dict[int, int] = {}
        self._alive: dict[int, int] = {}
        self._locations: dict[int, Mapping[str, Any]] = {}
        print(
            f"searching {search.space.name}: {search.samples} configurations, up to {search.size} in a bank, "
            f"on {allocation}",
            flush=True,
        )

    def epoch(self, population: Population, epoch: int, alive: int, ig: float, location: Mapping[str, Any]) -> None:
        """A population has trained so far, of which so many go on, with that best IG in bits, at that location."""
        number = population.number
        if self._locations.get(number) != location:
            self._locations[number] = location
            event_log.event("population started", population=number, configurations=len(population.own), **location)
            print(f"search: population {number} on node {location['node']}, device {location['device']}", flush=True)
        self._first.setdefault(number, epoch - 1)
        self._epochs[number], self._alive[number] = epoch, alive
        tags = {"run": self.search.folder.name, "bank": f"population {number}", "backbone": ""}
        event_log.measure(tags, {"acw_validation_ig": ig})
        if time.monotonic() - self._shown > PROGRESS_SECONDS:
            self._say()

    def finished(self, population: Population) -> None:
        self._epochs.pop(population.number, None)
        self._say()
        print(table(self.search.trialled[:SHOWN]), flush=True)

    def _say(self) -> None:
        self._shown = time.monotonic()
        figures = self.figures()
        event_log.event("search", **figures)
        print(f"search: {search_line(figures)}; at most {figures['minutes_left']:.1f} min left", flush=True)

    def figures(self) -> dict[str, Any]:
        """Configurations done, which populations train, the best so far, time left; for JSON."""
        trialled = self.search.trialled
        known = [configuration for configuration in trialled if math.isfinite(configuration.ig)]
        best = {"number": known[0].number, "ig": known[0].ig, "fields": known[0].fields} if known else None
        return {
            "done": sum(1 for configuration in trialled if configuration.number),
            "total": self.search.samples,
            "training": [
                {"configurations": self._alive[number], "epoch": epoch}
                for number, epoch in sorted(self._epochs.items())
            ],
            "max_epochs": self.recipe.max_epochs,
            "best": best,
            "minutes_left": round(self.minutes_left(), 1),
        }

    def minutes_left(self) -> float:
        """As if every population that is left were trained for all of the recipe's epochs."""
        done = {number: len(best_so_far(outcomes)) for number, outcomes in self.search.finished.items()} | self._epochs
        epochs = sum(done[number] - first for number, first in self._first.items())
        populations = len(self.search.waiting) + len(self.search.missing)
        left = populations * self.recipe.max_epochs - sum(self._epochs.values())
        return (time.monotonic() - self._start) / max(epochs, 1) * left / 60


def table(trialled: Sequence[Trialled]) -> str:
    """Configurations, the best first, for people; IG in bits, and the gain over the recipe itself if that is there."""
    own = next((entry.ig for entry in trialled if entry.number == 0), None)
    fields = sorted({name for entry in trialled for name in entry.fields})
    rows = [["", "IG", "gain", "epochs", "state", *fields]]
    for entry in trialled:
        gain = f"{entry.ig - own:+.4f}" if own is not None and math.isfinite(own) and entry.number else ""
        values = [written(entry.fields[name]) if entry.fields else "" for name in fields]
        name = str(entry.number) if entry.number else "recipe"
        rows.append([name, f"{entry.ig:.4f}", gain, str(entry.outcome.epochs), entry.outcome.state, *values])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def overlay(search: Search, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `pipeline.py --overlay` takes: the best configuration's fields, and where they come from; for JSON.

    facts: of the search, besides its configurations. Where nothing was better than the recipe itself, no field changes.
    """
    best = search.trialled[0]
    if not math.isfinite(best.ig):
        raise UserError(
            f"{shown(search.folder)}: no configuration has a finite loss; lower --learning-rate or the space's"
        )
    baseline = next(configuration for configuration in search.trialled if configuration.number == 0)
    origin = {
        "space": search.space.name,
        "configurations": len(search.trialled) - 1,
        "validation_IG": best.ig,
        "validation_IG_of_the_recipe": baseline.ig if math.isfinite(baseline.ig) else None,
        "epochs": best.outcome.epochs,
    }
    return {"fields": best.fields, "search": origin | dict(facts)}
