"""The paper's joint training: a fold's heads and category weights fine-tuned together on their mixture's likelihood.

A system is what one fold's heads make: per backbone its heads (their mean density), and a softmax over backbones for
each category. It starts from heads that were trained one by one, and every part of it is then trained on the mixture's
negative log-likelihood, in nats per fixation, each image counting equally: readouts, smoothing, centre-bias weights
and, at ten times the rate, category weights. The final model is the mean of the folds' densities (`aggregation`).
Shape suffixes: S heads a backbone, B images, F fixations, H x W the density's grid, G categories, N backbones.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from acw.cluster.costs import peak_rss
from acw.features.joined import Store
from acw.features.tensors import Features
from acw.heads import readout as bank_of_heads
from acw.heads.finalizer import Finalizer, finalize
from acw.heads.readout import Parameters
from acw.recipes import Recipe
from acw.storage.errors import UserError
from acw.storage.files import fetch, write_atomic
from acw.training.bank import above, below, read_checkpoint, stored, system_path
from acw.training.batches import Batches, TrainingSet, group_by_shape, read_ahead
from acw.training.loss import image_loss
from acw.training.trainer import ADAM_BETAS, ADAM_EPS, PLATEAU_THRESHOLD

WEIGHTS_RATE = 10.0  # of the category weights, times that of everything else
LOGITS = "category_logits"


@dataclass(frozen=True)
class JointSet:
    """What a system is trained on: the training set, its images' categories (N,) int64, and the backbones' stores."""

    training: TrainingSet
    category: np.ndarray
    categories: int
    stores: dict[str, Store]


@dataclass
class SystemState:
    """All that a system's training needs to go on after an interruption.

    parameters, best: `BACKBONE/NAME` -> (S, ...), and LOGITS -> (G, N). first, second, steps: Adam's, of those that
    learn. rate, bad_epochs, best_ig: as in the plateau rule. history: one entry an epoch.
    """

    parameters: dict[str, Tensor]
    best: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    steps: int
    rate: float
    bad_epochs: int
    best_ig: float
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def new(cls, recipe: Recipe, heads: dict[str, Parameters], categories: int) -> SystemState:
        parameters = {f"{name}/{key}": value.clone() for name, bank in heads.items() for key, value in bank.items()}
        parameters[LOGITS] = torch.zeros(categories, len(heads))
        best, first, second = (
            {name: value.clone() if kept else torch.zeros_like(value) for name, value in parameters.items()}
            for kept in (True, False, False)
        )
        return cls(parameters, best, first, second, 0, recipe.joint_learning_rate, 0, -math.inf)

    def finished(self, recipe: Recipe) -> bool:
        return len(self.history) >= recipe.joint_max_epochs or not above(self.rate, recipe.joint_min_learning_rate)

    def heads(self, backbone: str) -> Parameters:
        """The best-validation parameters of a backbone's heads, stacked."""
        return below(self.best, backbone)

    def weights(self) -> np.ndarray:
        """(G, N) float64: the best-validation category weights."""
        return self.best[LOGITS].double().softmax(1).numpy()

    def save(self, path: Path) -> None:
        tensors = {f"{group}/{name}": t.contiguous() for group in _GROUPS for name, t in getattr(self, group).items()}
        rest = {name: getattr(self, name) for name in _NUMBERS}
        metadata = {"history": json.dumps(self.history), "numbers": json.dumps(rest)}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: Path) -> SystemState:
        tensors, metadata = read_checkpoint(path)
        groups: dict[str, Any] = {group: below(tensors, group) for group in _GROUPS}
        return cls(**groups, **json.loads(metadata["numbers"]), history=json.loads(metadata["history"]))


_GROUPS = ("parameters", "best", "first", "second")
_NUMBERS = ("steps", "rate", "bad_epochs", "best_ig")


