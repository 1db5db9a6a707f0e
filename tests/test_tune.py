"""Searches: populations in banks, what the searcher learns, what an interruption leaves, and the jobs that search."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_runs import NAME, RECIPE, displays, histories, succeed
from test_faults import kill_driver
from tiny_training import CPU, make_store, make_training_set
from tiny_training import RECIPE as TINY

from acw.cluster import event_log
from acw.cluster.allocation import Allocation
from acw.features.store import FeatureStore
from acw.pipeline import search
from acw.pipeline.job import parse
from acw.provenance import provenance
from acw.recipes import Recipe, derive, named_recipe
from acw.report import search_page
from acw.search import population, space, tuner
from acw.search.population import Outcome, Population, train_population
from acw.search.space import Search, Space, load_space
from acw.storage.errors import UserError
from acw.storage.files import write_json
from acw.tracking import mlflow_store
from acw.training.bank import Bank, BankState, Head
from acw.training.status import status, text

SPACES = Path(__file__).parents[1] / "tune_spaces"
# No rate falls, so what ends a head is its last epoch or its rung.
SEARCHED = dataclasses.replace(TINY, max_epochs=2, lr_patience=9, backbones=("lite0", "lite1"))
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


def test_banks_that_end_at_different_epochs_have_curves_of_one_length(
    stores: dict[str, FeatureStore], tmp_path: Path
) -> None:
    """A bank ends with its last head; the mean over backbones needs what it has reached until the others end."""
    short = dataclasses.replace(SEARCHED, max_epochs=3, min_learning_rate=1e-3)
    one = Population(0, 0, {}, [{}])
    states = [_state_after(short, ended) for ended in (1, 3)]
    banks = [Bank(name, (Head.of(short, 0, 0),)) for name in short.backbones]
    (outcome,) = population.outcomes(short, one, 1, dict(zip(banks, states, strict=True)))
    assert outcome.curves == {"lite0": [0.1, 0.1, 0.1], "lite1": [0.1, 0.2, 0.3]}
    assert (outcome.epochs, outcome.ig) == (3, pytest.approx((0.1 + 0.3) / 2))
    assert tuner.best_so_far([outcome]) == pytest.approx([0.1, 0.15, 0.2])


def _state_after(recipe: Recipe, epochs: int) -> BankState:
    """A bank of one head that stopped after so many epochs, each a tenth of a bit better."""
    state = BankState.new(recipe, Bank("lite0", (Head.of(recipe, 0, 0),)), 4)
    state.history = [{"ig": [0.1 * (epoch + 1)]} for epoch in range(epochs)]
    state.learning_rate[:] = recipe.min_learning_rate
    return state


def test_a_configuration_that_goes_astray_is_one_that_is_bad(stores: dict[str, FeatureStore], tmp_path: Path) -> None:
    short, training_set = dataclasses.replace(SEARCHED, max_epochs=1, backbones=("lite0",)), make_training_set()
    store = {"lite0": stores["lite0"]}
    for own in ([{}, {"learning_rate": 1e30}], [{"learning_rate": 1e30}]):
        odd = Population(len(own), 0, {}, own)
        *_, last = train_population(short, odd, (0,), training_set, store, tmp_path / str(len(own)), CPU)
        assert last[-1].state == "diverged"
        assert len(own) == 1 or last[0].state == "finished"
    assert space.Trialled(1, {}, last[-1]).ig == -math.inf


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
    recipe = named_recipe("gaze_small")
    assert [one.long_side for one in _space("input_scale").recipes(recipe)] == [0, 256, 320, 400, 512, 640]
    taps = {one.backbone_values[0].taps for one in _space("taps").recipes(recipe)}
    assert [len(one) for one in sorted(taps, key=len)] == [1, 3, 4]
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


def test_an_interruption_does_not_change_what_is_proposed(tmp_path: Path) -> None:
    at_once = Search(tmp_path / "at once", _space(), 4, 11, seed=0)
    _run(at_once, 3)
    for _ in range(3):
        _run(Search(tmp_path / "again", _space(), 4, 11, seed=0), 1)
    assert Search(tmp_path / "again", _space(), 4, 11, seed=0).proposed == at_once.proposed


@pytest.mark.parametrize("name", sorted(file.stem for file in SPACES.glob("*.py")))
def test_every_space_can_be_searched_and_says_how(tmp_path: Path, name: str) -> None:
    space = _space(name)
    assert f"--space {name}" in space.doc
    assert "Cost:" in space.doc
    found = Search(tmp_path, space, 3, 3, seed=0)
    recipe = named_recipe("gaze_small")
    while found.missing:
        for fields in found.propose().fields:
            derive(recipe, fields)
    assert json.dumps(space.identity)
    with pytest.raises(UserError, match=r"no search space 'no_such'; spaces are .*sigma_lr"):
        _space("no_such")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("SPACE = {'sigma': 24.0}", "'sigma' is fixed; give it on the command line, --sigma"),
        ("SPACE = {'seed': tune.choice([1, 2])}", "'seed' cannot be searched"),
        ("SPACES = {}", "cannot be read .*SPACE"),
        ("SPACE = {", "cannot be read .*never closed"),
        ("SPACE = {'sigma': tune.sample_from(lambda spec: 3)}", "search space odd: "),
    ],
)
def test_a_space_that_cannot_be_searched_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "odd.py").write_text(f"from ray import tune\n{text}\n", encoding="utf-8")
    with pytest.raises(UserError, match=problem) as caught:
        load_space(tmp_path, "odd")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_diverges_is_worse_than_all(tmp_path: Path) -> None:
    found = Search(tmp_path, _space(), 4, 3, seed=0)
    proposed = found.propose()
    found.finish(proposed, [Outcome(None, 0, "diverged", {}), *(_ended(0.2) for _ in proposed.own[1:])])
    origin = {"recipe": "gaze_small"}
    assert tuner.overlay(found, origin)["search"]["validation_IG_of_the_recipe"] is None
    recipe = dataclasses.replace(named_recipe("gaze_small"), backbones=("lite0",))
    record = provenance(recipe) | {"dataset": {"name": "tiny"}}
    write_json(tmp_path / "search.json", found.summary() | {"folds": [0], "provenance": record})
    search_page.write(tmp_path)
    assert "the recipe itself has no finite loss" in (tmp_path / "report.html").read_text(encoding="utf-8")
    tuner.table(found.trialled)
    none = Search(tmp_path / "none", _space(), 1, 0, seed=0)
    none.finish(none.propose(), [Outcome(None, 0, "diverged", {})])
    with pytest.raises(UserError, match="no configuration has a finite loss"):
        tuner.overlay(none, origin)


# --- Jobs ------------------------------------------------------------------------------------------------------------

TWO_RATES = """
from ray import tune

