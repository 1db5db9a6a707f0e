"""Scores of models on images: per image, per category and overall, with intervals and paired differences."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from acw.bootstrap import interval
from acw.data import Dataset
from acw.features import FeatureStore
from acw.fusion import Likelihoods, oracle
from acw.gold_standard import GoldStandard
from acw.heads import normalise, upsample
from acw.metrics import METRICS, Target, gaussian_blur, score, shuffled_fixations
from acw.model import Model
from acw.training import density_grid

# Names in `references`: scores that no model could have, or that look at the answer.
REFERENCES = ("gold_standard", "optimum", "oracle_weights")
IMAGES_PER_TASK = 4
Scores = dict[str, dict[str, float]]


class Densities(Protocol):
    """Where a backbone's densities of an image come from."""

    def of(self, index: int) -> tuple[Tensor, np.ndarray]:
        """(B, H, W) log-densities of the backbones on the density grid, on the CPU, and (D,) pooled features."""


@dataclass(frozen=True)
class StoredDensities:
    """From features that were extracted before; stores in the order of the model's backbones."""

    model: Model
    stores: list[FeatureStore]
    sizes: list[tuple[int, int]]

    def of(self, index: int) -> tuple[Tensor, np.ndarray]:
        grid = density_grid(self.sizes[index], self.model.density_cell)
        densities, pooled = [], []
        for name, store in zip(self.model.names, self.stores, strict=True):
            densities.append(self.model.ensemble(name, store.load([index], self.model.device), grid)[0])
            pooled.append(store.pooled([index])[0].double().numpy())
        return torch.stack(densities).cpu(), np.concatenate(pooled)


@dataclass(frozen=True)
class ImageDensities:
    """From the images themselves, by the finished model."""

    model: Model
    dataset: Dataset

    def of(self, index: int) -> tuple[Tensor, np.ndarray]:
        log_densities, pooled = self.model.backbone_log_densities(self.dataset.stimuli[index].pixels())
        return log_densities.cpu(), pooled


@dataclass(frozen=True)
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
        bias = torch.from_numpy(self.model.center_bias.of_size(stimulus.size))
        # For every subject of the gold standard they are the same, and are found once.
        negatives = self._negatives(index)

        def target_of(mine: np.ndarray | slice) -> Target:
            return Target.of(stimulus.size, x[mine], y[mine], negatives, bias, self.dataset.blur_sigma)

        target = target_of(slice(None))
        log_densities, pooled = self.densities.of(index)
        full = upsample(log_densities, stimulus.size)
        # In float64 no density underflows to 0, whose logarithm would be -inf.
        density = full.double().exp()
        blurred = gaussian_blur(density.float(), target.blur_sigma, "constant")

        def mixture(weights: np.ndarray) -> dict[str, float]:
            w = torch.from_numpy(weights)
            # Every density and its blur is linear in the weights: nothing is blurred twice.
            mixed = normalise(torch.tensordot(w, density, 1).log())
            return score(mixed.float(), target, torch.tensordot(w.float(), blurred, 1))

        weights = {f"backbone:{name}": row for name, row in zip(self.model.names, np.eye(len(full)), strict=True)}
        weights |= {"uniform": np.full(len(full), 1 / len(full)), "global_weights": self.model.global_weights}
        probabilities = self.model.classifier.probabilities(pooled[None])[0]
        weights["inferred_category"] = self.model.mixing_weights(None, probabilities)
        weights |= {name: rows[index] for name, rows in self.by_image.items()}
        if self.labelled:
            weights["category_weights"] = self.model.mixing_weights(stimulus.category, probabilities)
        result = {"center_bias": score(bias, target)}
        result |= {name: mixture(row) for name, row in weights.items()}
        if self.labelled and len(self.model.categories) > 1:
            wrong = [c for c in self.model.categories if c != stimulus.category]
            scores = [mixture(self.model.mixing_weights(category, probabilities)) for category in wrong]
            result["wrong_category"] = {m: float(np.mean([s[m] for s in scores])) for m in METRICS}
        result["oracle_weights"] = mixture(self._oracle(full, target))
        optimum = self.dataset.optimum_log_density(index)
        if optimum is not None:
            result["optimum"] = score(torch.from_numpy(optimum), target)
        if self.gold_standard is not None:
            result["gold_standard"] = self._gold_standard(index, self.gold_standard, target_of)
        return result

    def _negatives(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of sAUC's negatives: the other images' fixations, scaled to this one."""
        dataset = self.dataset
        among = np.isin(dataset.image, self.among)
        sizes = np.array([stimulus.size for stimulus in dataset.stimuli])
        return shuffled_fixations(sizes, dataset.image[among], dataset.x[among], dataset.y[among], index)

    @staticmethod
    def _oracle(full: Tensor, target: Target) -> np.ndarray:
        log_p = full[:, target.rows, target.cols].T.double().numpy()
        return oracle(Likelihoods(log_p, np.zeros(len(log_p), dtype=np.int64), 1))[0]

    def _gold_standard(
        self, index: int, gold: GoldStandard, target_of: Callable[[np.ndarray], Target]
    ) -> dict[str, float]:
        """Each subject scored by the others' density, averaged over fixations."""
        total = dict.fromkeys(METRICS, 0.0)
        size = self.dataset.stimuli[index].size
        people = gold.leave_one_out(self.dataset, index)
        count = sum(int(mine.sum()) for mine, _ in people)
        for mine, log_density in people:
            scores = score(upsample(log_density, size), target_of(mine))
            for metric in METRICS:
                total[metric] += scores[metric] * int(mine.sum()) / count
        return total


def score_images(scoring: Scoring, indices: Sequence[int] | np.ndarray) -> dict[int, Scores]:
    """Scores of all the images, computed by all cores of the Ray cluster; index -> name -> metric -> score."""
    import ray

    @ray.remote(num_cpus=1, max_retries=3)
    def some(scoring: Scoring, chunk: list[int]) -> dict[int, Scores]:
        torch.set_num_threads(1)
        with torch.inference_mode():
            return {index: scoring.image(index) for index in chunk}

    shared = ray.put(scoring)
    images = [int(index) for index in indices]
    chunks = [images[start : start + IMAGES_PER_TASK] for start in range(0, len(images), IMAGES_PER_TASK)]
    result: dict[int, Scores] = {}
    for scores in _as_completed([some.remote(shared, chunk) for chunk in chunks]):
        result |= scores
        if len(result) * 10 // len(images) > (len(result) - len(scores)) * 10 // len(images):
            print(f"scoring: {len(result)}/{len(images)} images", flush=True)
    return {index: result[index] for index in images}


def _as_completed(tasks: list[Any]) -> Iterator[dict[int, Scores]]:
    import ray

    while tasks:
        done, tasks = ray.wait(tasks)
        yield ray.get(done[0])


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


def sample(log_density: Tensor, x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n,) float64 log-density per px at fixations (px), from a normalised one (H, W) on a grid over the image."""
    position = np.stack([x / size[1] * 2 - 1, y / size[0] * 2 - 1], -1).astype(np.float32)
    values = torch.nn.functional.grid_sample(
        log_density[None, None], torch.from_numpy(position)[None, None], padding_mode="border", align_corners=False
    )
    grid = log_density.shape
    return values[0, 0, 0].double().numpy() - math.log(size[0] * size[1] / (grid[0] * grid[1]))
