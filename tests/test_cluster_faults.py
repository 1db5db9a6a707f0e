"""What befalls a cluster of three nodes in the midst of a run: the run ends as an undisturbed one, or in one clear line
after which the same command ends it. Nothing that was finished is done again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_runs import Run, assert_same_heads, assert_same_scores, command, displays, elsewhere, finished, histories
from servers import free_port, mlflow_server, wait_until_it_answers
from test_faults import assert_whole, features_of
from three_nodes import NODE, PATIENCE, ThreeNodes, fill, finish, head, running, small_disk, submission, wait_for
from tiny_training import RECIPE, train_alone

from acw.recipes import derive

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes to kill in /proc"),
]

TINY = Path(__file__).with_name("tiny_training.py")
EPOCHS = 30
# No rate falls, so all epochs are trained.
WORDS = (f"max_epochs={EPOCHS}", f"lr_patience={EPOCHS}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing disturbed, of four banks of 15 heads, without Ray."""
    folder = tmp_path_factory.mktemp("alone")
    train_alone(derive(RECIPE, dict(word.split("=") for word in WORDS)), folder)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.getbasetemp() / "jobs")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ThreeNodes]:
    with ThreeNodes(tmp_path / "cluster.log") as three_nodes:
        yield three_nodes


@pytest.fixture
def folder(tmp_path: Path, alone: Path) -> Path:
    """A run's folder in which the features are."""
    shutil.copytree(alone / "features", tmp_path / "run" / "features")
    return tmp_path / "run"


def training(folder: Path, *words: str) -> list[str]:
    return [sys.executable, str(TINY), str(folder), *WORDS, *words]


def wait_until_it_trains(folder: Path, job: subprocess.Popen[bytes], log: Path) -> dict[str, list[dict]]:
    """Until some banks have epochs behind them and more before them; their histories."""

    def under_way() -> bool:
        assert job.poll() is None, log.read_text(encoding="utf-8")
        return sum(2 <= len(history) < EPOCHS - 5 for history in histories(folder).values()) >= 2

    wait_for(under_way, "for two banks to have some epochs")
    return histories(folder)


def assert_equals_undisturbed(folder: Path, before: dict[str, list[dict]], alone: Path) -> None:
    after = histories(folder)
    assert {len(history) for history in after.values()} == {EPOCHS}
    for bank, history in before.items():
        # The seconds in it say that no epoch was trained again.
        assert after[bank][: len(history)] == history
    assert_same_heads(folder, alone)


# --- Workers and nodes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["worker", "node"])
def test_lost_in_training(cluster: ThreeNodes, folder: Path, tmp_path: Path, alone: Path, lost: str) -> None:
    log = tmp_path / "log"
    with running(training(folder), log, cluster.environment) as job:
        before = wait_until_it_trains(folder, job, log)
        workers = cluster.workers("RayTrainWorker")
        assert len(workers) == 3
        pid, node = next((pid, node) for pid, node in workers.items() if node != cluster.head)
        if lost == "worker":
            os.kill(pid, signal.SIGKILL)
        else:
            cluster.remove(node)
        assert job.wait(timeout=2 * PATIENCE) == 0, log.read_text(encoding="utf-8")
    assert_equals_undisturbed(folder, before, alone)
    said = log.read_text(encoding="utf-8")
    assert "training: a worker was lost; goes on from the checkpoints" in said
    for history in histories(folder).values():
        for entry in history:
            assert f"on node {entry['node']}, device {entry['device']}" in said


def test_a_cluster_that_is_too_small_is_worked_with_and_grown_into(folder: Path, tmp_path: Path, alone: Path) -> None:
    log = tmp_path / "log"
    with (
        ThreeNodes(tmp_path / "cluster.log", [NODE]) as cluster,
        running(training(folder, "workers=2"), log, cluster.environment) as job,
    ):
        wait_for(lambda: histories(folder), "for an epoch")
        # Held until there is room, as a quick machine would be done by then.
        (worker,) = cluster.workers("RayTrainWorker")
        os.kill(worker, signal.SIGSTOP)
        cluster.add()
        wait_for(lambda: "regroups" in log.read_text(encoding="utf-8"), "for the new node to be seen")
        os.kill(worker, signal.SIGCONT)
        assert job.wait(timeout=2 * PATIENCE) == 0, log.read_text(encoding="utf-8")
    said = log.read_text(encoding="utf-8")
    assert "asked for 2 workers, the cluster has room for 1" in said
    assert "room for 2 workers instead of 1: regroups" in said
    assert_equals_undisturbed(folder, {}, alone)
    assert len({entry["node"] for history in histories(folder).values() for entry in history}) == 2


