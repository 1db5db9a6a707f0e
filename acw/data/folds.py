"""The split: which images are held out for evaluation, and which fold each of the others validates."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from acw.data.dataset import Dataset
from acw.storage.checksums import fingerprint
from acw.storage.errors import UserError


@dataclass(frozen=True, eq=False)
class Split:
    """fold: int8 (N,), -1 for a held-out image, else the fold that it validates; hash: names this very split."""

    fold: np.ndarray
    hash: str

    @property
    def held_out(self) -> np.ndarray:
        """Indices of the images that are scored and never chosen on."""
        return np.flatnonzero(self.fold < 0)

    def refuse_unscorable(self) -> None:
        """Raises UserError if too few images are held out to be scored: better known before a training than after."""
        if len(self.held_out) < 2:
            raise UserError(
                f"data set: only one of {len(self.fold)} images is held out, and sAUC needs fixations of a second; "
                "add images or give a larger --holdout"
            )

    def without(self, images: np.ndarray) -> Split:
        """The same split for heads that must not meet some images ((N,) bool): neither trained nor stopped by them."""
        return Split(np.where(images, np.int8(-1), self.fold), fingerprint([self.hash, images.tolist()]))

    def with_held_out(self) -> Split:
        """The same split with the held-out images dealt into the folds: for a model that is not scored any more."""
        fold = self.fold.copy()
        fold[self.held_out] = np.arange(len(self.held_out)) % (self.fold.max() + 1)
        return Split(fold, fingerprint([self.hash, "with held out"]))

    @property
    def development(self) -> np.ndarray:
        """Indices of all other images."""
        return np.flatnonzero(self.fold >= 0)

    def validation(self, fold: int) -> np.ndarray:
        """Indices of the images that validate the heads of this fold."""
        assert 0 <= fold <= self.fold.max(), fold
        return np.flatnonzero(self.fold == fold)

    def training(self, fold: int) -> np.ndarray:
        """Indices of the images that train the heads of this fold."""
        assert 0 <= fold <= self.fold.max(), fold
        return np.flatnonzero((self.fold >= 0) & (self.fold != fold))


def split(dataset: Dataset, seed: int, folds: int = 5, holdout: float = 0.2) -> Split:
    """Holds out a share of every category and deals the rest into folds.

    A category's images are ranked by a hash of the seed, the category and their own names. The first
    round(holdout * n), at least one, are held out; the rest are dealt in turn. Where the dealing starts depends on the
    category, so that the left-over images of all categories do not pile up in the first folds. An image's place
    therefore depends on the seed and its category's names, not on other categories or on the order of the stimuli.

    Raises UserError for a category that is too small to be held out and in every fold (with the defaults: fewer than
    6 images), and for folds or holdout out of range.
    """
    if not 2 <= folds <= 100:
        raise UserError(f"folds: {folds} is not between 2 and 100; choose 5, as ACW (2024) does")
    if not 0 < holdout < 1:
        raise UserError(f"holdout: {holdout} is not between 0 and 1; choose 0.2, as ACW (2024) does")
    names = defaultdict(list)
    for stimulus in dataset.stimuli:
        names[stimulus.category].append(stimulus.name)
    fold_of: dict[str, int] = {}
    for category, members in names.items():
        ranked = sorted(members, key=lambda name: _digest(seed, category, name))
        held = held_out_count(len(ranked), holdout)
        if len(ranked) - held < folds:
            raise UserError(
                f"category {category}: has {len(ranked)} images, too few to hold out {held} and put one in each of "
                f"{folds} folds; add images or merge it with another category"
            )
        start = int(_digest(seed, category), 16) % folds
        fold_of |= dict.fromkeys(ranked[:held], -1)
        fold_of |= {name: (start + turn) % folds for turn, name in enumerate(ranked[held:])}
    fold = np.array([fold_of[stimulus.name] for stimulus in dataset.stimuli], dtype=np.int8)
    return Split(fold, fingerprint({"seed": seed, "folds": folds, "holdout": holdout, "place": fold_of}))


def held_out_count(images: int, holdout: float) -> int:
    """How many of a category's images are held out."""
    return max(1, math.floor(holdout * images + 0.5))


def _digest(*key: object) -> str:
    return hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()
