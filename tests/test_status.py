"""A run's log, its metrics on Ray, and what `acw status` makes of what a run leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from job_runs import finished

from acw.cluster import costs, event_log
from acw.cluster.joining import connect
from acw.pipeline.job import stage
from acw.recipes import Recipe
from acw.storage.errors import UserError
from acw.training import progress
from acw.training.bank import Bank, BankState, checkpoint_path, plan_banks
from acw.training.monitor import ProgressMonitor
from acw.training.status import status, text
from acw.training.trainer import _record

# Two banks of two heads a backbone; a head stops after its second fall.
RECIPE = Recipe("tiny", backbones=("lite0", "lite1"), folds=2, seeds=2, heads_per_worker=2, max_epochs=20)
BANKS = plan_banks(RECIPE)
PLACE = {"node": "10.0.0.1/abcd", "gpus": ["3"], "device": "cuda:0"}


def train(folder: Path, bank: Bank, gains: Sequence[Sequence[float]], seconds: float = 10.0) -> BankState:
    """A bank's checkpoint after epochs with these validation IG, one a head, of which stopped heads have none."""
    state = BankState.new(RECIPE, bank, 4)
    for row in gains:
        active = state.active(RECIPE)
        ig = torch.tensor(row, dtype=torch.float64)[active]
        notes = {"seconds": seconds, "head_images_per_second": 50.0 * len(active), **PLACE}
        _record(RECIPE, bank, state, active, {"loss": -ig, "ig": ig}, notes)
    state.save(checkpoint_path(folder, bank))
    return state


RISING = [[0.1 * epoch, 0.2 * epoch] for epoch in range(1, 6)]
STOPPED = [*RISING, *[[0.0, 0.0]] * 4]  # two epochs until the first fall, two until the second


def job(folder: Path) -> Any:
    return SimpleNamespace(folder=folder, recipe=RECIPE, dataset=SimpleNamespace(stimuli=[None] * 9))