def test_banks_share_gpus_on_nodes_of_several_sizes(folder: Path, tmp_path: Path, alone: Path) -> None:
    """GPUs that Ray only pretends to have: a node with one core for its GPU, another with two for as many banks."""
    sizes = [NODE, {"num_cpus": 1, "num_gpus": 1}, {"num_cpus": 2, "num_gpus": 1}]
    log = tmp_path / "log"
    with ThreeNodes(tmp_path / "cluster.log", sizes) as cluster:
        said = finish(training(folder, "workers=8", "gpus_per_worker=0.5"), log, cluster.environment)
    assert "asked for 8 workers, the cluster has room for 3" in said
    assert "4 banks on 3 workers of 1 CPU and 0.5 GPU" in said
    places = [(history[0]["node"], *history[0]["gpus"]) for history in histories(folder).values()]
    assert {len(place) for place in places} == {2}
    assert len({node for node, _ in places}) == 2, "the head has no GPU"
    for node, gpu in places:
        assert f"on node {node}, GPU {gpu}, device cpu" in said
    assert_equals_undisturbed(folder, {}, alone)


def test_a_node_lost_in_scoring(cluster: ThreeNodes, done: Run, tmp_path: Path) -> None:
    """With what its workers had computed in its memory."""
    root, log = tmp_path / "runs", tmp_path / "log"
    folder = features_of(done, root)
    shutil.copytree(done.job.folder / "banks", folder / "banks")
    shutil.copy(done.job.folder / "recipe.json", folder)
    with running(command("aggregate", *elsewhere(done.arguments, root)), log, cluster.environment) as job:
        wait_for(
            lambda: "averaging: " in log.read_text(encoding="utf-8") or job.poll() is not None,
            "for a part of the scores",
        )
        cluster.remove(next(node for node in cluster.nodes if node != cluster.head))
        assert job.wait(timeout=2 * PATIENCE) == 0, log.read_text(encoding="utf-8")
    assert_same_scores(folder, done.job.folder, 1e-6)


# --- Drivers and heads -------------------------------------------------------------------------------------------


def test_driver_killed_and_run_again(cluster: ThreeNodes, folder: Path, tmp_path: Path, alone: Path) -> None:
    """On the same cluster, where what the first had claimed must be free again."""
    log = tmp_path / "log"
    with running(training(folder), log, cluster.environment) as job:
        wait_until_it_trains(folder, job, log)
        job.kill()
        job.wait()
    before = histories(folder)
    assert any(len(history) < EPOCHS for history in before.values()), "killed too late to have interrupted anything"
    finish(training(folder), log, cluster.environment)
    assert_equals_undisturbed(folder, before, alone)


def test_head_stopped_and_job_submitted_again(folder: Path, tmp_path: Path, alone: Path) -> None:
    """All nodes are killed, the head first of all; another cluster takes their place."""
    before: dict[str, list[dict]] = {}
    for attempt in ("first", "second"):
        port, log = free_port(), tmp_path / f"{attempt}.log"
        with ThreeNodes(tmp_path / "cluster.log", [head(port), NODE, NODE]) as cluster:
            wait_until_it_answers(f"http://127.0.0.1:{port}/api/version")
            with running(submission(port, "--", *training(folder)), log, cluster.environment) as client:
                if attempt == "first":
                    wait_until_it_trains(folder, client, log)
                    cluster.stop()
                    assert client.wait(timeout=PATIENCE) != 0
                    before = histories(folder)
                    assert any(len(history) < EPOCHS for history in before.values())
                else:
                    assert client.wait(timeout=2 * PATIENCE) == 0, log.read_text(encoding="utf-8")
    assert_equals_undisturbed(folder, before, alone)


# --- Memory and disks --------------------------------------------------------------------------------------------


def test_object_stores_that_are_full(cluster: ThreeNodes, done: Run, tmp_path: Path) -> None:
    """Of all nodes, while the run trains and scores: what finds no place goes to Ray's folder on disk."""
    root, log = tmp_path / "runs", tmp_path / "log"
    folder = features_of(done, root)
    with cluster.full_stores(tmp_path / "hog.log") as hog:
        finish(command("pipeline", *elsewhere(done.arguments, root)), log, cluster.environment)
        assert hog.poll() is None, "it kept them full to the end"
    assert_same_heads(folder, done.job.folder)
    assert_same_scores(folder, done.job.folder, 1e-3)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    with small_disk(tmp_path / "disk", "8m") as place:
        yield place


