"""What a finished model and its references predict of single images, for the report to draw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from acw.data import Dataset
from acw.evaluation.gold_standard import GoldStandard
from acw.evaluation.scoring import StoredDensities
from acw.fusion.category_weights import mix
from acw.heads.finalizer import upsample
from acw.model.model import Model
from acw.report.pictures import CENTRE_BIAS, GOLD_STANDARD, OURS, UNIFORM, Example


@dataclass(frozen=True, eq=False)
class Predictions:
    """Of a run's images: `predictions(name)` is the `Example` of the image of that name.

    gold_standard: None where the data set has no subjects.
    """

    dataset: Dataset
    stored: StoredDensities
    gold_standard: GoldStandard | None

    def __call__(self, image: str) -> Example:
        index = self._index[image]
        stimulus = self.dataset.stimuli[index]
        on_grid = self.stored.of(index)[0]
        components = self.model.finalizer.upsample(on_grid, stimulus.size)

        def mixed(weights: np.ndarray) -> np.ndarray:
            return mix(components, torch.from_numpy(weights).float()).numpy()

        def ours(category: str) -> np.ndarray:
            if self.model.adaptation is None:
                return mixed(self._numbers[category])
            numbers = self.model.adaptation.row(self.model.categories.index(category))
            return self.model.adapted(on_grid, numbers, stimulus.size).numpy()

        log_densities = {OURS: ours(stimulus.category)}
        log_densities |= {name: mixed(row) for name, row in self.model.backbone_rows.items()}
        log_densities[UNIFORM] = mixed(self.model.uniform_row)
        log_densities[CENTRE_BIAS] = self.model.center_bias.of_size(stimulus.size)
        if self.gold_standard is not None:
            gold = self.gold_standard.everybody(self.dataset, index)
            log_densities[GOLD_STANDARD] = upsample(gold, stimulus.size).numpy()
        x, y, _ = self.dataset.fixations_of(index)
        # The category whose numbers are furthest away: what a wrong label can do at most.
        right = self._numbers[stimulus.category]
        distance = {category: float(np.abs(row - right).sum()) for category, row in self._numbers.items()}
        furthest = max(distance, key=distance.__getitem__)
        wrong = (furthest, ours(furthest)) if distance[furthest] > 0 else None
        return Example(stimulus.category, stimulus.pixels(), x, y, log_densities, wrong)

    @property
    def model(self) -> Model:
        return self.stored.model

    @cached_property
    def _index(self) -> dict[str, int]:
        return {stimulus.name: index for index, stimulus in enumerate(self.dataset.stimuli)}

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        """Category -> its weights or, of an adaptation, all of its numbers."""
        adaptation = self.model.adaptation
        if adaptation is None:
            return {category: self.model.mixing_weights(category, np.empty(0)) for category in self.model.categories}
        single = [np.log(adaptation.temperature), adaptation.center_bias_weight, adaptation.own_weight]
        rows = np.column_stack([adaptation.weights, adaptation.kernels, *single])
        return dict(zip(self.model.categories, rows, strict=False))
