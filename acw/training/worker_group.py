"""A group of Ray Train workers that share the work until none is left, on a cluster whose nodes come and go.

What is done is in the workers' checkpoints, so a new group is started, as large as the cluster has room for, whenever
one of its workers is lost, and at the end of an epoch when there is room for more. Ray Train's own elastic workers are
as fast, but wait where others work on the cluster, too (docs/log.md, 2026-11-30).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from acw.cluster import event_log
from acw.cluster.allocation import Allocation, Demand, capacity, wait_for_capacity
from acw.storage.errors import UserError
from acw.storage.files import ray_storage
from acw.training.scheduler import Scheduler

# Groups lost in a row before any of their workers has finished an epoch. Spot machines are lost often in a long run.
MAX_FAILURES = 5
# For Ray to find places for a group: a node's loss is known after half a minute.
PLACES_SECONDS = 30
LOOKING_SECONDS = 2.0
RECRUITING_SECONDS = 20.0


class Coordinator:
    """What workers tell their driver and each other; in memory, since a full disk may be what they have to tell."""

    def __init__(self) -> None:
        self._starts: list[tuple[str, dict[str, Any]]] = []
        self._error = ""
        self._raised = False
        self._at_work = False
        self._regroup = False
        self._scheduler = Scheduler({})

    def started(self, unit: str, location: dict[str, Any]) -> None:
        """A worker says which unit it starts, and where it is (`allocation.location_of`)."""
        self._starts.append((unit, location))

    def report_error(self, error: str) -> None:
        """A worker says what only the user can mend."""
        self._error = self._error or error

    def report_exception(self) -> None:
        """A worker says that an error of the program's ends it."""
        self._raised = True

    def error(self) -> str:
        return self._error

    def raised(self) -> bool:
        """Whether an error of the program's has ended a worker of this group; others were lost."""
        return self._raised

    def at_work(self) -> bool:
        """Whether a worker of this group has asked for work."""
        return self._at_work

    def schedule(self, left: dict[str, float]) -> None:
        """The driver has a new worker group for these units; how much is left of each, in any unit of work."""
        self._scheduler, self._regroup = Scheduler(left), False
        self._raised = self._at_work = False

    def next_unit(self, worker: int, left: float = 0.0, epoch: float = 0.0) -> str:
        """The unit whose next epoch a worker trains (`Scheduler.next`), or "" where it should stop."""
        self._at_work = True
        return "" if self._regroup or self._error else self._scheduler.next(worker, left, epoch)

    def regroup(self) -> None:
        """The driver wants the workers to stop at the end of their epoch."""
        self._regroup = True

    def starts(self, since: int) -> list[tuple[str, dict[str, Any]]]:
        return self._starts[since:]


class StartReporter:
    """Prints which units workers have started, and where, since the last time."""

    def __init__(self, coordinator: Any, what: str) -> None:
        self.coordinator, self.what, self._seen = coordinator, what, 0

    def report(self) -> None:
        import ray

        new = ray.get(self.coordinator.starts.remote(self._seen))
        self._seen += len(new)
        for unit, location in new:
            gpus = f", GPU {','.join(location['gpus'])}" if location["gpus"] else ""
            event_log.event("bank started", training=self.what, bank=unit, **location)
            print(f"{self.what}: {unit} on node {location['node']}{gpus}, device {location['device']}", flush=True)


