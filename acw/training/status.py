"""`acw status RUN`: what of a run or a search is done, what runs, when it will end; from the files that it leaves.

It asks neither Ray nor MLflow, so it also tells of a run that has ended, was interrupted, or is on another machine.
"""

from __future__ import annotations

import datetime
import json
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acw.cluster import event_log
from acw.recipes import Recipe
from acw.storage.addresses import shown
from acw.storage.errors import UserError
from acw.storage.files import fetch, present
from acw.training.bank import plan_banks
from acw.training.progress import (
    BANK_STARTED,
    Progress,
    bank_units,
    in_hand,
    mean,
    number,
    read,
    recorded_recipe,
    search_line,
    summary,
    summary_line,
    system_units,
    written_fields,
)

# A driver that cannot be asked is believed to live for so many missed heartbeats.
MISSED_HEARTBEATS = 4
# Checkpoints may be in S3, where an answer takes its time.
READERS = 16
FEATURE_FIGURES = ("done", "total", "backbone", "images_per_second", "minutes_left")
SEARCH_FIGURES = ("done", "total", "best", "training", "max_epochs", "minutes_left")


@dataclass(frozen=True)
class Driver:
    """Who works, or worked last, on a run; of a run without a log, nobody who could be known.

    stage: that it is or was in; events: since it began with that. since, seen: its first and last event, seconds since
    1970.
    """

    stage: str = "training"
    since: float = 0.0
    seen: float = 0.0
    node: str = ""
    pid: int = 0
    alive: bool = False
    finished: bool = False
    error: str = ""
    events: Sequence[dict[str, Any]] = ()

    def last(self, event: str, names: Sequence[str]) -> dict[str, Any]:
        """What its last event of that name says; empty before the first."""
        found = [entry for entry in self.events if entry["event"] == event]
        return {name: found[-1][name] for name in names} if found else {}

    @property
    def workers(self) -> int | None:
        counts = [event["workers"] for event in self.events if "workers" in event]
        return counts[-1] if counts else None

    @property
    def state(self) -> str:
        """Of its work, if there is any left."""
        ended = "failed" if self.error else "waiting" if self.finished else "interrupted"
        return "running" if self.alive else ended


def status(folder: Path, now: float) -> dict[str, Any]:
    """All that `acw status` says, as JSON's values. Raises UserError for a folder that is no run's and no search's."""
    events = event_log.events(folder)
    driver = _driver(events, now)
    who: dict[str, Any] = {"run": shown(folder), "error": driver.error, "node": driver.node, "pid": driver.pid}
    who |= {"since": _iso(driver.since), "seen": _iso(driver.seen)}
    who["seen_seconds"] = round(now - driver.seen, 1) if driver.seen else None
    if driver.stage == "search":
        return who | _search(driver, now)
    recipe = _recipe(folder, events)
    units = [] if recipe.heads else bank_units(recipe, plan_banks(recipe), folder)
    with ThreadPoolExecutor(READERS) as pool:
        banks = list(pool.map(read, units))
        systems = list(pool.map(read, system_units(recipe, folder) if recipe.joint else []))
    stages = _stages(folder, recipe, driver, banks, systems, now)
    running = [at for at, stage in enumerate(stages) if stage["state"] == "running"]
    return {
        **who,
        "recipe": recipe.name,
        "state": "finished" if all(stage["state"] == "done" for stage in stages) else driver.state,
        "workers": driver.workers,
        "stages": stages,
        **_end(stages[running[0]].get("minutes_left") if running else None, now),
        "then": [stage["name"] for stage in stages[running[0] + 1 :]] if running else [],
    }


def _search(driver: Driver, now: float) -> dict[str, Any]:
    """A search's figures: what its driver said last of its configurations, or before that of their features."""
    alive = driver.alive and not driver.finished  # pipeline.py goes on to train
    configurations = driver.last("search", SEARCH_FIGURES)
    features = {} if configurations else driver.last("features", FEATURE_FIGURES)
    return {
        "recipe": driver.events[0]["recipe"]["name"],
        "state": "finished" if driver.finished else driver.state,
        "features": features,
        "configurations": configurations,
        **_end((configurations or features).get("minutes_left") if alive else None, now),
    }


def _end(minutes: float | None, now: float) -> dict[str, Any]:
    """When what is running ends."""
    return {"minutes_left": minutes, "ends": None if minutes is None else _iso(now + 60 * minutes)}


