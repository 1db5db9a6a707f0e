"""Makes the package's starter model of a finished run, a few MB in acw/starter/, and says what that costs.

python jobs/starter.py RUN --dataset FOLDER

FOLDER: the data set that the run was trained on, of which ten images are kept by their hashes, with the model's scores,
so that a test can tell whether a later version still predicts as this one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from acw.data import Dataset
from acw.model import files
from acw.model.model import Model
from acw.pipeline.options import Parser, add_dataset_options, local_path, read_dataset
from acw.starter import CHECKED, FOLDER
from acw.storage.files import fetch, write_atomic, write_json
from acw.tracking import model_card

IMAGES = 10

SECTION = """
## As acw carries it

The starter model: heads in float16, networks by the package and the hash that they come from. That changes the \
log-likelihood of {images} of the pictures by {change:.1e} bit per fixation at most. `make starter` makes it anew.

Its pictures and fixations are those of OSIE (Xu, Jiang, Wang, Kankanhalli, Zhao: Predicting human gaze beyond pixels, \
2014; MIT licence; 559 pictures, 15 people) and SUN500 (Liang, Jiang, Liang, Zhao: Saliency prediction with scene \
structural guidance, 2015; MIT licence; 400 pictures, 12 people), sorted into eight categories by their content.
"""


def make(model: Model, dataset: Dataset, card: str) -> None:
    """Writes the model to the package's folder, with its card and its scores on some images of the data set."""
    networks = [model.loaded(backbone) for backbone in model.backbones]
    files.save(model, FOLDER, networks, compact=True)
    small = files.load(FOLDER)
    chosen = np.linspace(0, len(dataset.stimuli) - 1, IMAGES).astype(int).tolist()
    before, after = ([scores(each, dataset, index) for index in chosen] for each in (model, small))
    change = max(abs(one["LL"] - other["LL"]) for one, other in zip(before, after, strict=True))
    write_json(FOLDER / CHECKED, after)
    write_atomic(FOLDER / model_card.FILE, card.rstrip() + "\n" + SECTION.format(images=IMAGES, change=change))
    size = sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file())
    print(f"{FOLDER}: {size / 1e6:.1f} MB; float16 changes LL by {change:.1e} bit per fixation at most", flush=True)


def scores(model: Model, dataset: Dataset, index: int) -> dict[str, Any]:
    """An image's hash, and IG and LL of the model's prediction, without its category, in bits per fixation."""
    stimulus = dataset.stimuli[index]
    x, y, _ = dataset.fixations_of(index)
    fixated = y.astype(int), x.astype(int)
    log_density = float(model.predict(stimulus.pixels()).log_density[fixated].astype(np.float64).mean())
    baseline = float(model.center_bias.of_size(stimulus.size)[fixated].astype(np.float64).mean())
    gains = {"IG": log_density - baseline, "LL": log_density + math.log(math.prod(stimulus.size))}
    return {"sha256": stimulus.digest} | {name: round(gain / math.log(2), 5) for name, gain in gains.items()}


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a finished run's folder")
    add_dataset_options(parser)
    options = parser.read(argv)
    folder = local_path(options["run"], "RUN") / "model"
    dataset = read_dataset(options)
    make(files.load(folder), dataset, fetch(folder / model_card.FILE).read_text(encoding="utf-8"))