def train_system(
    recipe: Recipe,
    fold: int,
    data: JointSet,
    heads: dict[str, Parameters],
    folder: Path,
    device: torch.device,
    location: Mapping[str, Any] | None = None,
) -> Iterator[SystemState]:
    """Trains a fold's system from its checkpoint in the run's folder, or from `heads` (by backbone) to the end.

    Yields after each epoch, whose checkpoint is then on disk. location: as for `training.train_epochs`.
    Raises UserError where the loss is not finite.
    """
    path = system_path(folder, fold)
    state = SystemState.load(path) if fetch(path).exists() else SystemState.new(recipe, heads, data.categories)
    batches = _Batches(recipe, fold, data, device)
    if not state.history:
        # Where it starts from is a candidate too: fine-tuning must not make it worse.
        state.best_ig = _validate(state.parameters, batches)
    while not state.finished(recipe):
        start = time.monotonic()
        loss = _train_epoch(recipe, state, batches)
        ig = _validate(state.parameters, batches)
        if not (math.isfinite(loss) and math.isfinite(ig)):
            raise UserError("joint training: the loss is not finite; lower --joint-learning-rate")
        entry = {"epoch": len(state.history), "loss": loss, "ig": ig, "learning_rate": state.rate}
        entry |= {"seconds": round(time.monotonic() - start, 3), "time": round(time.time(), 3)}
        entry |= {"peak_rss": peak_rss(), **(location or {})}
        state.history.append(entry | {"weights": state.parameters[LOGITS].double().softmax(1).tolist()})
        better = ig > state.best_ig + PLATEAU_THRESHOLD
        if better:
            state.best_ig = ig
            state.best = {name: value.clone() for name, value in state.parameters.items()}
        state.bad_epochs = 0 if better else state.bad_epochs + 1
        if state.bad_epochs > recipe.joint_patience:
            state.rate, state.bad_epochs = state.rate * recipe.lr_factor, 0
        state.save(path)
        yield state


def _train_epoch(recipe: Recipe, state: SystemState, batches: _Batches) -> float:
    """One pass over the fold's training images; the mean loss, nats per fixation."""
    fixed = {"log_sigma": not recipe.learn_sigma, LOGITS: not recipe.category_weights}
    on_device = {name: value.to(batches.device) for name, value in state.parameters.items()}
    learning = [name for name in on_device if not fixed.get(name.rpartition("/")[2])]
    for name in learning:
        on_device[name].requires_grad_(True)
    adam = _adam(state, {name: on_device[name] for name in learning})
    order = np.random.default_rng([recipe.seed, batches.fold, len(state.history)])
    images = order.permutation(batches.training)
    steps = [images[start : start + recipe.batch_size] for start in range(0, len(images), recipe.batch_size)]
    parts = [batches.groups(step) for step in steps]
    reader = read_ahead((group for groups in parts for group in groups), batches.load)
    total = 0.0
    for step, groups in zip(steps, parts, strict=True):
        adam.zero_grad()
        for _ in groups:
            loss = image_loss(mixture_log_likelihood(on_device, next(reader), batches)).sum() / len(step)
            loss.backward()
            total += float(loss.detach()) * len(step)
        adam.step()
    state.parameters |= {name: on_device[name].detach().cpu() for name in learning}
    for name in learning:
        moments = adam.state[on_device[name]]
        state.first[name], state.second[name] = moments["exp_avg"].cpu(), moments["exp_avg_sq"].cpu()
    state.steps += len(steps)
    return total / len(images)


def _adam(state: SystemState, learning: dict[str, Tensor]) -> torch.optim.Adam:
    """PyTorch's Adam with the two groups of Galván's ACW, as far as it had come."""
    groups: list[dict[str, Any]] = [{"params": [value for name, value in learning.items() if name != LOGITS]}]
    if LOGITS in learning:
        groups.append({"params": [learning[LOGITS]], "lr": WEIGHTS_RATE * state.rate})
    adam = torch.optim.Adam(groups, lr=state.rate, betas=ADAM_BETAS, eps=ADAM_EPS)
    for name, value in learning.items():
        moments = {"exp_avg": state.first[name], "exp_avg_sq": state.second[name]}
        # In place, where checkpoints must not see it.
        adam.state[value] = {name: moment.to(value.device, copy=True) for name, moment in moments.items()}
        adam.state[value]["step"] = torch.tensor(float(state.steps))
    return adam


@torch.no_grad()
def _validate(parameters: dict[str, Tensor], batches: _Batches) -> float:
    """Mean IG over the fold's KDE on its validation images, bits per fixation."""
    on_device = {name: value.to(batches.device) for name, value in parameters.items()}
    total = 0.0
    for batch in read_ahead(batches.groups(batches.validation), batches.load):
        baseline = [((rows @ batch.baseline_HW) * columns).sum(1).mean() for rows, columns in batch.places]
        gain_B = mixture_log_likelihood(on_device, batch, batches) - (torch.stack(baseline) - batch.log_area_B)
        total += float(gain_B.double().sum())
    return total / len(batches.validation) / math.log(2)


@dataclass
class _Batch:
    """Images of one shape. features: per backbone. places: of each image, as `Finalizer.places`. log_area_B: px a cell.

    bias_HW: what the heads add; baseline_HW: the fold's KDE, over which IG is measured.
    """

    category_B: Tensor
    features: dict[str, Features]
    places: list[tuple[Tensor, Tensor]]
    log_area_B: Tensor
    bias_HW: Tensor
    baseline_HW: Tensor


