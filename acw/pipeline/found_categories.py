"""Categories that a run finds by itself (`--categories auto`), and pictures of each for a person to name it by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from acw.data import Dataset
from acw.features.joined import Store, parts_of
from acw.fusion import category_weights, clusters
from acw.fusion.out_of_fold import OutOfFold
from acw.pipeline.categories import FOUND, forget
from acw.pipeline.job import Job
from acw.report.pictures import jpeg
from acw.storage.files import write_json

UNNAMED = "unnamed"  # before a category's number, until `acw categories` names it
# Of a montage: pictures beside each other and below each other, and their size and the gap between them, in px.
COLUMNS, ROWS = 6, 2
WIDTH, HEIGHT, GAP = 146, 104, 4


def found(job: Job, predictions: OutOfFold, stores: Sequence[Store]) -> Job:
    """The job with its images in the categories that are found; leaves FOUND in its folder.

    That holds what each number of categories would gain, which image is in which, and a montage of each category.
    """
    dataset, images = job.dataset, np.arange(len(job.dataset.stimuli))
    pooled = np.hstack([part.pooled(images).double().numpy() for part in parts_of(stores)])
    together = np.zeros(len(predictions.images), np.int64)
    seed, likelihoods = job.recipe.seed, predictions.likelihoods
    weights = category_weights.fit(likelihoods, together, 1, seed).global_weights
    these = clusters.find(pooled, predictions.images, predictions.maps, weights, seed)
    count = int(these.number.max()) + 1
    names = [f"{UNNAMED}-{number + 1:0{len(str(count))}}" for number in range(count)]
    gains = {number: [mean / math.log(2), error / math.log(2)] for number, (mean, error) in these.gain.items()}
    for number, (mean, error) in gains.items():
        print(f"categories: {number} would gain {mean:+.4f} bit (standard error {error:.4f})", flush=True)
    print(f"categories: {count} found" if count > 1 else "categories: more than one pay nothing", flush=True)
    of_images = [names[number] for number in these.number.tolist()]
    labelled = dataset.recategorised(of_images, f"categories were found by clustering the networks' features: {count}")
    montages = {}
    for number, name in enumerate(names):
        members = np.flatnonzero(these.number == number)
        most_typical = members[np.argsort(-these.typical[members], kind="stable")]
        montages[name] = jpeg(montage(labelled, most_typical[: COLUMNS * ROWS]))
    placed = {stimulus.name: stimulus.category for stimulus in labelled.stimuli}
    forget(job.folder)
    write_json(job.folder / FOUND, {"gain_bits": gains, "images": placed, "montages": montages})
    return dataclasses.replace(job, dataset=labelled)


def montage(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): the images of these indices in rows, each cut to the same shape."""
    across, down = WIDTH + GAP, HEIGHT + GAP
    sheet = Image.new("RGB", (COLUMNS * across - GAP, math.ceil(len(images) / COLUMNS) * down - GAP), "white")
    for place, index in enumerate(images.tolist()):
        picture = ImageOps.fit(Image.fromarray(dataset.stimuli[index].pixels()), (WIDTH, HEIGHT))
        sheet.paste(picture, (place % COLUMNS * across, place // COLUMNS * down))
    return np.asarray(sheet)
