"""Searches a space of recipe fields with Ray Tune; writes the best as a file that `pipeline.py --overlay FILE` takes.

    python jobs/tune.py gaze --dataset FOLDER --space sigma_lr --samples 16
    python jobs/tune.py demo --samples 2 --max_epochs 2     # the embedded displays, on a CPU

The objective is the validation IG of one fold, averaged over the recipe's backbones; held-out images are never used.
The last line on stdout is the path of the overlay.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acw.cli import Job, Parser, parse, run
from acw.storage import UserError, write_json

SPACES = Path(__file__).resolve().parents[1] / "tune_spaces"
FOLD = 0


def search(job: Job, space: dict[str, Any], samples: int) -> dict[str, Any]:
    """Runs the search and prints its trials; returns the best one's fields."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from acw.aggregation import training_set
    from acw.cluster import allocate

    recipe = job.recipe
    allocation = allocate(samples, recipe.workers, recipe.accelerator)
    shared = (recipe, training_set(job.dataset, job.split, recipe), job.stores())
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trial, shared=shared, threads=allocation.cpus),
            {"cpu": allocation.cpus, "gpu": allocation.gpus},
        ),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="ig",
            mode="max",
            num_samples=samples,
            max_concurrent_trials=allocation.workers,
            reuse_actors=True,
            scheduler=ASHAScheduler(max_t=recipe.max_epochs, grace_period=min(3, recipe.max_epochs)),
        ),
        run_config=tune.RunConfig(storage_path=str(job.folder / "tune"), verbose=1),
    )
    results = tuner.fit()
    if results.num_errors:
        raise results.errors[0]
    trials = [(result.metrics or {}, result.config or {}) for result in (results[k] for k in range(len(results)))]
    ranked = sorted(trials, key=lambda trial: -trial[0]["ig"])
    print(f"{'IG':>8}  {'epochs':>6}  configuration; IG in bit on the validation images of fold {FOLD}")
    for metrics, config in ranked:
        print(f"{metrics['ig']:8.4f}  {metrics['training_iteration']:6}  {config}")
    return ranked[0][1]


def trial(config: dict[str, Any], shared: Any, threads: int) -> None:
    """One configuration: a head per backbone on one fold, an epoch of all at a time."""
    import tempfile

    import ray
    import torch
    from ray import tune

    from acw.recipes import derive
    from acw.training import Bank, train_epochs

    recipe, training_set, stores = shared
    recipe = derive(recipe, config)
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            train_epochs(recipe, Bank(name, ((FOLD, 0),)), training_set, store, Path(folder), device)
            for name, store in stores.items()
        ]
        best = [float("-inf")] * len(runs)
        # A head that has stopped keeps its best; the trial goes on while any trains.
        for states in itertools.zip_longest(*runs):
            best = [old if state is None else float(state.best_ig[0]) for old, state in zip(best, states, strict=True)]
            tune.report({"ig": sum(best) / len(best)})


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
        raise UserError(f"--samples {options.samples}: give the number of trials, 1 or more")
    job = parse(rest, __doc__.splitlines()[0] + "\n\n--space NAME (default sigma_lr), --samples N (default 8)")
    space = _space(options.space)
    from extract import extract

    from acw.cluster import connect

    connect()
    extract(job)
    best = search(job, space, options.samples)
    path = job.folder / f"overlay-{options.space}.json"
    write_json(path, best)
    print(path, flush=True)


if __name__ == "__main__":
    run(main)