class _Batches:
    """Serves a fold's images with the features of all backbones."""

    def __init__(self, recipe: Recipe, fold: int, data: JointSet, device: torch.device) -> None:
        self.fold, self.data, self.device = fold, data, device
        self.finalizer: Finalizer = recipe.finalizer
        self.training = np.flatnonzero((data.training.fold >= 0) & (data.training.fold != fold))
        self.validation = np.flatnonzero(data.training.fold == fold)
        # Fixations and centre biases are the same with every backbone's features.
        self._one = Batches(data.training, next(iter(data.stores.values())), self.finalizer, device)

    def groups(self, indices: np.ndarray) -> list[np.ndarray]:
        """The images split into those whose tensors have one shape in every store."""
        groups = group_by_shape(self.data.stores.values(), self.data.training.sizes, indices, self.finalizer)
        return [np.array(group) for group in groups]

    def load(self, indices: np.ndarray) -> _Batch:
        training = self.data.training
        sizes = [training.sizes[index] for index in indices]
        grid = self.finalizer.grid(sizes[0])
        places = []
        for index, size in zip(indices, sizes, strict=True):
            part = slice(self._one.offsets[index], self._one.offsets[index + 1])
            rows, columns = self.finalizer.places(training.x[part], training.y[part], size, grid)
            places.append((rows.to(self.device), columns.to(self.device)))
        return _Batch(
            torch.from_numpy(self.data.category[indices]).to(self.device),
            {name: store.load(list(indices), self.device) for name, store in self.data.stores.items()},
            places,
            torch.tensor([math.log(h * w / (grid[0] * grid[1])) for h, w in sizes], device=self.device),
            self._one.bias("finalizer_bias", grid)[self.fold],
            self._one.bias("baseline", grid)[self.fold],
        )


def mixture_log_likelihood(parameters: dict[str, Tensor], batch: _Batch, batches: _Batches) -> Tensor:
    """(B,) mean natural-log density per px at each image's fixations, of `sum_b w[c, b] mean_s p_bs`."""
    log_weights_BN = parameters[LOGITS].log_softmax(1)[batch.category_B]
    of_backbones: list[list[Tensor]] = []  # per backbone, per image (F,)
    for name, features in batch.features.items():
        bank = below(parameters, name)
        priority_SBhw = bank_of_heads.readout(bank, features)
        bias_SHW = batch.bias_HW.expand(len(priority_SBhw), -1, -1)
        scores_SBHW = finalize(bank, priority_SBhw, bias_SHW, batches.finalizer)
        log_mass_SB = scores_SBHW.logsumexp((2, 3))
        images = []
        for position, (rows_FH, columns_FW) in enumerate(batch.places):
            values_SF = ((rows_FH @ scores_SBHW[:, position]) * columns_FW).sum(2)
            log_p_SF = values_SF - log_mass_SB[:, position, None]
            images.append(log_p_SF.logsumexp(0) - math.log(len(log_p_SF)))
        of_backbones.append(images)
    mixed = [
        (torch.stack(log_p_NF) + log_weights_N[:, None]).logsumexp(0).mean()
        for log_weights_N, *log_p_NF in zip(log_weights_BN, *of_backbones, strict=True)
    ]
    return torch.stack(mixed) - batch.log_area_B


def unfinished_systems(recipe: Recipe, folder: Path) -> list[int]:
    """The folds whose system has epochs left to train."""

    def has_epochs_left(fold: int) -> bool:
        path = system_path(folder, fold)
        return not stored(path) or not SystemState.load(path).finished(recipe)

    return [fold for fold in range(recipe.folds) if has_epochs_left(fold)]


def trained_systems(recipe: Recipe, folder: Path) -> list[SystemState]:
    """The finished systems of a run, a fold each; raises UserError if one is missing or has not finished."""
    systems = []
    for path in (system_path(folder, fold) for fold in range(recipe.folds)):
        systems += [SystemState.load(path)] if fetch(path).exists() else []
        if not path.exists() or not systems[-1].finished(recipe):
            raise UserError(
                f"{path}: joint training has not finished; run jobs/train.py again, it goes on where it stopped"
            )
    return systems


def weights_history(systems: Sequence[SystemState]) -> np.ndarray:
    """(E + 1, G, N): the mean over the systems of the category weights, from their even start on, after each epoch.

    A system that has stopped keeps its last ones.
    """
    longest = max(len(system.history) for system in systems)
    groups, backbones = systems[0].best[LOGITS].shape
    curves = []
    for system in systems:
        steps = [np.full((groups, backbones), 1 / backbones), *(np.array(entry["weights"]) for entry in system.history)]
        curves.append(np.stack([*steps, *[steps[-1]] * (longest + 1 - len(steps))]))
    return np.mean(curves, axis=0)
