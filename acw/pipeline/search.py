"""Searches a space of recipe fields with Ray Tune; writes the best as a file that `acw run --overlay FILE` takes.

Optuna proposes populations of configurations. Each is trained in one bank a backbone, in one pass over the features;
the worse of a population stop early (successive halving), and so do whole populations that are worse than others
(ASHA). `--heads-per-worker` says how many heads a bank may have: fewer, and the searcher learns more often.
The objective is the validation IG of some folds, averaged over the recipe's backbones; held-out images are never used.
The last line on stdout is the path of the overlay; report.html beside it shows the search.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acw.pipeline.job import Job, add_recipe_options, job_of, read_options
from acw.pipeline.options import Parser
from acw.recipes import Recipe
from acw.storage.addresses import shown
from acw.storage.errors import UserError
from acw.storage.files import fetch, plain_name

if TYPE_CHECKING:
    from acw.search.space import Search, Space
    from acw.search.tuner import Work

SPACES = Path(__file__).resolve().parents[2] / "tune_spaces"


@dataclass(frozen=True)
class Options:
    """What a search is asked for, besides the job: see `add_search_options`."""

    space: str
    samples: int
    folds: tuple[int, ...]
    resume: bool


def add_search_options(parser: Parser) -> None:
    """Those of every search; `search_options` takes them from the parsed options."""
    parser.add_argument("--samples", metavar="N", help="configurations, besides the recipe's own (default: 16)")
    about = "cross-validation folds whose validation images decide, such as 0,1 (default: 0)"
    parser.add_argument("--search-folds", metavar="A,B,...", help=about)


def search_options(options: dict[str, Any], space: str, resume: bool) -> Options:
    """Raises UserError for what makes no sense."""
    samples, folds = options["samples"] or "16", (options["search_folds"] or "0").split(",")
    if not samples.isdecimal() or int(samples) < 1:
        raise UserError(f"--samples {samples}: give the number of configurations, 1 or more")
    if not all(fold.isdecimal() for fold in folds) or len(set(folds)) < len(folds):
        raise UserError(f"--search-folds {options['search_folds']}: give numbers of folds, such as 0,1")
    return Options(space, int(samples), tuple(map(int, folds)), resume)


def tune(job: Job, options: Options) -> Path:
    """Does all of the search that is not done yet; the path of its overlay."""
    from acw.cluster import event_log
    from acw.search import tuner
    from acw.search.space import load_space
    from acw.tracking import mlflow_store

    search = _search(job, load_space(SPACES, options.space), options)
    folder, uri = search.folder, mlflow_store.tracking_uri(job.root, job.tracking_uri)
    unfinished = search.waiting or search.missing
    if unfinished and search.proposed and not options.resume:
        raise UserError(
            f"{shown(folder)}: an earlier search has {len(search.trialled)} of these configurations; add --resume "
            "to go on with it, or delete the folder"
        )
    print(f"search: {shown(folder)}", flush=True)
    if unfinished or not _logged(search, uri):
        with event_log.kept(folder, "search", images=len(job.dataset.stimuli), recipe=dataclasses.asdict(job.recipe)):
            _complete(job, search, options, uri)
    print(tuner.table(search.trialled))
    return folder / "overlay.json"


def _complete(job: Job, search: Search, options: Options, uri: str) -> None:
    """Trains what is missing, and writes down and logs what came out."""
    from mlflow.exceptions import MlflowException

    from acw.cluster.joining import address
    from acw.pipeline.train import record
    from acw.report import search_page
    from acw.search import tuner
    from acw.storage.files import write_json
    from acw.tracking import mlflow_store, searches

    folder, origin = search.folder, _origin(job, options)

    def ended() -> None:
        # A tracking server may be away for a while: at the end all is logged that is not there.
        try:
            searches.log(uri, search, job.recipe, origin, ended=False)
        except (MlflowException, UserError) as error:
            print(f"not in MLflow yet: {str(error).partition(chr(10))[0]}", flush=True)

    # What is wrong with a cluster or an MLflow store is better known now than after the search.
    address()
    mlflow_store.ready(job.root, job.tracking_uri)
    if search.waiting or search.missing:
        tuner.run(_work(job, search.space, options, folder), search, ended)
    write_json(folder / "overlay.json", tuner.overlay(search, origin))
    made_with = {"folds": list(options.folds), "provenance": record(job)}
    write_json(folder / "search.json", search.summary() | made_with)
    search_page.write(folder)
    searches.log(uri, search, job.recipe, origin, ended=True)
    # Last: it says that all is done.
    write_json(folder / "logged.json", _log_entry(search, uri))


def _search(job: Job, space: Space, options: Options) -> Search:
    """The search that the arguments name, with what earlier attempts have left of it."""
    from acw.search.space import Search
    from acw.storage.checksums import fingerprint

    recipe = job.recipe
    if recipe.heads:
        raise UserError(f"--heads {recipe.heads}: those are trained already; leave them out to search")
    if outside := [fold for fold in options.folds if not 0 <= fold < recipe.folds]:
        raise UserError(f"--search-folds {outside[0]}: the recipe has folds 0 to {recipe.folds - 1}")
    identity = fingerprint([recipe.fingerprint, job.dataset.fingerprint, space.identity, options.folds])
    folder = job.root / "tune" / f"{space.name}-{recipe.name}-{plain_name(job.dataset.name)}-{identity}"
    size = max(recipe.heads_per_worker // len(options.folds), 1)
    return Search(folder, space, size, options.samples, recipe.seed)


def _work(job: Job, space: Space, options: Options, folder: Path) -> Work:
    """What all trials share; extracts the features that the space's recipes need."""
    from acw.cluster.joining import connect
    from acw.features import joined
    from acw.features.extraction import extract
    from acw.search.tuner import Work
    from acw.training.training_set import training_set

    connect()
    recipe, dataset = job.recipe, job.dataset
    stores = {}
    for configured in space.recipes(recipe):
        views = tuple(configured.views)
        if views not in stores:
            parts, _ = extract(
                job.root,
                configured.backbone_values,
                dataset.stimuli,
                dataset.stimuli_fingerprint,
                recipe.workers,
                recipe.accelerator,
                recipe.gpus_per_worker,
                joined.parts_beside_others(views),
            )
            constants = joined.standards(views, parts, job.heads_split.development)
            stores[views] = joined.of_views(views, parts, constants)
    split = job.heads_split
    return Work(recipe, options.folds, dataset, split, training_set(dataset, split, recipe), stores, folder)


