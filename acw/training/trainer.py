"""The loop that trains a bank of heads on one backbone's cached features.

What it minimises is in loss.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acw.cluster.costs import peak_rss
from acw.features.joined import Store
from acw.heads import readout as bank_of_heads
from acw.heads.readout import Parameters
from acw.recipes import Recipe
from acw.storage.errors import UserError
from acw.storage.files import fetch
from acw.training.bank import Bank, BankState, Head, checkpoint_path
from acw.training.batches import Batches, TrainingSet
from acw.training.dropout import dropped
from acw.training.loss import coarsest, image_loss, log_likelihood

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
# A validation IG counts as better only beyond this many bits, as in PyTorch's plateau scheduler (absolute threshold).
PLATEAU_THRESHOLD = 1e-4
# Validation keeps no graph, so it can take more images at once than a training step.
EVALUATION_BATCH = 16


class Diverged(UserError):
    """The loss is not finite."""


def train_epochs(
    recipe: Recipe,
    bank: Bank,
    training_set: TrainingSet,
    store: Store,
    folder: Path,
    device: torch.device,
    location: Mapping[str, Any] | None = None,
) -> Iterator[BankState]:
    """Trains a bank from its checkpoint in the run's folder, or from the start, to the end; yields after each epoch.

    Each epoch's checkpoint is on disk before it is yielded, so at most one epoch is ever done twice. location: where
    that is, for the notes on each epoch, as `allocation.location_of` gives it. Where the bank does not fit into the
    GPU's memory, fewer images go through it at once, which changes the heads by rounding. Raises UserError where the
    loss is not finite (Diverged), and where not one image fits.
    """
    path = checkpoint_path(folder, bank)
    state = BankState.load(path) if fetch(path).exists() else BankState.new(recipe, bank, sum(store.channels))
    batches = Batches(training_set, store, recipe.finalizer, device)
    while len(active := state.active(recipe)):
        start = time.monotonic()
        # The heads that still train, as a smaller bank: a stopped head costs nothing.
        members = [bank.members[head] for head in active]
        adam = BankAdam(state, active, members, device)
        try:
            strides, errors = coarsest(adam.parameters(), members, batches, fresh=not state.history)
            loss, images = _train_epoch(recipe, adam, members, len(state.history), batches, strides)
            ig, validated = _validate(adam.parameters(), members, batches)
        except torch.OutOfMemoryError:  # of the GPU; the state is as it was before the epoch, which is done again
            most = max(recipe.batch_size, EVALUATION_BATCH)
            _take_fewer(batches, f"{len(members)} heads on {bank.backbone}", most)
            continue
        adam.write_back(state)
        seconds = time.monotonic() - start
        notes = {
            "seconds": round(seconds, 3),
            "time": round(time.time(), 3),
            "head_images_per_second": round((images + validated) / seconds, 1),
            "peak_rss": peak_rss(),
            **(location or {}),
        }
        _record(recipe, bank, state, active, {"loss": loss, "ig": ig, "stride": strides, "loss_error": errors}, notes)
        state.save(path)
        yield state


def train_briefly(recipe: Recipe, bank: Bank, start: Parameters, batches: Batches, strides: Tensor) -> Parameters:
    """The bank's heads, which start as they are given, after all of the recipe's epochs at its rate.

    For heads that are trained already, and so few images that validation would say nothing of when to stop. strides:
    (K,), as `coarsest` gives them. Raises Diverged where the loss is not finite.
    """
    state, every = BankState.before_training(bank, start), torch.arange(len(bank.members))
    adam = BankAdam(state, every, bank.members, batches.device)
    for epoch in range(recipe.max_epochs):
        loss, _ = _train_epoch(recipe, adam, bank.members, epoch, batches, strides)
        if not torch.isfinite(loss).all():
            raise Diverged(f"{recipe.name}: {bank.backbone}'s loss is not finite; check its weights and the images")
    adam.write_back(state)
    return state.parameters


def _take_fewer(batches: Batches, heads: str, most: int) -> None:
    """Halves the images of a pass, of which there have been `most` at first; raises UserError where it was one."""
    before = batches.at_once or most
    trouble = f"training: {heads} do not fit into the memory of {batches.device}"
    if before == 1:
        raise UserError(
            f"{trouble}; give --gpus-per-worker 1, or workers with larger GPUs, and run the command again: it goes on; "
            "or lower --heads-per-worker, with which it begins anew"
        )
    batches.at_once = before // 2
    print(f"{trouble} with up to {before} images at once; the epoch begins again with {batches.at_once}", flush=True)


def _train_epoch(
    recipe: Recipe, adam: BankAdam, members: Sequence[Head], epoch: int, batches: Batches, strides: Tensor
) -> tuple[Tensor, int]:
    """One pass over the training images; steps Adam, returns each head's mean loss and how many (head, image) pairs."""
    device = batches.device
    folds = torch.tensor([head.fold for head in members])
    fold_of = batches.training_set.fold
    total, count = torch.zeros(len(members), device=device), torch.zeros(len(members), dtype=torch.int64)
    # Images of one fold at a time: all heads but that fold's own take part, whole, and those cost nothing.
    numbered = enumerate(epoch_batches(recipe, batches, epoch))
    steps = [(step, torch.nonzero(folds != int(fold_of[i[0]]))[:, 0], i) for step, i in numbered]
    steps = [(step, on, images) for step, on, images in steps if len(on)]
    parts = [batches.passes(images, recipe.batch_size) for _, _, images in steps]
    reader = batches.ahead(part for of_step in parts for part in of_step)
    for (step, on, images), of_step in zip(steps, parts, strict=True):
        flat_KP = adam.flat.index_select(0, on.to(device)).requires_grad_(True)
        for _ in of_step:
            parameters = bank_of_heads.unflatten(flat_KP, adam.like)
            parameters = dropped(parameters, [members[head] for head in on.tolist()], recipe.seed, epoch, step)
            loss_KB = image_loss(log_likelihood(parameters, folds[on], next(reader), batches, strides[on]))
            # A sum over heads: no head's gradient reaches another's parameters. Of each pass by itself, lest what one
            # keeps for its gradient be in memory during the next.
            (loss_KB.sum() / len(images)).backward()
            total[on.to(device)] += loss_KB.detach().sum(1)
        adam.step(on, flat_KP)
        count[on] += len(images)
    return total.cpu() / count, int(count.sum())