def _recipe(folder: Path, events: Sequence[dict[str, Any]]) -> Recipe:
    path = fetch(folder / "recipe.json")
    if path.exists():
        return recorded_recipe(json.loads(path.read_text(encoding="utf-8"))["recipe"])
    if started := [event["recipe"] for event in events if "recipe" in event]:
        return recorded_recipe(started[-1])
    below = sorted({file.parent.name for name in ("recipe.json", event_log.FILE) for file in folder.glob(f"*/{name}")})
    hint = f"runs in it are {', '.join(below)}" if below else "jobs print theirs as `run: FOLDER`"
    raise UserError(f"{shown(folder)}: no run's folder; {hint}")


def _driver(events: list[dict[str, Any]], now: float) -> Driver:
    starts = [position for position, event in enumerate(events) if event["event"] == "stage started"]
    if not starts:
        return Driver()
    own = events[starts[-1] :]
    first, last = own[0], own[-1]
    # Earlier versions wrote `born`.
    started = first.get("start_time", first.get("born"))
    seen = event_log.seconds(last)
    finished, failed = last["event"] == "stage finished", last["event"] == "stage failed"
    if failed or last["event"] == "stage interrupted":
        alive = False
    elif first["node"] == socket.gethostname() and started is not None:
        alive = event_log.start_time(first["pid"]) == started
    else:
        alive = not finished and now - seen < MISSED_HEARTBEATS * event_log.HEARTBEAT_SECONDS
    error = last.get("error", "") if failed else ""
    return Driver(
        first["stage"], event_log.seconds(first), seen, first["node"], first["pid"], alive, finished, error, own
    )


def _stages(
    folder: Path, recipe: Recipe, driver: Driver, banks: list[Progress], systems: list[Progress], now: float
) -> list[dict[str, Any]]:
    done = {
        "features": present(folder / "features.json"),
        "heads": all(bank.finished for bank in banks),
        "joint training": all(system.finished for system in systems),
        "aggregation": present(folder / "evaluation.json"),
        "registration": present(folder / "registration.json"),
    }
    if not recipe.joint:
        del done["joint training"]
    current = _current(driver, done)
    stages = []
    for name, is_done in done.items():
        units = {"heads": banks, "joint training": systems}.get(name, [])
        runs = driver.alive and name == current
        interrupted = not driver.alive and (name == current or any(unit.epochs for unit in units))
        state = "running" if runs else "done" if is_done else "interrupted" if interrupted else "waiting"
        stage: dict[str, Any] = {"name": name, "state": state}
        if name == "features" and runs:
            stage |= driver.last("features", FEATURE_FIGURES)
        if name == "heads" and recipe.heads:
            stage["taken_from"] = recipe.heads
        elif units:
            workers = driver.workers or sum(unit.epochs > 0 and not unit.finished for unit in units)
            stage |= summary(units, workers, now if runs else None)
            usual = mean(unit.epoch_seconds for unit in units)
            stage["units"] = [_unit(unit, driver, runs, usual, now) for unit in units]
        stages.append(stage)
    return stages


def _current(driver: Driver, done: dict[str, bool]) -> str | None:
    """The stage that the driver is in, or was when it ended too early."""
    if driver.finished or not driver.events:
        return None
    if driver.stage == "training":
        return "joint training" if done["heads"] and "joint training" in done else "heads"
    if driver.stage == "aggregation" and any(event["event"] == "registering" for event in driver.events):
        return "registration"
    return driver.stage


def _unit(progress: Progress, driver: Driver, runs: bool, usual: float | None, now: float) -> dict[str, Any]:
    """A bank, or a fold's system; usual: what an epoch of one takes, seconds."""
    unit = progress.unit
    events = [event for event in driver.events if event["event"] in BANK_STARTED and event["bank"] == unit.name]
    started = [event_log.seconds(event) for event in events]
    if progress.written and progress.written > driver.since:
        started.append(driver.since)
    hands = in_hand(driver.events)
    if progress.finished:
        state = "done"
    elif not runs:
        state = "interrupted" if progress.epochs and not driver.alive else "waiting"
    elif not started or (hands and unit.name not in hands):
        state = "waiting"  # for a worker, or for its turn
    else:
        state = "stalled" if progress.stalled(now, max(started), usual) else "running"
    last = [{}, *events, *progress.history][-1]
    return {
        "name": unit.name,
        "backbone": unit.backbone,
        "state": state,
        "done": progress.done,
        "total": len(unit.heads),
        "epochs": progress.epochs,
        "max_epochs": unit.rule.max_epochs,
        "images_per_second": progress.images_per_second,
        "validation_ig": progress.ig,
        "written": _iso(progress.written),
        "silent_seconds": round(now - progress.written, 1) if progress.written else None,
        **{name: last.get(name) for name in ("node", "gpus", "device")},
    }


