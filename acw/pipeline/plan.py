"""What a recipe will take on a data set, before anything is spent: images, bytes, memory, hours and money.

Seconds come from doing the real thing on this machine, on a few of the data set's own images, one thread, for about
half a minute: features of some images, two epochs of a bank on them, and the scores of one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from acw.cluster.costs import peak_rss
from acw.cluster.process import compute_with
from acw.data import Dataset
from acw.evaluation import gold_standard
from acw.evaluation.sauc import MeanPrediction
from acw.evaluation.scoring import Scoring, StoredDensities
from acw.features.backbone import Backbone, FrozenBackbone, load_backbone
from acw.features.batch_size import Pace
from acw.features.extraction import write_shards
from acw.features.store import SHARD_IMAGES, FeatureStore, shard_path, store_folder
from acw.fusion.classifier import CategoryClassifier
from acw.heads.center_bias import CenterBias
from acw.heads.readout import new_heads
from acw.model.model import Model
from acw.pipeline.job import Job
from acw.recipes import Recipe
from acw.storage.files import present
from acw.training.bank import Bank, plan_banks
from acw.training.batches import Batches, TrainingSet
from acw.training.joint import JointSet, train_system
from acw.training.loss import coarsest
from acw.training.scheduler import soonest_end
from acw.training.trainer import train_epochs
from acw.training.training_set import kde_of, training_set

# Of calibration, for each backbone's features; training and scores take about as long again.
SECONDS_A_BACKBONE = 3.0
MOST_IMAGES = 8
# Heads stop when their validation IG stands still: on `gaze` they needed 725 of 1,200 head-epochs.
EXPECTED_SHARE = 0.6
# A joint training's share of its epochs, on `gaze`.
JOINT_SHARE = 0.6
# Ray, Ray Train and their worker processes have to start; seconds, on two cores.
START_UP = 30.0
# Fitting weights and category inference, drawing and registering: `gaze` on two cores.
FINISHING = 60.0
# A doubling of cores that saves less of the time than this does not pay off.
WORTHWHILE = 0.2


@dataclass(frozen=True)
class BackbonePlan:
    """One backbone's part. Seconds are of one thread of this machine: per image, and per image and epoch of a bank.

    input_size, readout: (height, width) for the first image. stored: whether the root has its features already.
    """

    name: str
    input_size: tuple[int, int]
    readout: tuple[int, int]
    channels: int
    image_bytes: int
    stored: bool
    extraction: float
    epoch: float


@dataclass(frozen=True)
class Plan:
    """bank_overhead: seconds an epoch of a bank takes whatever the images. scoring: seconds a held-out image.
    joint: seconds an image and epoch of one jointly trained system; 0 for a recipe without.

    worker_bytes: the largest resident memory of the calibration, which did a worker's work; disk_free: bytes.
    """

    recipe: Recipe
    images: int
    held_out: int
    fixations: int
    sizes: int
    backbones: list[BackbonePlan]
    bank_overhead: float
    joint: float
    scoring: float
    worker_bytes: int
    disk_free: int

    @property
    def feature_bytes(self) -> int:
        return self.images * sum(backbone.image_bytes for backbone in self.backbones)

    def banks(self) -> list[Bank]:
        return plan_banks(self.recipe)

    def seconds(self, cores: int, share: float | None = None) -> dict[str, float]:
        """Expected wall-clock seconds of each step on so many cores; share: of the most epochs that are trained."""
        extraction = sum(0 if b.stored else self.images * b.extraction for b in self.backbones) / cores
        development = self.images - self.held_out
        epochs = self.recipe.max_epochs * (EXPECTED_SHARE if share is None else share)
        of = {backbone.name: backbone for backbone in self.backbones}
        full = min(self.recipe.heads_per_worker, self.recipe.folds * self.recipe.seeds)
        costs = [
            epochs * (development * of[bank.backbone].epoch + self.bank_overhead) * len(bank.members) / full
            for bank in self.banks()
        ]
        heads = soonest_end(costs, cores) + START_UP / 2
        steps = {"features": extraction + START_UP / 2, "heads": heads}
        if self.recipe.joint:
            rounds = math.ceil(self.recipe.folds / cores)
            of_joint = JOINT_SHARE if share is None else share
            steps["systems"] = rounds * development * self.joint * self.recipe.joint_max_epochs * of_joint
        return steps | {"scores": self.held_out * self.scoring / cores + FINISHING}

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


def make(job: Job) -> Plan:
    """Calibrates on this machine and plans the job; writes only into a temporary folder.

    Raises UserError for what the run itself would stop at: weights that cannot be had, damaged images.
    """
    compute_with(1)
    recipe, dataset = job.recipe, job.dataset
    chosen = np.unique(np.linspace(0, len(dataset.stimuli) - 1, MOST_IMAGES).astype(int))
    sample = _repeated(dataset, chosen, recipe.folds * recipe.batch_size)
    fold = (np.arange(len(sample.stimuli)) % recipe.folds).astype(np.int8)
    split = dataclasses.replace(job.split, fold=fold)
    training = training_set(sample, split, recipe)
    plans, stores, overheads = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for backbone in recipe.backbone_values:
            network = load_backbone(backbone)
            store, extraction = _extract(network, backbone, sample, len(chosen), Path(folder) / backbone.name)
            epoch, overhead = _train(recipe, backbone.name, training, store, Path(folder))
            there = store_folder(job.root, backbone, dataset.stimuli_fingerprint, network.weights_sha256)
            plans.append(_backbone_plan(dataset, backbone, store, there, extraction, epoch))
            stores.append(store)
            overheads.append(overhead)
        joint = _train_jointly(recipe, training, stores, Path(folder)) if recipe.joint else 0.0
        scoring = _score(recipe, sample, stores)
    free = shutil.disk_usage(next(p for p in (job.root, *job.root.parents) if p.exists())).free
    return Plan(
        recipe,
        len(dataset.stimuli),
        len(job.split.held_out),
        len(dataset.x),
        len({stimulus.size for stimulus in dataset.stimuli}),
        plans,
        max(overheads),
        joint,
        scoring,
        peak_rss(),
        free,
    )


def _repeated(dataset: Dataset, chosen: np.ndarray, count: int) -> Dataset:
    """A data set of `count` images, the chosen ones over and over."""
    order = chosen[np.arange(count) % len(chosen)]
    mine = [np.flatnonzero(dataset.image == index) for index in order]
    kept = np.concatenate(mine)
    image = np.repeat(np.arange(count, dtype=np.int32), [len(part) for part in mine])
    return dataclasses.replace(
        dataset,
        stimuli=tuple(dataset.stimuli[index] for index in order),
        image=image,
        x=dataset.x[kept],
        y=dataset.y[kept],
        subject=dataset.subject[kept],
    )


def _extract(
    network: FrozenBackbone, backbone: Backbone, sample: Dataset, different: int, folder: Path
) -> tuple[FeatureStore, float]:
    """A store of the sample, in which only as many images are computed as there is time for; seconds an image."""
    pace = Pace(torch.device("cpu"))

    def compute(images: Sequence[Any]) -> float:
        start = time.monotonic()
        write_shards(network, backbone, images, [0], folder, pace)
        return time.monotonic() - start

    first = compute(sample.stimuli[:1])
    count = max(1, min(different, int(SECONDS_A_BACKBONE / first)))
    compute(sample.stimuli[:count])  # the network's fastest batch is found here
    seconds = compute(sample.stimuli[:count]) / count
    # The rest are copies of these: what is trained on them is thrown away.
    computed = load_file(shard_path(folder, 0))
    total = len(sample.stimuli)
    for shard in range(-(-total // SHARD_IMAGES)):
        indices = range(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, total))
        tensors = {
            f"{index}.{name.partition('.')[2]}": value
            for index in indices
            for name, value in computed.items()
            if name.startswith(f"{index % count}.")
        }
        save_file({name: value.clone() for name, value in tensors.items()}, shard_path(folder, shard))
    taps = [[name for name in computed if name.startswith(f"{k}.tap")] for k in range(count)]
    shapes = [[computed[f"{k}.tap{t}"].shape for t in range(len(taps[k]))] for k in range(count)]
    sizes = [tuple((shape[0], shape[1]) for shape in of_image) for of_image in shapes]
    readouts = [backbone.readout_size(stimulus.size) for stimulus in sample.stimuli[:count]]
    return FeatureStore(
        folder,
        total,
        tuple(network.channels),
        tuple(sizes[k % count] for k in range(total)),
        tuple(readouts[k % count] for k in range(total)),
    ), seconds


def _train(
    recipe: Recipe, backbone: str, training: TrainingSet, store: FeatureStore, folder: Path
) -> tuple[float, float]:
    """Seconds an image and epoch of the largest bank on a backbone, and seconds an epoch whatever the images."""
    short = dataclasses.replace(recipe, max_epochs=2)
    bank = next(bank for bank in plan_banks(recipe) if bank.backbone == backbone)
    *_, state = train_epochs(short, bank, training, store, folder, torch.device("cpu"))
    batches = Batches(training, store, recipe.finalizer, torch.device("cpu"))
    start = time.monotonic()
    coarsest(state.parameters, bank.members, batches, fresh=False)
    overhead = time.monotonic() - start
    seconds = state.history[-1]["seconds"] - overhead
    return max(seconds, 0.0) / len(training.sizes), overhead


def _train_jointly(recipe: Recipe, training: TrainingSet, stores: list[FeatureStore], folder: Path) -> float:
    """Seconds an image and epoch of one system, trained on its part of the images and validated on the rest."""
    data = JointSet(
        training, np.zeros(len(training.sizes), np.int64), 1, dict(zip(recipe.backbones, stores, strict=True))
    )
    heads = {
        name: new_heads(sum(store.channels), recipe.sigma, range(recipe.seeds)) for name, store in data.stores.items()
    }
    *_, state = train_system(
        dataclasses.replace(recipe, joint_max_epochs=1), 0, data, heads, folder, torch.device("cpu")
    )
    return state.history[-1]["seconds"] / len(training.sizes)


def _score(recipe: Recipe, sample: Dataset, stores: list[FeatureStore]) -> float:
    """Seconds to score a held-out image under every mixture, by fresh heads: maps are as large as trained ones'."""
    generator = np.random.default_rng(0)
    channels = sum(sum(store.channels) for store in stores)
    groups, backbones = len(sample.categories), len(stores)
    heads = range(recipe.folds * recipe.seeds)
    bias: CenterBias = kde_of(sample, np.arange(len(sample.stimuli)))
    model = Model(
        backbones=recipe.backbone_values,
        heads={
            name: new_heads(sum(store.channels), recipe.sigma, heads)
            for name, store in zip(recipe.backbones, stores, strict=True)
        },
        finalizer=recipe.finalizer,
        categories=list(sample.categories),
        weights=generator.dirichlet(np.ones(backbones), groups),
        global_weights=np.full(backbones, 1 / backbones),
        center_bias=bias,
        finalizer_bias=bias,
        classifier=CategoryClassifier(
            np.zeros(channels), np.ones(channels), np.zeros((groups, channels)), np.zeros(groups), 0.0
        ),
        provenance={},
    )
    everything = np.arange(len(sample.stimuli))
    gold = None
    if gold_standard.has_subjects(sample, everything):
        gold = gold_standard.GoldStandard(20.0, np.array([0.8, 0.19, 0.01]), bias)
    sizes = [stimulus.size for stimulus in sample.stimuli]
    scoring = Scoring(sample, everything, StoredDensities(model, stores, sizes), model, {}, True, gold)
    with torch.inference_mode():
        means = {name: MeanPrediction(total, 2) for name, total in scoring.sums([0, 1]).items()}
        start = time.monotonic()
        said = {1: scoring.said(1)}
        scoring.sums([1], said)
        scoring.image(1, means, said)
        return time.monotonic() - start