def assert_one_line(said: str, *words: str) -> None:
    """That a job's last line is the only one about its end, and says those words."""
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("error: "), said
    assert "Traceback" not in said
    for word in words:
        assert word in last


def test_disk_full_in_training(cluster: ThreeNodes, folder: Path, disk: Path, tmp_path: Path, alone: Path) -> None:
    run, log = disk / "run", tmp_path / "log"
    shutil.copytree(folder, run)
    with running(training(run), log, cluster.environment) as job:
        wait_until_it_trains(run, job, log)
        ballast = fill(disk)
        assert job.wait(timeout=2 * PATIENCE) == 2, log.read_text(encoding="utf-8")
    assert_one_line(log.read_text(encoding="utf-8"), str(run / "banks"), "No space left on device", "free the disk")
    before = histories(run)
    assert any(len(history) < EPOCHS for history in before.values())
    assert not list(run.rglob("*.partial"))
    ballast.unlink()
    finish(training(run), log, cluster.environment)
    assert_equals_undisturbed(run, before, alone)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_disk_full_in_extraction(cluster: ThreeNodes, disk: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    dataset = displays(tmp_path / "set", ("Colour", "Contour", "Text"), 22)
    arguments = ["demo", "--backbones", "lite0", "--workers", "2", *dataset, "--root", str(disk)]
    resize(disk, "24m")  # room for one of five shards
    said = finish(command("extract", *arguments), log, cluster.environment, status=2)
    assert_one_line(said, str(disk / "features"), "No space left on device", "free the disk")
    before = {path: path.stat().st_mtime_ns for path in disk.glob("features/*/shard-*.safetensors")}
    assert not list(disk.rglob("*.partial"))
    resize(disk, "128m")
    finish(command("extract", *arguments), log, cluster.environment)
    assert_whole(disk)
    assert {path: path.stat().st_mtime_ns for path in before} == before


# --- The MLflow server -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", ["for a minute", "for good"])
def test_mlflow_server_away_while_a_run_is_logged(done: Run, tmp_path: Path, away: str) -> None:
    """Killed when a part is logged. If it is back in time it is not missed; else a rerun registers what is there."""
    import mlflow

    root, log, port = tmp_path / "runs", tmp_path / "log", free_port()
    folder = features_of(done, root)
    shutil.copytree(done.job.folder / "banks", folder / "banks")
    shutil.copy(done.job.folder / "recipe.json", folder)
    banks = {path: path.stat().st_mtime_ns for path in folder.glob("banks/*")}
    uri = f"http://127.0.0.1:{port}"
    job_line = command("aggregate", *elsewhere(done.arguments, root), "--tracking-uri", uri)
    patience = {} if away == "for a minute" else {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
    with contextlib.ExitStack() as first:
        first.enter_context(mlflow_server(tmp_path, port))
        with running(job_line, log, os.environ | patience) as job:
            wait_for(lambda: (folder / "weights.png").exists() or job.poll() is not None, "for the run to be logged")
            assert job.poll() is None, log.read_text(encoding="utf-8")
            first.close()  # kills the server
            if away == "for a minute":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    assert job.wait(timeout=60) == 0, log.read_text(encoding="utf-8")
            else:
                assert job.wait(timeout=PATIENCE) == 2, log.read_text(encoding="utf-8")
                assert_one_line(
                    log.read_text(encoding="utf-8"), uri, "MLflow server has gone away", "no head is trained again"
                )
            with mlflow_server(tmp_path, port):
                if away == "for a minute":
                    assert job.wait(timeout=2 * PATIENCE) == 0, log.read_text(encoding="utf-8")
                else:
                    finish(job_line, log)
                client = mlflow.MlflowClient(uri)
                (version,) = client.search_model_versions("name = 'acw'")
                parent = client.get_run(version.run_id)
                assert parent.info.status == "FINISHED"
                runs = client.search_runs([parent.info.experiment_id])
                assert len(runs) == 1 + len(banks)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("banks/*")} == banks
    assert_same_scores(folder, done.job.folder, 1e-6)