SPACE = {"learning_rate": tune.choice([2e-4, 5e-3])}
"""
SMALL = (
    *("demo", "--backbones", "lite0", "--seeds", "1", "--folds", "2"),
    *("--heads-per-worker", "3", "--workers", "1"),
)


@dataclasses.dataclass
class Searched:
    """A search by jobs/tune.py: its command line, the folder that it left and the last line that it printed."""

    arguments: list[str]
    folder: Path
    last: str


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Iterator[Searched]:
    """Four configurations of two learning rates, in two banks, on 16 pictures; in this process."""
    base = tmp_path_factory.mktemp("search")
    (base / "spaces").mkdir()
    (base / "spaces" / "two_rates.py").write_text(TWO_RATES, encoding="utf-8")
    arguments = [*SMALL, "--max-epochs", "2", "--learning-rate", "1.5e-4", "--root", str(base / f"runs on {NAME}")]
    arguments += displays(base / NAME, ("Colour", "Faces"), 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "SPACES", base / "spaces")
        last = _printed(search.main, [*arguments, "--space", "two_rates", "--samples", "4"])
        yield Searched(arguments, Path(last).parent, last)


def _printed(main: Any, arguments: list[str]) -> str:
    """The last line on stdout."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(arguments)
    return out.getvalue().splitlines()[-1]


def test_a_search_finds_the_better_rate_and_writes_it_down(searched: Searched) -> None:
    overlay = json.loads((searched.folder / "overlay.json").read_text(encoding="utf-8"))
    # On so few pictures the high rate overshoots.
    assert overlay["fields"] == {"learning_rate": 2e-4}
    origin = overlay["search"]
    assert (origin["space"], origin["configurations"], origin["folds"]) == ("two_rates", 4, [0])
    assert origin["validation_IG"] > origin["validation_IG_of_the_recipe"]
    job = parse([*searched.arguments, "--overlay", searched.last], "")
    assert job.recipe.learning_rate == 1.5e-4, "what is typed wins over the file"
    untyped = [a for a in searched.arguments if a not in ("--learning-rate", "1.5e-4")]
    job = parse([*untyped, "--overlay", searched.last], "")
    assert (job.recipe.learning_rate, job.overlay) == (2e-4, overlay)
    report = (searched.folder / "report.html").read_text(encoding="utf-8")
    assert "two_rates" in report
    assert "http" not in report.replace("http-equiv", "")


