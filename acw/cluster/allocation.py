"""How many workers of which size fit on the cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from acw.cluster.joining import on_cluster
from acw.storage.errors import UserError

# How many GPUs a job asks of an autoscaling cluster that has none yet; --workers asks for another number.
GPUS_TO_START = 4
# Until a cluster has started the first node that it was asked for: spot machines with a GPU may take their time.
PATIENCE_SECONDS = 20 * 60.0
WAITING_SECONDS = 60.0


@dataclass(frozen=True)
class Allocation:
    """What a pool of worker processes asks of the cluster; per worker `cpus` and `gpus`, which may be a fraction."""

    workers: int
    cpus: int
    gpus: float

    def __str__(self) -> str:
        return f"{self.workers} workers of {self.cpus} CPU and {self.gpus:g} GPU"


def wants_gpus(accelerator: str) -> bool:
    """Whether work goes to GPUs: `gpu` always, `cpu` never, `auto` where the cluster has any now.

    Raises UserError for `gpu` on a Ray that was started here and has none; a cluster's autoscaler may bring them.
    """
    import ray

    present = ray.cluster_resources().get("GPU", 0) > 0
    if accelerator == "gpu" and not present and not on_cluster():
        raise UserError("no GPU on this machine; submit the job to a cluster that has some, or give --accelerator cpu")
    return accelerator == "gpu" or (accelerator == "auto" and present)


def allocate(tasks: int, workers: int, accelerator: str, gpus_per_worker: float = 1.0) -> Allocation:
    """Workers that run side by side for `tasks` tasks: `workers` of them, or as many as there is room for (0).

    gpus_per_worker: 1, or a whole fraction of one, so that several workers share a GPU. Cores are shared out evenly
    within each node. Where there is room for fewer than are asked for, says so; more than there is room for are given
    only on a cluster, which may grow: it works with those that it has until then (`capacity`).
    Where GPUs are demanded and none is there yet, GPUS_TO_START are, and the first is waited for; raises UserError if
    none comes within PATIENCE_SECONDS.
    """
    if wants_gpus(accelerator):
        worker = Allocation(1, 1, gpus_per_worker)
        here = capacity(worker)
        count = min(tasks, workers or here or GPUS_TO_START * round(1 / gpus_per_worker))
    else:
        cores = [int(node.get("CPU", 0)) for node in _nodes()]
        if not sum(cores):
            raise UserError(
                "the Ray cluster has no CPU to work on; add a node, or give --accelerator gpu to have one started"
            )
        here = sum(cores)
        count = min(tasks, workers or here)
        fitting = min(count, here)
        cpus = max(c for c in range(1, max(cores) + 1) if c == 1 or sum(n // c for n in cores) >= fitting)
        worker = Allocation(1, cpus, 0)
    if count > here > 0:
        print(f"asked for {workers or count} workers, the cluster has room for {here}: they do the work", flush=True)
    result = Allocation(count if on_cluster() else min(count, here), worker.cpus, worker.gpus)
    if not here:
        wait_for_capacity(result)
    return result


def capacity(allocation: Allocation) -> int:
    """How many workers of an allocation's size the cluster's nodes hold at present, were nothing else on them."""

    def of(node: Mapping[str, float]) -> int:
        by_cores = int(node.get("CPU", 0)) // allocation.cpus
        # A worker's part is of one GPU.
        return min(by_cores, int(node.get("GPU", 0)) * int(1 / allocation.gpus)) if allocation.gpus else by_cores

    return sum(map(of, _nodes()))


def wait_for_capacity(allocation: Allocation) -> int:
    """Asks the cluster for the workers of an allocation; the capacity for them as soon as there is any.

    Raises UserError if there is none within PATIENCE_SECONDS.
    """
    demand, start = Demand(allocation), time.monotonic()
    what = f"{allocation.cpus} CPU" + (f" and {allocation.gpus:g} GPU" if allocation.gpus else "")
    shown = 0.0
    while not (here := capacity(allocation)):
        demand.renew(allocation.workers)
        waited = time.monotonic() - start
        if waited > PATIENCE_SECONDS:
            demand.end()
            raise UserError(
                f"no node with {what} came within {PATIENCE_SECONDS / 60:.0f} min; `ray status` says what the cluster "
                "tried: add one and run the command again, or give --accelerator cpu"
            )
        if waited >= shown:
            print(f"waiting for the cluster to start a node with {what} ({waited / 60:.0f} min)", flush=True)
            shown += WAITING_SECONDS
        time.sleep(1.0)
    demand.end()
    return here


class Demand:
    """Tasks that do nothing but ask for the resources of a worker: for as long as they wait, the autoscaler knows of
    them, and when one has run, the cluster had the capacity."""

    def __init__(self, allocation: Allocation) -> None:
        import ray

        @ray.remote(num_cpus=allocation.cpus, num_gpus=allocation.gpus, max_retries=0)
        def one_worker() -> None:
            pass

        self._task = one_worker
        self._waiting: list[Any] = []

    def renew(self, missing: int) -> bool:
        """Keeps so many waiting; whether one has run since the last call."""
        import ray

        before = len(self._waiting)
        if self._waiting:
            _, self._waiting = ray.wait(self._waiting, num_returns=before, timeout=0)
        ran = len(self._waiting) < before
        self._waiting += [self._task.remote() for _ in range(missing - len(self._waiting))]
        return ran

    def end(self) -> None:
        import ray

        for task in self._waiting:
            ray.cancel(task)
        self._waiting = []


def location_of(allocation: Allocation, device: Any) -> dict[str, Any]:
    """Where this worker works: its node (address and the beginning of Ray's id), GPU ids as Ray gave them, device."""
    import ray

    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", []) if allocation.gpus else []
    return {
        "node": f"{ray.util.get_node_ip_address()}/{context.get_node_id()[:8]}",
        "gpus": [str(gpu) for gpu in gpus],
        "device": str(device),
    }


def _nodes() -> list[Mapping[str, float]]:
    """The resources of the nodes that are alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
