"""How work is spread: over the cores of several nodes, over GPUs and their parts, over less than was asked for."""

from __future__ import annotations

import os
from typing import Any

import pytest
from three_nodes import wait_for

from acw.cluster import allocation
from acw.cluster.allocation import GPUS_TO_START, Allocation, Demand, allocate, capacity, wait_for_capacity
from acw.cluster.errors import user_error
from acw.storage.errors import UserError


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


def test_gpus_are_used_where_there_are_any(nodes: Any) -> None:
    nodes((16, 2), (16, 2))
    assert allocate(60, 0, "auto") == Allocation(4, 1, 1)
    assert allocate(3, 0, "gpu") == Allocation(3, 1, 1)
    assert allocate(60, 0, "cpu").gpus == 0


def test_workers_share_gpus_as_far_as_their_nodes_cores_go(nodes: Any) -> None:
    nodes((16, 2), (16, 2))
    assert allocate(60, 0, "auto", 0.25) == Allocation(16, 1, 0.25)
    # A head without GPUs, a node with fewer cores than its GPUs could serve, and one GPU for a third of it each.
    nodes((8, 0), (3, 1), (16, 2))
    assert allocate(60, 0, "auto", 0.25) == Allocation(11, 1, 0.25)
    assert allocate(60, 0, "auto", 0.3333) == Allocation(9, 1, 0.3333)
    # Two of 0.6 do not fit on one GPU, though on two GPUs there would be 0.8 left.
    assert allocate(60, 0, "auto", 0.6) == Allocation(3, 1, 0.6)


def test_a_cluster_smaller_than_the_request_works_with_what_it_has(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes((4, 0), (2, 0))
    assert allocate(60, 50, "auto") == Allocation(6, 1, 0)
    assert "asked for 50 workers, the cluster has room for 6" in capsys.readouterr().out
    assert allocate(60, 6, "auto") == Allocation(6, 1, 0)
    assert capsys.readouterr().out == ""
    # A cluster may grow: it is asked for all of them, and begins with those that it has.
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    nodes((0, 0), (4, 1), (4, 1))
    asked = allocate(60, 8, "gpu")
    assert asked == Allocation(8, 1, 1)
    assert capacity(asked) == 2
    assert "asked for 8 workers, the cluster has room for 2" in capsys.readouterr().out


def test_demanded_gpus_are_started_on_a_cluster_and_refused_on_a_laptop(
    nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[Allocation] = []
    monkeypatch.setattr(allocation, "wait_for_capacity", waited.append)
    nodes((0, 0))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert allocate(60, 0, "gpu") == Allocation(GPUS_TO_START, 1, 1)
    assert allocate(60, 0, "gpu", 0.5) == Allocation(2 * GPUS_TO_START, 1, 0.5)
    assert allocate(60, 7, "gpu") == Allocation(7, 1, 1)
    assert len(waited) == 3, "it starts with the first of them"
    with pytest.raises(UserError, match="no CPU"):
        allocate(60, 0, "auto")
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match="no GPU on this machine"):
        allocate(60, 0, "gpu")


def test_room_that_never_comes_is_told_in_one_line(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocation, "PATIENCE_SECONDS", 1.5)
    with pytest.raises(UserError, match=r"no node with 3 CPU came within .* give --accelerator cpu"):
        wait_for_capacity(Allocation(1, 3, 0))
    assert "waiting for the cluster to start a node with 3 CPU (0 min)" in capsys.readouterr().out
    assert wait_for_capacity(Allocation(8, 1, 0)) == 2


def test_what_befell_the_cluster_is_told_in_one_line(ray_local: None) -> None:
    import ray

    @ray.remote(max_retries=1)
    def dies() -> None:
        os._exit(1)

    with pytest.raises(ray.exceptions.WorkerCrashedError) as caught:
        ray.get(dies.remote())
    told = user_error(caught.value)
    assert told is not None
    assert "workers were lost again and again" in str(told)
    assert "\n" not in str(told)
    assert user_error(ValueError("a mistake of ours")) is None


def test_a_demand_says_when_there_was_room(ray_local: None) -> None:
    too_large, small = Demand(Allocation(1, 3, 0)), Demand(Allocation(1, 1, 0))
    assert not small.renew(1)
    assert not too_large.renew(1)
    wait_for(lambda: small.renew(1), "for the place of a worker")
    assert not too_large.renew(1)
    small.end()
    too_large.end()
