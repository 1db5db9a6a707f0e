"""Work for one core of the cluster, while this process goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


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
