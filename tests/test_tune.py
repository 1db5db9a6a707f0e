"""Searches: populations in banks, what the searcher learns, what an interruption leaves, and the jobs that search."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_training import CPU, RECIPE, make_store, make_training_set

from acw import population, search
from acw.features import FeatureStore
from acw.population import Outcome, Population, train_population
from acw.recipes import named_recipe
from acw.search import Search, Space, load_space
from acw.storage import UserError

SPACES = Path(__file__).parents[1] / "tune_spaces"
# No rate falls, so what ends a head is its last epoch or its rung.
SEARCHED = dataclasses.replace(RECIPE, max_epochs=2, lr_patience=9, backbones=("lite0", "lite1"))
RATES = (2e-4, 5e-3, 3e-4, 4e-4)
POPULATION = Population(0, 0, {}, [{}, *({"learning_rate": rate} for rate in RATES)])


class Guarded(FeatureStore):
    """Features of which those of held-out images cannot be read."""

    def load(self, indices, device="cpu"):
        assert (make_training_set().fold[np.asarray(indices)] >= 0).all(), "a held-out image"
        return super().load(indices, device)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureStore]:
    store = make_store(tmp_path_factory.mktemp("features"))
    guarded = Guarded(*(getattr(store, field.name) for field in dataclasses.fields(store)))
    return dict.fromkeys(SEARCHED.backbones, guarded)


def _train(stores: dict[str, FeatureStore], folder: Path, folds: tuple[int, ...] = (0,)) -> Iterator[list[Outcome]]:
    training_set = make_training_set()
    held_out = training_set.fold[training_set.image] < 0
    assert held_out.any()
    # Whoever looked at these would have no finite loss or IG.
    training_set.x[held_out] = training_set.y[held_out] = math.nan
    return train_population(SEARCHED, POPULATION, folds, training_set, stores, folder, CPU)


@pytest.fixture(autouse=True, scope="module")
def _early_rung() -> Iterator[None]:
    """After one epoch already, to save the tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "RUNGS", (1,))
        yield


@pytest.fixture(scope="module")
def trained(stores: dict[str, FeatureStore], tmp_path_factory: pytest.TempPathFactory) -> list[list[Outcome]]:
    return list(_train(stores, tmp_path_factory.mktemp("population")))


# --- A population ----------------------------------------------------------------------------------------------------


def test_the_best_third_of_a_population_goes_on_and_the_recipe_itself(trained: list[list[Outcome]]) -> None:
    """Nothing of held-out images is needed for that: their features cannot be read, their fixations are NaN."""
    assert [one.state for one in trained[0]] == ["training"] * 5
    own, *others = trained[-1]
    assert (own.state, own.epochs) == ("finished", 2)
    # Two of four: the highest rate is the best by far.
    after_one = [np.mean([curve[0] for curve in one.curves.values()]) for one in others]
    assert {k for k, one in enumerate(others) if one.state == "finished"} == set(np.argsort(after_one)[-2:])
    assert after_one[1] > 0.1 + max(after_one[0], *after_one[2:])
    for one in trained[-1]:
        assert one.state in ("finished", "stopped")
        assert one.epochs == (2 if one.state == "finished" else 1)
        assert one.ig == pytest.approx(np.mean([max(curve) for curve in one.curves.values()]), abs=1e-4)
        assert {len(curve) for curve in one.curves.values()} == {one.epochs}


@pytest.mark.parametrize("lost", ["", "lite1"])
def test_an_interrupted_population_goes_on_as_it_would_have(
    stores: dict[str, FeatureStore], trained: list[list[Outcome]], tmp_path: Path, lost: str
) -> None:
    """Killed after the first epoch, and while the second bank was in it."""
    next(_train(stores, tmp_path))
    checkpoints = {path.name.partition("-")[0]: path for path in tmp_path.glob("banks/*")}
    if lost:
        checkpoints[lost].unlink()
    before = checkpoints["lite0"].stat().st_mtime_ns
    again = _train(stores, tmp_path)
    if lost:
        assert next(again) == trained[0]
        assert checkpoints["lite0"].stat().st_mtime_ns == before, "an epoch is not done again"
    assert list(again) == trained[1:]


def test_the_objective_is_the_mean_over_the_folds(stores: dict[str, FeatureStore], tmp_path: Path) -> None:
    one, other, both = (
        next(_train(stores, tmp_path / name, folds))[0] for name, folds in (("0", (0,)), ("1", (1,)), ("01", (0, 1)))
    )
    assert one.ig != other.ig
    assert both.ig == pytest.approx((one.ig + other.ig) / 2, abs=1e-4)


