"""Makes a version of the registered model the champion, if it is better than the champion beyond chance.

acw promote 3                              by out-of-fold IG, where both were trained on the same data set and split
acw promote 3 --dataset FOLDER             by the likelihood of fixations that neither has learned from
acw promote 3 --force                      whatever the comparison says; the version's tags keep that

Paired by image, with a 95 % interval (bootstrap over images within category). Held-out images of a run's own data set
are never asked, as they would no longer be held out. Exit status 1 if the alias stays where it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from acw.pipeline.models import add_store_options, store_of
from acw.pipeline.options import Parser, add_reader_options, read_dataset

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from acw.data import Dataset
    from acw.model.model import Model
    from acw.tracking.registry import ByImage, Decision

SEED = 0  # of the bootstrap


def add_options(parser: Parser) -> None:
    parser.add_argument("version", type=int, metavar="VERSION", help="its number, as `acw models` lists them")
    about = "data set on which both are compared, as other commands take it, instead of the one that they come from"
    parser.add_argument("--dataset", metavar="PATH", help=about)
    add_reader_options(parser)
    about = "move the alias whatever the comparison says, and note that in the version's tags"
    parser.add_argument("--force", action="store_true", help=about)
    add_store_options(parser)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    store, client = store_of(options)
    dataset = read_dataset(options | {"pixels_per_degree": None}) if options["dataset"] else None
    from acw.tracking import mlflow_store, registry

    version, champion = registry.version_of(client, options["version"]), registry.champion_of(client)
    if champion and champion.version == version.version:
        print(f"version {version.version} is the champion", flush=True)
        return
    if dataset is None or champion is None:
        alias, reason = registry.decide_again(client, version)
    else:
        alias, reason = _decide_on(dataset, store, version, champion)
    forced = options["force"] and alias != "champion"
    if alias != "champion" and not forced:
        print(f"version {version.version} does not become the champion: {reason}", flush=True)
        sys.exit(1)

    def move() -> None:
        registry.crown(mlflow_store.connect(store)[0], version, champion, reason, forced)

    mlflow_store.log(store, move)
    print(f"version {version.version} is the champion now: {'forced, though ' * forced}{reason}", flush=True)


def _decide_on(dataset: Dataset, store: str, version: ModelVersion, champion: ModelVersion) -> Decision:
    """By log-likelihood on a data set: unlike IG, it is over the same baseline for both."""
    from acw.tracking import registry

    numbers = (version.version, champion.version)
    folders = [registry.download_model(f"models:/{registry.NAME}/{number}", store) for number in numbers]
    from acw.model import files
    from acw.pipeline.evaluate import learned_from

    models = [files.load(folder) for folder in folders]
    for number, model in zip(numbers, models, strict=True):
        if dataset.fingerprint in learned_from(model):
            seen = f"version {number} has learned from images of {dataset.name}"
            return "challenger", f"not comparable: {seen}; without --dataset, out-of-fold IG is compared"
    scores: list[ByImage] = []
    for number, model in zip(numbers, models, strict=True):
        print(f"version {number} on {dataset.name}", flush=True)
        of_model, reason = _scored(model, f"version {number}", dataset)
        if reason and number == version.version:
            return "challenger", reason
        scores.append(of_model)
    ours, theirs = scores
    return registry.compare(f"LL on {dataset.name} ({dataset.fingerprint})", ours, theirs, champion.version)


def _scored(model: Model, name: str, dataset: Dataset) -> tuple[ByImage, str]:
    """The model's LL of each image, and why its scores are not to be believed, if anything says so."""
    from acw.evaluation.summary import summarise
    from acw.pipeline.evaluate import is_labelled, score
    from acw.tracking.registry import doubt

    scores, _, _ = score(model, name, dataset)
    kind = "weights" if model.adaptation is None else "adaptation"
    inferred = "inferred_category" if model.adaptation is None else "inferred_adaptation"
    own = f"category_{kind}" if is_labelled(model, dataset) else inferred
    stimuli = [dataset.stimuli[index] for index in scores]
    of_images = {s.name: (s.category, scores[index][own]["LL"]) for index, s in zip(scores, stimuli, strict=True)}
    return of_images, doubt(summarise(dataset, scores, SEED) | {"headline": own})
