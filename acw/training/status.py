"""`acw status RUN`: what of a run or a search is done, what runs, when it will end; from the files that it leaves.

It asks neither Ray nor MLflow, so it also tells of a run that has ended, was interrupted, or is on another machine.
"""

from __future__ import annotations

import dataclasses
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
    STALLED_EPOCHS,
    STALLED_SECONDS,
    Progress,
    bank_units,
    in_hand,
    mean,
    number,
    read,
    search_line,
    summary,
    system_units,
    time_left,
    written_fields,
)

# A driver that cannot be asked is believed to live for so many missed heartbeats.
MISSED_HEARTBEATS = 4
# Checkpoints may be in S3, where an answer takes its time.
READERS = 16
SEARCH_FIGURES = ("done", "total", "best", "training", "max_epochs", "minutes_left")


@dataclass(frozen=True)
class Driver:
    """Who works, or worked last, on a run.

    stage: that it is or was in. since: when it began with it; seen: its last event; both seconds since 1970.
    """

    stage: str
    since: float
    seen: float
    node: str
    pid: int
    alive: bool
    finished: bool
    error: str
    events: list[dict[str, Any]]


def status(folder: Path, now: float) -> dict[str, Any]:
    """All that `acw status` says, as JSON's values. Raises UserError for a folder that is no run's and no search's."""
    events = event_log.events(folder)
    driver = _driver(events, now)
    if driver and driver.stage == "search":
        return _search(folder, driver, now)
    recipe = _recipe(folder, events)
    units = [] if recipe.heads else bank_units(recipe, plan_banks(recipe), folder)
    count = len(units)
    units += system_units(recipe, folder) if recipe.joint else []
    with ThreadPoolExecutor(READERS) as pool:
        all_progress = list(pool.map(read, units))
    banks, systems = all_progress[:count], all_progress[count:]
    driver = driver or _unlogged(all_progress, now)
    stages = _stages(folder, recipe, driver, banks, systems, now)
    return {
        "run": shown(folder),
        "recipe": recipe.name,
        **_who(driver, now),
        "state": _state(driver, stages),
        "workers": _workers(driver),
        "stages": stages,
        **_end(driver, stages, now),
    }


def _who(driver: Driver, now: float) -> dict[str, Any]:
    return {
        "error": driver.error,
        "node": driver.node,
        "pid": driver.pid,
        "since": _iso(driver.since),
        "seen": _iso(driver.seen),
        "seen_seconds": round(now - driver.seen, 1) if driver.seen else None,
    }


def _search(folder: Path, driver: Driver, now: float) -> dict[str, Any]:
    """A search's figures: what its driver said last of its configurations, or before that of their features."""
    alive = driver.alive and not driver.finished  # pipeline.py goes on to train
    over = "finished" if driver.finished else "failed" if driver.error else "interrupted"
    told = [event for event in driver.events if event["event"] == "search"]
    configurations = {name: told[-1][name] for name in SEARCH_FIGURES} if told else {}
    features = {} if told else _extraction(driver)
    left = (configurations or features).get("minutes_left") if alive else None
    return {
        "run": shown(folder),
        "recipe": driver.events[0]["recipe"]["name"],
        **_who(driver, now),
        "state": "running" if alive else over,
        "features": features,
        "configurations": configurations,
        "minutes_left": left,
        "ends": _iso(now + 60 * left) if left is not None else None,
    }


def _recipe(folder: Path, events: Sequence[dict[str, Any]]) -> Recipe:
    path = fetch(folder / "recipe.json")
    if path.exists():
        fields = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    elif started := [event["recipe"] for event in events if "recipe" in event]:
        fields = started[-1]
    else:
        below = sorted(
            {file.parent.name for name in ("recipe.json", event_log.FILE) for file in folder.glob(f"*/{name}")}
        )
        hint = f"runs in it are {', '.join(below)}" if below else "jobs print theirs as `run: FOLDER`"
        raise UserError(f"{shown(folder)}: no run's folder; {hint}")
    known = {field.name for field in dataclasses.fields(Recipe)}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return Recipe(**{name: value for name, value in values.items() if name in known})


