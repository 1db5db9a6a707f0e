"""What category adaptation is worth on kinds of images that heads have not seen, and on those that they have.

    python jobs/extract.py gaze --dataset FOLDER --root ROOT              # and the same with --folds 2 for each OTHER
    python benchmarks/adaptation.py --dataset FOLDER --root ROOT --others OTHER,OTHER --threads 2     # an hour

For every two categories, and for every source of the images, heads are trained without them (one seed, EPOCHS epochs,
all side by side in one bank), and beside these five that each leave out a fold of all images. Of the development images
only. What the first say of the images that they were not trained on is adapted by some of these images (PER_KIND, drawn
DRAWS times) and scored on the others, by numbers alone and, from COMMAND_IMAGES of them, as `acw adapt` does it: with
readouts of their own where these pay, or not at all; each category CATEGORY_DRAWS times. What the second say of theirs
is what heads that know the kind reach. What so few images teach otherwise: heads that are trained from the start on all
that the first were, and on these COMMAND_IMAGES. The second are adapted by the command, too, to images of the fold that
they left out and held-out ones of a category, which shows what that costs where there is nothing to learn. OTHER is a
folder of images with a fixations.csv, of another kind, which the second are adapted to. All is in bits per fixation
over the numbers for all images, by numbers alone on the coarse grid on which they are fitted. ROOT/adaptation keeps the
heads and what they say.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import numpy as np
import torch
from adapt_command import adapted
from harness import Figures
from torch import Tensor
from unseen_kinds import (
    COMMAND_IMAGES,
    DRAWS,
    SCORED,
    Draw,
    draws_of,
    heads_of,
    kept,
    label_of,
    left_out,
    stores_as_read_by,
)

from acw.data import Dataset
from acw.evaluation.bootstrap import interval, ratio_interval
from acw.evaluation.scoring import StoredDensities, split_half
from acw.features import joined
from acw.features.joined import Store
from acw.fusion import adaptation_fit, category_weights
from acw.fusion.adaptation import GRID
from acw.fusion.adaptation_fit import (
    NONE,
    Maps,
    adaptation_of,
    climb,
    fit_all,
    log_likelihood,
    own_center_bias,
    precision,
    unadapted,
)
from acw.fusion.category_weights import Likelihoods
from acw.fusion.classifier import CategoryClassifier
from acw.heads import readout
from acw.heads.center_bias import CenterBias
from acw.model.model import Model
from acw.model.study import Seen, Study
from acw.pipeline import job as jobs
from acw.pipeline.job import Job
from acw.training.training_set import kde_of

PER_KIND = (5, 10, 20, 50)
WEIGHTS_STRENGTH = 1.0  # of the prior, where weights alone are fitted


Gains = dict[tuple[str, str], dict[int, list[float]]]  # kind, what -> image -> bits, of each time that it was scored


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What all views say of some images of a data set; name: of the entry that left them out, or of the data set."""

    name: str
    dataset: Dataset
    images: np.ndarray
    by_view: Sequence[dict[str, np.ndarray]]

    def maps(self, bias: CenterBias) -> Maps:
        images = self.images.tolist()
        return Maps.of(
            [np.stack([view[f"{self.name}/{index}"] for view in self.by_view]) for index in images],
            [self.dataset.fixations_of(index)[:2] for index in images],
            [self.dataset.stimuli[index].size for index in images],
            [bias] * len(images),
        )

    def at_fixations(self) -> list[np.ndarray]:
        """Of each image (F, C) log-density per px."""
        return [np.stack([view[f"{self.name}/{i}/at"] for view in self.by_view], 1) for i in self.images.tolist()]

    def by_halves(self, weights: np.ndarray) -> np.ndarray:
        """(N,) bits by which the best weights for half of an image's subjects foretell the others better than these."""
        gains = []
        for index, log_p in zip(self.images.tolist(), self.at_fixations(), strict=True):
            halves = split_half(log_p, self.dataset.fixations_of(index)[2])
            gains.append((halves - np.log(np.exp(log_p) @ weights)).mean() / math.log(2))
        return np.array(gains)


