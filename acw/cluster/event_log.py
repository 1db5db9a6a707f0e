"""What a job says to programs: events as JSON lines through Python's `logging`, figures as metrics of the Ray cluster.

Only a job's driver writes `log.jsonl` in the run's folder, also of what workers do, which their checkpoints tell it: a
file has one writer, and objects of S3 cannot be appended to. Workers' own events go to stderr, which Ray keeps for each
of them and shows on its dashboard.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from acw.storage.addresses import in_cache
from acw.storage.errors import UserError
from acw.storage.files import fetch, write_atomic

FILE = "log.jsonl"
# How often a driver that has nothing else to log writes a heartbeat.
HEARTBEAT_SECONDS = 30.0
LOGGER = logging.getLogger("acw")
METRICS = {
    "acw_heads_done": "Heads of the bank that train no more",
    "acw_images_per_second": "Images that the bank was trained and validated on in its last epoch",
    "acw_validation_ig": "Best validation IG, bit per fixation, mean over the bank's heads",
}
TAGS = ("run", "bank", "backbone")


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs an event; fields are JSON's values. It goes nowhere outside of `stage` and `to_stderr`."""
    LOGGER.log(level, name, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record as one line: time (UTC), level, event, run, node, pid and the event's fields."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "run": self.run,
            "node": socket.gethostname(),
            "pid": record.process,
        }
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False, default=str)


class RunLog(logging.Handler):
    """Appends to a run's log: line by line on a disk, every HEARTBEAT_SECONDS in S3, where it is uploaded as a whole.

    Raises UserError where it cannot be written from the start; once a run is under way, that is no reason to end it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.setFormatter(JsonLines(folder.name))
        self.path = folder / FILE
        self.last = time.monotonic()
        before = self.path.read_text(errors="replace", encoding="utf-8") if fetch(self.path).exists() else ""
        # A driver that was killed may have left half a line.
        whole = before if not before or before.endswith("\n") else f"{before}\n"
        if whole != before or not before:
            write_atomic(self.path, whole)
        self._text, self._uploaded = (whole, len(whole)) if in_cache(self.path) else ("", 0)

    def emit(self, record: logging.LogRecord) -> None:
        self.last = time.monotonic()
        line = self.format(record) + "\n"
        if in_cache(self.path):
            self._text += line
        else:
            with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
                file.write(line)

    def upload(self) -> None:
        """Of what has come since the last time."""
        if len(text := self._text) > self._uploaded:
            with contextlib.suppress(UserError):
                write_atomic(self.path, text)
                self._uploaded = len(text)


def events(folder: Path) -> list[dict[str, Any]]:
    """A run's log so far, without lines that were cut off; empty where there is none."""
    path = fetch(folder / FILE)
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def seconds(event: Mapping[str, Any]) -> float:
    """When an event was, Unix time."""
    return datetime.datetime.fromisoformat(event["time"]).timestamp()


@contextlib.contextmanager
def kept(folder: Path, name: str, **facts: Any) -> Iterator[None]:
    """Keeps a folder's log: start and end of a stage of that name, what `event` is told, Python's warnings, and a
    heartbeat every HEARTBEAT_SECONDS. facts: what its start says of it, JSON's values."""
    handler = RunLog(folder)
    _only(handler)
    show = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        show(message, category, filename, lineno, *rest)
        event("warning", logging.WARNING, category=category.__name__, text=str(message), file=filename, line=lineno)

    warnings.showwarning = shown  # type: ignore[assignment]
    ended, start = threading.Event(), time.monotonic()

    def heartbeat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            if time.monotonic() - handler.last > HEARTBEAT_SECONDS:
                event("alive", stage=name)
            handler.upload()

    thread = threading.Thread(target=heartbeat, daemon=True)
    try:
        event("stage started", stage=name, start_time=start_time(os.getpid()), **facts)
        handler.upload()
        thread.start()
        yield
        event("stage finished", stage=name, seconds=round(time.monotonic() - start, 1))
    except Exception as error:
        event("stage failed", logging.ERROR, stage=name, error=_one_line(error))
        raise
    except BaseException as error:  # Ctrl-C, or SIGTERM, which Ray makes an exit
        event("stage interrupted", logging.WARNING, stage=name, by=type(error).__name__)
        raise
    finally:
        ended.set()
        warnings.showwarning = show
        LOGGER.removeHandler(handler)
        if thread.ident:
            thread.join()
        handler.upload()


def _one_line(error: Exception) -> str:
    """What a user would be told, or what was raised; Ray's errors bring whole tracebacks."""
    from acw.cluster.errors import user_error

    known = user_error(error)
    text = " ".join(str(known or error).split())
    return text if known else f"{type(error).__name__}: {text[:300]}"


def to_stderr(run: str) -> None:
    """Has this process, a worker on a run, write its events to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(run))
    _only(handler)


def _only(handler: logging.Handler) -> None:
    for other in list(LOGGER.handlers):
        LOGGER.removeHandler(other)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    # Others' handlers, as Ray's and MLflow's, would write it where people read.
    LOGGER.propagate = False


def start_time(pid: int) -> int | None:
    """When a process of this machine was started, in the kernel's ticks; None where it has ended or cannot be asked.

    With it, a process that has got another's id is not taken for it.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(rest[18])


@functools.cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description=METRICS[name], tag_keys=TAGS)


def measure(tags: dict[str, str], values: dict[str, float | None]) -> None:
    """Sets metrics that Ray's nodes offer to Prometheus and the dashboard, as `ray_NAME`; those that are known."""
    # Ray takes nothing else.
    tags = {name: value.encode("ascii", "backslashreplace").decode() for name, value in tags.items()}
    for name, value in values.items():
        if value is not None:
            _gauge(name).set(value, tags)
