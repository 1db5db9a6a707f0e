"""Scores of models on images: per image, per category and overall, with intervals and paired differences."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from acw.bootstrap import interval
from acw.data import Dataset
from acw.features import FeatureStore
from acw.finalizer import upsample
from acw.fusion import Likelihoods, oracle
from acw.gold_standard import GoldStandard
from acw.metrics import METRICS, Components, ShuffledFixations, Target, score, score_mixtures
from acw.model import Model
from acw.resources import Cost, peak_rss

# Names in `references`: scores that no model could have, or that look at the answer.
REFERENCES = ("gold_standard", "optimum", "oracle_weights")
# Images that Ray knows of at a time: enough for a cluster to see that it should grow.
TASKS_AT_ONCE = 500
Scores = dict[str, dict[str, float]]


class Densities(Protocol):
    """Where a backbone's densities of an image come from."""

    def of(self, index: int) -> tuple[Tensor, np.ndarray]:
        """(C, H, W) log-densities of the components on the density grid, on the CPU, and (D,) pooled features."""


@dataclass(frozen=True)
class StoredDensities:
    """From features that were extracted before; stores in the order of the model's backbones."""

    model: Model
    stores: list[FeatureStore]
    sizes: list[tuple[int, int]]

    def of(self, index: int) -> tuple[Tensor, np.ndarray]:
        features = [store.load([index], self.model.device) for store in self.stores]
        pooled = [store.pooled([index])[0].double().numpy() for store in self.stores]
        return self.model.stored_log_densities(features, self.sizes[index]).cpu(), np.concatenate(pooled)


@dataclass(frozen=True)
class ImageDensities:
    """From the images themselves, by the finished model."""

    model: Model
    dataset: Dataset

    def of(self, index: int) -> tuple[Tensor, np.ndarray]:
        log_densities, pooled = self.model.component_log_densities(self.dataset.stimuli[index].pixels())
        return log_densities.cpu(), pooled


