"""Scores a finished model on every image of a data set.

Other models' maps and predictions are scored beside it on the same images; saliency maps as they are, without IG, LL.
Writes FILE as evaluation.json's scores, and FILE's name with `.per_image.csv`. IG is over the model's stored centre
bias, which never saw this data set. The last line on stdout is FILE's path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acw.data import Dataset
from acw.pipeline.options import Parser, add_dataset_options, check_writable, local_path, read_dataset
from acw.storage.addresses import shown
from acw.storage.errors import UserError
from acw.storage.files import is_model_uri, write_atomic, write_json

if TYPE_CHECKING:
    from acw.cluster.costs import Cost
    from acw.evaluation.external_models import ExternalModel
    from acw.evaluation.gold_standard import GoldStandard
    from acw.evaluation.scoring import Scores
    from acw.model.model import Model

SEED = 0  # of the bootstrap


def evaluate(
    location: str,
    dataset: Dataset,
    out: Path,
    external: tuple[ExternalModel, ...],
    exact: bool,
    sim_opt: int,
    adaptive: bool,
) -> None:
    """Scores the model, and the external ones beside it, on all images and writes the two files; prints the table."""
    from acw.evaluation.summary import per_image_csv, summarise, table
    from acw.tracking.load import load

    model = load(location)
    scores, gold, cost = score(model, location, dataset, external, exact, sim_opt, adaptive)
    result = {
        "dataset": dataset.summary() | {"scored": "all images", "images_scored": len(scores)},
        **summarise(dataset, scores, SEED),
        **({"gold_standard": gold.described()} if gold else {}),
        "model": location,
        "outside": {other.name: {"kind": other.kind, "source": shown(other.location)} for other in external},
        "exact": exact,
        "sim_opt_fixations": sim_opt or None,
        "cost": dataclasses.asdict(cost),
        "provenance": model.provenance,
    }
    write_atomic(out.with_name(f"{out.name.removesuffix('.json')}.per_image.csv"), per_image_csv(dataset, scores))
    write_json(out, result)
    print(table(result))


def score(
    model: Model,
    location: str,
    dataset: Dataset,
    external: tuple[ExternalModel, ...] = (),
    exact: bool = False,
    sim_opt: int = 0,
    adaptive: bool = False,
) -> tuple[dict[int, Scores], GoldStandard | None, Cost]:
    """Scores of all images by index, of the model, what it is made of, and the external ones; how well people predict
    people, where they are told apart; and what it took. location: what to call the model."""
    import numpy as np

    from acw.cluster.joining import connect
    from acw.evaluation import gold_standard
    from acw.evaluation.distributed import score_images
    from acw.evaluation.scoring import ImageDensities, Scoring

    trained_on = model.provenance["dataset"]
    if trained_on is None:
        raise UserError(
            f"{location}: has no centre bias yet, and IG no baseline; have them taken from training folds, and the "
            f"held-out images scored: acw run cat2000_iie --heads {location} --dataset D"
        )
    if dataset.fingerprint in learned_from(model):
        print(
            "warning: the model has learned from images of this very data set; see its own scores or gains", flush=True
        )
    labelled = is_labelled(model, dataset)
    if not labelled:
        print("categories are not the model's: weights by inferred category only", flush=True)
    images = np.arange(len(dataset.stimuli))
    gold = None
    if gold_standard.has_subjects(dataset, images):
        gold = gold_standard.fit(dataset, images, model.center_bias, adaptive)
    model.load_backbones()
    connect()
    densities = ImageDensities(model, dataset)
    scoring = Scoring(
        dataset, images, densities, model, {}, labelled, gold, external, model.adaptation, exact=exact, sim_opt=sim_opt
    )
    scores, cost = score_images(scoring, images)
    print(f"scores: {cost}", flush=True)
    return scores, gold, cost


def is_labelled(model: Model, dataset: Dataset) -> bool:
    """Whether the data set's categories are the model's, whose own numbers are then used."""
    return set(dataset.categories) <= set(model.categories)


def add_options(parser: Parser) -> None:
    about = "a run's folder, or an MLflow URI such as models:/acw@champion"
    parser.add_argument("--model", required=True, metavar="PATH", help=about)
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--maps", action="append", default=[], metavar="[NAME=]DIR", help="another model's maps")
    about = "what --maps holds; and --predictions, where the file does not say and values may mislead"
    parser.add_argument("--kind", choices=("density", "saliency"), help=about)
    parser.add_argument("--predictions", action="append", default=[], metavar="[NAME=]FILE", help="pysaliency's HDF5")
    about = "pysaliency's model, on PYTHONPATH"
    parser.add_argument("--object", action="append", default=[], metavar="[NAME=]MODULE:OBJECT", help=about)
    about = "scores by pysaliency itself, but for controls and saliency maps: slow"
    parser.add_argument("--exact", action="store_true", help=about)
    about = "SIM of maps optimised for it by pysaliency, too: three minutes a full-HD image"
    parser.add_argument("--sim-opt", action="store_true", help=about)
    about = "kernels of the density by which people predict people: of one width, or adaptive"
    parser.add_argument("--gold-standard", choices=("fixed", "adaptive"), default="fixed", help=about)
    add_dataset_options(parser)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    if options["maps"] and not options["kind"]:
        raise UserError("--maps: say what the maps are: --kind density or --kind saliency")
    out = local_path(options["out"], "--out")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    check_writable(out.parent)
    location = options["model"] if is_model_uri(options["model"]) else shown(local_path(options["model"], "--model"))
    dataset = read_dataset(options)
    from acw.evaluation.external_models import open_maps, open_object, open_predictions
    from acw.evaluation.scoring import MODELS, REFERENCES
    from acw.evaluation.sim_opt import fixations_of

    external = [open_maps(spec, options["kind"], dataset) for spec in options["maps"]]
    external += [open_predictions(spec, dataset, options["kind"]) for spec in options["predictions"]]
    external += [open_object(spec, dataset) for spec in options["object"]]
    names = [other.name for other in external]
    ours = (*MODELS, *REFERENCES)
    taken = [name for name in names if names.count(name) > 1 or name in ours or name.startswith("backbone:")]
    if taken:
        raise UserError(f"{taken[0]}: two models are called so; call yours otherwise: NAME=PATH, NAME=MODULE:OBJECT")
    for other in external:
        other.check(dataset)
    if len(dataset.stimuli) < 2:
        raise UserError(f"dataset {dataset.location}: has one image, and sAUC needs fixations of a second; add images")
    fixations = fixations_of(dataset) if options["sim_opt"] else 0
    adaptive = options["gold_standard"] == "adaptive"
    evaluate(location, dataset, out, tuple(external), options["exact"], fixations, adaptive)
    print(shown(out), flush=True)


def learned_from(model: Model) -> Iterator[str]:
    """Fingerprints of the data sets whose images a model has seen: its own, those that it was adapted to, and those of
    the model whose heads it took, as far as that is still there."""
    from acw.model.description import describe
    from acw.storage.addresses import local

    provenance: dict[str, Any] | None = model.provenance
    while provenance:
        adapted_to = [record["dataset"] for record in provenance.get("adapted", [])]
        yield from (data["fingerprint"] for data in (provenance["dataset"], *adapted_to) if data)
        heads = provenance.get("recipe", {}).get("heads")
        try:
            provenance = describe(local(heads))["provenance"] if heads else None
        except (UserError, OSError):
            provenance = None
