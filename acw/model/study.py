"""A data set as a model sees it, which is to be adapted to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from acw.data import Dataset
from acw.features.joined import Store
from acw.heads.readout import Parameters
from acw.model.model import Model


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model says of N images, and where people looked in them.

    log_densities: of each (C, H, W), the components' on its grid. pooled: (N, D) features. fixations: of each x and y,
    in px; sizes: (height, width), in px.
    """

    log_densities: Sequence[Tensor]
    pooled: np.ndarray
    fixations: Sequence[tuple[np.ndarray, np.ndarray]]
    sizes: Sequence[tuple[int, int]]

    def only(self, components: np.ndarray) -> Seen:
        """What some of the components say."""
        return dataclasses.replace(self, log_densities=[of_image[components] for of_image in self.log_densities])

    def subset(self, chosen: np.ndarray) -> Seen:
        """Of some of the images."""
        log_densities, fixations, sizes = (
            [values[index] for index in chosen.tolist()] for values in (self.log_densities, self.fixations, self.sizes)
        )
        return Seen(log_densities, self.pooled[chosen], fixations, sizes)


@dataclass(frozen=True, eq=False)
class Study:
    """stores: of the images' features, one a view; mirrored: of the mirror images', where the model asks for them."""

    model: Model
    dataset: Dataset
    stores: Sequence[Store]
    mirrored: Sequence[Store]
    seen: Seen

    def said_by(self, heads: Mapping[str, Parameters], index: int) -> Tensor:
        """(V, H, W) log-densities of an image by other heads of the V views."""
        model = dataclasses.replace(self.model, heads=dict(heads), systems=1, readouts=[])
        features, mirror = (
            [store.load([index], model.device) for store in each] for each in (self.stores, self.mirrored)
        )
        return model.stored_log_densities(features, self.seen.sizes[index], mirror).cpu()