def _driver(events: list[dict[str, Any]], now: float) -> Driver | None:
    starts = [position for position, event in enumerate(events) if event["event"] == "stage started"]
    if not starts:
        return None
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


def _unlogged(all_progress: Sequence[Progress], now: float) -> Driver:
    """What checkpoints tell of the driver of a run without a log."""
    seen = max((progress.written for progress in all_progress if progress.written), default=0.0)
    longest = max((entry["seconds"] for progress in all_progress for entry in progress.history), default=0.0)
    finished = all(progress.finished for progress in all_progress)
    alive = not finished and now - seen < max(STALLED_SECONDS, STALLED_EPOCHS * longest)
    return Driver("training", 0.0, seen, "", 0, alive, finished, "", [])


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
            stage |= _extraction(driver)
        if name == "heads" and recipe.heads:
            stage["taken_from"] = recipe.heads
        elif units:
            workers = _workers(driver) or sum(unit.epochs > 0 and not unit.finished for unit in units)
            stage |= summary(units, workers, now if runs else None)
            usual = mean(unit.epoch_seconds for unit in units)
            stage["units"] = [_unit(unit, driver, runs, usual, now) for unit in units]
        stages.append(stage)
    return stages


def _current(driver: Driver, done: dict[str, bool]) -> str | None:
    """The stage that the driver is in, or was when it ended too early."""
    if driver.finished:
        return None
    if driver.stage == "training":
        return "joint training" if done["heads"] and "joint training" in done else "heads"
    if driver.stage == "aggregation" and any(event["event"] == "registering" for event in driver.events):
        return "registration"
    return driver.stage


def _extraction(driver: Driver) -> dict[str, Any]:
    """How far the extraction is."""
    told = [event for event in driver.events if event["event"] == "features"]
    names = ("done", "total", "backbone", "images_per_second", "minutes_left")
    return {name: told[-1][name] for name in names} if told else {}


def _unit(progress: Progress, driver: Driver, runs: bool, usual: float | None, now: float) -> dict[str, Any]:
    """A bank, or a fold's system; usual: what an epoch of one takes, seconds."""
    events = [
        event for event in driver.events if event["event"] in BANK_STARTED and event["bank"] == progress.unit.name
    ]
    started = [event_log.seconds(event) for event in events]
    if progress.written and progress.written > driver.since:
        started.append(driver.since)
    hands = in_hand(driver.events)
    if progress.finished:
        state = "done"
    elif not runs:
        state = "interrupted" if progress.epochs and not driver.alive else "waiting"
    elif not started or (hands and progress.unit.name not in hands):
        state = "waiting"  # for a worker, or for its turn
    else:
        state = "stalled" if progress.stalled(now, max(started), usual) else "running"
    last = [{}, *events, *progress.history][-1]
    return {
        "name": progress.unit.name,
        "backbone": progress.unit.backbone,
        "state": state,
        "done": progress.done,
        "total": len(progress.unit.heads),
        "epochs": progress.epochs,
        "max_epochs": progress.unit.rule.max_epochs,
        "images_per_second": progress.images_per_second,
        "validation_ig": progress.ig,
        "written": _iso(progress.written),
        "silent_seconds": round(now - progress.written, 1) if progress.written else None,
        **{name: last.get(name) for name in ("node", "gpus", "device")},
    }


def _workers(driver: Driver) -> int | None:
    counts = [event["workers"] for event in driver.events if "workers" in event]
    return counts[-1] if counts else None


def _state(driver: Driver, stages: Sequence[dict[str, Any]]) -> str:
    if all(stage["state"] == "done" for stage in stages):
        return "finished"
    if driver.alive:
        return "running"
    if driver.error:
        return "failed"
    return "waiting" if driver.finished else "interrupted"


