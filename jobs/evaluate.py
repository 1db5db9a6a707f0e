"""Scores a finished model on every image of a data set.

    python jobs/evaluate.py --model runs/gaze-gaze-0123456789abcdef --dataset FOLDER --out scores.json
    python jobs/evaluate.py --model models:/acw@champion --dataset synthetic --out scores.json   # on a CPU

Writes FILE as evaluation.json's scores, and FILE's name with `.per_image.csv`. IG is over the model's stored centre
bias, which never saw this data set. The last line on stdout is FILE's path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from acw.cli import Parser, add_dataset_options, check_writable, local_path, read_dataset, run
from acw.data import Dataset
from acw.storage import UserError

SEED = 0  # of the bootstrap


def evaluate(location: str, dataset: Dataset, out: Path) -> None:
    """Scores the model on all images and writes the two files; prints the table."""
    import numpy as np

    import acw
    from acw import gold_standard
    from acw.cluster import connect
    from acw.evaluation import ImageDensities, Scoring, per_image_csv, score_images, summarise, table
    from acw.storage import write_atomic, write_json

    model = acw.load(location)
    if dataset.fingerprint == model.provenance["dataset"]["fingerprint"]:
        print("warning: the model was trained on images of this very data set; see its own evaluation.json", flush=True)
    labelled = set(dataset.categories) <= set(model.categories)
    if not labelled:
        print("categories are not the model's: weights by inferred category only", flush=True)
    images = np.arange(len(dataset.stimuli))
    gold = None
    if gold_standard.has_subjects(dataset, images):
        gold = gold_standard.fit(dataset, images, model.center_bias)
    model.load_backbones()
    connect()
    scoring = Scoring(dataset, images, ImageDensities(model, dataset), model, {}, labelled, gold)
    scores, cost = score_images(scoring, images)
    print(f"scores: {cost}", flush=True)
    result = {
        "dataset": dataset.summary() | {"scored": "all images", "images_scored": len(scores)},
        **summarise(dataset, scores, SEED),
        "model": location,
        "cost": dataclasses.asdict(cost),
        "provenance": model.provenance,
    }
    write_atomic(out.with_suffix(".per_image.csv"), per_image_csv(dataset, scores))
    write_json(out, result)
    print(table(result))


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a run's folder, or an MLflow URI such as models:/acw@champion")
    parser.add_argument("--out", required=True, help="JSON file to write")
    add_dataset_options(parser)
    options = vars(parser.parse_args(argv))
    out = local_path(options["out"], "--out")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    check_writable(out.parent)
    location = options["model"] if ":/" in options["model"] else str(local_path(options["model"], "--model"))
    evaluate(location, read_dataset(options), out)
    print(out, flush=True)


if __name__ == "__main__":
    run(main)
