"""The eight metrics against pysaliency's on the same full-HD maps, and what scoring a data set costs.

    python benchmarks/metrics.py                # a minute; 16 images
    python benchmarks/metrics.py --images 400   # CAT2000's held-out part, 5 minutes on 2 cores

The second part is what jobs/evaluate.py and jobs/aggregate.py do once densities are there: 1920 x 1080 px, 325
fixations an image, 4 backbones, 20 categories whose weights all differ, 400 images' fixations as sAUC's negatives.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
import torch
import torch.nn.functional as F
from harness import Figures

from acw.cluster import joining
from acw.data import Dataset, Stimulus, pysaliency_compat
from acw.evaluation.distributed import score_images
from acw.evaluation.metrics import METRICS, Components, ShuffledFixations, Target, score_mixtures
from acw.evaluation.sauc import MeanPrediction, reduced, shuffled_aucs
from acw.evaluation.scoring import Scoring
from acw.features.view import View
from acw.features.zoo import BACKBONES
from acw.fusion.classifier import CategoryClassifier
from acw.heads import finalizer
from acw.heads.center_bias import fixed_gaussian
from acw.heads.finalizer import Finalizer
from acw.model.model import Model

SIZE = (1080, 1920)
IMAGES = 400  # of CAT2000 are held out
FIXATIONS = 325
BLUR_SIGMA = 40.0
CELL = 8.0
CATEGORIES = 20
BACKBONE_COUNT = 4
POOLED = 8


@dataclass(frozen=True)
class RandomDensities:
    """Smooth densities of all backbones around the centre, the same for an image each time."""

    def of(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        generator = torch.Generator().manual_seed(index)
        grid = Finalizer(cell=CELL).grid(SIZE)
        noise = torch.zeros(BACKBONE_COUNT, *grid)
        for shape in ((4, 7), (9, 16), (30, 52)):
            coarse = torch.randn((BACKBONE_COUNT, 1, *shape), generator=generator)
            noise += F.interpolate(coarse, grid, mode="bicubic")[:, 0]
        log_densities = finalizer.normalise(1.2 * noise + torch.from_numpy(fixed_gaussian().of_size(grid)))
        return log_densities, np.random.default_rng(index).normal(size=POOLED)


def dataset(fixations: Sequence[int]) -> Dataset:
    """Images without pixels, in 20 categories in turn, and so many fixations on each, around its centre."""
    generator = np.random.default_rng(0)
    images = len(fixations)
    stimuli = tuple(Stimulus(f"{i:04d}", "", SIZE, f"c{i % CATEGORIES:02d}", None, "") for i in range(images))
    image = np.repeat(np.arange(images), fixations).astype(np.int32)
    y, x = (generator.normal(0.5, 0.18, (len(image), 2)).clip(0, 0.999) * SIZE).T.astype(np.float32)
    nobody = np.full(len(image), -1, dtype=np.int32)
    return Dataset("random", "none", "nowhere", stimuli, image, x, y, nobody, BLUR_SIGMA, ())


def scoring(images: int) -> Scoring:
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.full(BACKBONE_COUNT, 3), CATEGORIES)
    data = dataset([FIXATIONS] * images)
    classifier = CategoryClassifier(
        np.zeros(POOLED), np.ones(POOLED), generator.normal(size=(CATEGORIES, POOLED)), np.zeros(CATEGORIES), 0.5
    )
    model = Model(
        views=[View((dataclasses.replace(BACKBONES["lite0"], name=f"b{b}"),)) for b in range(BACKBONE_COUNT)],
        heads={},
        finalizer=Finalizer(cell=CELL),
        categories=list(data.categories),
        weights=weights,
        global_weights=weights.mean(0),
        center_bias=fixed_gaussian(),
        finalizer_bias=fixed_gaussian(),
        classifier=classifier,
        provenance={},
    )
    by_image = {"shuffled_labels": weights[generator.permutation(images) % CATEGORIES]}
    return Scoring(data, np.arange(images), RandomDensities(), model, by_image, True, None)


def against_pysaliency(rounds: int) -> Figures:
    """One density of one image, with all other fixations of a data set on a second image: seconds and differences."""
    pysaliency = pysaliency_compat.load()
    data = dataset([FIXATIONS, (IMAGES - 1) * FIXATIONS])
    maps = [finalizer.upsample(RandomDensities().of(index)[0][0], SIZE) for index in range(2)]
    bias = torch.from_numpy(fixed_gaussian().of_size(SIZE))
    stimuli = pysaliency.Stimuli([np.full((*SIZE, 3), i, np.uint8) for i in range(2)])
    fixations = pysaliency.Fixations.create_without_history(data.x, data.y, data.image)

    class Given(pysaliency.Model):
        def __init__(self, maps: list[torch.Tensor]) -> None:
            super().__init__(caching=True)
            self.maps = maps

        def _log_density(self, stimulus: np.ndarray) -> np.ndarray:
            return self.maps[stimulus[0, 0, 0]].double().numpy()

    first, of_first = stimuli[:1], fixations[fixations.n == 0]
    provider = pysaliency.saliency_map_models.FullShuffledNonfixationProvider(stimuli, fixations)
    mean = pysaliency.models.ShuffledBaselineModel(Given(maps), stimuli, library="numpy", caching=False)
    mean.get_average_prediction()  # once a data set
    regularisers = {"log_regularization": 2.2204e-16, "quotient_regularization": 2.2204e-16}

    def theirs(metrics: Sequence[str]) -> dict[str, float]:
        """By pysaliency, which keeps the maps that these metrics have in common."""
        model, baseline = Given(maps), Given([bias])
        density = pysaliency.DensitySaliencyMapModel(model)
        smooth = pysaliency.BluringSaliencyMapModel(density, BLUR_SIGMA, mode="constant")
        shuffled = pysaliency.models.ShuffledAUCSaliencyMapModel(model, mean)
        empirical = pysaliency.FixationMap(first, of_first, kernel_size=BLUR_SIGMA)
        of = {
            "IG": lambda: model.information_gain(first, of_first, baseline),
            "LL": lambda: model.information_gain(first, of_first, pysaliency.UniformModel()),
            "AUC": lambda: density.AUC(first, of_first, nonfixations="uniform"),
            "sAUC": lambda: shuffled.AUC(first, of_first, nonfixations=lambda *_: provider(stimuli, fixations, 0)),
            "NSS": lambda: density.NSS(first, of_first),
            "CC": lambda: smooth.CC(first, empirical),
            "KLDiv": lambda: smooth.KLDiv(first, empirical, minimum_value=0, **regularisers),
            "SIM": lambda: smooth.SIM(first, empirical),
        }
        with np.errstate(divide="ignore"):
            return {metric: float(of[metric]()) for metric in metrics}

    of_size = Components.of(bias[None], BLUR_SIGMA)
    negatives = ShuffledFixations.of(SIZE, np.array([SIZE] * 2), np.full(2, True), data.image, data.x, data.y)
    weight = torch.ones(1, 1, dtype=torch.float64)
    said = MeanPrediction(sum(reduced(one[None], weight)[0] for one in maps), 2)
    x, y, _ = data.fixations_of(0)

    def ours() -> dict[str, float]:
        target = Target.of(x, y, negatives.without(x, y), of_size)
        components = Components.of(maps[0][None], BLUR_SIGMA)
        of_others = said.others(reduced(maps[0][None], weight)[0])
        (sauc,) = shuffled_aucs(components, weight, target, of_others)
        return score_mixtures(components, weight, target)[0] | {"sAUC": sauc}

    alone = {f"pysaliency {metric}, s": functools.partial(theirs, [metric]) for metric in METRICS}
    figures = harness.alternate(
        {"ours, all eight, s": ours, "pysaliency, all eight, s": lambda: theirs(METRICS), **alone}, rounds
    )
    figures["times faster"] = figures["pysaliency, all eight, s"] / figures["ours, all eight, s"]
    found, expected = ours(), theirs(METRICS)
    return figures | {f"difference {metric}": abs(found[metric] - expected[metric]) for metric in METRICS}


def of_a_data_set(images: int) -> Figures:
    """Seconds and memory of `score_images` on Ray, with as many workers as there are cores."""
    memory = Memory()
    cores = os.cpu_count() or 1
    everything = scoring(IMAGES)
    seconds = []
    with torch.inference_mode():
        means = {name: MeanPrediction(total, 2) for name, total in everything.sums([0, 1]).items()}
        for index in range(3):
            before = time.process_time()
            everything.sums([index])
            everything.image(index, means)
            seconds.append(time.process_time() - before)
    joining.connect()
    _, start = score_images(everything, range(cores))
    _, cost = score_images(everything, range(images))
    joining.disconnect()
    each = cost.seconds * cores / images
    return {
        "images scored": images,
        # Of a processor, which is what a machine with nothing else to do needs on the clock.
        "an image alone, s": min(seconds),
        "an image beside others, s": each,
        "start of the workers, s": start.seconds,
        f"{IMAGES} images on 2 cores, minutes": (start.seconds + each * IMAGES / 2) / 60,
        "peak of one worker, GiB": cost.peak_rss / 2**30,
        "peak of all processes, GiB": memory.peak() / 2**30,
    }


class Memory:
    """The most memory that this process and its descendants have had together, looked at each second (Linux)."""

    def __init__(self) -> None:
        self.most = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def peak(self) -> int:
        self.done.set()
        self.thread.join()
        return self.most

    def _watch(self) -> None:
        while not self.done.wait(1):
            self.most = max(self.most, _memory_of(os.getpid()))


def _memory_of(process: int) -> int:
    """Bytes of a process and its descendants, with shared pages counted once."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
        children = [
            c
            for task in Path(f"/proc/{process}/task").iterdir()
            for c in (task / "children").read_text(encoding="utf-8").split()
        ]
    except OSError:  # it has ended
        return 0
    own = next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return own + sum(_memory_of(int(child)) for child in children)


def benchmark(arguments: argparse.Namespace) -> Figures:
    with torch.inference_mode():
        figures = against_pysaliency(arguments.rounds)
    return figures | of_a_data_set(arguments.images)


if __name__ == "__main__":
    harness.run(__doc__ or "", benchmark, images=16, rounds=3)