def bits(theta: Tensor, maps: Maps, own: Tensor | None = None) -> np.ndarray:
    """(N,) mean log2-density of each image's fixations."""
    own = torch.zeros_like(maps.center_bias) if own is None else own
    return (log_likelihood(theta.float(), maps, own).double() / math.log(2)).numpy()


def fitted_on_some(
    maps: Maps, members: np.ndarray, overall: Tensor, images: int, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What was fitted on `images` of a kind's, the others of its members, and their bits over the numbers for all."""
    drawn = np.random.default_rng(seed).permutation(members)
    training, rest = maps.subset(np.sort(drawn[:images])), np.sort(drawn[images:])
    test, views = maps.subset(rest), maps.density.shape[2]
    without = bits(overall, test)
    only_weights = torch.zeros(len(overall), dtype=torch.bool)
    only_weights[3 : 3 + views] = True
    prior, nothing = precision(views, WEIGHTS_STRENGTH), torch.zeros_like(training.center_bias)
    weights = climb(training, nothing, overall, prior, overall, only_weights)
    yield "category weights", rest, bits(weights, test) - without
    adapted, _ = adaptation_fit.fit_new(training, overall, seed)
    yield "category adaptation", rest, bits(adapted, test, own_center_bias(test, training)) - without


def study(job: Job, of: Predictions, stores: list[Store], heads: Sequence[readout.Parameters], bias: CenterBias,
          overall: Tensor) -> Study:  # fmt: skip
    """A data set as a model sees it that knows no categories, of its images those of `of`; heads: of each view."""
    views = job.recipe.views
    numbers = adaptation_of([overall, overall], np.zeros((1, *GRID), np.float32), len(views))
    one = np.zeros(1)
    model = Model(
        views=views,
        heads=dict(zip(job.recipe.backbones, heads, strict=True)),
        finalizer=job.recipe.finalizer,
        categories=["all"],
        weights=numbers.weights[:1],
        global_weights=numbers.weights[0],
        center_bias=bias,
        finalizer_bias=bias,
        classifier=CategoryClassifier(one, one + 1, np.zeros((1, 1)), one, math.nan),
        provenance={},
        standards=joined.read_standards(job.folder / joined.FILE),
        adaptation=numbers,
    )
    dataset, images = of.dataset, set(of.images.tolist())
    every, sizes = range(len(dataset.stimuli)), [stimulus.size for stimulus in dataset.stimuli]
    densities = StoredDensities(model, stores, sizes)
    log_densities = [densities.of(index)[0] if index in images else torch.empty(0) for index in every]
    fixations = [dataset.fixations_of(index)[:2] for index in every]
    return Study(model, dataset, stores, [], Seen(log_densities, np.zeros((len(every), 1)), fixations, sizes))


def by_command(gains: Gains, of: Study, draw: Draw) -> None:
    """Adds what `acw adapt` gains."""
    values, what = adapted(of, draw.some, draw.rest)
    print(f"{draw.label}: {what}, {values.mean():+.4f}", flush=True)
    for index, value in zip(draw.rest.tolist(), values.tolist(), strict=True):
        gains[draw.label, f"acw adapt, {COMMAND_IMAGES} images"][index].append(value)


def unseen(gains: Gains, label: str, said_of: Predictions, maps: Maps, groups: Sequence[np.ndarray], overall: Tensor,
           weights: np.ndarray) -> None:  # fmt: skip
    """Adds what is gained on a kind that heads have not seen; groups: members that are adapted to together."""
    images = said_of.images.tolist()
    without, halves = bits(overall, maps), said_of.by_halves(weights)
    even = np.full(len(weights), 1 / len(weights))
    for name, values in (
        ("even mixture", bits(unadapted(even), maps) - without),
        ("one weight vector for all", bits(unadapted(weights), maps) - without),
        ("weights by image, ceiling", halves + bits(unadapted(weights), maps) - without),
    ):
        for index, value in zip(images, values.tolist(), strict=True):
            gains[label, name][index].append(value)
    draws = DRAWS if len(groups) == 1 else 1
    for members, number, draw in itertools.product(groups, PER_KIND, range(draws)):
        if len(members) >= number + SCORED:
            for name, rest, values in fitted_on_some(maps, members, overall, number, draw):
                for place, value in zip(rest.tolist(), values.tolist(), strict=True):
                    gains[label, f"{name}, {number} images"][images[place]].append(value)


def seen(gains: Gains, said_of: Sequence[Predictions], maps: Maps, category: np.ndarray, overall: Tensor) -> np.ndarray:
    """Adds what is gained on images of kinds that heads have seen, out of fold; the weights for all."""
    log_p = [of_image for part in said_of for of_image in part.at_fixations()]
    image = np.repeat(np.arange(len(log_p)), list(map(len, log_p)))
    likelihoods, groups = Likelihoods(np.concatenate(log_p), image, len(log_p)), int(category.max()) + 1
    by_category = category_weights.fit(likelihoods, category, groups, 0)
    weights = by_category.global_weights
    one_for_all = likelihoods.mean_log_likelihood(weights)
    even = np.full(len(weights), 1 / len(weights))
    left_out = adaptation_fit.crossvalidate(maps, weights, category, groups, 0)
    best = max((name for name in left_out if name != NONE), key=lambda name: left_out[name].mean())
    columns = {
        "even mixture": likelihoods.mean_log_likelihood(even) - one_for_all,
        "category weights": by_category.left_out - one_for_all,
        "one set of numbers for all": left_out["inf"] - left_out[NONE],
        f"category adaptation (prior of {best} images)": left_out[best] - left_out[NONE],
        "weights by image, ceiling": np.concatenate([part.by_halves(weights) for part in said_of]) * math.log(2),
    }
    for name, values in columns.items():
        for index, value in enumerate((values / math.log(2)).tolist()):
            gains["seen, over one weight vector for all", name][index].append(value)
    return weights


def report(gains: Gains, category: dict[str, np.ndarray], gap: str) -> Figures:
    """Means over images with 95 % intervals and, where there are heads that know a kind, the share of their lead."""
    figures: Figures = {}
    for (label, name), by_image in gains.items():
        indices = np.array(sorted(by_image))
        values = np.array([np.mean(by_image[index]) for index in indices.tolist()])
        groups = category[label][indices]
        mean, low, high = map(float, interval(values, groups))
        figures[f"{label}: {name}"] = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        if name != gap and (label, gap) in gains:
            lead = np.array([np.mean(gains[label, gap][index]) for index in indices.tolist()])
            share, low, high = ratio_interval(values, lead, groups)
            figures[f"{label}: {name}"] += f", {share:.0%} [{low:.0%}, {high:.0%}] of the gap"
    return figures


def benchmark(options: argparse.Namespace) -> Figures:
    def parsed(*arguments: str) -> Job:
        scale = ["--pixels-per-degree", str(options.pixels_per_degree)] if options.pixels_per_degree else []
        return jobs.parse([options.recipe, "--root", options.root, *scale, *arguments], __doc__ or "")

    job = parsed("--dataset", options.dataset)
    names = [name for name in options.others.split(",") if name]
    others = [parsed("--dataset", name, "--fixations", f"{name}/fixations.csv", "--folds", "2") for name in names]
    dataset, development = job.dataset, job.split.development
    kinds, folds = left_out(job)
    folder = Path(options.root) / "adaptation"
    folder.mkdir(parents=True, exist_ok=True)
    views, stores = job.recipe.backbones, list(job.stores().values())
    of_kinds = [kept(job, view, kinds, [], folder, "kinds") for view in views]
    of_folds = [kept(job, view, folds, others, folder, "folds") for view in views]

    gains: Gains = defaultdict(lambda: defaultdict(list))
    known = [Predictions(name, dataset, np.flatnonzero(out), of_folds) for name, out in folds.items()]
    parts = [of.maps(kde_of(dataset, np.setdiff1d(development, of.images))) for of in known]
    together = Maps(*(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Maps)))
    images = np.concatenate([of.images for of in known])
    overall = fit_all(together, np.full(len(views), 1 / len(views)))
    weights = seen(gains, known, together, dataset.category_index[images], overall)
    reached = dict(zip(images.tolist(), bits(overall, together).tolist(), strict=True))
    category = {"seen, over one weight vector for all": dataset.category_index[images]}
    gap = "heads that know the kind"
    draws = list(draws_of(job, kinds))
    with_some = {}
    for number, draw in enumerate(draws):
        with_some[f"draw {number}"] = kinds[draw.kind].copy()
        with_some[f"draw {number}"][draw.some] = False
    of_some = [kept(job, view, with_some, [], folder, "some") for view in views]
    for kind, out in kinds.items():
        of = Predictions(kind, dataset, np.flatnonzero(out), of_kinds)
        bias = kde_of(dataset, np.setdiff1d(development, of.images))
        maps, label = of.maps(bias), label_of(kind)
        own = np.zeros(len(of.images)) if kind == label else dataset.category_index[of.images]
        unseen(gains, label, of, maps, [np.flatnonzero(own == c) for c in np.unique(own)], overall, weights)
        if mine := [(number, draw) for number, draw in enumerate(draws) if draw.kind == kind]:
            heads = [readout.select(heads_of(view), [list(kinds).index(kind)]) for view in of_kinds]
            seen_by_these = study(job, of, stores, heads, bias, overall)
        for number, draw in mine:
            by_command(gains, seen_by_these, draw)
            before, after = (
                bits(overall, Predictions(name, dataset, draw.rest, said_by).maps(bias))
                for name, said_by in ((kind, of_kinds), (f"draw {number}", of_some))
            )
            for index, value in zip(draw.rest.tolist(), (after - before).tolist(), strict=True):
                gains[label, f"trained from the start on {COMMAND_IMAGES} more images"][index].append(value)
        category[label] = dataset.category_index
        for index, base in zip(of.images.tolist(), bits(overall, maps).tolist(), strict=True):
            gains[label, gap][index].append(reached[index] - base)
    label = "seen categories, another fold"
    category[label] = dataset.category_index
    for c in range(len(dataset.categories)):
        name, out = list(folds.items())[c % len(folds)]
        images = np.flatnonzero((dataset.category_index == c) & (out | (job.split.fold < 0)))
        if len(images) < COMMAND_IMAGES + SCORED:
            continue
        heads = [readout.select(heads_of(view), [c % len(folds)]) for view in of_folds]
        of, bias = Predictions(name, dataset, images, of_folds), kde_of(dataset, np.setdiff1d(development, images))
        by_command(gains, study(job, of, stores, heads, bias, overall), Draw.of(label, name, images, 0))
    bias = kde_of(dataset, development)
    for other in others:
        every = np.arange(len(other.dataset.stimuli))
        of = Predictions(other.dataset.name, other.dataset, every, of_folds)
        unseen(gains, other.dataset.name, of, of.maps(bias), [every], overall, weights)
        heads = list(map(heads_of, of_folds))
        seen_by_all = study(job, of, list(stores_as_read_by(job, other).values()), heads, bias, overall)
        for seed in range(DRAWS):
            by_command(gains, seen_by_all, Draw.of(of.name, "", every, seed))
        category[other.dataset.name] = np.zeros(len(every))
    return report(gains, category, gap)


if __name__ == "__main__":
    harness.run(__doc__ or "", benchmark, recipe="gaze", dataset="", root="runs", others="", pixels_per_degree=0.0)
