"""Scores of every model and reference on an image; `distributed` has them computed for many."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from acw.data import Dataset
from acw.evaluation.exact import ExactTarget
from acw.evaluation.external_models import ExternalModel
from acw.evaluation.gold_standard import GoldStandard
from acw.evaluation.metrics import (
    METRICS,
    Components,
    ShuffledFixations,
    Target,
    in_order,
    score_mixtures,
    score_saliency,
)
from acw.evaluation.sauc import MeanPrediction, reduced, shuffled_auc, shuffled_aucs
from acw.evaluation.sim_opt import best_map
from acw.features.joined import Store, parts_of
from acw.fusion.adaptation import Adaptation
from acw.fusion.category_weights import Likelihoods, oracle
from acw.heads.finalizer import normalise, upsample
from acw.model.model import Model
from acw.storage.errors import UserError

# Names of models that are mixtures of the components, but for backbones, sources and controls.
MODELS = (
    *("center_bias", "uniform", "global_weights", "category_weights", "inferred_category", "wrong_category"),
    *("global_adaptation", "category_adaptation", "inferred_adaptation"),
    "log_mixture",
)
# Names in `references`: scores that no model could have, or that look at the answer.
REFERENCES = ("gold_standard", "gold_standard_upper", "optimum", "oracle_weights")
# Names in `controls`: of which only the likelihood is asked, IG and LL.
CONTROLS = ("wrong_adaptation", "shuffled_adaptation", "split_half_weights")
# For whom the map that is best for SIM is searched, if asked: a minute an image and model at full HD.
SIM_OPT_OF = ("center_bias", "category_weights", "inferred_category")
Scores = dict[str, dict[str, float]]
# What `Densities.of` gives for an image, as arrays, which Ray's workers read where they lie.
ComponentPrediction = tuple[np.ndarray, np.ndarray]
ONE = torch.ones((1, 1), dtype=torch.float64)


class Densities(Protocol):
    """Where the components' densities of an image come from."""

    def of(self, index: int) -> tuple[Tensor, np.ndarray]:
        """(C, H, W) log-densities of the components on the density grid, on the CPU, and (D,) pooled features."""


@dataclass(frozen=True)
class StoredDensities:
    """From features that were extracted before; stores in the order of the model's views.

    mirrored: of the mirror images of some, as many; places: where the image of an index is in these.
    """

    model: Model
    stores: list[Store]
    sizes: list[tuple[int, int]]
    mirrored: list[Store] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)

    def of(self, index: int) -> tuple[Tensor, np.ndarray]:
        features = [store.load([index], self.model.device) for store in self.stores]
        mirrored = [store.load([self.places[index]], self.model.device) for store in self.mirrored]
        pooled = [part.pooled([index])[0].double().numpy() for part in parts_of(self.stores)]
        log_densities = self.model.stored_log_densities(features, self.sizes[index], mirrored)
        return log_densities.cpu(), np.concatenate(pooled)


@dataclass(frozen=True)
class ImageDensities:
    """From the images themselves, by the finished model."""

    model: Model
    dataset: Dataset

    def of(self, index: int) -> tuple[Tensor, np.ndarray]:
        log_densities, pooled = self.model.component_log_densities(self.dataset.stimuli[index].pixels())
        return log_densities.cpu(), pooled


@dataclass(frozen=True, eq=False)
class _Maps:
    """What is predicted for an image. log_densities: float32 (C, H, W) of the components.

    on_grid: the same on the model's grid; log_p: float64 (F, C), at the fixations. weights: name -> (C,) of a mixture.
    wrong: those of the other categories. singles: name -> float32 (H, W) log-density of what is no such mixture.
    """

    log_densities: Tensor
    on_grid: Tensor
    log_p: np.ndarray
    weights: dict[str, np.ndarray]
    wrong: list[np.ndarray]
    singles: dict[str, Tensor]

    def reduced(self) -> dict[str, Tensor]:
        """Name -> density at the size at which predictions are averaged."""
        # Names may share their weights: global and category weights under an infinite prior.
        rows, row_of = np.unique(np.stack(list(self.weights.values())), axis=0, return_inverse=True)
        small = reduced(self.log_densities, torch.from_numpy(rows))
        result = {name: small[k] for name, k in zip(self.weights, row_of.ravel(), strict=True)}
        return result | {name: reduced(single[None], ONE)[0] for name, single in self.singles.items()}


