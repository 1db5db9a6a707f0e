"""Training's entry on a Ray cluster: banks of heads spread over a group of Ray Train's workers, systems of a joint
training over Ray's tasks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acw.cluster import event_log
from acw.cluster.allocation import Allocation, allocate, capacity, location_of
from acw.cluster.costs import Cost, peak_rss
from acw.cluster.process import compute_with
from acw.features.joined import Store
from acw.heads.readout import Parameters
from acw.recipes import Recipe
from acw.storage.files import fetch
from acw.training.bank import Bank, plan_banks, system_path, unfinished
from acw.training.batches import TrainingSet
from acw.training.joint import JointSet, SystemState, train_system, unfinished_systems
from acw.training.monitor import LOOK_SECONDS, ProgressMonitor, Report
from acw.training.progress import Progress, Unit, bank_units, epoch_fields, read, system_units
from acw.training.trainer import train_epochs
from acw.training.worker_group import StartReporter, complete, new_coordinator

# How often the joint training of a fold may be lost with its node; each loss costs an epoch at most.
MAX_RETRIES = 10
UNIT = "heads x images"


@dataclass(frozen=True)
class Work:
    """What every worker gets. coordinator: `worker_group.Coordinator`, as an actor, which schedules the banks."""

    recipe: Recipe
    training_set: TrainingSet
    stores: dict[str, Store]
    folder: Path
    allocation: Allocation
    coordinator: Any


def train(
    recipe: Recipe,
    training_set: TrainingSet,
    stores: dict[str, Store],
    folder: Path,
    report: Report = lambda _: None,
) -> Cost:
    """Trains all heads of a recipe that have epochs left; leaves their checkpoints in the run's folder.

    report: is told of epochs as they come. Returns the cost, in which an image counts once for every head that trained
    or was validated on it. Raises UserError for what a user can mend, which workers that are lost again and again are
    too.
    """
    banks = plan_banks(recipe)
    waiting = unfinished(recipe, folder)
    if not waiting:
        print(f"training: all {sum(len(bank.members) for bank in banks)} heads are trained", flush=True)
        return Cost(0.0, 0, peak_rss(), UNIT)
    units = bank_units(recipe, banks, folder)
    start, before = time.monotonic(), _work(units)[0]
    # Cores are shared out as for all banks: a rerun then has the threads, and so the heads, of an uninterrupted run.
    allocation = allocate(len(banks), recipe.workers, recipe.accelerator, recipe.gpus_per_worker)
    workers = min(allocation.workers, capacity(allocation), len(waiting))
    group = dataclasses.replace(allocation, workers=workers)
    print(
        f"training {sum(len(bank.members) for bank in waiting)} heads in {len(waiting)} banks on {group}",
        flush=True,
    )
    coordinator = new_coordinator()
    work = Work(recipe, training_set, stores, folder, allocation, coordinator)

    def left() -> dict[str, float]:
        mine = {bank.name for bank in unfinished(recipe, folder)}
        return {unit.name: _left(read(unit), stores[unit.backbone])[0] for unit in units if unit.name in mine}

    def epochs() -> int:
        return sum(read(unit).epochs for unit in units)

    with ProgressMonitor("training", units, folder, workers, report):
        complete(run_worker, {"work": work}, left, epochs, coordinator, allocation)
    after, peak = _work(units)
    return Cost(time.monotonic() - start, after - before, max(peak, peak_rss()), UNIT)


def train_jointly(
    recipe: Recipe,
    data: JointSet,
    heads: Sequence[dict[str, Parameters]],
    folder: Path,
    report: Report = lambda _: None,
) -> Cost:
    """Fine-tunes the folds' systems that have epochs left; leaves their checkpoints in the run's folder.

    heads: per fold and backbone, where the systems start from. report: is told of epochs as they come. Returns the
    cost, in which an image counts once for every head that trained or was validated on it. Raises UserError for what a
    user can mend.
    """
    import ray

    waiting = unfinished_systems(recipe, folder)
    if not waiting:
        print(f"joint training: all {recipe.folds} systems are trained", flush=True)
        return Cost(0.0, 0, peak_rss(), UNIT)
    allocation = allocate(recipe.folds, recipe.workers, recipe.accelerator, recipe.gpus_per_worker)
    coordinator = new_coordinator()
    starts = StartReporter(coordinator, "joint training")
    systems = system_units(recipe, folder)

    # A task that dies with its node starts again, from its checkpoint.
    @ray.remote(num_cpus=allocation.cpus, num_gpus=allocation.gpus, max_retries=MAX_RETRIES)
    def one(data: JointSet, heads: dict[str, Parameters], fold: int) -> tuple[int, int, int]:
        compute_with(allocation.cpus)
        device = torch.device("cuda" if torch.cuda.is_available() and allocation.gpus else "cpu")
        location = location_of(allocation, device)
        unit, epochs = systems[fold], 0
        event_log.to_stderr(folder.name)
        event_log.event("bank started", bank=unit.name, **location)
        ray.get(coordinator.started.remote(unit.name, location))
        for state in train_system(recipe, fold, data, heads, folder, device, location):
            epochs += 1
            event_log.event("epoch", **epoch_fields(unit, state.history[-1]))
        return fold, epochs, peak_rss()

    start, shared, trained, peak = time.monotonic(), ray.put(data), 0, peak_rss()
    out = [one.remote(shared, heads[fold], fold) for fold in waiting]
    with ProgressMonitor("joint training", systems, folder, min(allocation.workers, len(waiting)), report):
        while out:
            ready, out = ray.wait(out, timeout=LOOK_SECONDS)
            starts.report()
            for fold, epochs, memory in ray.get(ready):
                trained, peak = trained + epochs, max(peak, memory)
                state = SystemState.load(fetch(system_path(folder, fold)))
                print(
                    f"joint training: fold {fold} done after {len(state.history)} epochs, {len(waiting) - len(out)}/"
                    f"{len(waiting)} systems, validation IG {state.best_ig:.4f} bit",
                    flush=True,
                )
    images = int((data.training.fold >= 0).sum()) * len(recipe.backbones) * recipe.seeds
    return Cost(time.monotonic() - start, trained * images, peak, UNIT)


def _work(units: Sequence[Unit]) -> tuple[int, int]:
    """(head, image) pairs that the banks' checkpoints tell of, and the largest resident memory of a worker, bytes."""
    epochs = [entry for unit in units for entry in read(unit).history]
    pairs = sum(entry["head_images_per_second"] * entry["seconds"] for entry in epochs)
    return round(pairs), max((entry["peak_rss"] for entry in epochs), default=0)


