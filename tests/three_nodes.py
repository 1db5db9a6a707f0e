"""A Ray cluster of three nodes on this machine, in a process of its own, and what may befall it.

As a script it holds such a cluster and obeys lines on stdin, until that ends; `ThreeNodes` is a test's hold on it.
Every process of it listens on 127.0.0.1 only and is ended by its id.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 300.0
STORE_BYTES = 80 * 2**20  # Ray takes no smaller object stores than 75 MiB
NODE = {"num_cpus": 1}


def head(port: int) -> dict[str, Any]:
    """A node whose dashboard on that port takes jobs."""
    return NODE | {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}


def submission(port: int, *arguments: str) -> list[str]:
    """The command line of `ray job submit` to the cluster with that head."""
    job_submit = ["-m", "ray.scripts.scripts", "job", "submit", "--address", f"http://127.0.0.1:{port}"]
    return [sys.executable, *job_submit, *arguments]


# Pins almost all of each node's object store: what a process looks at can be neither moved to disk nor dropped.
_HOG = """
import numpy as np, ray, time
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(log_to_driver=False)
@ray.remote(num_cpus=0)
class Hog:
    def fill(self):
        self.seen = []
        for size in (16, 16, 16, 16, 4, 4, 1, 1):
            try:
                self.seen.append(ray.get(ray.put(np.zeros(size * 2**20, np.uint8))))
            except ray.exceptions.ObjectStoreFullError:
                pass
        return sum(map(len, self.seen))
hogs = [Hog.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote()
        for n in ray.nodes()]
print("filled", ray.get([hog.fill.remote() for hog in hogs]), flush=True)
time.sleep(10000)
"""


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """The condition's first true value."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.05)
    return found


def processes(session: int) -> dict[int, str]:
    """What still runs of a session, as id -> command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, theirs = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
            if int(theirs) == session and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_text(encoding="utf-8").replace("\0", " ")
    return found


def end_all(session: int) -> None:
    while left := processes(session):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, of which nothing is left afterwards; its output is added to the log."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        end_all(process.pid)
        process.wait()


def finish(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, status: int = 0) -> str:
    """Runs a job that must end with a status; what it printed."""
    start = log.stat().st_size if log.exists() else 0
    with running(command, log, environment) as job:
        ended = job.wait(timeout=2 * PATIENCE)
    printed = log.read_text(encoding="utf-8")[start:]
    assert ended == status, printed
    return printed


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of so many bytes; skips the test where none may be mounted."""
    import pytest

    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Writes a file until nothing more fits."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


class ThreeNodes:
    """A cluster's address, the environment in which jobs find it, and its nodes by the ids that Ray gave them.

    sizes: of each node, as arguments of Ray's `Cluster.add_node`; the first is the head, where drivers run.
    log: where a failure to start is explained.
    """

    def __init__(self, log: Path, sizes: Sequence[Mapping[str, Any]] = (NODE, NODE, NODE)) -> None:
        # Ray's Unix sockets lie below this folder, and their paths may not exceed 107 bytes: hence not below $TMPDIR.
        self._folder = tempfile.mkdtemp(prefix="acw-n-", dir="/tmp")
        self._environment = os.environ | {
            "RAY_TMPDIR": self._folder,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A machine with fewer cores than nodes is slow to start them.
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_worker_register_timeout_seconds": "240",
            "RAY_worker_niceness": "0",  # relative to the test's own
            "PYTHONUNBUFFERED": "1",
        }
        self._environment.pop("RAY_ADDRESS", None)
        with log.open("ab") as out:
            self._holder = subprocess.Popen(
                [sys.executable, __file__, json.dumps([dict(size) for size in sizes])],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                encoding="utf-8",
                start_new_session=True,
            )
        self.nodes: dict[str, int] = {}
        try:
            self.address = self._answer()["address"]
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> ThreeNodes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        return self._environment | {"RAY_ADDRESS": self.address}

    @property
    def head(self) -> str:
        return next(iter(self.nodes))

    def add(self, **size: Any) -> None:
        self._say("add", size or NODE)

    def remove(self, node: str) -> None:
        """Kills a node's processes, without grace."""
        self._say("remove", node)

    def commands(self, name: str) -> dict[int, str]:
        """Processes on its nodes with that in their command lines, as id -> command line."""
        return {pid: line for pid, line in processes(self._holder.pid).items() if name in line}

    def workers(self, name: str) -> dict[int, str]:
        """Processes of Ray workers with that name, as id -> node."""
        found = {}
        for pid in self.commands(name):
            with contextlib.suppress(OSError, StopIteration):
                # A worker's parent is its node's raylet.
                parent = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
                found[pid] = next(node for node, raylet in self.nodes.items() if raylet == parent)
        return found

    @contextlib.contextmanager
    def full_stores(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Fills the object stores of all its nodes, until the process that does so is ended."""
        before = log.read_text(encoding="utf-8") if log.exists() else ""
        with running([sys.executable, "-c", _HOG], log, self.environment) as hog:
            filled = lambda: "filled" in log.read_text(encoding="utf-8")[len(before) :]  # noqa: E731
            wait_for(lambda: filled() or hog.poll() is not None, "for the stores to be full")
            assert hog.poll() is None, log.read_text(encoding="utf-8")
            yield hog

    def stop(self) -> None:
        """Ends all of it, by force."""
        end_all(self._holder.pid)
        self._holder.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _say(self, *words: Any) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.write(json.dumps(words) + "\n")
        self._holder.stdin.flush()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._holder.stdout is not None
        line = self._holder.stdout.readline()
        assert line.startswith("{"), f"the cluster's process has ended: {line}"
        answer = json.loads(line)
        self.nodes = answer["nodes"]
        return answer


def _hold(sizes: Sequence[dict[str, Any]]) -> None:
    from ray.cluster_utils import Cluster

    first, *others = [{"object_store_memory": STORE_BYTES} | size for size in sizes]
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False} | first)
    nodes = {cluster.head_node.node_id: cluster.head_node}
    folders = itertools.count()

    def add(size: dict[str, Any]) -> None:
        # A folder for each, as machines have: in one, a node deletes the working directory that others' jobs are in.
        folder = os.path.join(os.environ["RAY_TMPDIR"], str(next(folders)))
        # On a busy machine it takes longer to be known than Ray's own patience.
        node = cluster.add_node(wait=False, **{"object_store_memory": STORE_BYTES, "temp_dir": folder} | size)
        nodes[node.node_id] = node

    def answer() -> None:
        raylets = {name: node.all_processes["raylet"][0].process.pid for name, node in nodes.items()}
        print(json.dumps({"address": cluster.address, "nodes": raylets}), flush=True)

    for size in others:
        add(size)
    cluster.wait_for_nodes(timeout=PATIENCE)
    answer()
    for line in sys.stdin:
        word, what = json.loads(line)
        if word == "add":
            add(what)
        else:
            cluster.remove_node(nodes.pop(what), allow_graceful=False)
        answer()
    cluster.shutdown()


if __name__ == "__main__":
    _hold(json.loads(sys.argv[1]))