def _end(driver: Driver, stages: Sequence[dict[str, Any]], now: float) -> dict[str, Any]:
    """When the stage that is running ends, and what comes after it."""
    names = [stage["name"] for stage in stages]
    running = next((stage for stage in stages if stage["state"] == "running"), None)
    left = running.get("minutes_left") if running else None
    return {
        "minutes_left": left,
        "ends": _iso(now + 60 * left) if left is not None else None,
        "then": names[names.index(running["name"]) + 1 :] if running else [],
    }


def _iso(seconds: float | None) -> str | None:
    if not seconds:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


# --- As text -----------------------------------------------------------------------------------------------------


def text(figures: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{figures['run']}: {_headline(figures)}"]
    if "configurations" in figures:
        return "\n".join([*lines, *_search_text(figures)])
    for stage in figures["stages"]:
        lines.append(f"{stage['name']:16}{stage['state']:13}{_stage_text(stage)}")
        lines += [f"  {unit['name']:30}{unit['state']:13}{_unit_text(unit)}" for unit in stage.get("units", [])]
    return "\n".join(line.rstrip() for line in [*lines, *_last_line(figures)])


def _search_text(figures: dict[str, Any]) -> Iterator[str]:
    if figures["features"]:
        yield f"{'features':16}{_stage_text(figures['features'] | {'name': 'features', 'state': figures['state']})}"
    if known := figures["configurations"]:
        yield f"{'search':16}{search_line(known)}"
        if known["best"]:
            yield f"{'best so far':16}{written_fields(known['best']['fields'])}"
    if figures["state"] in ("interrupted", "failed"):
        yield "nothing is running: the same command, with --resume for a search, goes on where it stopped"
    elif figures["ends"] is not None:
        at = datetime.datetime.fromisoformat(figures["ends"]).astimezone().strftime("%H:%M")
        yield f"it will end in at most {figures['minutes_left']:.1f} min, at {at}"


def _headline(figures: dict[str, Any]) -> str:
    who = f", by process {figures['pid']} on {figures['node']}" if figures["node"] else " (a guess: it keeps no log)"
    result = figures["state"] + who
    if figures["seen_seconds"] is not None:
        result += f", last sign of life {_ago(figures['seen_seconds'])}"
    return result + (f": {figures['error']}" if figures["error"] else "")


def _stage_text(stage: dict[str, Any]) -> str:
    if "taken_from" in stage:
        return f"those of {stage['taken_from']}"
    if "total" not in stage:
        return ""
    parts = [f"{stage['done']}/{stage['total']} {_what(stage)}"]
    if "banks" in stage and stage["name"] == "heads":
        parts.append(f"{stage['banks_done']}/{stage['banks']} banks")
    if stage["images_per_second"] is not None:
        parts.append(f"{stage['images_per_second']:.1f} images/s")
    if stage.get("validation_ig") is not None:
        parts.append(f"validation IG {stage['validation_ig']:.4f} bit")
    if stage["state"] != "done" and stage["minutes_left"] is not None:
        parts.append(time_left(stage) if "minutes_at_most" in stage else f"{stage['minutes_left']:.1f} min left")
    return ", ".join(parts)


def _what(stage: dict[str, Any]) -> str:
    return {"features": "shards", "heads": "heads"}.get(stage["name"], "systems")


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
    if figures["state"] in ("interrupted", "failed", "waiting"):
        return ["nothing is running: the same command goes on where it stopped"]
    running = [stage for stage in figures["stages"] if stage["state"] == "running"]
    if not running:
        return []
    then = f"; then {', '.join(figures['then'])}" if figures["then"] else ""
    if figures["ends"] is None:
        return [f"{running[0]['name']}: no estimate yet{then}"]
    at = datetime.datetime.fromisoformat(figures["ends"]).astimezone().strftime("%H:%M")
    return [f"{running[0]['name']} will end in about {figures['minutes_left']:.1f} min, at {at}{then}"]


def _ago(seconds: float) -> str:
    """A time that has passed, in a unit that suits it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
