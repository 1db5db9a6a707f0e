"""kill -9 in the midst of a job, then the same command again: the result is that of an uninterrupted run.

What befalls a cluster of several nodes is in test_cluster_faults.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from job_runs import EPOCHS, Run, assert_same_heads, command, displays, elsewhere, finished, histories, succeed
from three_nodes import PATIENCE, fill, processes, running, small_disk, wait_for
from tiny_training import BANK
from tiny_training import RECIPE as TINY

from acw.features.store import intact
from acw.storage.errors import UserError
from acw.storage.files import write_atomic
from acw.training.bank import BankState

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes to kill in /proc")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.getbasetemp() / "jobs")


def features_of(done: Run, root: Path) -> Path:
    """Makes a root in which the run's features are extracted and nothing is trained; the run's folder there."""
    # Hard links: files of a store are only ever replaced, never written to.
    shutil.copytree(done.job.root / "features", root / "features", copy_function=os.link)
    folder = root / done.job.folder.name
    folder.mkdir()
    shutil.copy(done.job.folder / "features.json", folder)
    return folder


def kill_driver(
    script: str, arguments: Sequence[str], log: Path, when: Callable[[], bool], by: signal.Signals = signal.SIGKILL
) -> None:
    """Starts a job and ends its driver as soon as a condition holds; its other processes have to end by themselves."""
    with running(command(script, *arguments), log) as job:
        wait_for(lambda: when() or job.poll() is not None, "for the moment to kill the driver")
        assert job.poll() is None, log.read_text(encoding="utf-8")
        job.send_signal(by)
        assert job.wait(timeout=PATIENCE) != 0, log.read_text(encoding="utf-8")
        # Ray's two idle agents go a minute after their raylet; `running` ends them by their pids.
        agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
        wait_for(lambda: all(line.startswith(agents) for line in processes(job.pid).values()), "for Ray to end")


def kill_worker(script: str, arguments: Sequence[str], log: Path, name: str, when: Callable[[], bool]) -> None:
    """Starts a job, kills one of its Ray workers as soon as a condition holds, and expects the job to succeed."""
    with running(command(script, *arguments), log) as job:
        wait_for(lambda: when() or job.poll() is not None, "for the moment to kill a worker")
        victims = [pid for pid, line in processes(job.pid).items() if name in line]
        assert victims, f"no {name} among {processes(job.pid)}: {log.read_text(encoding='utf-8')}"
        os.kill(victims[0], signal.SIGKILL)
        assert job.wait(timeout=2 * PATIENCE) == 0, log.read_text(encoding="utf-8")


def trains(folder: Path) -> Callable[[], bool]:
    """Whether a bank has some epochs behind it and more before it."""
    return lambda: any(2 <= len(history) < EPOCHS for history in histories(folder).values())


def assert_kept(before: dict[str, list[dict]], folder: Path) -> None:
    """No epoch was done again that was noted before: an epoch's entry holds the very seconds that it took."""
    after = histories(folder)
    for bank, history in before.items():
        assert after[bank][: len(history)] == history
    assert {len(history) for history in after.values()} == {EPOCHS}


# --- Training ----------------------------------------------------------------------------------------------------


def test_driver_killed_in_training(done: Run, tmp_path: Path) -> None:
    """From nothing on in another root: so this also says that the same recipe gives the same heads."""
    root, folder = tmp_path / "runs", tmp_path / "runs" / done.job.folder.name
    arguments = elsewhere(done.arguments, root)
    kill_driver("pipeline", arguments, tmp_path / "log", trains(folder))
    before = histories(folder)
    assert any(len(history) < EPOCHS for history in before.values()), "killed too late to have interrupted anything"
    succeed("pipeline", *arguments)
    assert_kept(before, folder)
    assert_same_heads(folder, done.job.folder)


