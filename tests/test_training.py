"""Training: each head as if alone under PyTorch's own optimiser and scheduler, no leak, and exact resumption."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_training import BANK, CPU, MEMBERS, RECIPE, make_store, make_training_set

from acw.features import tensors
from acw.features.store import FeatureStore
from acw.heads import finalizer, readout
from acw.heads.finalizer import Finalizer
from acw.recipes import Recipe
from acw.storage.errors import UserError
from acw.training import trainer
from acw.training.bank import Bank, BankState, Head, checkpoint_path, plan_banks, unfinished
from acw.training.batches import Batches, TrainingSet
from acw.training.loss import LOSS_TOLERANCE, coarsest, log_likelihood
from acw.training.trainer import BankAdam, train_epochs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def training_set() -> TrainingSet:
    return make_training_set()


def train(
    folder: Path, training_set: TrainingSet, store: FeatureStore, bank: Bank = BANK, recipe: Recipe = RECIPE
) -> BankState:
    for _ in train_epochs(recipe, bank, training_set, store, folder, CPU):
        pass
    return BankState.load(checkpoint_path(folder, bank))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, training_set: TrainingSet, store: FeatureStore) -> BankState:
    return train(tmp_path_factory.mktemp("run"), training_set, store)


def tensors_of(state: BankState) -> dict[str, torch.Tensor]:
    groups = ("parameters", "best", "first_moment", "second_moment")
    result = {f"{group}/{name}": value for group in groups for name, value in getattr(state, group).items()}
    return result | {name: getattr(state, name) for name in ("steps", "bad_epochs", "learning_rate", "best_ig")}


# What differs between two equal trainings.
MEASURED = ("time", "seconds", "head_images_per_second", "peak_rss")


def history_of(state: BankState) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in MEASURED} for entry in state.history]


def test_each_head_steps_as_pytorchs_adam_does() -> None:
    """Rates and weight decays of their own; one head sees no image in some steps, as if it had not been called."""
    members = [dataclasses.replace(head, weight_decay=0.1 * (k % 3)) for k, head in enumerate(MEMBERS)]
    state = BankState.new(RECIPE, BANK, 3)
    state.learning_rate[:] = torch.logspace(-1, -5, len(MEMBERS), dtype=torch.float64)
    before = {name: value.clone() for name, value in state.parameters.items()}
    active = torch.tensor([1, 2, 7, 14])
    on = torch.rand(25, len(active), generator=torch.Generator().manual_seed(0)) < 0.7
    on[0] = torch.tensor([True, False, True, True])
    shapes = {name: value[active].shape for name, value in state.parameters.items()}
    generator = torch.Generator().manual_seed(1)
    # Of very different sizes, so that the epsilon matters for some.
    gradients = [
        {name: torch.randn(shape, generator=generator) * 10 ** -(step % 9) for name, shape in shapes.items()}
        for step in range(len(on))
    ]

    def run(first: int, last: int) -> None:
        optimiser = BankAdam(state, active, [members[head] for head in active], CPU)
        for step in range(first, last):
            rows = torch.nonzero(on[step])[:, 0]
            flat = optimiser.flat[rows].requires_grad_(True)
            flat.grad = readout.flatten(gradients[step])[rows]
            optimiser.step(rows, flat)
        optimiser.write_back(state)

    run(0, 10)
    run(10, 25)  # a second epoch, from what the first has left in the state
    for position, head in enumerate(active.tolist()):
        plain = {name: value[head].clone().requires_grad_(True) for name, value in before.items()}
        decayed = [value for name, value in plain.items() if name.startswith("conv") and name.endswith("weight")]
        others = [value for name, value in plain.items() if not (name.startswith("conv") and name.endswith("weight"))]
        groups = [{"params": decayed, "weight_decay": members[head].weight_decay}, {"params": others}]
        adam = torch.optim.AdamW(groups, lr=float(state.learning_rate[head]), weight_decay=0)
        for step in range(len(on)):
            if on[step, position]:
                for name, parameter in plain.items():
                    parameter.grad = gradients[step][name][position].clone()
                adam.step()
        for name, parameter in plain.items():
            step_size = float(state.learning_rate[head])
            difference = (state.parameters[name][head] - parameter).abs().max()
            assert difference <= 1e-4 * step_size + 2e-6, (head, name)
        assert state.steps[head] == on[:, position].sum()
    untouched = [head for head in range(len(MEMBERS)) if head not in active]
    assert all(value[untouched].equal(before[name][untouched]) for name, value in state.parameters.items())


def test_the_rate_falls_as_pytorchs_plateau_scheduler_does() -> None:
    recipe = dataclasses.replace(
        RECIPE, lr_patience=2, lr_factor=0.3, learning_rate=1e-2, min_learning_rate=1e-4, max_epochs=1000
    )
    state = BankState.new(recipe, BANK, 3)
    plain = [torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate) for _ in MEMBERS]
    schedulers = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(
            one, mode="max", factor=0.3, patience=2, threshold=1e-4, threshold_mode="abs"
        )
        for one in plain
    ]
    generator = np.random.default_rng(0)
    best_epoch = [0] * len(MEMBERS)
    stopped_at = []
    for epoch in range(200):
        active = state.active(recipe)
        expected = [k for k, one in enumerate(plain) if one.param_groups[0]["lr"] > recipe.min_learning_rate]
        assert active.tolist() == expected
        stopped_at.append(len(MEMBERS) - len(active))
        if not len(active):
            break
        # A climb in steps that are now above, now below the threshold, differently steep for each head.
        ig = np.log1p(epoch * np.arange(1, 16) / 20) + generator.choice([0, 5e-5, 1e-3, -0.1, -0.2], len(MEMBERS))
        for value in state.parameters.values():
            value[:] = epoch
        measured = {"loss": torch.zeros(len(active)), "ig": torch.from_numpy(ig)[active]}
        trainer._record(recipe, BANK, state, active, measured, {})
        for head in expected:
            before = schedulers[head].best
            schedulers[head].step(float(ig[head]))
            if schedulers[head].best != before:
                best_epoch[head] = epoch
    assert len(set(stopped_at)) > 3, "the heads should stop at different epochs"
    assert stopped_at[-1] == len(MEMBERS)
    for head in range(len(MEMBERS)):
        kept = {float(value[head].flatten()[0]) for value in state.best.values()}
        assert kept == {float(best_epoch[head])}, head
        assert float(state.best_ig[head]) == schedulers[head].best


def test_a_target_map_reads_the_upsampled_map_at_the_fixated_pixels() -> None:
    generator = np.random.default_rng(0)
    for grid, size in (((7, 11), (50, 83)), ((1, 5), (8, 33)), ((30, 2), (60, 9)), ((3, 4), (3, 4))):
        y, x = (generator.random(40) * length for length in size)
        y[:2], x[1:3] = [0, size[0] - 1e-3], [0, size[1] - 1e-3]
        values = torch.from_numpy(generator.normal(size=grid)).float()
        full = finalizer.upsample(values, size)
        offset = full - finalizer.spline_matrix(grid[0], size[0]) @ values @ finalizer.spline_matrix(grid[1], size[1]).T
        weights = Finalizer().target_map(x, y, size, grid)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
        expected = full[y.astype(int), x.astype(int)].mean() - offset.mean()
        assert float((weights * values).sum()) == pytest.approx(float(expected), abs=1e-5)


def test_the_loss_is_that_of_the_full_density(training_set: TrainingSet, store: FeatureStore) -> None:
    """But for what the grid cannot resolve, which must vanish with its cell: any other mistake would stay."""
    bank = readout.new_heads(12, 24.0, [1, 2])
    bank["conv5.weight"] *= 6
    folds = torch.tensor([0, 1])
    worst = {}
    for cell, stride in ((8.0, 3), (8.0, 1), (4.0, 3), (4.0, 1), (2.0, 1)):
        how = Finalizer(cell=cell)
        batches = Batches(training_set, store, how, CPU)
        differences = []
        for group in batches.groups([0, 1, 2, 3]):
            batch = batches.load(group)
            bias = batches.bias("finalizer_bias", batch.grid)[folds]
            actual = log_likelihood(bank, folds, batch, batches, stride)
            coarse = finalizer.normalise(finalizer.finalize(bank, readout.readout(bank, batch.features), bias, how))
            assert float(coarse.amax() - coarse.amin()) > 5
            for position, index in enumerate(group):
                mine = training_set.image == index
                full = finalizer.upsample(coarse[:, position], training_set.sizes[index])
                at_pixels = full[:, training_set.y[mine].astype(int), training_set.x[mine].astype(int)]
                differences.append((actual[:, position] - at_pixels.mean(1)).abs().max().item())
        worst[cell, stride] = max(differences)
    assert worst[8.0, 1] < 4e-3
    assert worst[4.0, 1] < min(worst[8.0, 1] / 2, 3e-4)
    assert worst[2.0, 1] < 1e-4
    assert worst[8.0, 1] < worst[8.0, 3] < 0.2, "a coarser sum is a worse one"
    assert worst[4.0, 3] < worst[8.0, 3]


def test_the_coarsest_sum_within_the_tolerance_is_taken(training_set: TrainingSet, store: FeatureStore) -> None:
    batches = Batches(training_set, store, Finalizer(cell=2.0), CPU)
    members = (MEMBERS[2], MEMBERS[3])
    folds = torch.tensor([head.fold for head in members])
    # A smooth head and a sharp one, each with its own stride in the same bank.
    bank = readout.new_heads(12, 1.0, [1, 2])
    bank["log_sigma"] = torch.tensor([60.0, 5.0]).log()
    bank["center_bias_weight"] *= torch.tensor([0.1, 1.0])
    bank["conv5.weight"] *= torch.tensor([0.1, 12.0])[:, None, None]
    strides, errors = coarsest(bank, members, batches, fresh=False)
    assert strides[1] < strides[0] == 12
    assert (errors < LOSS_TOLERANCE).all()
    everything = [batches.load(group) for group in batches.groups(np.flatnonzero(training_set.fold >= 0))]
    taken, exact, coarse = (
        torch.cat([log_likelihood(bank, folds, batch, batches, s) for batch in everything], 1).mean(1)
        for s in (strides, 0.5, 16.0)
    )
    for head, stride in enumerate(strides.tolist()):
        alone = torch.cat([log_likelihood(bank, folds, b, batches, stride) for b in everything], 1).mean(1)
        assert float(taken[head]) == pytest.approx(float(alone[head]), abs=1e-5), "as if all heads had its stride"
    # Measured on some of the images.
    assert (taken - exact).abs().max() < 2 * LOSS_TOLERANCE
    assert (coarse - exact).abs()[1] > LOSS_TOLERANCE
    assert coarsest(bank, members, batches, fresh=True)[0].tolist() == [4, 4]


def test_an_epoch_has_each_development_image_once(training_set: TrainingSet, store: FeatureStore) -> None:
    batches = Batches(training_set, store, RECIPE.finalizer, CPU)
    epochs = [trainer.epoch_batches(RECIPE, batches, epoch) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == np.flatnonzero(training_set.fold >= 0).tolist()
        assert {len(indices) for indices in epoch} <= set(range(1, RECIPE.batch_size + 1))
        assert all(len(set(training_set.fold[indices])) == 1 for indices in epoch)
        assert len(epoch) == sum(-(-(training_set.fold == f).sum() // RECIPE.batch_size) for f in range(RECIPE.folds))
        for fold in range(RECIPE.folds):
            own = [batches.groups(indices) for indices in epoch if training_set.fold[indices[0]] == fold]
            shapes = len(batches.groups(np.flatnonzero(training_set.fold == fold)))
            assert sum(map(len, own)) < len(own) + shapes, "a shape is spread over no more batches than it must"
    first, second = ([indices.tolist() for indices in epoch] for epoch in epochs)
    assert first != second
    assert [indices.tolist() for indices in trainer.epoch_batches(RECIPE, batches, 0)] == first
    alone = trainer.epoch_batches(dataclasses.replace(RECIPE, batch_size=1), batches, 0)
    assert sorted(np.concatenate(alone)) == sorted(np.concatenate(epochs[0])), "also where no image is left over"
    other_seed = dataclasses.replace(RECIPE, seed=1)
    assert [indices.tolist() for indices in trainer.epoch_batches(other_seed, batches, 0)] != first


def test_heads_in_one_bank_end_as_each_head_alone(
    tmp_path: Path, training_set: TrainingSet, store: FeatureStore, trained: BankState
) -> None:
    together = tensors_of(trained)
    for k, member in enumerate(MEMBERS):
        alone = train(tmp_path, training_set, store, Bank("stub", (member,)))
        for name, value in tensors_of(alone).items():
            torch.testing.assert_close(value[0], together[name][k], rtol=1e-3, atol=1e-4, msg=f"{member} {name}")
        assert [entry["ig"][0] for entry in alone.history] == pytest.approx(
            [entry["ig"][k] for entry in trained.history], abs=1e-3
        )


def test_an_epoch_is_a_plain_loop_over_the_folds_training_images(
    tmp_path: Path, training_set: TrainingSet, store: FeatureStore
) -> None:
    """One image after the other, the mean of a batch's losses, and PyTorch's Adam."""
    recipe = dataclasses.replace(RECIPE, max_epochs=1)
    members = (Head.of(recipe, 1, 0), Head.of(recipe, 3, 2))
    state = train(tmp_path, training_set, store, Bank("stub", members), recipe)
    start = BankState.new(recipe, Bank("stub", members), 12)
    batches = Batches(training_set, store, recipe.finalizer, CPU)
    for k, fold in enumerate((1, 3)):
        head = {name: value.requires_grad_(True) for name, value in readout.select(start.parameters, [k]).items()}
        adam = torch.optim.Adam(head.values(), lr=recipe.learning_rate)
        losses = []
        for indices in trainer.epoch_batches(recipe, batches, 0):
            own = [index for index in indices if training_set.fold[index] not in (-1, fold)]
            for index in own:
                batch = batches.load(np.array([index]))
                loss = -log_likelihood(head, torch.tensor([fold]), batch, batches)[0, 0]
                (loss / len(own)).backward()
                losses.append(loss.item())
            if own:
                adam.step()
                adam.zero_grad()
        for name, value in head.items():
            torch.testing.assert_close(state.parameters[name][k], value[0], rtol=1e-3, atol=1e-4, msg=f"{fold} {name}")
        assert state.history[0]["loss"][k] == pytest.approx(np.mean(losses), abs=1e-3)
        gains = []
        for index in np.flatnonzero(training_set.fold == fold):
            batch = batches.load(np.array([index]))
            kde = training_set.baseline[fold].of_size(batch.grid) - batch.log_area_B.item()
            mean_log_p = log_likelihood(head, torch.tensor([fold]), batch, batches)[0, 0].item()
            gains.append(mean_log_p - float((kde * batch.target_BHW[0].numpy()).sum()))
        assert state.history[0]["ig"][k] == pytest.approx(np.mean(gains) / np.log(2), abs=1e-3)


def test_training_learns(trained: BankState) -> None:
    first, last = (np.array(trained.history[epoch]["loss"]) for epoch in (0, -1))
    assert (last < first).all()


Interruption = Callable[[pytest.MonkeyPatch, int], None]


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def before_the_rename(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    real, calls = safetensors.torch.save_file, []

    def save(tensors: dict, path: Path, metadata: dict) -> None:
        real(tensors, path, metadata)
        calls.append(path)
        if len(calls) == epoch:
            raise Killed

    monkeypatch.setattr(safetensors.torch, "save_file", save)


def after_the_rename(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    real = BankState.save

    def save(state: BankState, path: Path) -> None:
        real(state, path)
        if len(state.history) == epoch:
            raise Killed

    monkeypatch.setattr(BankState, "save", save)


def in_mid_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    real, calls = BankAdam.step, []

    def step(self: BankAdam, on: torch.Tensor, flat_KP: torch.Tensor) -> None:
        real(self, on, flat_KP)
        calls.append(on)
        if len(calls) == 8 * (epoch - 1) + 3:
            raise Killed

    monkeypatch.setattr(BankAdam, "step", step)


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("interrupt", [before_the_rename, after_the_rename, in_mid_epoch])
def test_an_interrupted_bank_ends_as_an_uninterrupted_one(
    tmp_path: Path,
    training_set: TrainingSet,
    store: FeatureStore,
    trained: BankState,
    interrupt: Interruption,
    epoch: int,
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt(monkeypatch, epoch)
        with pytest.raises(Killed):
            train(tmp_path, training_set, store)
    resumed = train(tmp_path, training_set, store)
    for name, value in tensors_of(resumed).items():
        assert value.equal(tensors_of(trained)[name]), name
    assert history_of(resumed) == history_of(trained)
    assert [path.name for path in (tmp_path / "banks").iterdir()] == [f"{BANK.name}.safetensors"]


def test_a_damaged_checkpoint_is_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = dataclasses.replace(RECIPE, backbones=("lite0",), heads_per_worker=2)
    banks = plan_banks(recipe)
    for bank in banks:
        state = BankState.new(recipe, bank, 4)
        state.learning_rate[:] = recipe.min_learning_rate
        state.save(checkpoint_path(tmp_path, bank))
    assert unfinished(recipe, tmp_path) == []
    assert not capsys.readouterr().out
    path = checkpoint_path(tmp_path, banks[0])
    os.truncate(path, path.stat().st_size // 2)
    assert unfinished(recipe, tmp_path) == [banks[0]]
    assert capsys.readouterr().out.startswith(f"{path}: the checkpoint is damaged; deleted")
    assert not path.exists()


def test_heads_that_are_trained_on_begin_where_they_were_best(
    tmp_path: Path, training_set: TrainingSet, store: FeatureStore, trained: BankState
) -> None:
    trained.further(BANK).save(checkpoint_path(tmp_path, BANK))
    assert BankState.load(checkpoint_path(tmp_path, BANK)).parameters.keys() == trained.best.keys()
    state = next(train_epochs(RECIPE, BANK, training_set, store, tmp_path, CPU))
    assert len(state.history) == 1
    assert (np.array(state.history[0]["loss"]) < trained.history[0]["loss"]).all(), "not from the start"


def moved(training_set: TrainingSet, fold: int) -> TrainingSet:
    """Other fixations on the images of a fold, or on the held-out ones (-1)."""
    theirs = training_set.fold[training_set.image] == fold
    x, y = training_set.x.copy(), training_set.y.copy()
    x[theirs], y[theirs] = x[theirs] * 0.3, y[theirs] * 0.2
    return dataclasses.replace(training_set, x=x, y=y)


def test_held_out_images_are_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training_set: TrainingSet, store: FeatureStore, trained: BankState
) -> None:
    real = FeatureStore.load
    seen: set[int] = set()

    def load(self: FeatureStore, indices: Any, device: Any = "cpu") -> tensors.Features:
        seen.update(int(index) for index in indices)
        return real(self, indices, device)

    monkeypatch.setattr(FeatureStore, "load", load)
    state = train(tmp_path, moved(training_set, -1), store)
    assert seen == set(np.flatnonzero(training_set.fold >= 0).tolist())
    assert all(value.equal(tensors_of(trained)[name]) for name, value in tensors_of(state).items())


def test_validation_images_do_not_train_their_folds_heads(
    tmp_path: Path, training_set: TrainingSet, store: FeatureStore, trained: BankState
) -> None:
    state = train(tmp_path, moved(training_set, 2), store)
    for name, value in state.parameters.items():
        for k, head in enumerate(MEMBERS):
            # But for rounding, which is in the hands of tensors as wide as the neediest head of the bank wants them.
            same = torch.allclose(value[k], trained.parameters[name][k], rtol=1e-4, atol=1e-5)
            assert same == (head.fold == 2), (name, head.fold)
    # What the fold's heads are chosen on has changed, of course.
    assert all(
        state.history[0]["ig"][k] != trained.history[0]["ig"][k] for k in range(len(MEMBERS)) if MEMBERS[k].fold == 2
    )


def test_a_fixed_sigma_stays_where_it_is(tmp_path: Path, training_set: TrainingSet, store: FeatureStore) -> None:
    recipe = dataclasses.replace(RECIPE, learn_sigma=False, max_epochs=1, sigma=21.0)
    state = train(tmp_path, training_set, store, Bank("stub", tuple(Head.of(recipe, 0, s) for s in (0, 1))), recipe)
    assert state.parameters["log_sigma"].exp().tolist() == pytest.approx([21.0, 21.0])
    assert not state.parameters["center_bias_weight"].equal(torch.ones(2))


@pytest.mark.parametrize("size", [1, 4, 15])
def test_banks_hold_every_head_once(size: int) -> None:
    banks = plan_banks(dataclasses.replace(RECIPE, heads_per_worker=size))
    every = [(bank.backbone, member) for bank in banks for member in bank.members]
    assert len(every) == len(set(every)) == 60
    assert set(every) == {(name, member) for name in RECIPE.backbones for member in MEMBERS}
    assert max(len(bank.members) for bank in banks) == size
    assert len({bank.name for bank in banks}) == len(banks)


def test_heads_with_hyperparameters_of_their_own_end_as_under_recipes_of_their_own(
    tmp_path: Path, training_set: TrainingSet, store: FeatureStore
) -> None:
    """A population in one bank: each configuration as if it had been a run."""
    changes: list[dict[str, Any]] = [
        {"learning_rate": 1e-3},
        {"sigma": 40.0, "learn_sigma": False},
        {"weight_decay": 0.3, "initial_scale": 0.2},
        {"dropout": 0.5},
    ]
    recipes = [dataclasses.replace(RECIPE, **change) for change in changes]
    population = Bank("stub", tuple(Head.of(recipe, 1, 0) for recipe in recipes))
    together = tensors_of(train(tmp_path / "population", training_set, store, population))
    for k, recipe in enumerate(recipes):
        alone = tensors_of(
            train(tmp_path / str(k), training_set, store, Bank("stub", (Head.of(recipe, 1, 0),)), recipe)
        )
        for name, value in alone.items():
            torch.testing.assert_close(value[0], together[name][k], rtol=1e-3, atol=1e-4, msg=f"{changes[k]} {name}")
    assert together["parameters/log_sigma"][1].exp() == pytest.approx(40)


def test_a_diverged_configuration_ends_alone(tmp_path: Path, training_set: TrainingSet, store: FeatureStore) -> None:
    wild = dataclasses.replace(RECIPE, learning_rate=1e30)
    population = Bank("stub", (Head.of(RECIPE, 1, 0), Head.of(wild, 1, 0)))
    state = train(tmp_path / "population", training_set, store, population)
    sane = train(tmp_path / "sane", training_set, store, Bank("stub", population.members[:1]))
    assert state.history[-1]["ig"] == [pytest.approx(sane.history[-1]["ig"][0], abs=1e-4), None]
    assert float(state.learning_rate[1]) == 0
    with pytest.raises(UserError, match="lower --learning-rate"):
        train(tmp_path / "wild", training_set, store, Bank("stub", population.members[1:]), wild)
