"""Work for the cluster's cores: what processes that have done it keep, until they are ended."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from acw.cluster.tasks import end_idle_workers, submit


@pytest.mark.usefixtures("ray_local")
def test_processes_that_wait_are_ended_and_others_take_over() -> None:
    def pid_after(seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    pids = {result() for result in [submit(pid_after, 1.0) for _ in range(2)]}
    assert len(pids) == 2
    end_idle_workers()
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"{alive} of {pids} are still there"
        time.sleep(0.1)
    assert submit(pid_after, 0.0)() not in pids
