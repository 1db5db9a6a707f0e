"""A plan by what `benchmarks/gpu.py` has measured on one GPU: nothing is computed, and no run need have been there.

Each step's seconds are those of the results file, scaled by what the data set's images are larger or smaller than
those that were measured: a network's by its input's pixels, a bank's by the cells of its readout, scores by the
image's pixels. Scores are computed on the GPU's share of CPU cores, as the product does it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acw.features.backbone import Backbone
from acw.features.view import View
from acw.features.zoo import BACKBONES
from acw.pipeline.job import Job
from acw.pipeline.plan import OTHER_HEADS, BackbonePlan, Plan, full_bank
from acw.recipes import Recipe
from acw.storage.errors import UserError
from acw.storage.files import fetch

# The readouts at which steps were measured, of a bank of so many heads.
READOUTS, HEADS = ((8, 15), (34, 60)), 15
# What an epoch takes besides its steps: validation, and the check of the loss's grid. Not measured on a GPU.
BESIDES_STEPS = 1.1
MAKE_ONE = "make one on a machine with a GPU: python benchmarks/gpu.py --json FILE"
# CAT2000's training part, for which the recipe of that name is planned where no data set is given: image sizes, and
# the fixations of all images (18 observers, 5 s; some 325 an image).
CAT2000, CAT2000_FIXATIONS = Counter({(1080, 1920): 2000}), 2000 * 325


@dataclass(frozen=True)
class Results:
    """A results file. card: the GPU's name; cores: CPU cores beside it; size: (height, width) px of the images."""

    file: Path
    card: str
    cores: int
    size: tuple[int, int]
    figures: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises UserError for a file that is missing, damaged, of something else, or not measured on a GPU."""
        what = f"--hardware {path}"
        try:
            content = json.loads(fetch(path).read_text(encoding="utf-8"))
            machine, figures = content["machine"], content["figures"]
            card, width_height = machine["gpu"], figures["image, px"]
            cores = int(machine["cores"]) // max(int(machine["gpus"]), 1)
            width, height = (int(side) for side in width_height.split("x"))
            tiny = bool(figures["tiny"])
        except OSError as error:
            raise UserError(f"{what}: cannot be read ({error.strerror}); {MAKE_ONE}") from None
        except ValueError:
            raise UserError(f"{what}: is damaged; {MAKE_ONE}") from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{what}: holds no results of benchmarks/gpu.py; {MAKE_ONE}") from None
        if tiny or not card:
            raise UserError(f"{what}: was measured {'at tiny sizes' if tiny else 'without a GPU'}; {MAKE_ONE}")
        return cls(path, str(card), max(cores, 1), (height, width), figures)

    def __getitem__(self, name: str) -> float:
        """A figure; raises UserError where it was not measured."""
        value = self.figures.get(name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"--hardware {self.file}: says nothing of '{name}'; {MAKE_ONE}")
        return float(value)


def make(job: Job, results: Results, dataset_given: bool) -> Plan:
    """Plans the job, or, where cat2000 was given no data set, that recipe on CAT2000.

    Raises UserError for networks, and for a joint training, of which nothing was measured.
    """
    recipe = job.recipe
    if recipe.joint:
        raise UserError(
            f"--hardware: {recipe.name} trains jointly, of which nothing was measured; leave --hardware out"
        )
    if lacking := [b.name for b in recipe.backbone_values if _bank(b.name, READOUTS[0]) not in results.figures]:
        raise UserError(
            f"--hardware {results.file}: has no heads on {', '.join(lacking)}, only on the networks of the papers; "
            "leave --hardware out"
        )
    sizes, fixations = Counter(stimulus.size for stimulus in job.dataset.stimuli), len(job.dataset.x)
    held_out = len(job.split.held_out)
    if recipe.name == "cat2000" and not dataset_given:
        sizes, fixations = CAT2000, CAT2000_FIXATIONS
        held_out = round(sizes.total() * recipe.holdout)
    backbones = [_backbone(results, backbone, sizes) for backbone in recipe.backbone_values]
    image_bytes = {backbone.name: backbone.image_bytes for backbone in backbones}
    pixels = _mean(sizes, math.prod)
    scoring = results["scores, all eight of 25 mixtures, one core, s an image"] / math.prod(results.size)
    memory = [results["heads at 34x60, peak memory, GiB"]]
    memory += [results[f"extraction, {backbone.name}, peak memory, GiB"] for backbone in backbones]
    return Plan(
        recipe,
        sizes.total(),
        held_out,
        fixations,
        len(sizes),
        backbones,
        {view.name: _epoch(results, recipe, view, sizes, image_bytes) for view in recipe.views},
        0.0,
        scoring * pixels / results.cores,
        round(max(memory) * 2**30),
        shutil.disk_usage(next(p for p in (job.root, *job.root.parents) if p.exists())).free,
        [],
        results.card,
    )


def _mean(sizes: Counter[tuple[int, int]], of: Any) -> float:
    """The mean over images of a function of their size."""
    return sum(of(size) * count for size, count in sizes.items()) / sizes.total()


def _backbone(results: Results, backbone: Backbone, sizes: Counter[tuple[int, int]]) -> BackbonePlan:
    name = backbone.name
    measured = math.prod(BACKBONES[name].input_size(results.size))
    factor = _mean(sizes, lambda size: math.prod(backbone.input_size(size))) / measured
    first = next(iter(sizes))
    return BackbonePlan(
        name,
        backbone.input_size(first),
        backbone.readout_size(first),
        round(results[f"extraction, {name}, channels"]),
        math.ceil(results[f"extraction, {name}, MB an image"] * 1e6 * factor),
        False,
        factor / results[f"extraction, {name}, images/s"],
    )


def _bank(network: str, readout: tuple[int, int]) -> str:
    """What its step is called in the results."""
    return f"bank of {HEADS} heads, {network}, {readout[0]}x{readout[1]}, ms an image"


def _epoch(
    results: Results, recipe: Recipe, view: View, sizes: Counter[tuple[int, int]], image_bytes: Mapping[str, int]
) -> float:
    """Seconds an image and epoch of a view's full bank: its steps, or the features' way to the GPU, which takes place
    meanwhile, where that takes longer."""
    (few, many), seconds = (math.prod(readout) for readout in READOUTS), 0.0
    cells = _mean(sizes, lambda size: math.prod(view.readout_size(size)))
    for part in view.parts:
        small, large = (results[_bank(part.name, readout)] / 1e3 for readout in READOUTS)
        seconds += small + max(large - small, 0.0) * max(cells - few, 0.0) / (many - few)
    seconds *= (OTHER_HEADS + full_bank(recipe)) / (OTHER_HEADS + HEADS)
    read = sum(image_bytes[part.name] for part in view.parts) / (results["copies from the host, GB/s"] * 1e9)
    return max(seconds * BESIDES_STEPS, read)
