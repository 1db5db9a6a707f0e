"""Follows a training from the job's driver: for people, for the log and for Ray's metrics."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from acw.cluster import event_log
from acw.storage.errors import UserError
from acw.training.progress import Progress, Unit, epoch_fields, in_hand, read, summary, summary_line

LOOK_SECONDS = 5.0

# Takes the epochs so far of units, by their names; returns at once and raises nothing.
Report = Callable[[Mapping[str, Sequence[Mapping[str, Any]]]], None]


class ProgressMonitor:
    """Follows the units of a training while workers are at it: a line on stdout whenever one has finished an epoch, all
    epochs and stopped heads in the run's log, and Ray's metrics. report: who else is told of epochs."""

    def __init__(
        self, what: str, units: Sequence[Unit], folder: Path, workers: int, report: Report = lambda _: None
    ) -> None:
        self.what, self.folder, self.workers, self.report = what, folder, workers, report
        self.all_progress = [Progress(unit) for unit in units]
        # What an earlier driver did not live to log is logged now.
        past = [entry for entry in event_log.events(folder) if entry.get("training") == what]
        self._epochs = {entry["bank"]: entry["epoch"] + 1 for entry in past if entry["event"] == "epoch"}
        self._stopped = {(entry["bank"], entry["head"]) for entry in past if entry["event"] == "head stopped"}
        self._stalled: set[str] = set()
        self._start = time.time()
        self._shown = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ProgressMonitor:
        heads = sum(len(progress.unit.heads) for progress in self.all_progress)
        event_log.event(f"{self.what} started", banks=len(self.all_progress), heads=heads, workers=self.workers)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _follow(self) -> None:
        going = True
        while going:
            going = not self._end.wait(LOOK_SECONDS)
            # What cannot be looked at now may be the next time.
            with contextlib.suppress(UserError):
                self.look()

    def look(self) -> None:
        """Tells what is new since the last look."""
        self.all_progress = [progress if progress.finished else read(progress.unit) for progress in self.all_progress]
        for progress in self.all_progress:
            self._log(progress)
            tags = {"run": self.folder.name, "bank": progress.unit.name, "backbone": progress.unit.backbone}
            figures = (float(progress.done), progress.images_per_second, progress.ig)
            event_log.measure(tags, dict(zip(event_log.METRICS, figures, strict=True)))
        self.report({progress.unit.name: progress.history for progress in self.all_progress})
        total = summary(self.all_progress, self.workers, time.time())
        line = f"{self.what}: {summary_line(self.what, total)}"
        if line != self._shown:
            print(line, flush=True)
            self._shown = line

    def _log(self, progress: Progress) -> None:
        name = progress.unit.name
        for entry in progress.history[self._epochs.get(name, 0) :]:
            event_log.event("epoch", training=self.what, **epoch_fields(progress.unit, entry))
        self._epochs[name] = progress.epochs
        for head, ig, stopped in zip(progress.unit.heads, progress.gains, progress.stopped, strict=False):
            if stopped and (name, head) not in self._stopped:
                self._stopped.add((name, head))
                event_log.event("head stopped", training=self.what, bank=name, head=head, epochs=progress.epochs, ig=ig)
        now = time.time()
        silent = progress.written and progress.written > self._start and progress.stalled(now, self._start)
        since = in_hand(event_log.events(self.folder)).get(name) if silent else None
        if since is None or not progress.stalled(now, since):
            self._stalled.discard(name)
        elif name not in self._stalled:
            self._stalled.add(name)
            event_log.event("stalled", logging.WARNING, training=self.what, bank=name, epochs=progress.epochs)