def _origin(job: Job, options: Options) -> dict[str, Any]:
    """Where a search's result comes from, for its overlay and MLflow."""
    from acw.provenance import commit

    return {
        "recipe": job.recipe.name,
        "backbones": list(job.recipe.backbones),
        "folds": list(options.folds),
        "dataset": job.dataset.fingerprint,
        "split": job.split.hash,
        "commit": commit(),
    }


def _log_entry(search: Search, uri: str) -> dict[str, Any]:
    return {"store": shown(uri), "configurations": len(search.trialled)}


def _logged(search: Search, uri: str) -> bool:
    """Whether all that came out is written and in the MLflow store that was asked for."""
    path = fetch(search.folder / "logged.json")
    return path.exists() and json.loads(path.read_text(encoding="utf-8")) == _log_entry(search, uri)


def add_options(parser: Parser, base: Recipe | None = None) -> None:
    about = "what to search: a file of tune_spaces/ (default: sigma_lr)"
    parser.add_argument("--space", default="sigma_lr", metavar="NAME", help=about)
    add_search_options(parser)
    about = "go on with a search that was interrupted, or add to one that has ended with fewer samples"
    parser.add_argument("--resume", action="store_true", help=about)
    add_recipe_options(parser, base)


def main(argv: Sequence[str]) -> None:
    options = read_options(argv, __doc__, add_options)
    asked = search_options(options, options["space"], options["resume"])
    print(shown(tune(job_of(options), asked)), flush=True)
