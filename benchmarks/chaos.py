"""Does a run survive what a night on spot machines brings? 60 heads, three nodes, faults at random; then a comparison.

    python benchmarks/chaos.py --minutes 10 --seed 0
    python benchmarks/chaos.py --minutes 1 --seed 0 --images 6 --epochs 3 --every 15       # tiny

Runs `jobs/pipeline.py demo` on small pictures of the built-in displays, on three nodes of one core each that are
all on this machine, logging to an MLflow server: once undisturbed, then, for so many minutes, with a fault about
`--every` seconds, drawn by the seed. A worker process is killed; a node is removed without grace and another one added;
the driver is killed; the whole cluster is stopped, head and all, and another one started; or for OUTAGE_SECONDS all
object stores are full, the MLflow server is away, or the run's disk is full (left out where no file system may be
mounted). A job that has ended by that is submitted again. A run that ends before the minutes do is compared and
followed by another one. Prints what was injected and the comparison with the undisturbed run; exit status 1 if heads
differ by more than 1e-6 or scores by more than 1e-3, or if anything that was finished was done again. A run takes about
three minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pytest
from job_runs import command, displays, heads, histories
from servers import free_port, mlflow_server
from three_nodes import ThreeNodes, end_all, fill, small_disk

HEADS_TOLERANCE = 1e-6
SCORES_TOLERANCE = 1e-3
OUTAGE_SECONDS = 15.0
DRIVER_SECONDS = 60.0  # for a driver to notice that its cluster is gone
DISK = "1g"
VERDICT = {True: "equal", False: "DIFFERENT"}
# Ray's processes that work for all jobs.
SERVICES = ("Agent", "ray::IDLE", "AutoscalingCoordinator", "PlacementGroupCleaner")


class Run:
    """The pipeline on a cluster, submitted as often as it takes."""

    def __init__(self, arguments: list[str], root: Path, cluster: ThreeNodes) -> None:
        self.root, self.cluster, self.log = root, cluster, root.with_suffix(".log")
        self._line = command("pipeline", *arguments, "--root", root)
        self.kept: dict[str, list[dict[str, Any]]] = {}
        self.job: subprocess.Popen[bytes]
        self.submit()

    def submit(self) -> None:
        with self.log.open("ab") as out:
            self.job = subprocess.Popen(
                self._line, stdout=out, stderr=out, env=self.cluster.environment, start_new_session=True
            )

    def kill(self) -> None:
        end_all(self.job.pid)
        self.job.wait()

    @property
    def folder(self) -> Path | None:
        return next(self.root.glob("demo-*"), None)

    def take_note(self) -> None:
        """Of the epochs that are finished."""
        if self.folder:
            self.kept |= histories(self.folder)

    def finish(self) -> None:
        if self.job.wait():
            self.failed()

    def failed(self) -> NoReturn:
        raise SystemExit(
            f"the run ended with status {self.job.returncode}:\n{self.log.read_text(encoding='utf-8')[-3000:]}"
        )

    @property
    def scores(self) -> dict[tuple[str, str], float]:
        assert self.folder
        models = json.loads((self.folder / "evaluation.json").read_text(encoding="utf-8"))["models"]
        return {(name, m): one["mean"] for name, entry in models.items() for m, one in entry["overall"].items()}


class Site:
    """What the runs need besides a cluster: a disk, which may be full, and an MLflow server, which may be away."""

    def __init__(self, place: Path, stack: contextlib.ExitStack) -> None:
        self.place, self.port = place, free_port()
        self._server = stack.enter_context(contextlib.ExitStack())
        self.start_server()
        try:
            self.disk: Path | None = stack.enter_context(small_disk(place / "disk", DISK))
        except pytest.skip.Exception as error:
            self.disk = None
            print(f"disk full is left out: {error}", flush=True)

    def start_server(self) -> None:
        self._server.enter_context(mlflow_server(self.place, self.port))

    @contextlib.contextmanager
    def no_server(self) -> Iterator[None]:
        self._server.close()
        try:
            yield
        finally:
            self.start_server()

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        assert self.disk
        ballast = fill(self.disk)
        try:
            yield
        finally:
            ballast.unlink()


class Faults:
    """Draws faults and injects them; counts them by name."""

    def __init__(self, seed: int, every: float, site: Site) -> None:
        self._random, self._every, self._site = random.Random(seed), every, site
        self._start = time.monotonic()
        self._next = self._start + every
        self._outage = contextlib.ExitStack()
        self._over: float | None = None  # when the outage that there is ends
        # Whether a job may have ended by an outage.
        self.excused = False
        self.counts: Counter[str] = Counter()
        self._kinds: list[Callable[[Run], str]] = [self._worker, self._node, self._driver, self._head]
        self._kinds += [self._stores, self._server, *([self._disk] if site.disk else [])]

    def inject(self, run: Run) -> None:
        """One fault, if it is time for one."""
        if self._over or time.monotonic() < self._next:
            return
        run.take_note()
        self.say(self._random.choice(self._kinds)(run))
        self._next = time.monotonic() + self._every * self._random.uniform(0.5, 1.5)

    def end_outage(self, *, now: bool = False) -> None:
        """If there is one and its time has come."""
        if self._over and (now or time.monotonic() > self._over):
            self._outage.close()
            self._over = None
            self.say("over")

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self._start:6.0f} s  {what}", flush=True)

    def _begin(self, name: str, outage: contextlib.AbstractContextManager[Any]) -> str:
        self._outage.enter_context(outage)
        self._over = time.monotonic() + OUTAGE_SECONDS
        self.excused = True
        self.counts[name] += 1
        return name

    def _stores(self, run: Run) -> str:
        return self._begin("object stores full", run.cluster.full_stores(self._site.place / "hog.log"))

    def _server(self, run: Run) -> str:
        return self._begin("MLflow server away", self._site.no_server())

    def _disk(self, run: Run) -> str:
        return self._begin("disk full", self._site.full_disk())

    def _head(self, run: Run) -> str:
        run.cluster.stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.job.wait(timeout=DRIVER_SECONDS)
        run.kill()
        run.cluster = ThreeNodes(self._site.place / "cluster.log")
        run.submit()
        self.counts["cluster stopped"] += 1
        return "cluster stopped, job submitted to another one"

    def _worker(self, run: Run) -> str:
        found = run.cluster.commands("ray::")
        busy = sorted(pid for pid, line in found.items() if not any(name in line for name in SERVICES))
        if not busy:
            return "no worker to kill"
        victim = self._random.choice(busy)
        os.kill(victim, signal.SIGKILL)
        self.counts["worker killed"] += 1
        return f"worker killed: {found[victim].split()[0]}"

    def _node(self, run: Run) -> str:
        node = self._random.choice([node for node in run.cluster.nodes if node != run.cluster.head])
        run.cluster.remove(node)
        run.cluster.add()
        self.counts["node removed"] += 1
        return f"node {node[:8]} removed, another one added"

    def _driver(self, run: Run) -> str:
        run.kill()
        run.submit()
        self.counts["driver killed"] += 1
        return "driver killed, job submitted again"


def compare(run: Run, undisturbed: Run) -> bool:
    """Prints how far a run is from the undisturbed one; whether that is near enough."""
    assert run.folder
    assert undisturbed.folder
    ours, theirs = heads(run.folder), heads(undisturbed.folder)
    of_heads = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    scores, reference = run.scores, undisturbed.scores
    of_scores = max(abs(scores[key] - reference[key]) for key in reference)
    after = histories(run.folder)
    again = [bank for bank, history in run.kept.items() if after[bank][: len(history)] != history]
    good = ours.keys() == theirs.keys() and of_heads <= HEADS_TOLERANCE and of_scores <= SCORES_TOLERANCE and not again
    print(f"          heads differ by {of_heads:.1e} (allowed {HEADS_TOLERANCE:g})")
    print(f"          scores differ by {of_scores:.1e} (allowed {SCORES_TOLERANCE:g})")
    print(f"          {len(again)} banks did finished epochs again: {VERDICT[good]}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="in which faults are injected (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two faults, about (default: 30)")
    parser.add_argument("--images", type=int, default=8, help="in each of three categories, 6 or more (default: 8)")
    parser.add_argument("--epochs", type=int, default=12, help="of each of the 60 heads (default: 12)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="acw-chaos-") as name:
        return chaos(Path(name), options)


def chaos(place: Path, options: argparse.Namespace) -> int:
    dataset = displays(place / "set", ("Colour", "Faces", "Text"), options.images)
    fields = ["--heads-per-worker", "5", "--max-epochs", str(options.epochs), "--lr-patience", str(options.epochs)]
    good, runs, start = True, 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        site = Site(place, stack)
        arguments = ["demo", *fields, *dataset, "--tracking-uri", f"http://127.0.0.1:{site.port}"]
        with ThreeNodes(place / "cluster.log") as cluster:
            undisturbed = Run(arguments, place / "undisturbed", cluster)
            undisturbed.finish()
        print(f"undisturbed: {time.monotonic() - start:.0f} s", flush=True)
        faults = Faults(options.seed, options.every, site)
        start = time.monotonic()
        end = start + 60 * options.minutes
        cluster = ThreeNodes(place / "cluster.log")
        while runs == 0 or time.monotonic() < end:
            runs += 1
            run = Run(arguments, (site.disk or place) / f"run{runs}", cluster)
            try:
                _endure(run, faults, end)
            finally:
                faults.end_outage(now=True)
                run.kill()
                cluster = run.cluster
                if sys.exc_info()[0]:
                    cluster.stop()
            faults.say(f"run {runs} finished")
            good &= compare(run, undisturbed)
            if site.disk:
                shutil.rmtree(run.root)
        cluster.stop()
    injected = ", ".join(f"{kind} {count} times" for kind, count in sorted(faults.counts.items()))
    print(f"{runs} runs in {time.monotonic() - start:.0f} s; {injected or 'no fault'}: {VERDICT[good]}")
    return 0 if good else 1


def _endure(run: Run, faults: Faults, end: float) -> None:
    """Injects faults until the end, and submits the job again whenever one has ended it, until it is finished."""
    while (status := run.job.poll()) != 0:
        if status is not None:
            if not faults.excused:
                run.failed()
            faults.say(
                f"job ended with status {status}: {run.log.read_text(encoding='utf-8').rstrip().splitlines()[-1]}"
            )
            faults.end_outage(now=True)
            faults.excused = False
            run.submit()
        time.sleep(0.5)
        faults.end_outage()
        if time.monotonic() < end:
            faults.inject(run)


if __name__ == "__main__":
    sys.exit(main())