def epoch_batches(recipe: Recipe, batches: Batches, epoch: int) -> list[np.ndarray]:
    """The training images of all folds in random order, in batches of one fold and, as far as that goes, one shape.

    A function of the recipe's seed, the epoch and the data only: a head meets its images in the same order in whatever
    bank it is trained, and an epoch that is done again is the same epoch.
    """
    generator = np.random.default_rng([recipe.seed, epoch])
    size = recipe.batch_size
    result: list[np.ndarray] = []
    for fold in range(recipe.folds):
        rest: list[np.ndarray] = []
        for group in batches.groups(np.flatnonzero(batches.training_set.fold == fold)):
            shuffled = generator.permutation(group)
            whole = len(group) // size * size
            result += [shuffled[start : start + size] for start in range(0, whole, size)]
            rest.append(shuffled[whole:])
        mixed = generator.permutation(np.concatenate(rest))
        # Of one shape together: each shape in a batch costs a pass of its own.
        mixed = np.concatenate([mixed[:0], *batches.groups(mixed)])
        result += [mixed[start : start + size] for start in range(0, len(mixed), size)]
    return [result[index] for index in generator.permutation(len(result))]


class BankAdam:
    """Adam (Kingma, Ba 2015) with decoupled weight decay (Loshchilov, Hutter 2019), rate and step count per head.

    It works on rows of one matrix (K, P) of all parameters of the active heads: a handful of operations a step, where
    PyTorch's own has one learning rate and would step heads that saw no image. `like` gives the parameters' shapes.
    """

    def __init__(self, state: BankState, active: Tensor, members: Sequence[Head], device: torch.device) -> None:
        self.active, self.like = active, state.parameters
        self.flat, self.first, self.second = (
            bank_of_heads.flatten(bank_of_heads.select(group, active)).to(device)
            for group in (state.parameters, state.first_moment, state.second_moment)
        )
        self.steps = state.steps[active].clone()
        self.rate = state.learning_rate[active]
        ones = {name: torch.ones_like(value[:1]) for name, value in self.like.items()}
        decays = {name: value * (name.startswith("conv") and name.endswith("weight")) for name, value in ones.items()}
        self._decays = bank_of_heads.flatten(decays)[0].to(device)
        self._decay = torch.tensor([head.weight_decay for head in members], dtype=torch.float64)
        self._learns = bank_of_heads.flatten(ones).repeat(len(members), 1).to(device)
        fixed = torch.tensor([not head.learn_sigma for head in members])
        bank_of_heads.unflatten(self._learns, self.like)["log_sigma"][fixed.to(device)] = 0
        self._all_learn = not bool(fixed.any())
        self._any_decay = bool(self._decay.any())

    def parameters(self) -> Parameters:
        return bank_of_heads.unflatten(self.flat, self.like)

    @torch.no_grad()
    def step(self, on: Tensor, flat_KP: Tensor) -> None:
        """One step of the heads `on` (indices), whose parameters `flat_KP` have a gradient."""
        device = self.flat.device
        gradient = flat_KP.grad
        assert gradient is not None
        if not self._all_learn:
            gradient = gradient * self._learns[on.to(device)]
        self.steps[on] += 1
        beta1, beta2 = ADAM_BETAS
        correction1, correction2 = 1 - beta1 ** self.steps[on].double(), 1 - beta2 ** self.steps[on].double()
        # m / c1 / (sqrt(v / c2) + eps), with the corrections moved onto what is one number a head.
        root2 = correction2.sqrt()
        size_K1 = (self.rate[on] * root2 / correction1).float().to(device)[:, None]
        epsilon_K1 = (ADAM_EPS * root2).float().to(device)[:, None]
        decay_K1 = (self.rate[on] * self._decay[on]).float().to(device)[:, None]
        # In place, on heads that lie side by side: a batch leaves out those of one fold, and copies of the others' rows
        # took longer than Adam.
        ends = [0, *(torch.nonzero(on.diff() > 1)[:, 0] + 1).tolist(), len(on)]
        for start, end in itertools.pairwise(ends):
            rows, mine = slice(int(on[start]), int(on[end - 1]) + 1), slice(start, end)
            first = self.first[rows].lerp_(gradient[mine], 1 - beta1)
            second = self.second[rows].mul_(beta2).addcmul_(gradient[mine], gradient[mine], value=1 - beta2)
            change = second.sqrt().add_(epsilon_K1[mine])
            torch.div(first, change, out=change)
            if self._any_decay:
                self.flat[rows].sub_(decay_K1[mine] * self._decays * self.flat[rows])
            self.flat[rows].sub_(change.mul_(size_K1[mine]))

    def write_back(self, state: BankState) -> None:
        """Puts the active heads' parameters and moments into the whole bank's state."""
        for group, flat in (
            (state.parameters, self.flat),
            (state.first_moment, self.first),
            (state.second_moment, self.second),
        ):
            for name, tensor in bank_of_heads.unflatten(flat.cpu(), self.like).items():
                group[name][self.active] = tensor
        state.steps[self.active] = self.steps


