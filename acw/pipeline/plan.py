"""What a recipe will take on a data set, before anything is spent: images, bytes, memory, hours and money.

Bytes and seconds of features come from computing those of some of the data set's own images here, one thread, for some
seconds a backbone. Seconds of all else come from what earlier runs under the root have measured (`measured`), or, where
there is none of this kind, from figures of the machine of docs/performance.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acw.cluster import costs
from acw.cluster.process import compute_with
from acw.data import Dataset, Stimulus
from acw.features.backbone import Backbone, load_backbone
from acw.features.batch_size import Pace
from acw.features.extraction import write_shards
from acw.features.joined import parts_beside_others
from acw.features.store import MANIFEST, shard_path, store_folder
from acw.features.view import JOIN, View
from acw.features.zoo import BACKBONES
from acw.pipeline.job import Job
from acw.recipes import Recipe
from acw.storage.files import fetch, listing, present
from acw.training.bank import Bank, further, plan_banks
from acw.training.progress import Unit, bank_units, images_per_second, read, recorded_recipe, system_units
from acw.training.scheduler import soonest_end

# Of each backbone's features, which are computed three times, as other work here would slow down any one of them.
SECONDS_A_BACKBONE = 2.0
MOST_IMAGES = 8
# An image costs a bank as much whatever its heads as so many heads cost besides: 15 heads together are some four times
# as fast as one by one.
OTHER_HEADS = 4
# Heads stop when their validation IG stands still: on `gaze` they needed 725 of 1,200 head-epochs.
EXPECTED_SHARE = 0.6
# A joint training's share of its epochs, on `gaze`.
JOINT_SHARE = 0.6
# Ray, Ray Train and their worker processes have to start; seconds, on two cores.
START_UP = 30.0
# Fitting weights and category inference, drawing and registering: `gaze` on two cores.
FINISHING = 60.0
# Where no run has measured it, on a core of the machine of docs/performance.md: `_work` a second; seconds of an image's
# scores, and for each of its pixels; bytes of a worker, and for each cell and head of a batch.
WORK_PER_SECOND = 4.5e9
SCORING, SCORING_PIXEL = 0.3, 0.7e-6
WORKER, WORKER_CELL = 1.2e9, 4800
# A doubling of cores that saves less of the time than this does not pay off.
WORTHWHILE = 0.2


@dataclass(frozen=True)
class BackbonePlan:
    """One backbone's part. extraction: seconds of one thread, per image.

    input_size, readout: (height, width) for the first image. stored: whether the root has its features already.
    """

    name: str
    input_size: tuple[int, int]
    readout: tuple[int, int]
    channels: int
    image_bytes: int
    stored: bool
    extraction: float


@dataclass(frozen=True)
class Plan:
    """epochs: by view, seconds of one thread for an image and epoch of a full bank.

    joint: seconds an image and epoch of one jointly trained system; 0 without. scoring: seconds a held-out image.
    worker_bytes: the largest resident memory of a worker; disk_free: bytes. unknown: views that no run has trained.
    card: the GPU whose seconds these are, with its share of CPU cores, in place of one core's; empty for a core's.
    """

    recipe: Recipe
    images: int
    held_out: int
    fixations: int
    sizes: int
    backbones: list[BackbonePlan]
    epochs: dict[str, float]
    joint: float
    scoring: float
    worker_bytes: int
    disk_free: int
    unknown: list[str]
    card: str = ""

    @property
    def feature_bytes(self) -> int:
        return self.images * sum(backbone.image_bytes for backbone in self.backbones)

    def banks(self) -> list[Bank]:
        return plan_banks(self.recipe)

    def seconds(self, cores: int, share: float | None = None) -> dict[str, float]:
        """Expected wall-clock seconds of each step on so many cores or GPUs; share: of the most epochs that are run."""
        mirrored = self.held_out if self.recipe.mirrored else 0
        images = self.images + mirrored
        extraction = sum(0 if b.stored else images * b.extraction for b in self.backbones) / cores
        development = self.images - self.held_out
        steps = {
            "features": extraction + START_UP / 2,
            "heads": self._training(development, cores, share, self.recipe.max_epochs),
        }
        if self.recipe.refit:
            steps["refit"] = self._training(self.images, cores, 1.0, further(self.recipe).max_epochs)
        if self.recipe.joint:
            rounds = math.ceil(self.recipe.folds / cores)
            of_joint = JOINT_SHARE if share is None else share
            steps["systems"] = rounds * development * self.joint * self.recipe.joint_max_epochs * of_joint
        return steps | {"scores": self.held_out * self.scoring / cores + FINISHING}

    def _training(self, images: int, cores: int, share: float | None, epochs: int) -> float:
        """Seconds in which all banks train on so many images; none where heads are another model's."""
        if self.recipe.heads:
            return 0.0
        trained = EXPECTED_SHARE if share is None else share
        of = {name: epoch / (OTHER_HEADS + full_bank(self.recipe)) for name, epoch in self.epochs.items()}
        bank_costs = [
            # A bank goes on until its last head stops.
            epochs * images * of[bank.backbone] * (OTHER_HEADS + trained * len(bank.members))
            for bank in self.banks()
        ]
        return soonest_end(bank_costs, cores) + START_UP / 2

    def table(self, price: float | None) -> list[tuple[int, float, float, float | None]]:
        """(cores, expected seconds, at most, cost) for 1, 2, 4, ... cores up to those that all banks can use."""
        usable = len(self.banks())
        rows = []
        for cores in sorted({*(2**k for k in range(usable.bit_length()) if 2**k <= usable), usable}):
            expected, most = (sum(self.seconds(cores, share).values()) for share in (None, 1.0))
            rows.append((cores, expected, most, None if price is None else expected / 3600 * cores * price))
        return rows

    def paying(self) -> int:
        """The most cores of the table's that are each worth their doubling."""
        rows = self.table(None)
        result = rows[0][0]
        for (_, before, _, _), (cores, after, _, _) in itertools.pairwise(rows):
            if after > before * (1 - WORTHWHILE):
                break
            result = cores
        return result


