"""How a group of workers ends that is lost again and again, and what is said of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.train import TrainingFailedError

from acw.cluster.allocation import Allocation
from acw.storage.errors import UserError
from acw.training import worker_group
from acw.training.worker_group import complete, new_coordinator

pytestmark = pytest.mark.faults  # of a minute and a half

WORKER = Allocation(1, 1, 0)


def ending(how: str) -> Callable[[dict], None]:
    def loop(config: dict) -> None:
        if how == "by a mistake":
            raise ArithmeticError("a mistake of the program's")
        if how == "by a kill":
            time.sleep(3)  # of a worker that dies while its group starts, Ray would not give the places back
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("features: are damaged; delete them")

    return loop


@pytest.mark.parametrize(
    ("how", "kind", "line"),
    [
        ("by a mistake", TrainingFailedError, "a mistake of the program's"),
        ("by a kill", UserError, "^training: 2 times in a row the workers were lost"),
        ("by the user's data", UserError, "^features: are damaged; delete them$"),
    ],
)
def test_a_group_s_end_is_told(
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
    kind: type[Exception],
    line: str,
) -> None:
    """A mistake with its traceback, what the user can mend in one line; nothing is said of losses where none was."""
    monkeypatch.setattr(worker_group, "MAX_FAILURES", 1)
    with pytest.raises(kind, match=line):
        complete(ending(how), {}, lambda: {"bank": 1.0}, lambda: 0, new_coordinator(), WORKER)
    assert ("goes on from the checkpoints" in capsys.readouterr().out) == (how != "by the user's data")


def test_who_finds_no_places_takes_fewer(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside others who work on the cluster: half as many as its nodes hold."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    coordinator, path = new_coordinator(), tmp_path / "done"

    def loop(config: dict) -> None:
        name = ray.get(coordinator.next_unit.remote(0))
        path.write_text(name, encoding="utf-8")

    others = placement_group([{"CPU": 1}])
    assert others.wait(60)
    try:
        left = lambda: {} if path.exists() else {"a": 1.0, "b": 1.0}  # noqa: E731
        complete(loop, {}, left, lambda: 0, coordinator, Allocation(2, 1, 0))
    finally:
        remove_placement_group(others)
    assert "training: no room for 2 workers; goes on from the checkpoints" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") in ("a", "b")
