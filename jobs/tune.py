"""Searches a space of recipe fields with Ray Tune; writes the best as a file that `pipeline.py --overlay FILE` takes.

    python jobs/tune.py gaze --dataset FOLDER --space sigma_lr --samples 32
    python jobs/tune.py demo --samples 4 --max_epochs 2     # the embedded displays, on a CPU

A trial is a population: `heads_per_worker` configurations are trained in one bank a backbone, in one pass over the
features, and the worse of them stop early. Fields that a bank cannot mix are drawn once a trial. The objective is the
validation IG of one fold, averaged over the recipe's backbones; held-out images are never used.
The last line on stdout is the path of the overlay.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acw.cli import Job, Parser, parse, run
from acw.storage import UserError, write_json

SPACES = Path(__file__).resolve().parents[1] / "tune_spaces"
FOLD = 0
# After these epochs only the best third of a population's configurations goes on (successive halving).
RUNGS = (3, 9)
KEPT = 3


@dataclass(frozen=True)
class Trialled:
    """A configuration, its validation IG in bits per fixation, and the epochs it was given."""

    config: dict[str, Any]
    ig: float
    epochs: int


def search(job: Job, space: dict[str, Any], samples: int) -> list[Trialled]:
    """Runs the search; returns all configurations, the best first."""
    from ray import tune

    from acw.aggregation import training_set
    from acw.banks import HYPERPARAMETERS
    from acw.cluster import allocate

    recipe = job.recipe
    own = {name: domain for name, domain in space.items() if name in HYPERPARAMETERS}
    common = {name: domain for name, domain in space.items() if name not in own}
    # Without a field that a bank can mix, a trial is one configuration.
    population = min(samples, recipe.heads_per_worker) if own else 1
    trials = math.ceil(samples / population)
    allocation = allocate(trials, recipe.workers, recipe.accelerator)
    shared = (recipe, training_set(job.dataset, job.split, recipe), job.stores())
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trial, shared=shared, threads=allocation.cpus),
            {"cpu": allocation.cpus, "gpu": allocation.gpus},
        ),
        param_space={"common": common, "own": {str(number): dict(own) for number in range(population)}},
        tune_config=tune.TuneConfig(
            metric="ig",
            mode="max",
            num_samples=trials,
            max_concurrent_trials=allocation.workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(job.folder / "tune"), verbose=1),
    )
    results = tuner.fit()
    if results.num_errors:
        raise results.errors[0]
    found = []
    for result in (results[k] for k in range(len(results))):
        metrics, config = result.metrics or {}, result.config or {}
        for number, (ig, epochs) in enumerate(zip(metrics["igs"], metrics["epochs"], strict=True)):
            found.append(Trialled(config["common"] | config["own"][str(number)], ig, epochs))
    return sorted(found, key=lambda one: -one.ig)


def trial(config: dict[str, Any], shared: Any, threads: int) -> None:
    """One population: a bank per backbone on one fold, an epoch of all at a time."""
    import tempfile

    import ray
    import torch
    from ray import tune

    from acw.banks import Bank, Head
    from acw.recipes import derive
    from acw.training import train_epochs

    recipe, training_set, stores = shared
    recipe = derive(recipe, config["common"])
    members = tuple(Head.of(derive(recipe, own), FOLD, 0) for own in config["own"].values())
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
    best = torch.full((len(stores), len(members)), -math.inf, dtype=torch.float64)
    epochs = [0] * len(members)
    with tempfile.TemporaryDirectory() as folder:
        waiting = [
            train_epochs(recipe, Bank(name, members), training_set, store, Path(folder), device)
            for name, store in stores.items()
        ]
        states: list[Any] = [None] * len(waiting)
        for epoch in range(1, recipe.max_epochs + 1):
            # A head that has stopped keeps its best; the trial goes on while any trains.
            advanced = [(row, state) for row, bank in enumerate(waiting) if (state := next(bank, None)) is not None]
            if not advanced:
                break
            for row, state in advanced:
                states[row], best[row] = state, state.best_ig
                for head, ig in enumerate(state.history[-1]["ig"]):
                    epochs[head] = epoch if ig is not None else epochs[head]
            mean = best.mean(0)
            tune.report({"ig": float(mean.max()), "igs": mean.tolist(), "epochs": epochs})
            if epoch in RUNGS:
                alive = [head for head in range(len(members)) if epochs[head] == epoch]
                alive.sort(key=lambda head: -float(mean[head]))
                for state in states:
                    state.learning_rate[alive[math.ceil(len(alive) / KEPT) :]] = 0


def _space(name: str) -> dict[str, Any]:
    path = SPACES / f"{name}.py"
    if not path.exists():
        known = sorted(file.stem for file in SPACES.glob("*.py"))
        raise UserError(f"no search space '{name}'; spaces are {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SPACE


def main(argv: Sequence[str]) -> None:
    own = Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--space", default="sigma_lr")
    own.add_argument("--samples", type=int, default=8)
    options, rest = own.parse_known_args(list(argv))
    if options.samples < 1:
        raise UserError(f"--samples {options.samples}: give the number of configurations, 1 or more")
    job = parse(rest, __doc__.splitlines()[0] + "\n\n--space NAME (default sigma_lr), --samples N (default 8)")
    space = _space(options.space)
    from extract import extract

    from acw.cluster import connect

    connect()
    extract(job)
    found = search(job, space, options.samples)
    print(f"{'IG':>8}  {'epochs':>6}  configuration; IG in bit on the validation images of fold {FOLD}")
    for one in found:
        print(f"{one.ig:8.4f}  {one.epochs:6}  {one.config}")
    path = job.folder / f"overlay-{options.space}.json"
    write_json(path, found[0].config)
    print(path, flush=True)


if __name__ == "__main__":
    run(main)