@dataclass(frozen=True, eq=False)
class Scoring:
    """What to score, and against what.

    dataset: whose fixations; `among`: the images whose other fixations are sAUC's negatives.
    by_image: name -> (N, B) weights of a mixture, a row an image of the data set.
    labelled: whether the data set's categories are the model's, so that right and wrong weights exist.
    """

    dataset: Dataset
    among: np.ndarray
    densities: Densities
    model: Model
    by_image: dict[str, np.ndarray]
    labelled: bool
    gold_standard: GoldStandard | None

    def image(self, index: int) -> Scores:
        """Scores of every model and reference on one image."""
        stimulus = self.dataset.stimuli[index]
        x, y, _ = self.dataset.fixations_of(index)
        bias, shuffled = _of_size(self, stimulus.size)
        negatives = shuffled.without(x, y) if index in self.among else shuffled
        target = Target.of(x, y, negatives, bias)
        log_densities, pooled = self.densities.of(index)
        components = Components.of(self.model.finalizer.upsample(log_densities, stimulus.size), target.blur_sigma)

        weights, wrong = self._weights(index, pooled)
        weights["oracle_weights"] = self._oracle(components, target)
        # Categories may share their weights, all of them under an infinite prior.
        rows, place = np.unique(np.stack([*weights.values(), *wrong]), axis=0, return_inverse=True)
        distinct = score_mixtures(components, torch.from_numpy(rows), target)
        scores = [distinct[k] for k in place.ravel()]
        of_wrong = scores[len(weights) :]
        result = {"center_bias": score_mixtures(bias, torch.ones((1, 1), dtype=torch.float64), target)[0]}
        result |= dict(zip(weights, scores[: len(weights)], strict=True))
        if of_wrong:
            result["wrong_category"] = {m: float(np.mean([one[m] for one in of_wrong])) for m in METRICS}
        optimum = self.dataset.optimum_log_density(index)
        if optimum is not None:
            result["optimum"] = score(torch.from_numpy(optimum), target)
        if self.gold_standard is not None:
            result["gold_standard"] = self._gold_standard(index, self.gold_standard, negatives, bias)
        return result

    def _weights(self, index: int, pooled: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """Name -> (B,) weights of the mixtures to score on an image, and those of the wrong categories."""
        model, category = self.model, self.dataset.stimuli[index].category
        components = len(model.components)
        weights = {f"backbone:{name}": row for name, row in model.backbone_rows.items()}
        weights |= {"uniform": np.full(components, 1 / components), "global_weights": model.global_weights}
        probabilities = model.classifier.probabilities(pooled[None])[0]
        weights["inferred_category"] = model.mixing_weights(None, probabilities)
        weights |= {name: rows[index] for name, rows in self.by_image.items()}
        if not self.labelled:
            return weights, []
        weights["category_weights"] = model.mixing_weights(category, probabilities)
        return weights, [model.mixing_weights(one, probabilities) for one in model.categories if one != category]

    @staticmethod
    def _oracle(components: Components, target: Target) -> np.ndarray:
        log_p = components.density[:, target.pixels].T.log().numpy()
        return oracle(Likelihoods(log_p, np.zeros(len(log_p), dtype=np.int64), 1))[0]

    def _gold_standard(
        self, index: int, gold: GoldStandard, negatives: ShuffledFixations, bias: Components
    ) -> dict[str, float]:
        """Each subject scored by the others' density, averaged over fixations."""
        total = dict.fromkeys(METRICS, 0.0)
        x, y, _ = self.dataset.fixations_of(index)
        for mine, log_density in gold.leave_one_out(self.dataset, index):
            scores = score(upsample(log_density, bias.size), Target.of(x[mine], y[mine], negatives, bias))
            for metric in METRICS:
                total[metric] += scores[metric] * int(mine.sum()) / len(x)
        return total


# Images are scored in the order of their sizes, and many data sets have but one.
@functools.lru_cache(maxsize=1)
def _of_size(scoring: Scoring, size: tuple[int, int]) -> tuple[Components, ShuffledFixations]:
    """The baseline on images of a size, and sAUC's negatives for them before their own fixations are taken out."""
    dataset = scoring.dataset
    bias = torch.from_numpy(scoring.model.center_bias.of_size(size))
    sizes = np.array([stimulus.size for stimulus in dataset.stimuli])
    among = np.isin(np.arange(len(sizes)), scoring.among)
    negatives = ShuffledFixations.of(size, sizes, among, dataset.image, dataset.x, dataset.y)
    return Components.of(bias[None], dataset.blur_sigma), negatives


def score_images(scoring: Scoring, indices: Sequence[int] | np.ndarray) -> tuple[dict[int, Scores], Cost]:
    """Scores of all the images, index -> name -> metric -> score, computed by all cores of the Ray cluster.

    The cost's peak is the workers': the model, and some 400 MB at full HD, whatever the size of the data set, whose
    columns they share.
    """
    import ray

    @ray.remote(num_cpus=1, max_retries=3)
    def one(shared: list[Any], index: int) -> tuple[int, Scores, int]:
        torch.set_num_threads(1)
        scoring = _received(*shared)
        with torch.inference_mode():
            return index, scoring.image(index), peak_rss()

    start = time.monotonic()
    # In a list it comes as a reference, so that a worker unpickles it once and not for every image.
    shared = [ray.put(scoring)]
    images = sorted(map(int, indices), key=lambda index: scoring.dataset.stimuli[index].size)
    waiting = iter(images)
    out = [one.remote(shared, index) for index in itertools.islice(waiting, TASKS_AT_ONCE)]
    result: dict[int, Scores] = {}
    peak = 0
    while out:
        (ready, *_), out = ray.wait(out)
        index, scores, worker_peak = ray.get(ready)
        result[index] = scores
        peak = max(peak, worker_peak)
        out += [one.remote(shared, index) for index in itertools.islice(waiting, 1)]
        if len(result) * 10 // len(images) > (len(result) - 1) * 10 // len(images):
            print(f"scoring: {len(result)}/{len(images)} images", flush=True)
    return {int(index): result[int(index)] for index in indices}, Cost(time.monotonic() - start, len(images), peak)


@functools.lru_cache(maxsize=1)
def _received(reference: Any) -> Scoring:
    import ray

    return ray.get(reference)


def per_image_csv(dataset: Dataset, scores: dict[int, Scores]) -> str:
    """A row an image and model: image, category, source, model, and the metrics."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "category", "source", "model", *METRICS])
    for index, by_model in scores.items():
        stimulus = dataset.stimuli[index]
        for name, values in by_model.items():
            row = [f"{values[metric]:.6g}" for metric in METRICS]
            writer.writerow([stimulus.name, stimulus.category, stimulus.source or "", name, *row])
    return text.getvalue()


def summarise(dataset: Dataset, scores: dict[int, Scores], seed: int) -> dict[str, Any]:
    """The `models`, `references` and `comparisons` of evaluation.json; intervals are 95 % bootstraps over images."""
    stimuli = [dataset.stimuli[index] for index in scores]
    category = np.array([stimulus.category for stimulus in stimuli])
    names = [name for name in next(iter(scores.values()))]
    table = {n: np.array([[s[n][m] for m in METRICS] for s in scores.values()]) for n in names}
    sources = sorted({stimulus.source for stimulus in stimuli if stimulus.source})
    source = np.array([stimulus.source for stimulus in stimuli])

    def entry(values: np.ndarray) -> dict[str, Any]:
        mean, low, high = interval(values, category, seed=seed)
        overall = {m: {"mean": mean[k], "ci95": [low[k], high[k]]} for k, m in enumerate(METRICS)}
        result = {
            "overall": overall,
            "by_category": {c: _means(values[category == c]) for c in sorted(set(category))},
        }
        if sources:
            result["by_source"] = {s: _means(values[source == s]) for s in sources}
        return result

    comparisons = []
    for a, b in _pairs(names):
        mean, low, high = interval(table[a] - table[b], category, seed=seed)
        comparisons += [
            {"a": a, "b": b, "metric": m, "mean": mean[k], "ci95": [low[k], high[k]]} for k, m in enumerate(METRICS)
        ]
    return {
        "models": {name: entry(table[name]) for name in names if name not in REFERENCES},
        "references": {name: entry(table[name]) for name in names if name in REFERENCES},
        "comparisons": comparisons,
    }


def _means(values: np.ndarray) -> dict[str, float]:
    return dict(zip(METRICS, values.mean(0).tolist(), strict=True))


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The differences that a reader asks for: what each step of the mixture is worth, and against its controls."""
    wanted = [
        ("uniform", "center_bias"),
        ("category_weights", "center_bias"),
        ("category_weights", "uniform"),
        ("global_weights", "uniform"),
        ("category_weights", "global_weights"),
        ("category_weights", "inferred_category"),
        ("category_weights", "wrong_category"),
        ("category_weights", "source_weights"),
        ("category_weights", "shuffled_labels"),
    ]
    return [(a, b) for a, b in wanted if a in names and b in names]


def table(evaluation: dict[str, Any]) -> str:
    """The score table that a person reads, models first, best IG last, then references."""
    header = f"{'':24}" + "".join(f"{metric:>9}" for metric in METRICS) + "   IG 95 % interval"
    lines = [header]
    for kind in ("models", "references"):
        lines.append("-" * len(header))
        entries = sorted(evaluation[kind].items(), key=lambda item: item[1]["overall"]["IG"]["mean"])
        for name, entry in entries:
            overall = entry["overall"]
            low, high = overall["IG"]["ci95"]
            values = "".join(f"{overall[metric]['mean']:9.4f}" for metric in METRICS)
            lines.append(f"{name:24}{values}   [{low:.4f}, {high:.4f}]")
    return "\n".join(lines)
