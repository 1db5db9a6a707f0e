"""Training: each head as if alone under PyTorch's own optimiser and scheduler, no leak, and exact resumption."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acw import features, heads, training
from acw.backbones import Backbone, FrozenBackbone
from acw.center_bias import GRID, CenterBias
from acw.data import Stimulus
from acw.features import FeatureStore
from acw.recipes import Recipe
from acw.training import Bank, BankAdam, BankState, Batches, TrainingSet, plan_banks, spread, train_epochs

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(
    Recipe("tiny"), backbones=("lite0", "lite1", "lite2", "lite2_fine"), batch_size=4, max_epochs=3, learning_rate=5e-3
)
MEMBERS = tuple((fold, seed) for fold in range(RECIPE.folds) for seed in range(RECIPE.seeds))
BANK = Bank("stub", MEMBERS)
# Two shapes, neither of them a multiple of the density's cell.
SIZES = [(125, 163), (98, 131)]
IMAGES = 36
BACKBONE = Backbone("stub", "stub", ("fine", "coarse"), "random", long_side=64, stride=10.0)


class Spots(Stimulus):
    """A dark image with bright spots, the same each time it is read."""

    def pixels(self) -> np.ndarray:
        generator = np.random.default_rng(zlib.crc32(self.name.encode()))
        blocks = generator.random((4, 5, 3)) ** 4
        return (255 * np.kron(blocks, np.ones((33, 34, 1)))[: self.size[0], : self.size[1]]).astype(np.uint8)


class StubNetwork:
    """Averages over cells, and their products with each other, in place of a backbone."""

    weights_sha256 = "0" * 64

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        channels = images.permute(0, 3, 1, 2).float() / 64
        taps = [F.adaptive_avg_pool2d(channels, size) for size in ((10, 14), (3, 5))]
        return [torch.cat([tap, tap * tap.roll(1, 1)], 1).permute(0, 2, 3, 1).contiguous() for tap in taps]


def stimuli() -> list[Stimulus]:
    return [Spots(f"{i}.png", "", SIZES[i % 2], "all", None, "") for i in range(IMAGES)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("store")
    network, images = cast(FrozenBackbone, StubNetwork()), stimuli()
    for shard in range(-(-IMAGES // features.SHARD_IMAGES)):
        features.write_shard(network, BACKBONE, images, shard, folder)
    readouts = tuple(BACKBONE.readout_size(image.size) for image in images)
    return FeatureStore(folder, IMAGES, (6, 6), (((10, 14), (3, 5)),) * IMAGES, readouts)


def random_bias(seed: int) -> CenterBias:
    coarse = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, (GRID, GRID), mode="bicubic")[0, 0]
    return CenterBias(heads.normalise(smooth).numpy(), None, None)


@pytest.fixture(scope="module")
def training_set() -> TrainingSet:
    """Every sixth image held out; 5 to 20 fixations on the brightest spots of each image."""
    generator = np.random.default_rng(0)
    image, x, y = [], [], []
    for index, stimulus in enumerate(stimuli()):
        brightness = stimulus.pixels().astype(float).mean(2).ravel() ** 2
        count = generator.integers(5, 20)
        pixel = generator.choice(len(brightness), count, p=brightness / brightness.sum())
        image.append(np.full(count, index, dtype=np.int32))
        y.append((pixel // stimulus.size[1] + generator.random(count)).astype(np.float32))
        x.append((pixel % stimulus.size[1] + generator.random(count)).astype(np.float32))
    fold = (np.arange(IMAGES) % 6 - 1).astype(np.int8)
    biases = [random_bias(seed) for seed in range(2 * RECIPE.folds)]
    sizes = [stimulus.size for stimulus in stimuli()]
    columns = np.concatenate(image), np.concatenate(x), np.concatenate(y)
    return TrainingSet(sizes, fold, *columns, biases[: RECIPE.folds], biases[RECIPE.folds :])


def train(
    folder: Path, training_set: TrainingSet, store: FeatureStore, bank: Bank = BANK, recipe: Recipe = RECIPE
) -> BankState:
    for _ in train_epochs(recipe, bank, training_set, store, folder, CPU):
        pass
    return BankState.load(training.checkpoint_path(folder, bank))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, training_set: TrainingSet, store: FeatureStore) -> BankState:
    return train(tmp_path_factory.mktemp("run"), training_set, store)


def tensors_of(state: BankState) -> dict[str, torch.Tensor]:
    groups = ("parameters", "best", "first_moment", "second_moment")
    result = {f"{group}/{name}": value for group in groups for name, value in getattr(state, group).items()}
    return result | {name: getattr(state, name) for name in ("steps", "bad_epochs", "learning_rate", "best_ig")}


def history_of(state: BankState) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in state.history]


def test_each_head_steps_as_pytorchs_adam_does() -> None:
    """Rates of their own; one head sees no image in some steps, as if it had not been called."""
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
        parameters = heads.select(state.parameters, active)
        optimiser = BankAdam(parameters, state, active)
        for step in range(first, last):
            for name, parameter in parameters.items():
                parameter.grad = gradients[step][name].clone()
            optimiser.step(on[step])
        optimiser.write_back()

    run(0, 10)
    run(10, 25)  # a second epoch, from what the first has left in the state
    for position, head in enumerate(active.tolist()):
        plain = {name: value[head].clone().requires_grad_(True) for name, value in before.items()}
        adam = torch.optim.Adam(plain.values(), lr=float(state.learning_rate[head]))
        for step in range(len(on)):
            if on[step, position]:
                for name, parameter in plain.items():
                    parameter.grad = gradients[step][name][position].clone()
                adam.step()
        for name, parameter in plain.items():
            step_size = float(state.learning_rate[head])
            difference = (state.parameters[name][head] - parameter).abs().max()
            assert difference <= 1e-4 * step_size + 1e-6, (head, name)
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
        training._record(recipe, state, active, torch.zeros(len(active)), torch.from_numpy(ig)[active], 0.0)
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


def test_spread_is_the_mean_of_bilinear_samples() -> None:
    generator = np.random.default_rng(0)
    for grid in ((7, 11), (1, 5), (30, 2)):
        y, x = generator.random((2, 40))
        y[:3], x[2:5] = [0, 1 - 1e-7, 0.5 / grid[0]], [0, 1 - 1e-7, 0.5]
        values = torch.from_numpy(generator.normal(size=grid))
        position = torch.from_numpy(np.stack([x, y], -1) * 2 - 1)[None, None]
        sampled = F.grid_sample(values[None, None], position, padding_mode="border", align_corners=False)
        weights = spread(y, x, grid)
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert float(torch.from_numpy(weights).double() @ values.flatten()) == pytest.approx(
            float(sampled.mean()), abs=1e-6
        )


def test_the_loss_on_the_grid_is_that_of_the_full_density(training_set: TrainingSet, store: FeatureStore) -> None:
    """But for what the grid cannot resolve, which must vanish with its cell: any other mistake would stay."""
    centred = dataclasses.replace(training_set, x=np.floor(training_set.x) + 0.5, y=np.floor(training_set.y) + 0.5)
    bank = heads.new_heads(12, 24.0, [1, 2])
    bank["conv5.weight"] *= 6
    worst = {}
    for cell in (8.0, 4.0, 2.0):
        batches = Batches(centred, store, cell, CPU)
        differences = []
        for group in batches.groups([0, 1, 2, 3]):
            batch = batches.load(group)
            bias = batches.bias("finalizer_bias", batch.grid)[[0, 1]]
            actual = training.log_likelihood(bank, batch, bias, cell)
            coarse = heads.normalise(heads.finalize(bank, heads.readout(bank, batch.features), bias, cell))
            assert float(coarse.amax() - coarse.amin()) > 5
            for position, index in enumerate(group):
                mine = centred.image == index
                full = heads.upsample(coarse[:, position], centred.sizes[index])
                at_pixels = full[:, centred.y[mine].astype(int), centred.x[mine].astype(int)]
                differences.append((actual[:, position] - at_pixels.mean(1)).abs().max().item())
        worst[cell] = max(differences)
    assert worst[8.0] < 0.03
    assert worst[4.0] < worst[8.0] / 2.5
    assert worst[2.0] < min(worst[4.0] / 2.5, 2e-3)


def test_an_epoch_has_each_development_image_once(training_set: TrainingSet, store: FeatureStore) -> None:
    batches = Batches(training_set, store, RECIPE.density_cell, CPU)
    epochs = [training.epoch_batches(RECIPE, batches, epoch) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == np.flatnonzero(training_set.fold >= 0).tolist()
        assert {len(indices) for indices in epoch} <= set(range(1, RECIPE.batch_size + 1))
        assert len(epoch) == -(-(training_set.fold >= 0).sum() // RECIPE.batch_size)
    first, second = ([indices.tolist() for indices in epoch] for epoch in epochs)
    assert first != second
    assert [indices.tolist() for indices in training.epoch_batches(RECIPE, batches, 0)] == first
    other_seed = dataclasses.replace(RECIPE, seed=1)
    assert [indices.tolist() for indices in training.epoch_batches(other_seed, batches, 0)] != first


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
    members = ((1, 0), (3, 2))
    state = train(tmp_path, training_set, store, Bank("stub", members), recipe)
    start = BankState.new(recipe, Bank("stub", members), 12)
    batches = Batches(training_set, store, recipe.density_cell, CPU)
    for k, (fold, _) in enumerate(members):
        head = {name: value.requires_grad_(True) for name, value in heads.select(start.parameters, [k]).items()}
        adam = torch.optim.Adam(head.values(), lr=recipe.learning_rate)
        losses = []
        for indices in training.epoch_batches(recipe, batches, 0):
            own = [index for index in indices if training_set.fold[index] not in (-1, fold)]
            for index in own:
                batch = batches.load(np.array([index]))
                bias = batches.bias("finalizer_bias", batch.grid)[[fold]]
                loss = -training.log_likelihood(head, batch, bias, recipe.density_cell)[0, 0]
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
            bias = batches.bias("finalizer_bias", batch.grid)[[fold]]
            kde = training_set.baseline[fold].of_size(batch.grid).ravel() - batch.log_area_B.item()
            log_likelihood = training.log_likelihood(head, batch, bias, recipe.density_cell)[0, 0].item()
            gains.append(log_likelihood - float(kde @ batch.target_BP[0].numpy()))
        assert state.history[0]["ig"][k] == pytest.approx(np.mean(gains) / np.log(2), abs=1e-3)


def test_training_learns(trained: BankState) -> None:
    first, last = (np.array(trained.history[epoch]["loss"]) for epoch in (0, -1))
    assert (last < first).all()


Interruption = Callable[[pytest.MonkeyPatch, int], None]


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def before_the_rename(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    real, calls = training.save_file, []

    def save(tensors: dict, path: Path, metadata: dict) -> None:
        real(tensors, path, metadata)
        calls.append(path)
        if len(calls) == epoch:
            raise Killed

    monkeypatch.setattr(training, "save_file", save)


def after_the_rename(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    real = BankState.save

    def save(state: BankState, path: Path) -> None:
        real(state, path)
        if len(state.history) == epoch:
            raise Killed

    monkeypatch.setattr(BankState, "save", save)


def in_mid_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    real, calls = BankAdam.step, []

    def step(self: BankAdam, on_K: torch.Tensor) -> None:
        real(self, on_K)
        calls.append(on_K)
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

    def load(self: FeatureStore, indices: Any, device: Any = "cpu") -> heads.Features:
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
        for k, (fold, _) in enumerate(MEMBERS):
            assert value[k].equal(trained.parameters[name][k]) == (fold == 2), (name, fold)
    # What the fold's heads are chosen on has changed, of course.
    assert all(
        state.history[0]["ig"][k] != trained.history[0]["ig"][k] for k in range(len(MEMBERS)) if MEMBERS[k][0] == 2
    )


def test_a_fixed_sigma_stays_where_it_is(tmp_path: Path, training_set: TrainingSet, store: FeatureStore) -> None:
    recipe = dataclasses.replace(RECIPE, learn_sigma=False, max_epochs=1, sigma=21.0)
    state = train(tmp_path, training_set, store, Bank("stub", MEMBERS[:2]), recipe)
    assert state.parameters["log_sigma"].exp().tolist() == pytest.approx([21.0, 21.0])
    assert not state.parameters["center_bias_weight"].equal(torch.ones(2))


@pytest.mark.parametrize("size", [1, 4, 15])
def test_banks_hold_every_head_once(size: int) -> None:
    banks = plan_banks(dataclasses.replace(RECIPE, heads_per_worker=size))
    every = [(bank.backbone, *member) for bank in banks for member in bank.members]
    assert len(every) == len(set(every)) == 60
    assert set(every) == {(name, *member) for name in RECIPE.backbones for member in MEMBERS}
    assert max(len(bank.members) for bank in banks) == size
    assert len({bank.name for bank in banks}) == len(banks)