def _iso(seconds: float | None) -> str | None:
    if not seconds:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


# --- As text -----------------------------------------------------------------------------------------------------


def text(figures: dict[str, Any]) -> str:
    """The same for people."""
    by = f"by process {figures['pid']} on {figures['node']}" if figures["node"] else "it keeps no log"
    seen = "" if figures["seen_seconds"] is None else f", last sign of life {_ago(figures['seen_seconds'])}"
    error = f": {figures['error']}" if figures["error"] else ""
    lines = [f"{figures['run']}: {figures['state']}, {by}{seen}{error}"]
    lines += _search_text(figures) if "configurations" in figures else _stages_text(figures["stages"])
    return "\n".join(line.rstrip() for line in [*lines, *_last_line(figures)])


def _search_text(figures: dict[str, Any]) -> Iterator[str]:
    if figures["features"]:
        yield f"{'features':16}{_features_text(figures['features'])}"
    if known := figures["configurations"]:
        yield f"{'search':16}{search_line(known)}"
        if known["best"]:
            yield f"{'best so far':16}{written_fields(known['best']['fields'])}"


def _features_text(figures: dict[str, Any]) -> str:
    rate, left = figures["images_per_second"], figures["minutes_left"]
    return f"{figures['done']}/{figures['total']} shards, {rate:.1f} images/s, {left:.1f} min left"


def _stages_text(stages: Sequence[dict[str, Any]]) -> Iterator[str]:
    names = [unit["name"] for stage in stages for unit in stage.get("units", [])]
    width = max([28, *map(len, names)]) + 2
    for stage in stages:
        yield f"{stage['name']:16}{stage['state']:13}{_stage_text(stage)}"
        for unit in stage.get("units", []):
            yield f"  {unit['name']:{width}}{unit['state']:13}{_unit_text(unit)}"


def _stage_text(stage: dict[str, Any]) -> str:
    if "taken_from" in stage:
        return f"those of {stage['taken_from']}"
    if "units" in stage:
        return summary_line(stage["name"], stage, ended=stage["state"] == "done")
    return _features_text(stage) if "total" in stage else ""


def _unit_text(unit: dict[str, Any]) -> str:
    parts = []
    if unit["epochs"]:
        parts = [f"{unit['done']}/{unit['total']} done", f"epoch {unit['epochs']} of at most {unit['max_epochs']}"]
        parts += [f"{unit['images_per_second']:.1f} images/s"] if unit["images_per_second"] is not None else []
        parts.append(f"IG {number(unit['validation_ig'], '.4f')}")
        parts += [f"wrote {_ago(unit['silent_seconds'])}"] if unit["state"] != "done" else []
    if unit["node"]:
        parts.append(f"on {unit['node']} {unit['device']}" + (f" ({','.join(unit['gpus'])})" if unit["gpus"] else ""))
    return ", ".join(parts)


def _last_line(figures: dict[str, Any]) -> list[str]:
    search = "configurations" in figures
    if figures["state"] in ("interrupted", "failed", "waiting"):
        how = ", with --resume for a search," if search else ""
        return [f"nothing is running: the same command{how} goes on where it stopped"]
    running = [stage["name"] for stage in figures.get("stages", []) if stage["state"] == "running"]
    then = f"; then {', '.join(figures['then'])}" if figures.get("then") else ""
    if figures["ends"] is None:
        return [f"{running[0]}: no estimate yet{then}"] if running else []
    at = datetime.datetime.fromisoformat(figures["ends"]).astimezone().strftime("%H:%M")
    end = f"will end in {'at most' if search else 'about'} {figures['minutes_left']:.1f} min, at {at}"
    return [f"{running[0] if running else 'it'} {end}{then}"]


def _ago(seconds: float) -> str:
    """A time that has passed, in a unit that suits it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
