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
        components = self.model.finalizer.upsample(self.stored.of(index)[0], stimulus.size)

        def mixed(weights: np.ndarray) -> np.ndarray:
            return mix(components, torch.from_numpy(weights).float()).numpy()

        right = self._weights[stimulus.category]
        log_densities = {OURS: mixed(right)}
        log_densities |= {name: mixed(row) for name, row in self.model.backbone_rows.items()}
        log_densities[UNIFORM] = mixed(np.full(len(right), 1 / len(right)))
        log_densities[CENTRE_BIAS] = self.model.center_bias.of_size(stimulus.size)
        if self.gold_standard is not None:
            gold = self.gold_standard.everybody(self.dataset, index)
            log_densities[GOLD_STANDARD] = upsample(gold, stimulus.size).numpy()
        x, y, _ = self.dataset.fixations_of(index)
        # The category whose weights are furthest away: what a wrong label can do at most.
        distance = {category: float(np.abs(row - right).sum()) for category, row in self._weights.items()}
        furthest = max(distance, key=distance.__getitem__)
        wrong = (furthest, mixed(self._weights[furthest])) if distance[furthest] > 0 else None
        return Example(stimulus.category, stimulus.pixels(), x, y, log_densities, wrong)

    @property
    def model(self) -> Model:
        return self.stored.model

    @cached_property
    def _index(self) -> dict[str, int]:
        return {stimulus.name: index for index, stimulus in enumerate(self.dataset.stimuli)}

    @cached_property
    def _weights(self) -> dict[str, np.ndarray]:
        return {category: self.model.mixing_weights(category, np.empty(0)) for category in self.model.categories}