def stage_of(figures: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (stage for stage in figures["stages"] if stage["name"] == name)
    return found


def halfway(folder: Path) -> None:
    (folder / "features.json").write_text("{}", encoding="utf-8")
    train(folder, BANKS[0], STOPPED)
    train(folder, BANKS[1], RISING)


def test_a_run_that_is_half_way(tmp_path: Path) -> None:
    seen = {}

    @stage("training")
    def training(job: Any) -> None:
        halfway(tmp_path)
        with ProgressMonitor("training", progress.bank_units(RECIPE, BANKS, tmp_path), tmp_path, 2) as monitor:
            monitor.look = lambda: None  # type: ignore[method-assign]  # that needs Ray
            seen.update(status(tmp_path, time.time()))

    training(job(tmp_path))
    assert (seen["state"], seen["pid"], seen["workers"]) == ("running", os.getpid(), 2)
    assert [stage["state"] for stage in seen["stages"]] == ["done", "running", "waiting", "waiting"]
    heads = stage_of(seen, "heads")
    assert (heads["done"], heads["total"], heads["banks_done"], heads["banks"]) == (2, 8, 1, 4)
    assert heads["images_per_second"] == 50, "of the bank that is under way"
    assert heads["validation_ig"] == pytest.approx((0.5 + 1.0) / 2)
    assert [unit["state"] for unit in heads["units"]] == ["done", "running", "waiting", "waiting"]
    assert heads["units"][1].items() >= (PLACE | {"epochs": 5, "done": 0, "backbone": "lite0"}).items()
    # Nine epochs, as the finished bank took: four are left of this one, nine of two others, and two workers take turns.
    assert heads["minutes_left"] == pytest.approx((40 + 90 + 90) / 2 / 60, abs=0.2)
    assert heads["minutes_at_most"] == pytest.approx((150 + 200 + 200) / 2 / 60, abs=0.2)
    assert seen["then"] == ["aggregation", "registration"]
    assert facts(text(seen)) >= {"2/8", "1/4", "epoch 5 of at most 20", "50.0 images/s", "0.7500 bit", "cuda:0 (3)"}
    assert f"about {heads['minutes_left']:.1f} min" in text(seen)


def facts(shown: str) -> set[str]:
    pattern = r"\d+/\d+|epoch \d+ of at most \d+|[\d.]+ images/s|[\d.]+ bit|cuda:0 \(3\)"
    return set(re.findall(pattern, shown))


def test_the_estimate_knows_of_workers_and_early_stops(tmp_path: Path) -> None:
    units = progress.bank_units(RECIPE, BANKS, tmp_path)

    def left(workers: int) -> tuple[float, float]:
        found = progress.seconds_left([progress.read(unit) for unit in units], workers, None)
        assert found is not None
        return found

    assert progress.seconds_left([progress.read(unit) for unit in units], 1, None) is None
    train(tmp_path, BANKS[0], RISING)
    expected, most = left(4)
    assert 40 <= expected <= most == 200, "no head can stop sooner than after four epochs"
    assert left(1)[1] == pytest.approx(4 * 200 - 50)
    assert left(2)[1] == pytest.approx((150 + 3 * 200) / 2)
    # Nearer to its end with each fall of the rates.
    train(tmp_path, BANKS[0], STOPPED[:7])
    assert left(1)[0] < expected * 4
    one = progress.read(units[0])
    assert one.epochs_left([])[0] < 4
    assert one.epochs_left([30])[0] == 13, "never beyond the recipe's last epoch"
    train(tmp_path, BANKS[0], STOPPED)
    assert left(1) == pytest.approx((3 * 90, 3 * 200)), "as long as the bank that is done"
    assert left(3) == pytest.approx((90, 200))


def test_a_bank_that_is_silent_for_too_long(tmp_path: Path) -> None:
    seen = []

    @stage("training")
    def training(job: Any) -> None:
        train(tmp_path, BANKS[1], RISING, seconds=60.0)
        written = checkpoint_path(tmp_path, BANKS[1]).stat().st_mtime
        seen.extend(stage_of(status(tmp_path, written + after), "heads")["units"][1]["state"] for after in (290, 310))

    training(job(tmp_path))
    assert seen == ["running", "stalled"]


def test_a_bank_that_a_worker_has_begun_with_and_never_finishes_an_epoch(tmp_path: Path) -> None:
    seen = []

    @stage("training")
    def training(job: Any) -> None:
        train(tmp_path, BANKS[0], RISING, seconds=60.0)
        event_log.event("bank started", bank=BANKS[1].name, **PLACE)
        for after in (290, 310):
            figures = status(tmp_path, time.time() + after)
            seen.extend(unit["state"] for unit in stage_of(figures, "heads")["units"][1:])
        assert f"{BANKS[1].name:30}stalled      on 10.0.0.1/abcd cuda:0 (3)" in text(figures)

    training(job(tmp_path))
    assert seen == ["running", "waiting", "waiting", "stalled", "waiting", "waiting"]


@pytest.mark.parametrize(
    ("group_started", "bank_started"),
    [("worker group started", "bank started"), ("crew gathered", "bank begun")],
    ids=["now", "in earlier logs"],
)
def test_a_bank_that_waits_for_its_turn_is_not_stalled(tmp_path: Path, group_started: str, bank_started: str) -> None:
    """Nor is one of an earlier group that none has begun with again."""
    seen = []

    @stage("training")
    def training(job: Any) -> None:
        halfway(tmp_path)
        for bank, worker in ((BANKS[1], 0), (BANKS[2], 1), (BANKS[3], 0)):
            event_log.event(bank_started, bank=bank.name, worker=worker, **PLACE)
        seen.append([unit["state"] for unit in stage_of(status(tmp_path, time.time()), "heads")["units"]])
        seen.append([unit["state"] for unit in stage_of(status(tmp_path, time.time() + 310), "heads")["units"]])
        event_log.event(group_started, training="training", workers=1)
        event_log.event(bank_started, bank=BANKS[2].name, worker=0, **PLACE)
        seen.append([unit["state"] for unit in stage_of(status(tmp_path, time.time()), "heads")["units"]])

    training(job(tmp_path))
    assert seen == [
        ["done", "waiting", "running", "running"],
        ["done", "waiting", "stalled", "stalled"],
        ["done", "waiting", "running", "waiting"],
    ]


def test_a_bank_is_silent_since_a_worker_has_begun_with_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not since its last epoch, after which it waited for its turn."""
    monkeypatch.setattr(event_log, "measure", lambda *_: None)  # that needs Ray
    train(tmp_path, BANKS[1], RISING)
    path = checkpoint_path(tmp_path, BANKS[1])
    os.utime(path, (path.stat().st_atime, time.time() - 1000))

    def warnings(monitor: ProgressMonitor, after: float) -> list[str]:
        with monkeypatch.context() as later:
            later.setattr("acw.training.monitor.time.time", lambda: now + after)
            monitor.look()
        return [event["bank"] for event in event_log.events(tmp_path) if event["event"] == "stalled"]

    now = time.time()

    @stage("training")
    def training(job: Any) -> None:
        monitor = ProgressMonitor("training", progress.bank_units(RECIPE, BANKS, tmp_path), tmp_path, 1)
        monitor._start = now - 2000  # of a driver that was there for the last epoch
        event_log.event("bank started", bank=BANKS[2].name, worker=0, **PLACE)
        assert warnings(monitor, 0) == []
        event_log.event("bank started", bank=BANKS[1].name, worker=0, **PLACE)
        assert warnings(monitor, 100) == []
        assert warnings(monitor, 310) == [BANKS[1].name]
        assert warnings(monitor, 320) == [BANKS[1].name], "once"

    training(job(tmp_path))


def test_an_interrupted_run(tmp_path: Path) -> None:
    halfway(tmp_path)
    program = """
import os, sys, types
from pathlib import Path
from acw.recipes import named_recipe
from acw.pipeline.job import stage
dataset = types.SimpleNamespace(stimuli=[])
job = types.SimpleNamespace(folder=Path(sys.argv[1]), recipe=named_recipe("demo"), dataset=dataset)
stage("training")(lambda job: os.kill(os.getpid(), 9))(job)
"""
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": dataclasses.asdict(RECIPE)}), encoding="utf-8")
    killed = subprocess.run([sys.executable, "-c", program, tmp_path], env=os.environ)
    assert killed.returncode == -9
    with (tmp_path / event_log.FILE).open("a", encoding="utf-8") as file:
        file.write('{"time": "2026-')  # what a write leaves that was cut off
    found = status(tmp_path, time.time())
    assert found["state"] == "interrupted"
    assert [stage["state"] for stage in found["stages"]] == ["done", "interrupted", "waiting", "waiting"]
    units = stage_of(found, "heads")["units"]
    assert [unit["state"] for unit in units] == ["done", "interrupted", "waiting", "waiting"]
    assert found["ends"] is None
    assert "the same command goes on" in text(found)

    @stage("training")
    def fail(job: Any) -> None:
        raise UserError("the disk is full;\nfree it")

    with pytest.raises(UserError):
        fail(job(tmp_path))
    found = status(tmp_path, time.time())
    assert (found["state"], found["error"]) == ("failed", "the disk is full; free it")
    assert "the disk is full" in text(found)
    started = [event for event in event_log.events(tmp_path) if event["event"] == "stage started"]
    assert len(started) == 2, "the line that was cut off has not spoilt the next one"


def test_a_driver_elsewhere_lives_by_its_signs(tmp_path: Path) -> None:
    @stage("training")
    def training(job: Any) -> None:
        lines = (
            (tmp_path / event_log.FILE)
            .read_text(encoding="utf-8")
            .replace(event_log.events(tmp_path)[0]["node"], "another")
        )
        (tmp_path / event_log.FILE).write_text(lines, encoding="utf-8")
        now = time.time()
        assert status(tmp_path, now + event_log.HEARTBEAT_SECONDS)["state"] == "running"
        assert status(tmp_path, now + 10 * event_log.HEARTBEAT_SECONDS)["state"] == "interrupted"

    training(job(tmp_path))


def test_events_carry_their_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @stage("features")
    def step(job: Any) -> None:
        warnings.warn("take care", stacklevel=1)
        event_log.event("epoch", bank="lite0-f0s0-f0s1", ig={"f0s0": 1.25})

    with pytest.warns(UserWarning, match="take care"):
        step(job(tmp_path / "run"))
    begun, warning, epoch, ended = event_log.events(tmp_path / "run")
    assert [event["event"] for event in (begun, warning, epoch, ended)] == [
        "stage started",
        "warning",
        "epoch",
        "stage finished",
    ]
    for event in (begun, warning, epoch, ended):
        assert (event["run"], event["pid"]) == ("run", os.getpid())
    assert (warning["level"], warning["text"]) == ("warning", "take care")
    assert epoch["ig"] == {"f0s0": 1.25}
    assert begun["recipe"]["name"] == "tiny"
    event_log.event("nobody listens")
    event_log.to_stderr("run")
    event_log.event("epoch", bank="lite0-f0s0-f0s1", epoch=3)
    event_log.LOGGER.handlers.clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line).items() >= {"run": "run", "bank": "lite0-f0s0-f0s1", "epoch": 3, "level": "info"}.items()


def test_metrics_and_events_of_a_training(tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    connect()  # a job of another test's may have ended it
    halfway(tmp_path)
    units = progress.bank_units(RECIPE, BANKS, tmp_path)

    @stage("training")
    def training(job: Any) -> None:
        with ProgressMonitor("training", units, tmp_path, 2) as monitor:
            monitor.look()

    training(job(tmp_path))
    training(job(tmp_path))
    epochs = [event for event in event_log.events(tmp_path) if event["event"] == "epoch"]
    assert [event["epoch"] for event in epochs] == [*range(9), *range(5)], "each once, also for the second driver"
    assert epochs[-1].items() >= ({"bank": BANKS[1].name, "ig": {"f1s0": 0.5, "f1s1": 1.0}} | PLACE).items()
    stopped = [event for event in event_log.events(tmp_path) if event["event"] == "head stopped"]
    assert [(event["bank"], event["head"], event["ig"]) for event in stopped] == [
        (BANKS[0].name, "f0s0", 0.5),
        (BANKS[0].name, "f0s1", 1.0),
    ]
    assert "training: 2/8 heads and 1/4 banks done, epoch 5-9 of at most 20" in capsys.readouterr().out

    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = {
        ("acw_heads_done", BANKS[0].name): 2.0,
        ("acw_heads_done", BANKS[1].name): 0.0,
        ("acw_images_per_second", BANKS[1].name): 50.0,
        ("acw_validation_ig", BANKS[1].name): 0.75,
    }
    end = time.monotonic() + 60
    while not (found := scrape(port, tmp_path.name)).items() >= wanted.items() and time.monotonic() < end:
        time.sleep(1)
    assert found.items() >= wanted.items()


def scrape(port: int, run: str) -> dict[tuple[str, str], float]:
    """Our metrics of a run as a node offers them to Prometheus: by name and bank."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if match := re.fullmatch(r"ray_(acw_\w+)\{(.*)\} (\S+)", line):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            if tags["run"] == run:
                found[match[1], tags["bank"]] = float(match[3])
    return found


# --- As a user sees it -------------------------------------------------------------------------------------------


def acw_status(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("acw")), "status", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def test_a_finished_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = finished(tmp_path_factory.getbasetemp() / "jobs").job.folder
    shown, figures = acw_status(folder).stdout, json.loads(acw_status(folder, "--json").stdout)
    assert figures["state"] == "finished"
    assert {stage["state"] for stage in figures["stages"]} == {"done"}
    heads = stage_of(figures, "heads")
    assert (heads["done"], heads["banks"], heads["minutes_left"]) == (4, 2, 0)
    assert f"validation IG {heads['validation_ig']:.4f} bit" in shown
    for unit in heads["units"]:
        assert re.search(rf"{unit['name']} +done +2/2 done, epoch {unit['epochs']} of", shown)
    events = event_log.events(folder)
    assert [event["stage"] for event in events if event["event"] == "stage finished"] == [
        "features",
        "training",
        "aggregation",
    ]
    assert {event["step"] for event in events if event["event"] == "cost"} == {"features", "heads", "scores"}
    assert costs.noted(folder)["scores"]["cores"] >= 1
    epochs = [(event["bank"], event["epoch"]) for event in events if event["event"] == "epoch"]
    assert len(epochs) == len(set(epochs)) == sum(unit["epochs"] for unit in heads["units"])
    assert all(event["run"] == folder.name for event in events)


def test_a_folder_of_no_run_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "some-run").mkdir()
    (tmp_path / "some-run" / "recipe.json").write_text("{}", encoding="utf-8")
    for folder, remedy in ((tmp_path, "some-run"), (tmp_path / "nowhere", "run: FOLDER")):
        result = acw_status(folder)
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert str(folder) in line
        assert remedy in line


def test_a_look_needs_no_torch() -> None:
    program = "import sys, acw.training.status, acw.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_recipes_of_other_versions_can_be_read(tmp_path: Path) -> None:
    fields = dataclasses.asdict(RECIPE) | {"a_field_of_tomorrow": 1}
    del fields["joint"]
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": fields}), encoding="utf-8")
    assert stage_of(status(tmp_path, 0.0), "heads")["total"] == 8