def full_bank(recipe: Recipe) -> int:
    """Heads of the largest bank."""
    return min(recipe.heads_per_worker, recipe.folds * recipe.seeds)


# Whether it was on the same data set, seconds, how much was done.
Spent = tuple[bool, float, float]


@dataclass(frozen=True)
class Measured:
    """What earlier runs took, in seconds of one CPU core; nothing, or 0, for what none has measured.

    features: an image, by all backbones. heads: by view, an image and epoch of a bank for each of its heads and
    OTHER_HEADS. system: an image and epoch of one. scoring: a held-out image. worker_bytes: the largest resident memory
    of a worker.
    """

    features: float
    heads: dict[str, float]
    system: float
    scoring: float
    worker_bytes: int


def measured(root: Path, recipe: Recipe, dataset: Dataset) -> Measured:
    """What runs under the root took, by the epochs in their checkpoints and by `costs.FILE`.

    It holds for backbones with the same input, taps and grids; a system's for the same set of them; the scores' for the
    same data set, too. Otherwise runs on other data sets count where none was on this one. Epochs on GPUs are left out.
    """
    kinds = {_kind(view) for view in recipe.views}
    heads: dict[str, list[Spent]] = defaultdict(list)
    features, systems, scores = (list[Spent]() for _ in range(3))
    peak = 0
    for folder, ran, facts in _runs(root):
        if ran.finalizer != recipe.finalizer:
            continue
        same = facts["fingerprint"] == dataset.fingerprint
        alike = {view.name for view in ran.views if _kind(view) in kinds}
        for unit in bank_units(ran, plan_banks(ran), folder):
            for epoch in _on_cpus(unit) if unit.backbone in alike else ():
                active = sum(ig is not None for ig in epoch["ig"])
                images = epoch["seconds"] * (images_per_second(epoch) or 0.0)
                heads[unit.backbone].append((same, epoch["seconds"], images * (OTHER_HEADS + active)))
                peak = max(peak, epoch["peak_rss"])
        if not alike == set(recipe.backbones) == set(ran.backbones):
            continue
        for unit in system_units(ran, folder) if ran.joint and ran.seeds == recipe.seeds else ():
            systems += [(same, epoch["seconds"], facts["images"] * (1 - ran.holdout)) for epoch in _on_cpus(unit)]
        noted = costs.noted(folder)
        parts = len(ran.backbone_values)
        if (computed := noted.get("features", {}).get("images", 0)) >= facts["images"] * parts:  # else some were there
            features += _spent(noted["features"], ran, same, computed // parts)
        if "scores" in noted and same and ran.mirrored == recipe.mirrored:
            scores += _spent(noted["scores"], ran, same, noted["scores"]["images"])
    of_heads = {name: _mean(spent) for name, spent in heads.items()}
    return Measured(_mean(features), of_heads, _mean(systems), _mean(scores), peak)


def _spent(cost: dict[str, Any], ran: Recipe, same: bool, images: int) -> list[Spent]:
    """What a step on so many images took of one core; empty where its cores are not known."""
    cores = cost.get("cores", 0)
    return [(same, cost["seconds"] * min(cores, ran.workers or math.inf), images)] if cores else []


def _kind(view: View) -> View:
    return View(tuple(dataclasses.replace(part, weights="") for part in view.parts))


def _mean(spent: Sequence[Spent]) -> float:
    """Seconds for one of what was done, on the data set itself where that was ever done; 0 where it never was."""
    chosen = [row for row in spent if row[2] and row[0] == max(spent)[0]]
    return sum(row[1] for row in chosen) / sum(row[2] for row in chosen) if chosen else 0.0


def _on_cpus(unit: Unit) -> list[dict[str, Any]]:
    return [epoch for epoch in read(unit).history if epoch.get("device", "cpu") == "cpu"]


def _runs(root: Path) -> Iterator[tuple[Path, Recipe, dict[str, Any]]]:
    """Runs under a root that have noted what a step took: folder, recipe, and what is recorded of the data set."""
    for path in listing(root):
        record = path.with_name("recipe.json")
        if path.name == costs.FILE and path.parent.parent == root and present(record):
            facts = json.loads(fetch(record).read_text(encoding="utf-8"))
            ran = recorded_recipe(facts["recipe"])
            if {part for view in ran.backbones for part in view.split(JOIN)} <= BACKBONES.keys():
                yield path.parent, ran, facts["dataset"]


def make(job: Job) -> Plan:
    """Plans the job; computes some features on this machine, and writes only into a temporary folder.

    Raises UserError for what the run itself would stop at: weights that cannot be had, damaged images.
    """
    compute_with(1)
    recipe, dataset = job.recipe, job.dataset
    known = measured(job.root, recipe, dataset)
    joined = parts_beside_others(recipe.views)
    backbones = [_backbone_plan(job, backbone, backbone.name in joined) for backbone in recipe.backbone_values]
    if known.features:
        factor = known.features / sum(b.extraction for b in backbones)
        backbones = [dataclasses.replace(b, extraction=factor * b.extraction) for b in backbones]
    unknown = [name for name in recipe.backbones if name not in known.heads]
    work = {view.name: _view_work(view, backbones, dataset.stimuli[0].size) for view in recipe.views}
    of_heads = {name: known.heads.get(name) or amount / WORK_PER_SECOND for name, amount in work.items()}
    joint = known.system or (OTHER_HEADS + recipe.seeds) * sum(work.values()) / WORK_PER_SECOND
    pixels = float(np.mean([math.prod(stimulus.size) for stimulus in dataset.stimuli]))
    cells = max(math.prod(view.readout_size(dataset.stimuli[0].size)) for view in recipe.views)
    scoring = SCORING + SCORING_PIXEL * pixels * (2 if recipe.mirrored else 1)
    return Plan(
        recipe,
        len(dataset.stimuli),
        len(job.split.held_out),
        len(dataset.x),
        len({stimulus.size for stimulus in dataset.stimuli}),
        backbones,
        {name: seconds * (OTHER_HEADS + full_bank(recipe)) for name, seconds in of_heads.items()},
        joint if recipe.joint else 0.0,
        known.scoring or scoring,
        known.worker_bytes or round(WORKER + WORKER_CELL * cells * recipe.batch_size * full_bank(recipe)),
        shutil.disk_usage(next(p for p in (job.root, *job.root.parents) if p.exists())).free,
        unknown,
    )


def _work(image_bytes: int, readout: tuple[int, int]) -> float:
    """What an image asks of a head, in no unit, by its features (float16) and cells; as `distributed` has it."""
    return image_bytes / 2 + 1500 * math.prod(readout) + 1_500_000


def _view_work(view: View, backbones: Sequence[BackbonePlan], size: tuple[int, int]) -> float:
    image_bytes = {backbone.name: backbone.image_bytes for backbone in backbones}
    return _work(sum(image_bytes[part.name] for part in view.parts), view.readout_size(size))


def _backbone_plan(job: Job, backbone: Backbone, joined: bool) -> BackbonePlan:
    """Computes features of as many images as there is time for; the first time, the fastest batch is found."""
    network, pace, stimuli = load_backbone(backbone), Pace(torch.device("cpu")), job.dataset.stimuli
    chosen = [stimuli[i] for i in np.unique(np.linspace(0, len(stimuli) - 1, MOST_IMAGES).astype(int))]
    with tempfile.TemporaryDirectory() as folder:

        def compute(images: Sequence[Stimulus]) -> float:
            start = time.monotonic()
            write_shards(network, backbone, images, [0], Path(folder), pace)
            return time.monotonic() - start

        count = min(len(chosen), 1 + int(SECONDS_A_BACKBONE / compute(chosen[:1])))
        compute(chosen[:count])
        extraction = min(compute(chosen[:count]), compute(chosen[:count])) / count
        image_bytes = math.ceil(shard_path(Path(folder), 0).stat().st_size / count)
    size, readout = stimuli[0].size, backbone.readout_size(stimuli[0].size)
    store = store_folder(job.root, backbone, job.dataset.stimuli_fingerprint, network.weights_sha256, joined)
    return BackbonePlan(
        backbone.name,
        backbone.input_size(size),
        readout,
        sum(network.channels),
        image_bytes,
        present(store / MANIFEST),
        extraction,
    )


def text(plan: Plan, price: float | None) -> str:
    """The plan as a person reads it."""
    recipe = plan.recipe
    heads = f"{sum(len(bank.members) for bank in plan.banks())} heads in {len(plan.banks())} banks"
    lines = [
        f"{recipe.name}: {plan.images} images of {plan.sizes} sizes, {plan.held_out} held out, {plan.fixations} "
        f"fixations; {f'the heads of {recipe.heads}' if recipe.heads else heads}",
        "",
        f"{'backbone':18}{'input':>11}{'readout':>9}{'channels':>10}{'MB/image':>10}{'GB':>8}{'img/s':>8}  features",
    ]
    for b in plan.backbones:
        lines.append(
            f"{b.name:18}{'x'.join(map(str, b.input_size)):>11}{'x'.join(map(str, b.readout)):>9}{b.channels:>10}"
            f"{b.image_bytes / 1e6:>10.2f}{b.image_bytes * plan.images / 1e9:>8.2f}{1 / b.extraction:>8.1f}  "
            f"{'are there' if b.stored else 'to be computed'}"
        )
    images = plan.images + (plan.held_out if recipe.mirrored else 0)
    wanted = sum(b.image_bytes for b in plan.backbones if not b.stored) * images
    enough = "" if wanted < plan.disk_free else "  <- NOT ENOUGH: free the disk or choose another --root"
    lines += [
        "",
        f"disk: {wanted / 1e9:.2f} GB of features to write, {plan.disk_free / 1e9:.1f} GB free{enough}",
        f"memory: about {plan.worker_bytes / 2**30:.1f} GiB {'of the GPU' if plan.card else 'a worker'}, "
        "whatever the number of images",
        "",
        f"time on so many {'GPUs' if plan.card else 'cores'}, by {_source(plan)}:",
        f"{'GPUs' if plan.card else 'cores':>9}"
        + "".join(f"{step:>11}" for step in (*plan.seconds(1), "in all", "at most"))
        + ("" if price is None else f"{'cost':>10}"),
    ]
    paying = plan.paying()
    for cores, expected, most, cost in plan.table(price):
        steps = plan.seconds(cores)
        lines.append(
            f"{cores:>9}"
            + "".join(f"{_duration(seconds, plan.card):>11}" for seconds in (*steps.values(), expected, most))
            + ("" if cost is None else f"{cost:>10.2f}")
            + ("  <- more hardly pay off" if cores == paying else "")
        )
    if recipe.heads:
        return "\n".join(lines)
    if plan.unknown:
        names = ", ".join(plan.unknown)
        lines.append(f"no run with {names} under --root yet: all but features may take half or twice as long here")
    lines.append(f"expected: heads stop at {EXPECTED_SHARE:.0%} of {recipe.max_epochs} epochs; at most: none does")
    return "\n".join(lines)


def _source(plan: Plan) -> str:
    if plan.card:
        return f"what was measured on {plan.card}; nothing was run there"
    return "figures of another machine" if plan.unknown else "earlier runs of this kind"


def _duration(seconds: float, card: str) -> str:
    if card:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