def _backbone_plan(
    dataset: Dataset, backbone: Backbone, store: FeatureStore, there: Path, extraction: float, epoch: float
) -> BackbonePlan:
    tensors = load_file(shard_path(store.folder, 0))
    images = min(SHARD_IMAGES, store.images)
    size = dataset.stimuli[0].size
    return BackbonePlan(
        backbone.name,
        backbone.input_size(size),
        backbone.readout_size(size),
        sum(store.channels),
        math.ceil(sum(value.nbytes for value in tensors.values()) / images),
        present(there / "manifest.json"),
        extraction,
        epoch,
    )


def text(plan: Plan, price: float | None) -> str:
    """The plan as a person reads it."""
    recipe = plan.recipe
    lines = [
        f"{recipe.name}: {plan.images} images of {plan.sizes} sizes, {plan.held_out} held out, {plan.fixations} "
        f"fixations; {sum(len(bank.members) for bank in plan.banks())} heads in {len(plan.banks())} banks",
        "",
        f"{'backbone':18}{'input':>11}{'readout':>9}{'channels':>10}{'MB/image':>10}{'GB':>8}{'img/s':>8}  features",
    ]
    for b in plan.backbones:
        lines.append(
            f"{b.name:18}{'x'.join(map(str, b.input_size)):>11}{'x'.join(map(str, b.readout)):>9}{b.channels:>10}"
            f"{b.image_bytes / 1e6:>10.2f}{b.image_bytes * plan.images / 1e9:>8.2f}{1 / b.extraction:>8.1f}  "
            f"{'are there' if b.stored else 'to be computed'}"
        )
    wanted = sum(b.image_bytes for b in plan.backbones if not b.stored) * plan.images
    enough = "" if wanted < plan.disk_free else "  <- NOT ENOUGH: free the disk or choose another --root"
    lines += [
        "",
        f"disk: {wanted / 1e9:.2f} GB of features to write, {plan.disk_free / 1e9:.1f} GB free{enough}",
        f"memory: about {plan.worker_bytes / 2**30:.1f} GiB a worker, whatever the number of images",
        "",
        "time, measured on this machine's CPU, on so many of its cores:",
        f"{'cores':>9}"
        + "".join(f"{step:>11}" for step in (*plan.seconds(1), "in all", "at most"))
        + ("" if price is None else f"{'cost':>10}"),
    ]
    paying = plan.paying()
    for cores, expected, most, cost in plan.table(price):
        steps = plan.seconds(cores)
        lines.append(
            f"{cores:>9}"
            + "".join(f"{_duration(seconds):>11}" for seconds in (*steps.values(), expected, most))
            + ("" if cost is None else f"{cost:>10.2f}")
            + ("  <- more hardly pay off" if cores == paying else "")
        )
    lines.append(f"expected: heads stop at {EXPECTED_SHARE:.0%} of {recipe.max_epochs} epochs; at most: none does")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
