"""The Ray cluster that a job runs on: joining it, and how many workers of which size fit."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass

from acw.storage import UserError

# How many a job asks of an autoscaling cluster that has none yet; --workers asks for another number.
GPUS_TO_START = 4


@dataclass(frozen=True)
class Allocation:
    """What a pool of worker processes asks of the cluster; `cpus` and `gpus` are per worker."""

    workers: int
    cpus: int
    gpus: int


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS or `ray job submit` names, or starts Ray here, on 127.0.0.1 only."""
    # Ray listens on all interfaces unless this is set before its import; a cluster's own nodes must keep doing so.
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The first error ends a job. What other workers say of the same damaged file would bury its one line.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    import ray

    # Ray says at each start that its token authentication is on, which is what we want.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    if not ray.is_initialized():
        ray.init(
            include_dashboard=None if "RAY_ADDRESS" in os.environ else False,
            logging_level=logging.WARNING,
            # Workers chatter into Ray's log files: errors come as exceptions, progress is the driver's to print.
            log_to_driver=False,
        )


def disconnect() -> None:
    """Leaves the cluster, or ends the Ray that `connect` started here; nothing where there is none."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


def wants_gpus(accelerator: str) -> bool:
    """Whether work goes to GPUs: `gpu` always, `cpu` never, `auto` where the cluster has any now.

    Raises UserError for `gpu` on a Ray that was started here and has none; a cluster's autoscaler may bring them.
    """
    import ray

    present = ray.cluster_resources().get("GPU", 0) > 0
    if accelerator == "gpu" and not present and "RAY_ADDRESS" not in os.environ:
        raise UserError("no GPU on this machine; submit the job to a cluster that has some, or give --accelerator cpu")
    return accelerator == "gpu" or (accelerator == "auto" and present)


def allocate(tasks: int, workers: int, accelerator: str) -> Allocation:
    """Workers that run side by side for `tasks` tasks: `workers` of them, or as many as there are GPUs or cores (0).

    Where GPUs are demanded and none is there yet, GPUS_TO_START are. Cores are shared out evenly within each node.
    """
    import ray

    if wants_gpus(accelerator):
        present = int(ray.cluster_resources().get("GPU", 0))
        return Allocation(min(tasks, workers or present or GPUS_TO_START), 1, 1)
    cores = _cores()
    if not sum(cores):
        raise UserError(
            "the Ray cluster has no CPU to work on; add a node, or give --accelerator gpu to have one started"
        )
    count = min(tasks, workers or sum(cores), sum(cores))
    cpus = max(c for c in range(1, max(cores) + 1) if c == 1 or sum(n // c for n in cores) >= count)
    return Allocation(count, cpus, 0)


def nodes_with_cpus() -> int:
    """How many nodes of the cluster have cores to work on."""
    return sum(cores > 0 for cores in _cores())


def _cores() -> list[int]:
    import ray

    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