def test_each_configuration_is_a_child_run_with_its_curves(searched: Searched) -> None:
    root = searched.folder.parents[1]
    client, experiment = mlflow_store.connect(mlflow_store.tracking_uri(root, None))
    runs = client.search_runs([experiment])
    (parent,) = (run for run in runs if run.data.tags.get("acw.search") == searched.folder.name)
    children = {run.data.tags["acw.configuration"]: run for run in runs if "acw.configuration" in run.data.tags}
    assert sorted(children) == ["0", "1", "2", "3", "4"]
    found = {
        one["number"]: one
        for one in json.loads((searched.folder / "search.json").read_text(encoding="utf-8"))["configurations"]
    }
    for number, run in children.items():
        one = found[int(number)]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert {name: float(value) for name, value in run.data.params.items()} == one["fields"]
        curve = client.get_metric_history(run.info.run_id, "ig.lite0")
        assert [point.value for point in sorted(curve, key=lambda point: point.step)] == one["curves"]["lite0"]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["ig.best"] == max(one["ig"] for one in found.values())
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"overlay.json", "report.html"}


def test_a_search_that_is_there_is_not_done_again(searched: Searched) -> None:
    before = {path: path.stat().st_mtime_ns for path in searched.folder.rglob("*")}
    command = [*searched.arguments, "--space", "two_rates", "--samples"]
    assert _printed(search.main, [*command, "4"]) == searched.last
    assert {path: path.stat().st_mtime_ns for path in searched.folder.rglob("*")} == before
    with pytest.raises(UserError, match=r"has 5 of these configurations; add --resume"):
        search.main([*command, "6"])


def test_status_tells_of_a_search(searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = status(searched.folder, time.time())
    assert (ended["state"], ended["configurations"]["done"], ended["ends"]) == ("finished", 4, None)
    assert ended["configurations"]["best"]["fields"] == {"learning_rate": 2e-4}
    monkeypatch.setattr(tuner, "PROGRESS_SECONDS", -1)
    found, recipe = Search(tmp_path, _space(), 4, 11, seed=0), named_recipe("gaze_small")
    with event_log.kept(tmp_path, "search", recipe=dataclasses.asdict(recipe)):
        reporter = tuner.ProgressReporter(found, recipe, Allocation(1, 1, 0))
        population = found.propose()
        assert status(tmp_path, time.time())["minutes_left"] is None
        found.finish(population, [_ended(0.5, "finished") for _ in population.own])
        reporter.finished(population)
        reporter.epoch(found.propose(), 2, 4, 0.3, {"node": "10.0.0.1/abcd", "gpus": [], "device": "cpu"})
        seen = status(tmp_path, time.time())
    assert seen["state"] == "running"
    assert seen["minutes_left"] >= 0
    assert "3/11 configurations done, best 0.5000 bit; training 4 in epoch 2 of at most 20" in text(seen)
    assert "best so far     the recipe itself" in text(seen)
    assert "will end in at most" in text(seen)


@pytest.mark.faults
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_search_goes_on_after_its_driver_was_killed(tmp_path: Path, by: signal.Signals) -> None:
    """In the second of two populations: neither the first nor any epoch of the second is done again."""
    arguments = [*RECIPE, "--heads-per-worker", "4", "--workers", "1", "--lr-patience", "40", "--max-epochs", "12"]
    arguments += [*displays(tmp_path / "tiny", ("Colour", "Faces"), 8), "--root", str(tmp_path / "root")]
    arguments += ["--tune", "sigma_lr", "--samples", "6"]

    def populations() -> dict[str, Any]:
        return {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in tmp_path.glob("root/tune/*/populations/*.json")
        }

    def second() -> dict[str, list[dict]]:
        return next((histories(folder) for folder in tmp_path.glob("root/tune/*/populations/001")), {})

    kill_driver("pipeline", arguments, tmp_path / "log", lambda: bool(second()), by)
    known, trained = populations(), second()
    assert known["000"]["outcomes"]
    assert known["001"]["outcomes"] is None
    (folder,) = tmp_path.glob("root/tune/*")
    assert not (folder / "overlay.json").exists(), "what is half found is no result"
    left = status(folder, time.time())
    assert (left["state"], left["configurations"]["done"]) == ("interrupted", 3)
    assert "--resume" in text(left)
    *_, last = succeed("pipeline", *arguments)
    after = populations()
    assert after["000"] == known["000"]
    assert after["001"]["own"] == known["001"]["own"]
    for bank, history in trained.items():
        assert second()[bank][: len(history)] == history, "an entry has the very seconds that the epoch took"
    (overlay,) = (json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("root/tune/*/overlay.json"))
    record = json.loads((Path(last).parent / "recipe.json").read_text(encoding="utf-8"))
    assert record["overlay"] == overlay
    assert overlay["fields"].items() <= record["recipe"].items()