def new_coordinator() -> Any:
    """A coordinator as an actor beside the driver, with which it lives and dies."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    coordinator = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Coordinator)
    return coordinator.options(scheduling_strategy=here).remote()


def complete(
    loop: Callable[[dict], None],
    config: dict[str, Any],
    left: Callable[[], dict[str, float]],
    epochs: Callable[[], int],
    coordinator: Any,
    allocation: Allocation,
) -> None:
    """Has a worker group work until nothing is left.

    loop: what each worker does, given the `config`; it asks the coordinator before each epoch. left: of each
    unit that has epochs left, how much, in any unit of work. epochs: how many are behind all units.
    Raises UserError for errors that workers report and for groups that are lost again and again; an error of the
    program's comes as Ray Train's.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, TrainingFailedError

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(PLACES_SECONDS))
    failures, divisor, starts = 0, 1, StartReporter(coordinator, "training")
    while units := left():
        before = epochs()
        here = capacity(allocation) or wait_for_capacity(allocation)
        workers = max(1, min(here, allocation.workers, len(units)) // divisor)
        ray.get(coordinator.schedule.remote(units))
        event_log.event("worker group started", training="training", workers=workers)
        try:
            with _GroupMonitor(coordinator, starts, allocation, workers, left):
                _trainer(_reporting(loop, coordinator), config, allocation, workers).fit()
            divisor = 1
        except (TrainingFailedError, RayActorError) as error:
            failures = 1 if epochs() > before else failures + 1
            if failures > MAX_FAILURES:
                if ray.get(coordinator.raised.remote()):
                    raise
                raise _given_up(error) from error
            # Others work on this cluster too, where a group found no places in time though no node has been lost.
            unplaced = isinstance(error, ControllerError) and not ray.get(coordinator.at_work.remote())
            crowded = unplaced and capacity(allocation) >= workers
            divisor = 2 * divisor if crowded else 1
            what = f"no room for {workers} workers" if crowded else "a worker was lost"
            print(f"training: {what}; goes on from the checkpoints", flush=True)
        if told := ray.get(coordinator.error.remote()):
            raise UserError(told)


def _reporting(loop: Callable[[dict], None], coordinator: Any) -> Callable[[dict], None]:
    """The loop, which tells the coordinator of its errors: those that Ray raises do not part them from lost workers."""

    def run(config: dict) -> None:
        import ray

        try:
            loop(config)
        except UserError as error:
            # Raised, it would be tried again with the same end, as if a node had been lost.
            ray.get(coordinator.report_error.remote(str(error)))
        except Exception:
            ray.get(coordinator.report_exception.remote())
            raise

    return run


def _trainer(loop: Callable[[dict], None], config: dict[str, Any], allocation: Allocation, workers: int) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        loop,
        train_loop_config=config,
        # Workers share no gradients, so the backend only has to come up, also where a GPU is a fraction or a fake.
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=allocation.gpus > 0,
            resources_per_worker={"CPU": allocation.cpus, "GPU": allocation.gpus},
        ),
        run_config=ray.train.RunConfig(
            # Checkpoints are ours, so Ray needs no memory of earlier groups; an old name would bring back its result.
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}",
            **ray_storage(),
            # Ray itself would gather the same group again, for which there may be no room now.
            failure_config=ray.train.FailureConfig(
                max_failures=0,
                controller_failure_limit=0,  # type: ignore[call-arg]  # of Ray Train V2
            ),
        ),
    )


def _given_up(error: Exception) -> UserError:
    """One line where all workers were lost or found no place."""
    lost = getattr(error, "worker_failures", {})
    reason = " ".join(str(next(iter(lost.values()), error)).split())[:300]
    return UserError(
        f"training: {MAX_FAILURES + 1} times in a row the workers were lost before one had finished an epoch; see `ray "
        f"status`, and give more memory or fewer --workers if they ran out of it ({reason})"
    )


class _GroupMonitor:
    """While a worker group works: prints where, and asks the cluster for those who are missing.

    When one of these finds a place, the group is asked to end its epoch and to regroup.
    """

    def __init__(
        self, coordinator: Any, starts: StartReporter, allocation: Allocation, workers: int, left: Callable[[], Any]
    ) -> None:
        self.coordinator, self.starts, self.left = coordinator, starts, left
        self.allocation, self.workers = allocation, workers
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _follow(self) -> None:
        demand, looked, asked = Demand(self.allocation), time.monotonic(), False
        while not self._end.wait(LOOKING_SECONDS):
            self.starts.report()
            if not asked and time.monotonic() - looked > RECRUITING_SECONDS:
                looked = time.monotonic()
                try:
                    missing = min(self.allocation.workers, len(self.left())) - self.workers
                except UserError:
                    continue  # the checkpoints cannot be had just now; whoever needs them says so
                if missing > 0 and demand.renew(missing) and (here := capacity(self.allocation)) > self.workers:
                    print(f"training: room for {here} workers instead of {self.workers}: regroups", flush=True)
                    self.coordinator.regroup.remote()
                    asked = True
        demand.end()
        self.starts.report()
