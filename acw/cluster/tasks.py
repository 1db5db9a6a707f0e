"""Work for one core of the cluster, while this process goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
LAST_SECONDS = 1.0  # of a process's last task: so long that no other process does two of them
PATIENCE_SECONDS = 15.0


def submit(function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
    """Has one core of the cluster call a function, a module's own, with these arguments, while this process goes on.

    Arguments may be what `ray.put` gave. What is returned waits for the result, or raises what the function raised.
    """
    import ray

    reference = ray.remote(num_cpus=1, max_retries=3)(_call).remote(function, *arguments)
    return lambda: ray.get(reference)


def _call(function: Callable[..., T], *arguments: Any) -> T:
    from acw.cluster.process import compute_with, give_back_when_idle

    compute_with(1)
    try:
        return function(*arguments)
    finally:
        give_back_when_idle()


def end_idle_workers() -> None:
    """Ends the processes that wait for tasks and, as Ray keeps them for the next ones, keep what they have loaded: some
    600 MiB after scoring. For when all that follows is done by other workers.

    By a task a core, which goes to a process that waits and is its last. Cores that others have are soon given up.
    """
    import ray

    last = ray.remote(num_cpus=1, max_calls=1, scheduling_strategy="SPREAD")(_wait)
    cores = int(ray.cluster_resources().get("CPU", 0))
    tasks = [last.remote(LAST_SECONDS) for _ in range(cores)]
    for waiting in ray.wait(tasks, num_returns=len(tasks), timeout=PATIENCE_SECONDS)[1]:
        ray.cancel(waiting)


def _wait(seconds: float) -> None:
    time.sleep(seconds)
