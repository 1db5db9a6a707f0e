"""Does a run survive what a night on spot machines brings? 60 heads, three nodes, faults at random; then a comparison.

    python benchmarks/chaos.py --minutes 10 --seed 0
    python benchmarks/chaos.py --minutes 1 --seed 0 --images 6 --epochs 3 --every 15       # tiny

Runs `jobs/pipeline.py demo` on small pictures of the built-in displays, on three nodes of one core each that are all
on this machine: once undisturbed, then, for so many minutes, with a fault about `--every` seconds, drawn by the seed: a
worker process is killed, a node is removed without grace and another one added, or the driver is killed and the job
submitted again. A run that ends before the minutes do is compared and followed by another one. Prints what was injected
and the comparison with the undisturbed run; exit status 1 if heads differ by more than 1e-6 or scores by more than
1e-3, or if anything that was finished was done again. A run takes about three minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from job_runs import command, displays, heads, histories
from three_nodes import ThreeNodes, end_all

HEADS_TOLERANCE = 1e-6
SCORES_TOLERANCE = 1e-3
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
            raise SystemExit(f"the run ended with status {self.job.returncode}:\n{self.log.read_text()[-3000:]}")

    @property
    def scores(self) -> dict[tuple[str, str], float]:
        assert self.folder
        models = json.loads((self.folder / "evaluation.json").read_text())["models"]
        return {(name, m): one["mean"] for name, entry in models.items() for m, one in entry["overall"].items()}


class Faults:
    """Draws faults and injects them; counts them by name."""

    def __init__(self, seed: int, every: float, start: float) -> None:
        self._random, self._every, self._start = random.Random(seed), every, start
        self._next = start + every
        self.counts: Counter[str] = Counter()

    def inject(self, run: Run) -> None:
        """One fault, if it is time for one."""
        if time.monotonic() < self._next:
            return
        run.take_note()
        kind = self._random.choice((self._worker, self._node, self._driver))
        what = kind(run)
        print(f"{time.monotonic() - self._start:6.0f} s  {what}", flush=True)
        self._next = time.monotonic() + self._every * self._random.uniform(0.5, 1.5)

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
    fields = ["--heads_per_worker", "5", "--max_epochs", str(options.epochs), "--lr_patience", str(options.epochs)]
    arguments = ["demo", *fields, *dataset]
    with ThreeNodes(place / "cluster.log") as cluster:
        start = time.monotonic()
        undisturbed = Run(arguments, place / "undisturbed", cluster)
        undisturbed.finish()
    print(f"undisturbed: {time.monotonic() - start:.0f} s", flush=True)
    good, runs = True, 0
    with ThreeNodes(place / "cluster.log") as cluster:
        start = time.monotonic()
        faults = Faults(options.seed, options.every, start)
        end = start + 60 * options.minutes
        while runs == 0 or time.monotonic() < end:
            runs += 1
            run = Run(arguments, place / f"run{runs}", cluster)
            while run.job.poll() is None:
                time.sleep(0.5)
                if time.monotonic() < end:
                    faults.inject(run)
            run.finish()
            print(f"{time.monotonic() - start:6.0f} s  run {runs} finished", flush=True)
            good &= compare(run, undisturbed)
    injected = ", ".join(f"{kind} {count} times" for kind, count in sorted(faults.counts.items()))
    print(f"{runs} runs in {time.monotonic() - start:.0f} s; {injected or 'no fault'}: {VERDICT[good]}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