def test_a_configuration_that_goes_astray_is_one_that_is_bad(stores: dict[str, FeatureStore], tmp_path: Path) -> None:
    short, training_set = dataclasses.replace(SEARCHED, max_epochs=1, backbones=("lite0",)), make_training_set()
    store = {"lite0": stores["lite0"]}
    for own in ([{}, {"learning_rate": 1e30}], [{"learning_rate": 1e30}]):
        odd = Population(len(own), 0, {}, own)
        *_, last = train_population(short, odd, (0,), training_set, store, tmp_path / str(len(own)), CPU)
        assert last[-1].state == "diverged"
        assert len(own) == 1 or last[0].state == "finished"
    assert search.Trialled(1, {}, last[-1]).ig == -math.inf


# --- What is proposed ------------------------------------------------------------------------------------------------


def _ended(ig: float, state: population.State = "finished") -> Outcome:
    return Outcome(ig, 4 if state == "finished" else 3, state, {"lite0": [ig]})


def _space(name: str = "sigma_lr") -> Space:
    return load_space(SPACES, name)


def _merit(fields: dict) -> float:
    """Best at a rate of 1e-3."""
    return 1.0 - abs(math.log(fields.get("learning_rate", 3e-3) / 1e-3))


def _run(found: Search, populations: int) -> None:
    for _ in range(populations):
        proposed = found.propose()
        found.finish(proposed, [_ended(_merit(fields)) for fields in proposed.fields])


def test_the_searcher_learns_from_every_member(tmp_path: Path) -> None:
    found = Search(tmp_path, _space(), 10, 60, seed=0)
    assert found.missing == [9 - 1, 9, 9, 9, 9, 8, 8]
    _run(found, 7)
    assert not found.missing
    rates = [fields["learning_rate"] for one in found.proposed.values() for fields in one.fields if fields]
    assert len(set(rates)) == 60
    early, late = (np.mean([abs(math.log(rate / 1e-3)) for rate in part]) for part in (rates[:17], rates[-24:]))
    assert late < 0.6 * early
    importance = found.importance()
    assert max(importance, key=lambda name: importance[name]) == "learning_rate"
    assert sum(importance.values()) == pytest.approx(1)
    assert found.trialled[0].ig > -0.1 + 1
    assert found.trialled[0].number > 0


def test_members_share_what_a_bank_cannot_mix(tmp_path: Path) -> None:
    found = Search(tmp_path, _space("input_scale"), 4, 12, seed=0)
    _run(found, len(found.missing))
    own, *others = found.proposed.values()
    assert own.fields == [{}], "the recipe itself has the recipe's input"
    assert [len(one.own) for one in others] == [4, 4, 4]
    for one in others:
        assert set(one.common) == {"long_side"}
        assert len({fields["sigma"] for fields in one.fields}) == 4
    recipe = named_recipe("gaze")
    assert [one.long_side for one in _space("input_scale").recipes(recipe)] == [0, 256, 320, 400, 512, 640]
    alone = Search(tmp_path / "alone", _space("center_bias"), 4, 3, seed=0)
    assert alone.missing == [0, 1, 1, 1]


def test_a_search_knows_what_its_folder_knows(tmp_path: Path) -> None:
    first = Search(tmp_path, _space(), 4, 11, seed=0)
    _run(first, 1)
    interrupted = first.propose()
    second = Search(tmp_path, _space(), 4, 11, seed=0)
    assert second.trialled == first.trialled
    assert second.waiting == [interrupted]
    assert second.missing == first.missing == [4]
    second.finish(interrupted, [_ended(0.5, "stopped") for _ in interrupted.own])
    assert not Search(tmp_path, _space(), 4, 11, seed=0).waiting
    # More of it: what is there counts.
    assert sum(Search(tmp_path, _space(), 4, 20, seed=0).missing) == 20 - 3 - 4


@pytest.mark.parametrize("name", sorted(file.stem for file in SPACES.glob("*.py")))
def test_every_space_can_be_searched_and_says_how(tmp_path: Path, name: str) -> None:
    space = _space(name)
    assert f"--space {name}" in space.doc
    assert "Cost:" in space.doc
    found = Search(tmp_path, space, 3, 3, seed=0)
    recipe = named_recipe("gaze")
    while found.missing:
        for fields in found.propose().fields:
            search.derive(recipe, fields)
    assert json.dumps(space.identity)
    with pytest.raises(UserError, match=r"no search space 'no_such'; spaces are .*sigma_lr"):
        _space("no_such")
