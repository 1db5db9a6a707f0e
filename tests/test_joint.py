"""Joint training: the loss is the mixture's, the weights learn at their own rate, and an interrupted one goes on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import CPU, RECIPE, make_store, make_training_set

from acw.heads import readout
from acw.heads.ensemble import ensemble
from acw.recipes import Recipe
from acw.storage.errors import UserError
from acw.training import joint
from acw.training.joint import LOGITS, JointSet, SystemState, train_system

SEEDS = 2
NAMES = ("lite0", "lite1")
JOINT = dataclasses.replace(
    RECIPE,
    backbones=NAMES,
    seeds=SEEDS,
    joint=True,
    joint_max_epochs=3,
    joint_learning_rate=3e-3,
    joint_patience=0,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> JointSet:
    store, training = make_store(tmp_path_factory.mktemp("store")), make_training_set()
    category = np.arange(len(training.sizes)) % 3
    return JointSet(training, category, 3, dict.fromkeys(NAMES, store))


def start() -> dict[str, readout.Parameters]:
    banks = {name: readout.new_heads(12, 24.0, range(10 * k, 10 * k + SEEDS)) for k, name in enumerate(NAMES)}
    for bank in banks.values():
        bank["conv5.weight"] *= 6
    return banks


def run(recipe: Recipe, data: JointSet, folder: Path, epochs: int | None = None) -> SystemState:
    """A system of fold 1, trained to the end or for some epochs."""
    for epoch, _ in enumerate(train_system(recipe, 1, data, start(), folder, CPU), 1):
        if epoch == epochs:
            break
    return SystemState.load(joint.system_path(folder, 1))


@pytest.fixture(scope="module")
def trained(data: JointSet, tmp_path_factory: pytest.TempPathFactory) -> SystemState:
    return run(JOINT, data, tmp_path_factory.mktemp("whole"))


def test_the_loss_is_that_of_the_mixture(data: JointSet) -> None:
    """Of the densities that prediction makes of the same heads, category by category."""
    parameters = SystemState.new(JOINT, start(), 3).parameters
    parameters[LOGITS] = torch.tensor([[0.0, 2.0], [-1.0, 1.0], [3.0, 0.0]])
    batches = joint._Batches(JOINT, 1, data, CPU)
    training = data.training
    for group in batches.groups(np.arange(6)):
        batch = batches.load(group)
        actual = joint.mixture_log_likelihood(parameters, batch, batches)
        for position, index in enumerate(group):
            densities = torch.stack(
                [
                    ensemble(bank, data.stores[name].load([index]), batch.bias_HW, JOINT.finalizer)[0]
                    for name, bank in start().items()
                ]
            )
            weights = parameters[LOGITS][data.category[index]].log_softmax(0)
            mine = training.image == index
            x, y, size = training.x[mine], training.y[mine], training.sizes[index]
            at_fixations = np.stack([JOINT.finalizer.at_pixels(one, x, y, size) for one in densities])
            expected = np.logaddexp.reduce(at_fixations + weights.numpy()[:, None]).mean()
            assert float(actual[position]) == pytest.approx(expected, abs=1e-4)


def test_an_epoch_is_pytorchs_adam_on_that_loss_in_two_groups(data: JointSet, tmp_path: Path) -> None:
    state = run(dataclasses.replace(JOINT, joint_max_epochs=1), data, tmp_path)
    fresh = SystemState.new(JOINT, start(), 3)
    parameters = {name: value.requires_grad_(True) for name, value in fresh.parameters.items()}
    batches = joint._Batches(JOINT, 1, data, CPU)
    others = [value for name, value in parameters.items() if name != LOGITS]
    rate = JOINT.joint_learning_rate
    adam = torch.optim.Adam([{"params": others}, {"params": [parameters[LOGITS]], "lr": 10 * rate}], lr=rate)
    images = np.random.default_rng([JOINT.seed, 1, 0]).permutation(batches.training)
    for first in range(0, len(images), JOINT.batch_size):
        step = images[first : first + JOINT.batch_size]
        losses = [-joint.mixture_log_likelihood(parameters, batches.load(np.array([i])), batches)[0] for i in step]
        torch.stack(losses).mean().backward()
        adam.step()
        adam.zero_grad()
    for name, value in parameters.items():
        torch.testing.assert_close(state.parameters[name], value.detach(), rtol=1e-3, atol=2e-4, msg=name)
    assert set(batches.training).isdisjoint(batches.validation)
    assert set(np.flatnonzero(data.training.fold < 0)).isdisjoint([*batches.training, *batches.validation])


def test_it_climbs_and_keeps_the_best(trained: SystemState, data: JointSet) -> None:
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    batches = joint._Batches(JOINT, 1, data, CPU)
    assert joint._validate(trained.best, batches) == pytest.approx(trained.best_ig, abs=1e-6)
    assert trained.best_ig >= max(entry["ig"] for entry in trained.history) - joint.PLATEAU_THRESHOLD
    assert np.abs(trained.weights() - 0.5).max() > 1e-3
    history = joint.weights_history([trained, SystemState.new(JOINT, start(), 3)])
    assert history.shape == (4, 3, 2)
    np.testing.assert_allclose(history[0], 0.5)
    np.testing.assert_allclose(history.sum(2), 1)
    np.testing.assert_allclose(history[3], (np.array(trained.history[2]["weights"]) + 0.5) / 2)


def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    trained: SystemState, data: JointSet, tmp_path: Path
) -> None:
    run(JOINT, data, tmp_path, epochs=1)
    assert joint.unfinished_systems(JOINT, tmp_path) == list(range(JOINT.folds))
    with pytest.raises(UserError, match=r"fold0.*joint training has not finished"):
        joint.trained_systems(JOINT, tmp_path)
    resumed = run(JOINT, data, tmp_path)
    for group in ("parameters", "best", "first", "second"):
        for name, value in getattr(trained, group).items():
            torch.testing.assert_close(getattr(resumed, group)[name], value, rtol=0, atol=1e-6, msg=f"{group} {name}")
    assert [entry["ig"] for entry in resumed.history] == pytest.approx([entry["ig"] for entry in trained.history])


def test_it_stops_at_its_lowest_rate_and_not_a_plateau_later() -> None:
    recipe = dataclasses.replace(JOINT, joint_max_epochs=99, joint_learning_rate=1e-4, joint_min_learning_rate=1e-6)
    state = SystemState.new(recipe, start(), 3)
    ended = []
    for _ in range(2):
        ended.append(state.finished(recipe))
        state.rate *= recipe.lr_factor
    assert state.rate > recipe.joint_min_learning_rate, "by rounding"
    assert [*ended, state.finished(recipe)] == [False, False, True]


def test_what_the_recipe_fixes_stays(data: JointSet, tmp_path: Path) -> None:
    recipe = dataclasses.replace(JOINT, learn_sigma=False, category_weights=False, joint_max_epochs=1)
    state = run(recipe, data, tmp_path)
    assert state.parameters[LOGITS].eq(0).all()
    for name in NAMES:
        assert state.parameters[f"{name}/log_sigma"].tolist() == pytest.approx([math.log(24.0)] * SEEDS)
        assert not state.parameters[f"{name}/conv0.weight"].equal(start()[name]["conv0.weight"])