@dataclass(frozen=True, eq=False)
class Scoring:
    """What to score, and against what.

    dataset: whose fixations; `among`: the images whose other fixations are sAUC's negatives.
    by_image: name -> (N, C) weights of a mixture, a row an image of the data set. adaptation: of the model, or one that
    is not the model's as it does not pay; shuffled: its control, fitted to labels that mean nothing, and these, (N,).
    labelled: whether the data set's categories are the model's, so that right and wrong weights exist.
    external: other models, scored beside ours. log_mixture: whether to score the combination of Galván's ACW too, the
    weighted sum of log-densities, renormalised. exact: densities are scored by pysaliency itself. sim_opt: an image's
    number of fixations, for SIM_OPT_OF and external densities; 0 leaves it out.
    """

    dataset: Dataset
    among: np.ndarray
    densities: Densities
    model: Model
    by_image: dict[str, np.ndarray]
    labelled: bool
    gold_standard: GoldStandard | None
    external: tuple[ExternalModel, ...] = ()
    adaptation: Adaptation | None = None
    shuffled: tuple[Adaptation, np.ndarray] | None = None
    log_mixture: bool = False
    exact: bool = False
    sim_opt: int = 0

    def component_prediction(self, index: int) -> ComponentPrediction:
        """What the components predict for an image: small, and costly to ask for."""
        log_densities, pooled = self.densities.of(index)
        return log_densities.numpy(), pooled

    def sums(
        self, indices: Sequence[int], predictions: Mapping[int, ComponentPrediction] | None = None
    ) -> dict[str, Tensor]:
        """Name -> sum of a model's reduced densities over images. predictions: of these, if they were made before."""
        total: dict[str, Tensor] = {}
        for index in indices:
            for name, density in self._maps(index, predictions).reduced().items():
                total[name] = total[name].add_(density) if name in total else density.clone()
        return total

    def image(
        self, index: int, means: dict[str, MeanPrediction], predictions: Mapping[int, ComponentPrediction] | None = None
    ) -> Scores:
        """Scores of every model and reference on one image; means: of `among`, by name; predictions: as in `sums`."""
        size = self.dataset.stimuli[index].size
        x, y, _ = self.dataset.fixations_of(index)
        _, bias, shuffled = _of_size(self, size)
        among = index in self.among
        target = Target.of(x, y, shuffled.without(x, y) if among else shuffled, bias)
        maps = self._maps(index, predictions)
        components = Components.of(maps.log_densities, target.blur_sigma)
        own = maps.reduced() if among else None

        def of_others(name: str) -> Tensor:
            return means[name].others(None if own is None else own[name])

        rows, row_of = np.unique(np.stack([*maps.weights.values(), *maps.wrong]), axis=0, return_inverse=True)
        distinct = score_mixtures(components, torch.from_numpy(rows), target)
        of_rows = [distinct[k] for k in row_of.ravel()]
        result = {name: dict(scores) for name, scores in zip(maps.weights, of_rows, strict=False)}
        for name, row in maps.weights.items():
            (result[name]["sAUC"],) = shuffled_aucs(components, torch.tensor(row)[None], target, of_others(name))
        if maps.wrong:
            of_wrong = of_rows[len(maps.weights) :]
            result["wrong_category"] = {m: float(np.mean([scores[m] for scores in of_wrong])) for m in of_wrong[0]}
            # What the model predicts for the other images, it predicts by their right categories.
            wrong = torch.from_numpy(np.stack(maps.wrong))
            values = shuffled_aucs(components, wrong, target, of_others("category_weights"))
            result["wrong_category"]["sAUC"] = float(np.mean(values))
        for name, log_density in maps.singles.items():
            single = bias if name == "center_bias" else Components.of(log_density[None], target.blur_sigma)
            result[name] = _single(single, target, of_others(name))
        if self.gold_standard is not None:
            result["gold_standard"] = self._leave_one_out(index, target, bias, of_others("gold_standard_upper"))
        for other in self.external:
            if other.kind == "saliency":
                result[other.name] = _saliency(torch.from_numpy(other.of(index)), target)
        log_bias = (bias.density[0] / bias.density[0].sum()).log().view(size)
        for name, log_p in self._at_fixations(index, maps):
            gain = float((log_p - log_bias[y.astype(int), x.astype(int)].double().numpy()).mean())
            level = float(log_p.mean()) + math.log(math.prod(size))
            result[name] = {"IG": gain / math.log(2), "LL": level / math.log(2)}
        if self.exact:
            exact = ExactTarget(target, log_bias.numpy())
            # All but those of wrong categories and single subjects.
            for name, density in self._every_density(maps):
                result[name] = exact.scores(density, of_others(name))
        if self.sim_opt:
            for name, density in self._every_density(maps):
                if name in SIM_OPT_OF or name in {other.name for other in self.external}:
                    best = torch.from_numpy(best_map(density, target.blur_sigma, self.sim_opt))
                    result[name]["SIM_opt"] = score_saliency(best, target)["SIM"]
        for name in (other.name for other in self.external):
            for metric, value in result[name].items():
                if not math.isfinite(value):
                    raise UserError(
                        f"{name}: its {metric} on {self.dataset.stimuli[index].name} is {value}, as its density is 0 "
                        "where somebody looked; give densities that are positive everywhere, or --kind saliency"
                    )
        return {name: {m: scores[m] for m in in_order(scores)} for name, scores in result.items()}

    @staticmethod
    def _every_density(maps: _Maps) -> Iterator[tuple[str, np.ndarray]]:
        """Name and float64 (H, W) log-density, normalised, of every mixture and every other density."""
        components = maps.log_densities.double().exp()
        for name, row in maps.weights.items():
            yield name, normalise(torch.tensordot(torch.tensor(row), components, 1).log()).numpy()
        for name, log_density in maps.singles.items():
            yield name, normalise(log_density.double()).numpy()

    def _maps(self, index: int, predictions: Mapping[int, ComponentPrediction] | None) -> _Maps:
        size = self.dataset.stimuli[index].size
        log_densities, pooled = self.component_prediction(index) if predictions is None else predictions[index]
        # Copied: Ray's arrays are read-only, of which torch warns.
        on_grid = torch.tensor(log_densities)
        full = self.model.finalizer.upsample(on_grid, size)
        weights, wrong = self._weights(index, pooled)
        x, y, _ = self.dataset.fixations_of(index)
        log_p = full[:, y.astype(int), x.astype(int)].T.double().numpy()
        weights["oracle_weights"] = oracle(Likelihoods(log_p, np.zeros(len(log_p), dtype=np.int64), 1))[0]
        singles = dict(self._singles(index, full, weights)) | dict(self._adapted(index, on_grid, pooled))
        return _Maps(full, on_grid, log_p, weights, wrong, singles)

    def _weights(self, index: int, pooled: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """Name -> (C,) weights of the mixtures to score on an image, and those of the wrong categories."""
        model, category = self.model, self.dataset.stimuli[index].category
        weights = {f"backbone:{name}": row for name, row in model.backbone_rows.items()}
        weights |= {"uniform": model.uniform_row, "global_weights": model.global_weights}
        probabilities = model.classifier.probabilities(pooled[None])[0]
        weights["inferred_category"] = model.mixing_weights(None, probabilities)
        weights |= {name: rows[index] for name, rows in self.by_image.items()}
        if not self.labelled:
            return weights, []
        weights["category_weights"] = model.mixing_weights(category, probabilities)
        return weights, [model.mixing_weights(wrong, probabilities) for wrong in model.categories if wrong != category]

    def _adapted(self, index: int, on_grid: Tensor, pooled: np.ndarray) -> Iterator[tuple[str, Tensor]]:
        """The densities by the numbers for all images, for the category, and for what category it looks like."""
        if self.adaptation is None:
            return
        stimulus, model = self.dataset.stimuli[index], self.model
        inferred = model.shares(None, pooled)
        numbers = {"global_adaptation": self.adaptation.row(-1), "inferred_adaptation": self.adaptation.of(inferred)}
        if self.labelled:
            own = self.adaptation.of(model.shares(stimulus.category, pooled))
            numbers |= {"category_adaptation": own}
        for name, of_name in numbers.items():
            yield name, model.adapted(on_grid, of_name, stimulus.size)

    def _at_fixations(self, index: int, maps: _Maps) -> Iterator[tuple[str, np.ndarray]]:
        """Those of CONTROLS that there are: name -> (F,) log-density per px at the fixations."""
        stimulus, model = self.dataset.stimuli[index], self.model
        x, y, subject = self.dataset.fixations_of(index)
        yield "split_half_weights", split_half(maps.log_p, subject)
        if self.adaptation is None or not self.labelled:
            return

        def of(adaptation: Adaptation, row: int) -> np.ndarray:
            adapted = model.adapted_on_grid(maps.on_grid, adaptation.row(row), stimulus.size)
            return model.finalizer.at_pixels(adapted, x, y, stimulus.size)

        right = model.categories.index(stimulus.category)
        wrong = [of(self.adaptation, row) for row in range(len(model.categories)) if row != right]
        if wrong:
            yield "wrong_adaptation", np.mean(wrong, 0)
        if self.shuffled:
            adaptation, labels = self.shuffled
            yield "shuffled_adaptation", of(adaptation, int(labels[index]))

    def _singles(self, index: int, full: Tensor, weights: dict[str, np.ndarray]) -> Iterator[tuple[str, Tensor]]:
        size = self.dataset.stimuli[index].size
        yield "center_bias", _of_size(self, size)[0]
        optimum = self.dataset.optimum_log_density(index)
        if optimum is not None:
            yield "optimum", torch.from_numpy(optimum)
        if self.gold_standard is not None:
            yield "gold_standard_upper", upsample(self.gold_standard.everybody(self.dataset, index), size)
        if self.log_mixture:
            row = weights["category_weights" if self.labelled else "global_weights"]
            yield "log_mixture", log_mixture(full, torch.tensor(row).float(), self.model.systems)
        for other in self.external:
            if other.kind == "density":
                yield other.name, torch.from_numpy(other.of(index).astype(np.float32))

    def _leave_one_out(self, index: int, target: Target, bias: Components, log_mean: Tensor) -> dict[str, float]:
        """Each subject scored by the others' density, averaged over fixations; sAUC by everybody's on other images."""
        assert self.gold_standard is not None
        total = dict.fromkeys(METRICS, 0.0)
        x, y, _ = self.dataset.fixations_of(index)
        negatives = ShuffledFixations(target.size, *(tensor.numpy() for tensor in target.negatives))
        for mine, log_density in self.gold_standard.leave_one_out(self.dataset, index):
            of_subject = Target.of(x[mine], y[mine], negatives, bias)
            components = Components.of(upsample(log_density, bias.size)[None], target.blur_sigma)
            for metric, value in _single(components, of_subject, log_mean).items():
                total[metric] += value * int(mine.sum()) / len(x)
        return total


def split_half(log_p: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """(F,) log-density at each fixation under the weights that are best for the other half of the subjects.

    log_p: (F, C) of the components; subject: (F,), -1 where unknown: then every other fixation is a half. What weights
    by image could be worth at most, without the noise that the best weights for the very fixations are fitted to.
    """
    _, number = np.unique(subject, return_inverse=True)
    half = (number if number.max() else np.arange(len(subject))) % 2
    result = np.empty(len(log_p))
    for own in (0, 1):
        other = log_p[half != own]
        if not len(other):
            return logsumexp(log_p, axis=1) - math.log(log_p.shape[1])
        weights = oracle(Likelihoods(other, np.zeros(len(other), dtype=np.int64), 1))[0]
        result[half == own] = logsumexp(log_p[half == own], axis=1, b=weights)
    return result


def log_mixture(log_densities: Tensor, weights: Tensor, systems: int) -> Tensor:
    """(H, W) the combination of Galván's ACW: of each system the weighted sum of its log-densities, renormalised; then
    the mean density of the systems. log_densities: (C, H, W), weights: (C,), of backbones, and of each its systems."""
    weight_BS = weights.view(-1, systems)
    share_S = weight_BS.sum(0)
    logs_BSHW = log_densities.unflatten(0, weight_BS.shape)
    logs_SHW = normalise(torch.einsum("bs,bshw->shw", weight_BS / share_S, logs_BSHW))
    return torch.logsumexp(logs_SHW + share_S.log()[:, None, None], 0)


def _single(components: Components, target: Target, log_mean: Tensor) -> dict[str, float]:
    """Scores of one density."""
    (scores,) = score_mixtures(components, ONE, target)
    return scores | {"sAUC": shuffled_aucs(components, ONE, target, log_mean)[0]}


def _saliency(saliency: Tensor, target: Target) -> dict[str, float]:
    """Scores of a saliency map as it is; lifted for sAUC, which only asks for ranks."""
    values = (saliency - saliency.min()).flatten()
    auc = shuffled_auc(values[target.pixels], values[target.negatives[0]], target)
    return score_saliency(saliency, target) | {"sAUC": auc}


# Images are scored in the order of their sizes, and many data sets have but one.
@functools.lru_cache(maxsize=1)
def _of_size(scoring: Scoring, size: tuple[int, int]) -> tuple[Tensor, Components, ShuffledFixations]:
    """The baseline on images of a size, (H, W) and as components, and sAUC's negatives for them before their own
    fixations are taken out."""
    dataset = scoring.dataset
    bias = torch.from_numpy(scoring.model.center_bias.of_size(size))
    sizes = np.array([stimulus.size for stimulus in dataset.stimuli])
    among = np.isin(np.arange(len(sizes)), scoring.among)
    negatives = ShuffledFixations.of(size, sizes, among, dataset.image, dataset.x, dataset.y)
    return bias, Components.of(bias[None], dataset.blur_sigma), negatives