@pytest.mark.faults
def test_worker_killed_in_training(done: Run, tmp_path: Path) -> None:
    """One bank is there already, as if an earlier run had ended between the two."""
    root = tmp_path / "runs"
    folder = features_of(done, root)
    first, second = sorted((done.job.folder / "banks").glob("*.safetensors"))
    (folder / "banks").mkdir()
    shutil.copy(first, folder / "banks")
    before: dict[str, list[dict]] = {}

    def second_trains() -> bool:
        before.update(histories(folder))
        return 2 <= len(before.get(second.stem, [])) < EPOCHS

    kill_worker("train", elsewhere(done.arguments, root), tmp_path / "log", "RayTrainWorker", second_trains)
    assert_kept(before, folder)
    assert_same_heads(folder, done.job.folder)


def test_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    """The one before stays, nothing half-written does, and safetensors' and torch's own errors are told in one line."""
    with small_disk(tmp_path / "disk", "2m") as disk:
        path, state = disk / "bank.safetensors", BankState.new(TINY, BANK, 12)
        state.save(path)
        ballast = fill(disk)
        state.history.append({"epoch": 0})
        with pytest.raises(UserError, match=r"bank\.safetensors: cannot be written \(No space left.*free the disk"):
            state.save(path)
        with pytest.raises(UserError, match=r"model\.pth: cannot be written \(No space left"):
            write_atomic(disk / "model.pth", lambda temporary: torch.save(state.parameters, temporary))
        assert {file.name for file in disk.iterdir()} == {path.name, ballast.name}
        assert BankState.load(path).history == []


# --- Extraction and aggregation ----------------------------------------------------------------------------------


@pytest.fixture
def extraction(tmp_path: Path) -> list[str]:
    """Arguments of a job with five shards of features to extract."""
    dataset = displays(tmp_path / "set", ("Colour", "Contour", "Text"), 22)
    return ["demo", "--backbones", "lite0", "--workers", "2", *dataset, "--root", str(tmp_path / "runs")]


def shards(root: Path) -> list[Path]:
    """Shards whose checksum is there too."""
    return [path.with_suffix(".safetensors") for path in sorted(root.glob("features/*/shard-*.sha256"))]


def assert_whole(root: Path) -> None:
    (manifest,) = root.glob("features/*/manifest.json")
    assert json.loads(manifest.read_text(encoding="utf-8"))["images"] == 66
    found = shards(root)
    assert len(found) == 5
    assert all(intact(manifest.parent, number) for number in range(len(found)))


@pytest.mark.faults
def test_worker_killed_in_extraction(extraction: list[str], tmp_path: Path) -> None:
    root = tmp_path / "runs"
    kill_worker("extract", extraction, tmp_path / "log", "ray::write", lambda: bool(shards(root)))
    assert_whole(root)


@pytest.mark.faults
def test_driver_killed_in_extraction(extraction: list[str], tmp_path: Path) -> None:
    root = tmp_path / "runs"
    kill_driver("extract", extraction, tmp_path / "log", lambda: bool(shards(root)))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in shards(root)}
    assert 0 < len(before) < 5
    succeed("extract", *extraction)
    assert_whole(root)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in before} == before


@pytest.mark.faults
@pytest.mark.parametrize("seen", ["category_weights.csv", "evaluation.json", "curves.png"])
def test_driver_killed_in_aggregation(done: Run, tmp_path: Path, seen: str) -> None:
    """Before the scores, after them, and while MLflow is written."""
    import mlflow

    root = tmp_path / "runs"
    folder = features_of(done, root)
    shutil.copytree(done.job.folder / "banks", folder / "banks")
    shutil.copy(done.job.folder / "recipe.json", folder)
    arguments = elsewhere(done.arguments, root)
    kill_driver("aggregate", arguments, tmp_path / "log", lambda: (folder / seen).exists())
    assert not (folder / "registration.json").exists()
    succeed("aggregate", *arguments)
    mine, theirs = (
        json.loads((run / "evaluation.json").read_text(encoding="utf-8")) for run in (folder, done.job.folder)
    )
    for name, entry in theirs["models"].items():
        for metric, score in entry["overall"].items():
            assert mine["models"][name]["overall"][metric]["mean"] == pytest.approx(score["mean"], abs=1e-6)
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'acw'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert len(runs) == 1 + len(histories(folder))
    (version,) = client.search_model_versions("name = 'acw'")
    assert version.run_id == parent.info.run_id
    assert client.get_model_version_by_alias("acw", "champion").version == version.version
