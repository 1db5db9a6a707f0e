"""How work is spread: over the cores of several nodes, over GPUs, and over a machine that has none."""

from __future__ import annotations

from typing import Any

import pytest

from acw.cluster import GPUS_TO_START, Allocation, allocate
from acw.storage import UserError


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes Ray say that the cluster has nodes of so many (cores, GPUs)."""
    import ray

    def become(*sizes: tuple[int, int]) -> None:
        alive = [{"Alive": True, "Resources": {"CPU": float(cores), "GPU": float(gpus)}} for cores, gpus in sizes]
        total = {"CPU": float(sum(c for c, _ in sizes)), "GPU": float(sum(g for _, g in sizes))}
        monkeypatch.setattr(ray, "nodes", lambda: alive)
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)

    return become


def test_cores_are_shared_within_nodes(nodes: Any) -> None:
    nodes((8, 0))
    assert allocate(4, 0, "auto") == Allocation(4, 2, 0)
    assert allocate(60, 0, "cpu") == Allocation(8, 1, 0)
    nodes((4, 0), (2, 0))
    # Three workers of two cores fit, two on the larger node and one on the smaller; four take one core each.
    assert allocate(3, 0, "auto") == Allocation(3, 2, 0)
    assert allocate(4, 0, "auto") == Allocation(4, 1, 0)
    assert allocate(60, 50, "auto") == Allocation(6, 1, 0)


def test_gpus_are_used_where_there_are_any(nodes: Any) -> None:
    nodes((16, 2), (16, 2))
    assert allocate(60, 0, "auto") == Allocation(4, 1, 1)
    assert allocate(3, 0, "gpu") == Allocation(3, 1, 1)
    assert allocate(60, 0, "cpu").gpus == 0


def test_demanded_gpus_are_started_on_a_cluster_and_refused_on_a_laptop(
    nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes((0, 0))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert allocate(60, 0, "gpu") == Allocation(GPUS_TO_START, 1, 1)
    assert allocate(60, 7, "gpu") == Allocation(7, 1, 1)
    with pytest.raises(UserError, match="no CPU"):
        allocate(60, 0, "auto")
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match="no GPU on this machine"):
        allocate(60, 0, "gpu")
