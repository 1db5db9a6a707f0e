"""The loop that trains a bank of heads on one backbone's cached features, and its checkpoints.

The loss is the negative log-likelihood in nats per fixation, each image counting equally. It needs the log-density at
the fixations and one normaliser an image, so it is computed on the finalizer's grid: with T an image's fixations spread
onto the grid (bilinear weights, sum 1) and s the unnormalised log-density, loss = logsumexp(s) - <T, s> + log(area).
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acw import heads as bank_of_heads
from acw.center_bias import CenterBias
from acw.features import FeatureStore
from acw.heads import Parameters
from acw.recipes import Recipe
from acw.storage import UserError, write_atomic

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
# A validation IG counts as better only beyond this many bits, as in PyTorch's plateau scheduler (absolute threshold).
PLATEAU_THRESHOLD = 1e-4
# Validation keeps no graph, so it can take more images at once than a training step.
EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Bank:
    """Heads that are trained together: `members` are (fold, seed) on one backbone."""

    backbone: str
    members: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        (first_fold, first_seed), (last_fold, last_seed) = self.members[0], self.members[-1]
        return f"{self.backbone}-f{first_fold}s{first_seed}-f{last_fold}s{last_seed}"


def plan_banks(recipe: Recipe) -> list[Bank]:
    """All heads of a recipe, in banks of `heads_per_worker`; small banks keep to one fold, and so to fewer images."""
    members = [(fold, seed) for fold in range(recipe.folds) for seed in range(recipe.seeds)]
    size = recipe.heads_per_worker
    parts = [tuple(members[start : start + size]) for start in range(0, len(members), size)]
    return [Bank(backbone, part) for backbone in recipe.backbones for part in parts]


@dataclass(frozen=True)
class TrainingSet:
    """What training needs to know of a data set besides its features.

    sizes: per image (H, W) px. fold: (N,) int8, -1 for held-out images, which training never touches.
    image, x, y: (F,) fixations in px, sorted by image. finalizer_bias: a centre bias per fold, from that fold's
    training images; baseline: likewise the KDE over which IG is measured.
    """

    sizes: list[tuple[int, int]]
    fold: np.ndarray
    image: np.ndarray
    x: np.ndarray
    y: np.ndarray
    finalizer_bias: list[CenterBias]
    baseline: list[CenterBias]


@dataclass
class Batch:
    """B images whose tensors have one shape.

    target_BP: fixations on the density grid of P cells, rows sum to 1. log_area_B: log px per cell.
    """

    indices: np.ndarray
    features: bank_of_heads.Features
    grid: tuple[int, int]
    target_BP: Tensor
    log_area_B: Tensor


def density_grid(size: tuple[int, int], cell: float) -> tuple[int, int]:
    """(H, W) cells of the grid on which an image of `size` px is given a density."""
    return math.ceil(size[0] / cell), math.ceil(size[1] / cell)


def group_by_shape(
    store: FeatureStore, sizes: Sequence[tuple[int, int]], indices: Sequence[int] | np.ndarray, cell: float
) -> list[list[int]]:
    """Images split into those whose features and density grids have one shape."""
    result: list[list[int]] = []
    for group in store.groups(indices):
        by_grid: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index in group:
            by_grid[density_grid(sizes[index], cell)].append(index)
        result += by_grid.values()
    return result


class Batches:
    """Serves one backbone's features with their targets."""

    def __init__(self, training_set: TrainingSet, store: FeatureStore, cell: float, device: torch.device) -> None:
        self.training_set, self.store, self.cell, self.device = training_set, store, cell, device
        self.offsets = np.searchsorted(training_set.image, np.arange(len(training_set.sizes) + 1))
        self._biases: dict[tuple[str, tuple[int, int]], Tensor] = {}

    def groups(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The images split into those that fit one batch."""
        return [np.array(group) for group in group_by_shape(self.store, self.training_set.sizes, indices, self.cell)]

    def load(self, indices: np.ndarray) -> Batch:
        sizes = [self.training_set.sizes[index] for index in indices]
        grid = density_grid(sizes[0], self.cell)
        target = np.stack([self._target(index, grid) for index in indices])
        log_area = torch.tensor([math.log(h * w / (grid[0] * grid[1])) for h, w in sizes])
        features = self.store.load(list(indices), self.device)
        return Batch(indices, features, grid, torch.from_numpy(target).to(self.device), log_area.to(self.device))

    def _target(self, index: int, grid: tuple[int, int]) -> np.ndarray:
        fixations = slice(self.offsets[index], self.offsets[index + 1])
        height, width = self.training_set.sizes[index]
        return spread(self.training_set.y[fixations] / height, self.training_set.x[fixations] / width, grid)

    def bias(self, kind: str, grid: tuple[int, int]) -> Tensor:
        """(folds, H, W) float32 on the device; kind is `finalizer_bias` or `baseline`."""
        if (kind, grid) not in self._biases:
            maps = np.stack([bias.of_size(grid) for bias in getattr(self.training_set, kind)])
            self._biases[kind, grid] = torch.from_numpy(maps).to(self.device)
        return self._biases[kind, grid]


def spread(y: np.ndarray, x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(H * W,) float32: points in relative coordinates as bilinear weights on a grid's cell centres, sum 1.

    The product with a map is the mean over the points of the map interpolated linearly, constant beyond the outermost
    centres: just what `upsample` makes of it.
    """
    target = np.zeros(grid[0] * grid[1])
    low_y, share_y = _neighbours(y, grid[0])
    low_x, share_x = _neighbours(x, grid[1])
    for dy in (0, 1):
        for dx in (0, 1):
            row = np.minimum(low_y + dy, grid[0] - 1)
            column = np.minimum(low_x + dx, grid[1] - 1)
            weight = (share_y if dy else 1 - share_y) * (share_x if dx else 1 - share_x)
            target += np.bincount(row * grid[1] + column, weight, grid[0] * grid[1])
    return (target / len(y)).astype(np.float32)


def _neighbours(relative: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    position = np.clip(relative.astype(np.float64) * cells - 0.5, 0, cells - 1)
    low = position.astype(int)
    return low, position - low


def log_likelihood(parameters: Parameters, batch: Batch, bias_KHW: Tensor, cell: float) -> Tensor:
    """(K, B) float32: mean natural-log density per px at an image's fixations, in nats per fixation."""
    priority = bank_of_heads.readout(parameters, batch.features)
    scores_KBP = bank_of_heads.finalize(parameters, priority, bias_KHW, cell).flatten(2)
    at_fixations = torch.einsum("kbp,bp->kb", scores_KBP, batch.target_BP)
    return at_fixations - torch.logsumexp(scores_KBP, 2) - batch.log_area_B


@dataclass
class BankState:
    """All that a bank's training needs to go on after an interruption.

    parameters, best, first_moment, second_moment: stacked over the K heads. steps, bad_epochs: (K,) int64.
    learning_rate, best_ig: (K,) float64. history: one entry an epoch, values per head (None for a stopped one).
    """

    parameters: Parameters
    best: Parameters
    first_moment: Parameters
    second_moment: Parameters
    steps: Tensor
    bad_epochs: Tensor
    learning_rate: Tensor
    best_ig: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def new(cls, recipe: Recipe, bank: Bank, channels: int) -> BankState:
        seeds = [head_seed(recipe.seed, bank.backbone, fold, seed) for fold, seed in bank.members]
        parameters = bank_of_heads.new_heads(channels, recipe.sigma, seeds)
        count = len(seeds)
        return cls(
            parameters,
            {name: value.clone() for name, value in parameters.items()},
            {name: torch.zeros_like(value) for name, value in parameters.items()},
            {name: torch.zeros_like(value) for name, value in parameters.items()},
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(count, dtype=torch.int64),
            torch.full((count,), recipe.learning_rate, dtype=torch.float64),
            torch.full((count,), -math.inf, dtype=torch.float64),
        )

    def active(self, recipe: Recipe) -> Tensor:
        """Indices of the heads that still train."""
        if len(self.history) >= recipe.max_epochs:
            return torch.empty(0, dtype=torch.int64)
        return torch.nonzero(self.learning_rate > recipe.min_learning_rate)[:, 0]

    def save(self, path: Path) -> None:
        tensors = {f"{group}/{name}": t for group in _GROUPS for name, t in getattr(self, group).items()}
        tensors |= {name: getattr(self, name) for name in _VECTORS}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"history": json.dumps(self.history)}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: Path) -> BankState:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                history = json.loads(file.metadata()["history"])
        except SafetensorError as error:
            raise UserError(f"{path}: unreadable checkpoint ({error}); delete it to train its heads again") from None
        groups: dict[str, Any] = {
            group: {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{group}/")}
            for group in _GROUPS
        }
        return cls(**groups, **{name: tensors[name] for name in _VECTORS}, history=history)


_GROUPS = ("parameters", "best", "first_moment", "second_moment")
_VECTORS = ("steps", "bad_epochs", "learning_rate", "best_ig")


def head_seed(seed: int, backbone: str, fold: int, head: int) -> int:
    """A head's own seed: it starts the same in whatever bank it is trained."""
    return zlib.crc32(f"{seed}/{backbone}/{fold}/{head}".encode())


def checkpoint_path(folder: Path, bank: Bank) -> Path:
    return folder / "banks" / f"{bank.name}.safetensors"


def unfinished(recipe: Recipe, folder: Path) -> list[Bank]:
    """The recipe's banks that have epochs left to train."""

    def has_epochs_left(bank: Bank) -> bool:
        path = checkpoint_path(folder, bank)
        return not path.exists() or len(BankState.load(path).active(recipe)) > 0

    return [bank for bank in plan_banks(recipe) if has_epochs_left(bank)]


def train_epochs(
    recipe: Recipe, bank: Bank, training_set: TrainingSet, store: FeatureStore, folder: Path, device: torch.device
) -> Iterator[BankState]:
    """Trains a bank from its checkpoint in the run's folder, or from the start, to the end; yields after each epoch.

    Each epoch's checkpoint is on disk before it is yielded, so at most one epoch is ever done twice.
    """
    path = checkpoint_path(folder, bank)
    state = BankState.load(path) if path.exists() else BankState.new(recipe, bank, sum(store.channels))
    batches = Batches(training_set, store, recipe.density_cell, device)
    while len(active := state.active(recipe)):
        start = time.monotonic()
        # Parameters of the heads that still train, as a smaller bank: a stopped head costs nothing.
        parameters = {n: t.to(device) for n, t in bank_of_heads.select(state.parameters, active).items()}
        members = [bank.members[head] for head in active]
        loss = _train_epoch(recipe, parameters, members, state, active, batches)
        ig = _validate(parameters, members, batches, recipe.density_cell)
        _record(recipe, state, active, loss, ig, time.monotonic() - start)
        state.save(path)
        yield state


def _train_epoch(
    recipe: Recipe,
    parameters: Parameters,
    members: Sequence[tuple[int, int]],
    state: BankState,
    active: Tensor,
    batches: Batches,
) -> Tensor:
    """One pass over the training images; changes parameters and moments in place, returns each head's mean loss."""
    device = parameters["log_sigma"].device
    folds = torch.tensor([fold for fold, _ in members], device=device)
    optimiser = BankAdam(parameters, state, active)
    if not recipe.learn_sigma:
        parameters["log_sigma"].requires_grad_(False)
    total, count = torch.zeros(len(members), device=device), torch.zeros(len(members), device=device)
    for indices in epoch_batches(recipe, batches, len(state.history)):
        mask_KB = torch.from_numpy(batches.training_set.fold[indices]).to(device) != folds[:, None]
        images_K = mask_KB.sum(1)
        # Validation images of all the bank's heads are not even read.
        for group in batches.groups(indices[mask_KB.any(0).cpu().numpy()]):
            batch = batches.load(group)
            weight_KB = (torch.from_numpy(batches.training_set.fold[group]).to(device) != folds[:, None]).float()
            bias = batches.bias("finalizer_bias", batch.grid)[folds]
            nll_KB = -log_likelihood(parameters, batch, bias, recipe.density_cell)
            nll_K = (nll_KB * weight_KB).sum(1)
            # A sum over heads: no head's gradient reaches another's parameters.
            (nll_K / images_K.clamp_min(1)).sum().backward()
            total += nll_K.detach()
        count += images_K
        optimiser.step(images_K > 0)
    optimiser.write_back()
    return (total / count).cpu()


def epoch_batches(recipe: Recipe, batches: Batches, epoch: int) -> list[np.ndarray]:
    """The training images of all folds in random order, in batches of one shape as far as that goes.

    A function of the recipe's seed, the epoch and the data only: a head meets its images in the same order in whatever
    bank it is trained, and an epoch that is done again is the same epoch.
    """
    generator = np.random.default_rng([recipe.seed, epoch])
    full: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for group in batches.groups(np.flatnonzero(batches.training_set.fold >= 0)):
        shuffled = generator.permutation(group)
        whole = len(group) // recipe.batch_size * recipe.batch_size
        full += [shuffled[start : start + recipe.batch_size] for start in range(0, whole, recipe.batch_size)]
        rest.append(shuffled[whole:])
    mixed = generator.permutation(np.concatenate(rest))
    full += [mixed[start : start + recipe.batch_size] for start in range(0, len(mixed), recipe.batch_size)]
    return [full[index] for index in generator.permutation(len(full))]


class BankAdam:
    """Adam (Kingma, Ba 2015) with a learning rate and a step count per head, which PyTorch's own has not.

    parameters: the active heads' stacked tensors, stepped in place; state: the whole bank's, from which the active
    heads' moments are taken and to which `write_back` returns all.
    """

    def __init__(self, parameters: Parameters, state: BankState, active: Tensor) -> None:
        self.parameters, self.state, self.active = parameters, state, active
        device = parameters["log_sigma"].device
        self.first = {n: t.to(device) for n, t in bank_of_heads.select(state.first_moment, active).items()}
        self.second = {n: t.to(device) for n, t in bank_of_heads.select(state.second_moment, active).items()}
        self.steps = state.steps[active].to(device)
        self.rate = state.learning_rate[active].float().to(device)
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def step(self, on_K: Tensor) -> None:
        """One step of the heads that are on; the others, which saw no image, keep parameters and moments."""
        self.steps += on_K
        beta1, beta2 = ADAM_BETAS
        steps = self.steps.clamp_min(1).double()
        correction1, correction2 = (1 - beta1**steps).float(), (1 - beta2**steps).float()
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            per_head = (-1,) + (1,) * (parameter.dim() - 1)
            on = on_K.view(per_head)
            first, second, gradient = self.first[name], self.second[name], parameter.grad
            first.copy_(torch.where(on, first.lerp(gradient, 1 - beta1), first))
            second.copy_(torch.where(on, second.lerp(gradient.square(), 1 - beta2), second))
            denominator = (second / correction2.view(per_head)).sqrt_().add_(ADAM_EPS)
            size = (self.rate / correction1 * on_K).view(per_head)
            parameter.sub_(size * first / denominator)
            parameter.grad = None

    def write_back(self) -> None:
        for group, tensors in (
            (self.state.parameters, self.parameters),
            (self.state.first_moment, self.first),
            (self.state.second_moment, self.second),
        ):
            for name, tensor in tensors.items():
                group[name][self.active] = tensor.detach().cpu()
        self.state.steps[self.active] = self.steps.cpu()


@torch.no_grad()
def _validate(parameters: Parameters, members: Sequence[tuple[int, int]], batches: Batches, cell: float) -> Tensor:
    """(K,) float64: each head's IG over its fold's KDE, in bits per fixation, on its fold's validation images."""
    result = torch.zeros(len(members), dtype=torch.float64)
    for fold in sorted({fold for fold, _ in members}):
        heads = [head for head, member in enumerate(members) if member[0] == fold]
        of_fold = bank_of_heads.select(parameters, heads)
        total, images = torch.zeros(len(heads), dtype=torch.float64), 0
        for group in batches.groups(np.flatnonzero(batches.training_set.fold == fold)):
            for start in range(0, len(group), EVALUATION_BATCH):
                batch = batches.load(group[start : start + EVALUATION_BATCH])
                bias = batches.bias("finalizer_bias", batch.grid)[[fold] * len(heads)]
                gain_KB = log_likelihood(of_fold, batch, bias, cell) - _baseline(batches, batch, fold)
                total += gain_KB.double().sum(1).cpu()
                images += len(batch.indices)
        result[heads] = total / images / math.log(2)
    return result


def _baseline(batches: Batches, batch: Batch, fold: int) -> Tensor:
    """(B,) the fold's KDE at each image's fixations, nats per fixation; its map is normalised over the grid."""
    return batch.target_BP @ batches.bias("baseline", batch.grid)[fold].flatten() - batch.log_area_B


def _record(recipe: Recipe, state: BankState, active: Tensor, loss: Tensor, ig: Tensor, seconds: float) -> None:
    """Takes note of an epoch: history, best parameters, and the plateau rule of each head."""
    rate, sigma = state.learning_rate[active], state.parameters["log_sigma"][active].exp()
    weight = state.parameters["center_bias_weight"][active]
    if not (torch.isfinite(ig).all() and torch.isfinite(loss).all()):
        raise UserError("training: the loss is not finite; lower --learning_rate, or check the features' backbone")
    columns = {"loss": loss, "ig": ig, "learning_rate": rate, "sigma": sigma, "center_bias_weight": weight}
    entry: dict[str, Any] = {"epoch": len(state.history), "seconds": round(seconds, 3)}
    for name, values in columns.items():
        row: list[float | None] = [None] * len(state.steps)
        for head, value in zip(active.tolist(), values.tolist(), strict=True):
            row[head] = value
        entry[name] = row
    state.history.append(entry)
    better = ig > state.best_ig[active] + PLATEAU_THRESHOLD
    improved = active[better]
    state.best_ig[improved] = ig[better]
    for name, value in state.parameters.items():
        state.best[name][improved] = value[improved]
    state.bad_epochs[active] = torch.where(better, 0, state.bad_epochs[active] + 1)
    # PyTorch's ReduceLROnPlateau: the rate falls after more than `patience` epochs without a better value.
    fall = active[state.bad_epochs[active] > recipe.lr_patience]
    state.learning_rate[fall] *= recipe.lr_factor
    state.bad_epochs[fall] = 0
