"""The whole job as on a real cluster: `ray job submit` to three nodes, from S3 to S3, an MLflow server, a node lost."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_runs import (
    JOBS,
    RECIPE,
    Histories,
    assert_same_heads,
    assert_same_scores,
    called,
    finished,
    histories,
    succeed,
)
from seaweed import BUCKET, KEY, SECRET, SeaweedFS
from servers import free_port, mlflow_server, wait_until_it_answers
from three_nodes import NODE, PATIENCE, ThreeNodes, finish, head, running, submission, wait_for

import acw
from acw.storage import s3
from acw.storage.addresses import local
from acw.storage.files import fetch, listing

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes to kill in /proc"),
]
REPOSITORY = JOBS.parent
# Of scores: heads are equal to as much, and log-densities to ten times that.
TOLERANCE = 1e-6


@pytest.fixture
def root(server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of the bucket; what this process and all that it starts need to know to reach it."""
    server.used_by(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return f"s3://{BUCKET}/whole"


def in_s3(folder: Path) -> Histories:
    """Per bank what its checkpoint in S3 says about the epochs so far."""
    for path in listing(folder / "banks"):
        fetch(path)
    return histories(folder)


def test_submitted_to_three_nodes_from_s3_to_s3_with_a_node_lost(
    root: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is the local run's. On one machine the nodes share their copies of what is in S3."""
    done = finished(tmp_path_factory.getbasetemp() / "jobs")
    pictures, table = (done.arguments[done.arguments.index(name) + 1] for name in ("--dataset", "--fixations"))
    succeed("stage", pictures, f"{root}/tiny", "--fixations", table)
    run = f"{root}/runs/{called(done, 'tiny')}"
    port, dashboard, log = free_port(), free_port(), tmp_path / "log"
    job = ["python", "jobs/pipeline.py", *RECIPE, "--dataset", f"{root}/tiny"]
    job += ["--fixations", f"{root}/tiny/fixations.csv", "--root", f"{root}/runs"]
    job += ["--tracking-uri", f"http://127.0.0.1:{port}"]
    submit = submission(dashboard, "--working-dir", str(REPOSITORY), "--", *job)
    with (
        mlflow_server(tmp_path, port, f"{root}/artifacts"),
        ThreeNodes(tmp_path / "cluster.log", [head(dashboard), NODE, NODE]) as cluster,
    ):
        wait_until_it_answers(f"http://127.0.0.1:{dashboard}/api/version")
        with running(submit, log, cluster.environment) as client:
            before = _until_half_way(local(run), client, log)
            node = next(node for node in cluster.workers("RayTrainWorker").values() if node != cluster.head)
            cluster.remove(node)
            assert client.wait(timeout=4 * PATIENCE) == 0, log.read_text(encoding="utf-8")
        said = log.read_text(encoding="utf-8")
        assert "training: a worker was lost; goes on from the checkpoints" in said
        assert f"{run}/evaluation.json" in said
        again = finish(submit, log, cluster.environment)
        assert f"{run}/evaluation.json" in again, "submitted again, it only shows what is there"
        assert "training" not in again
        after = in_s3(local(run))
        for bank, history in before.items():
            assert after[bank][: len(history)] == history, "finished epochs are not done again"
        image = done.job.dataset.stimuli[0].pixels()
        _assert_equals(done.job.folder, run, image)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        registered = acw.load("models:/acw@champion").predict(image).log_density
        np.testing.assert_array_equal(registered, acw.load(run).predict(image).log_density)
    objects = [entry.key for entry in s3.listing(root)]
    assert any("/artifacts/" in key and key.endswith("report.html") for key in objects)
    for secret in (KEY, SECRET):
        assert secret not in said


def _until_half_way(folder: Path, client: Any, log: Path) -> Histories:
    """The banks' histories, as soon as one has some epochs behind it and more before it."""

    def under_way() -> bool:
        assert client.poll() is None, log.read_text(encoding="utf-8")
        return any(len(history) >= 2 for history in in_s3(folder).values())

    wait_for(under_way, "for some epochs", 2 * PATIENCE)
    return in_s3(folder)


def _assert_equals(reference: Path, run: str, image: np.ndarray) -> None:
    here = local(run)
    for path in listing(here):
        fetch(path)
    assert_same_heads(here, reference)
    assert_same_scores(here, reference, TOLERANCE)
    expected = acw.load(reference).predict(image).log_density
    np.testing.assert_allclose(acw.load(run).predict(image).log_density, expected, atol=1e-5)
