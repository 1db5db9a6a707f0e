"""Adapts a finished model to a small data set of another kind of images, in some minutes.

acw adapt RUN FOLDER --fixations FOLDER/fixations.csv
acw adapt RUN FOLDER --by-category --out adapted

The data set becomes one category more, or each of its categories does: a handful of numbers and, where these pay as
well, readouts of its own. What the model knew before, it predicts as before. The gain is that over the model as it is,
on images that it was fitted without. Features are kept below the root.
Exit status 0: the adapted model is written and registered, and its folder is the last line on stdout; 1: nothing gains,
so no model is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acw.pipeline.models import add_store_options
from acw.pipeline.options import (
    MODEL_MEANS,
    Parser,
    add_reader_options,
    check_writable,
    local_path,
    model_location,
    read_dataset,
    root_folder,
)
from acw.storage.addresses import in_cache, shown
from acw.storage.errors import UserError
from acw.storage.files import csv_text, plain_name, present, write_atomic, write_json

if TYPE_CHECKING:
    from acw.data import Dataset, Stimulus
    from acw.features.joined import Store
    from acw.model.model import Model
    from acw.model.new_category import NewCategory
    from acw.model.study import Study

SEED = 0  # of the folds and of the bootstrap
STARTER = "acw's starter"
Groups = Mapping[str, np.ndarray]  # new category -> indices of its images


def add_options(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_MEANS)
    about = "the data set, as for --dataset: a folder, or s3://BUCKET/PREFIX"
    parser.add_argument("dataset", metavar="PATH", help=about)
    add_reader_options(parser)
    about = "a new category for each of the data set's, instead of one for all of it"
    parser.add_argument("--by-category", action="store_true", help=about)
    about = "what the new category is called (default: as the data set); with --by-category, what stands before a name"
    parser.add_argument("--name", metavar="NAME", help=about)
    about = "folder to write, which is not there yet, here or in S3 (default: adapted-NAME below the root)"
    parser.add_argument("--out", metavar="FOLDER", help=about)
    add_store_options(parser)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    location = model_location(options["model"], "MODEL")
    dataset = read_dataset(options | {"pixels_per_degree": None})
    groups = new_categories(dataset, options["name"], options["by_category"])
    root = root_folder(options["root"])
    out = local_path(options["out"], "--out") if options["out"] else root / f"adapted-{_name(dataset, options['name'])}"
    if present(out / "model" / "model.json") or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"--out {shown(out)}: is there already; name another folder, or remove it")
    check_writable(root)
    check_writable(out.parent)
    from acw.model import files, new_category
    from acw.tracking import mlflow_store
    from acw.tracking.load import folder_of

    uri = mlflow_store.ready(root, options["tracking_uri"])
    model = files.load(folder_of(location, uri), "cpu")
    new_category.check(model)
    if taken := [name for name in groups if name in model.categories]:
        raise UserError(f"the model knows a category '{taken[0]}' already; give --name for what is put in its place")
    study = look(model, dataset, root)
    fitted = {name: fit(study, name, images) for name, images in groups.items()}
    adopted = {name: category for name, category in fitted.items() if category.pays}
    for name, category in fitted.items():
        if name not in adopted:
            print(f"{name}: not adopted: {told(category)} over the model as it is, on images left out", flush=True)
    if not adopted:
        print("no model is written: it foretells these images as well as it is", flush=True)
        sys.exit(1)
    write(study, groups, adopted, STARTER if location is None else shown(location), out, uri)
    print(shown(out), flush=True)


def _name(dataset: Dataset, given: str | None) -> str:
    return plain_name(given or dataset.name)


def new_categories(dataset: Dataset, name: str | None, by_category: bool) -> Groups:
    """What new categories there are to be, and the images of each. Raises UserError for one with too few images."""
    from acw.model.new_category import FEWEST

    groups = {name or dataset.name: np.arange(len(dataset.stimuli))}
    if by_category:
        groups = {
            f"{name} {category}" if name else category: np.flatnonzero(dataset.category_index == number)
            for number, category in enumerate(dataset.categories)
        }
    for category, images in groups.items():
        if len(images) < FEWEST:
            raise UserError(
                f"dataset {dataset.location}: '{category}' has {len(images)} images, and {FEWEST} are the fewest that "
                f"a model can be adapted to; add images{', or leave out --by-category' if by_category else ''}"
            )
    return groups


def look(model: Model, dataset: Dataset, root: Path) -> Study:
    """Has the features of all images, which it keeps below `root`, and what the model says of them."""
    from acw.data.dataset import MirrorImage
    from acw.evaluation.scoring import StoredDensities
    from acw.features import joined
    from acw.features.extraction import extract_here
    from acw.model.study import Seen, Study
    from acw.storage.checksums import fingerprint

    def stores_of(stimuli: Sequence[Stimulus], of_these: str) -> list[Store]:
        beside = joined.parts_beside_others(model.views)
        of_parts = extract_here(root, model.loaded, model.backbones, stimuli, of_these, beside)
        return list(joined.of_views(model.views, of_parts, model.standards).values())

    stimuli, images = dataset.stimuli, range(len(dataset.stimuli))
    stores, mirrored = stores_of(stimuli, dataset.stimuli_fingerprint), []
    if model.mirrored:
        mirrors = [MirrorImage(**vars(stimulus)) for stimulus in stimuli]
        mirrored = stores_of(mirrors, fingerprint([dataset.stimuli_fingerprint, "mirrored"]))
    sizes = [stimulus.size for stimulus in stimuli]
    densities = StoredDensities(model, stores, sizes, mirrored, {index: index for index in images})
    log_densities, pooled = zip(*map(densities.of, images), strict=True)
    fixations = [dataset.fixations_of(index)[:2] for index in images]
    return Study(model, dataset, stores, mirrored, Seen(log_densities, np.stack(pooled), fixations, sizes))


def fit(study: Study, name: str, images: np.ndarray) -> NewCategory:
    """The category that some of the images are of."""
    from acw.model import new_category, own_readouts

    fold = new_category.fold_of(len(images), SEED)
    readouts = own_readouts.train(study, name, images, fold, SEED)
    return new_category.fit(study.model, study.seen.subset(images), SEED, readouts)


def gain(category: NewCategory) -> tuple[float, float, float]:
    """Bits per fixation over the model as it is: the mean over images that were left out, and its 95 % interval."""
    from acw.evaluation.bootstrap import interval

    bits = category.gain / math.log(2)
    mean, low, high = interval(bits, np.zeros(len(bits)), seed=SEED)
    return float(mean), float(low), float(high)


def told(category: NewCategory) -> str:
    mean, low, high = gain(category)
    return f"{mean:+.4f} bit [{low:+.4f}, {high:+.4f}]"


def write(study: Study, groups: Groups, adopted: Mapping[str, NewCategory], location: str, out: Path, uri: str) -> None:
    """The adapted model as a folder and as a registered version; says what was gained, and what changed."""
    from acw.fusion import classifier
    from acw.fusion.category_weights import dealt
    from acw.model import files
    from acw.model.new_category import extended
    from acw.pipeline.aggregate import write_adaptation
    from acw.provenance import commit
    from acw.report.weights import UNCHANGED, changes
    from acw.tracking import adaptations, model_card

    model, dataset, seen = study.model, study.dataset, study.seen
    images = np.concatenate([groups[name] for name in adopted])
    number = np.repeat(np.arange(len(adopted)), [len(groups[name]) for name in adopted])
    fold = dealt(number, len(adopted), SEED)
    wider, inferred = classifier.extended(model.classifier, seen.pooled[images], number, fold)
    right = inferred.argmax(1) == number + 1
    record: dict[str, Any] = {
        "model": location,
        "dataset": dataset.summary(),
        "categories": {
            name: {
                "images": len(groups[name]),
                **dict(zip(("gain_bits", "low", "high"), gain(category), strict=True)),
                "prior_strength": str(category.strength),
                "readouts_share": category.readouts.share if category.readouts else None,
                "inferred_rightly": float(right[number == place].mean()),
            }
            for place, (name, category) in enumerate(adopted.items())
        },
        "command": " ".join(sys.argv),
        "commit": commit(),
    }
    adapted = extended(model, list(adopted), list(adopted.values()), wider, record)
    assert adapted.adaptation is not None
    numbers = adapted.adaptation.only([adapted.categories.index(name) for name in adopted])
    numbers = dataclasses.replace(numbers, weights=adapted.by_backbone(numbers.weights))
    rows = [
        [dataset.stimuli[index].name, name, f"{value:.6f}"]
        for name, category in adopted.items()
        for index, value in zip(groups[name], category.gain / math.log(2), strict=True)
    ]
    with _whole(out) as folder:
        areas = [category.area for category in adopted.values()]
        write_adaptation(folder, list(adopted), model.names, numbers, areas)
        words = changes(folder)
        for name, category in adopted.items():
            if category.readouts:
                own = f"readouts of its own, {category.readouts.share:.0%} of the way to the trained ones"
                words[name] = own if words[name] == UNCHANGED else f"{own}, {words[name]}"
            print(f"{name}: {told(category)} over the model as it is, on images left out; {words[name]}", flush=True)
            share = record["categories"][name]["inferred_rightly"]
            print(f"{name}: inferred rightly for {share:.0%} of its images, left out as well", flush=True)
        write_atomic(folder / "gains.csv", csv_text(["image", "category", "gain"], rows))
        write_json(folder / "adaptation.json", record)
        write_atomic(folder / "model" / model_card.FILE, model_card.adapted(model.provenance, record, words))
        files.save(adapted, folder / "model", [adapted.loaded(backbone) for backbone in adapted.backbones])
        registration = adaptations.log(uri, folder, out.name, record)
        print(f"registered: acw version {registration.version}, {registration.alias} ({registration.reason})")


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder that has another's name once the block has ended well, and is gone if it has not.

    In S3, where nothing can be renamed, it is that folder; without model.json, which comes last, it holds no model.
    """
    if in_cache(out):
        yield out
        return
    folder = out.with_name(f".{out.name[:40]}.{secrets.token_hex(4)}.partial")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