@torch.no_grad()
def _validate(parameters: Parameters, members: Sequence[Head], batches: Batches) -> tuple[Tensor, int]:
    """(K,) float64 each head's IG over its fold's KDE, in bits per fixation, on its fold's validation images; pairs."""
    result, pairs = torch.zeros(len(members), dtype=torch.float64), 0
    for fold in sorted({head.fold for head in members}):
        mine = [k for k, head in enumerate(members) if head.fold == fold]
        of_fold, folds = bank_of_heads.select(parameters, mine), torch.full((len(mine),), fold)
        images = np.flatnonzero(batches.training_set.fold == fold)
        total = torch.zeros(len(mine), dtype=torch.float64)
        for batch in batches.ahead(batches.passes(images, EVALUATION_BATCH)):
            baseline_B = batches.at_fixations("baseline", batch)[fold] - batch.log_area_B
            gain_KB = log_likelihood(of_fold, folds, batch, batches) - baseline_B
            total += gain_KB.double().sum(1).cpu()
        result[mine] = total / len(images) / math.log(2)
        pairs += len(mine) * len(images)
    return result, pairs


def _record(
    recipe: Recipe, bank: Bank, state: BankState, active: Tensor, measured: dict[str, Tensor], notes: dict[str, Any]
) -> None:
    """Takes note of an epoch: history, best parameters, and the plateau rule of each head.

    A head whose loss is not finite stops and keeps its best parameters, where others of the bank are trained otherwise;
    where all are trained alike, raises Diverged.
    """
    ig = measured["ig"]
    lost = ~(torch.isfinite(ig) & torch.isfinite(measured["loss"]))
    if lost.any() and len({dataclasses.replace(head, fold=0, seed=0) for head in bank.members}) == 1:
        raise Diverged("training: the loss is not finite; lower --learning-rate, or check the features' backbone")
    columns = measured | {
        "learning_rate": state.learning_rate[active],
        "sigma": state.parameters["log_sigma"][active].exp(),
        "center_bias_weight": state.parameters["center_bias_weight"][active],
    }
    entry: dict[str, Any] = {"epoch": len(state.history), **notes}
    for name, values in columns.items():
        row: list[float | None] = [None] * len(state.steps)
        for head, value in zip(active[~lost].tolist(), values[~lost].tolist(), strict=True):
            row[head] = value
        entry[name] = row
    state.history.append(entry)
    state.learning_rate[active[lost]] = 0
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