def run_worker(config: dict) -> None:
    """What a Ray Train worker does: trains epochs of the banks that it is given."""
    import ray.train
    from ray.train.torch import get_device

    work: Work = config["work"]
    rank = ray.train.get_context().get_world_rank()
    # A GPU that Ray only pretends to have, as in tests, is no CUDA device.
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    location = location_of(work.allocation, device)
    event_log.to_stderr(work.folder.name)
    compute_with(work.allocation.cpus)
    banks = {bank.name: bank for bank in plan_banks(work.recipe)}
    name = ray.get(work.coordinator.next_unit.remote(rank))
    while name:
        name = _train_while_scheduled(work, banks[name], device, location, rank)


def _train_while_scheduled(work: Work, bank: Bank, device: torch.device, location: dict[str, Any], rank: int) -> str:
    """Trains a bank until it is done, or it is given another one; the name of that, or "" for none."""
    import ray

    (unit,), store = bank_units(work.recipe, [bank], work.folder), work.stores[bank.backbone]
    event_log.event("bank started", bank=bank.name, heads=unit.heads, **location)
    ray.get(work.coordinator.started.remote(bank.name, location | {"worker": rank}))
    for state in train_epochs(work.recipe, bank, work.training_set, store, work.folder, device, location):
        event_log.event("epoch", **epoch_fields(unit, state.history[-1]))
        progress = Progress(unit, state.history, state.learning_rate.tolist(), state.bad_epochs.tolist())
        name = ray.get(work.coordinator.next_unit.remote(rank, *_left(progress, store)))
        if name != bank.name:
            return name
    return ray.get(work.coordinator.next_unit.remote(rank))


def _left(progress: Progress, store: Store) -> tuple[float, float]:
    """What is left of a bank, as far as can be told, and what its next epoch takes; in no unit, but the same for all.

    An epoch of a head: the first layer over all channels and cells, the later layers, which cost about as much as 1,500
    channels, and what depends on neither, as `gaze`'s epochs had it.
    """
    values = sum(h * w * c for (h, w), c in zip(store.tap_sizes[0], store.channels, strict=True))
    of_head = values + 1500 * store.readouts[0][0] * store.readouts[0][1] + 1_500_000
    return of_head * progress.head_epochs_left, of_head * (len(progress.unit.heads) - progress.done)
