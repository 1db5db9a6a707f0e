"""The Ray cluster that a job runs on: joining it, and how many workers of which size fit."""

from __future__ import annotations

import atexit
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from acw.storage import UserError

T = TypeVar("T")

# How many GPUs a job asks of an autoscaling cluster that has none yet; --workers asks for another number.
GPUS_TO_START = 4
# Until a cluster has started the first node that it was asked for: spot machines with a GPU may take their time.
PATIENCE_SECONDS = 20 * 60.0
WAITING_SECONDS = 60.0
# What a Unix socket's path may have on every system, and what Ray puts behind its temporary folder: a session's name
# with a time and a process id, and the socket's.
SOCKET_BYTES = 103
SESSION_BYTES = len("/session_2026-11-29_16-14-44_123456_1234567/sockets/plasma_store.1")
# A head that is alive answers at once.
ANSWER_SECONDS = 5.0
# With this a client of HTTP/2, which Ray speaks, introduces itself: the preface, and an empty frame of settings. The
# server's first frame is one of settings, too.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
SETTINGS = 4


# Of the driver's environment, what workers on other nodes are to find in theirs: addresses, sizes, memory.
SHARED = (
    "ACW_CACHE_GB",
    "AWS_CA_BUNDLE",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "REQUESTS_CA_BUNDLE",
)


@dataclass(frozen=True)
class Allocation:
    """What a pool of worker processes asks of the cluster; per worker `cpus` and `gpus`, which may be a fraction."""

    workers: int
    cpus: int
    gpus: float

    def __str__(self) -> str:
        return f"{self.workers} workers of {self.cpus} CPU and {self.gpus:g} GPU"


def on_cluster() -> bool:
    """Whether RAY_ADDRESS, which `ray job submit` sets for its jobs, names a cluster; otherwise Ray is started here."""
    return _named() not in ("", "local")


def _named() -> str:
    return os.environ.get("RAY_ADDRESS", "").strip()


def address() -> str:
    """What ray.init takes: HOST:PORT of the cluster that RAY_ADDRESS names, or `local` for a Ray of our own.

    Ray left to itself would join what a file in its temporary folder names, be that dead or another's. Raises UserError
    within seconds where no Ray answers, which Ray itself would try for minutes.
    """
    if not on_cluster():
        return "local"
    named = _named()
    shown = re.sub(r"//[^/@]*@", "//", named)  # without a password
    remedy = "give HOST:PORT of its head, or unset RAY_ADDRESS to work on this machine"
    if "://" in named:
        raise UserError(
            f"RAY_ADDRESS {shown}: a job cannot join a cluster through this; submit it there (ray job submit --address "
            f"http://HEAD:8265 --working-dir . -- python jobs/...), {remedy}"
        )
    host, _, port = named.rpartition(":")
    if named != "auto" and not (
        re.fullmatch(r"\[[\w:]+\]|[^\s:/]+", host) and port.isdecimal() and 0 < int(port) < 2**16
    ):
        raise UserError(f"RAY_ADDRESS {shown}: is no address of a Ray cluster; {remedy}")
    from ray._private.services import canonicalize_bootstrap_address

    os.environ["RAY_ADDRESS"] = named  # Ray knows no spaces around it
    try:
        # For this machine's own name, Ray takes its address in the network.
        found = str(canonicalize_bootstrap_address(named))
    except ConnectionError:
        raise UserError(
            f"RAY_ADDRESS auto: no Ray runs on this machine; start one (ray start --head), {remedy}"
        ) from None
    try:
        _reach(found)
    except (OSError, UnicodeError) as error:
        there = "" if found == named else f" at {found}"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"RAY_ADDRESS {shown}: no Ray answers{there} ({reason}); start it, {remedy}") from None
    return found


def _reach(address: str) -> None:
    """Raises OSError or UnicodeError where nothing like Ray listens."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
            connection.sendall(PREFACE)
            first = connection.makefile("rb").read(len("lenTFstrm"))
            if first[3:4] != bytes((SETTINGS,)):
                raise OSError("something else listens there")


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS or `ray job submit` names, or starts Ray here, on 127.0.0.1 only.

    Raises UserError where that cannot be done.
    """
    own = None if on_cluster() else _of_our_own()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The first error ends a job. What other workers say of the same damaged file would bury its one line.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Ray's threads would leave glibc with an arena each, and every thread that reads features would take another and
    # keep memory in it. Only a process that starts with this has but one (`process.compute_with`).
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    # In pages of 2 MB, where the system has them: a virtual machine pays much for looking up 4 KB ones.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    where = address()
    import ray

    # Ray says at each start that its token authentication is on, which is what we want.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    try:
        ray.init(
            where,
            logging_level=logging.WARNING,
            # Workers chatter into Ray's log files: errors come as exceptions, progress is the driver's to print.
            log_to_driver=False,
            **({"runtime_env": _runtime_env()} if own is None else {"include_dashboard": False, "_temp_dir": own}),
        )
    except (RuntimeError, ConnectionError, ray.exceptions.RayError) as error:
        if own is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"RAY_ADDRESS {_named()}: this cluster cannot be joined ({reason}); have its versions of Ray and Python "
            "here, and its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN), or unset RAY_ADDRESS to work on this machine"
        ) from error


def _of_our_own() -> str:
    """Prepares the environment for a Ray that only this process and its workers reach; where it keeps its files."""
    # Ray listens on all interfaces unless this is set before its import; a cluster's own nodes must keep doing so.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        # Ray would keep one in the home directory, which there need not be.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return str(_temporary_folder())


def _temporary_folder() -> Path:
    """Where a Ray of our own keeps its files: where Ray would, if need be through a short link that goes at exit.

    Ray's sockets lie in it, whose paths must be short. Raises UserError where nothing can be written.
    """
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    name = next((name for name in names if os.environ.get(name)), "/tmp")
    folder = Path(os.environ.get(name, name)).absolute() / "ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if len(os.fsencode(folder)) + SESSION_BYTES <= SOCKET_BYTES:
            return folder
        link = Path(tempfile.mkdtemp(prefix="acw-ray-", dir="/tmp")) / "ray"
        link.symlink_to(folder)
    except OSError as error:
        raise UserError(
            f"{name} {folder.parent}: Ray cannot keep its files there ({error.strerror}); set RAY_TMPDIR to a folder "
            "that can be written"
        ) from None
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    return link


def _runtime_env() -> dict[str, Any] | None:
    """The environment of workers on other nodes: where S3 is, never a key to it."""
    # Of a submitted job, Ray would otherwise refuse variables that the job brings itself; they are the same here.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    found = {name: os.environ[name] for name in SHARED if name in os.environ}
    return {"env_vars": found} if found else None


def disconnect() -> None:
    """Leaves the cluster, or ends the Ray that `connect` started here; nothing where there is none."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


def trouble(error: BaseException) -> UserError | None:
    """What befell the cluster, in a line, where Ray has tried again in vain; None for any other error."""
    if "ray" not in sys.modules:
        return None
    from ray import exceptions

    known = {
        exceptions.OutOfMemoryError: "a node ran out of memory; give fewer --workers, or nodes with more",
        exceptions.OutOfDiskError: "the disk of a node's temporary folder is full; free it",
        exceptions.ObjectStoreFullError: "a node's object store is full; end other jobs, or give nodes more memory",
        exceptions.ObjectLostError: "results were lost with their nodes",
        exceptions.NodeDiedError: "nodes were lost again and again",
        exceptions.RayActorError: "workers were lost again and again; give fewer --workers if memory ran out",
        exceptions.WorkerCrashedError: "workers were lost again and again; give fewer --workers if memory ran out",
    }
    for kind, what in known.items():
        if isinstance(error, kind):
            reason = str(error).strip().partition("\n")[0][:200]
            return UserError(f"the cluster: {what}, and run the same command again: it goes on ({reason})")
    return None


def wants_gpus(accelerator: str) -> bool:
    """Whether work goes to GPUs: `gpu` always, `cpu` never, `auto` where the cluster has any now.

    Raises UserError for `gpu` on a Ray that was started here and has none; a cluster's autoscaler may bring them.
    """
    import ray

    present = ray.cluster_resources().get("GPU", 0) > 0
    if accelerator == "gpu" and not present and not on_cluster():
        raise UserError("no GPU on this machine; submit the job to a cluster that has some, or give --accelerator cpu")
    return accelerator == "gpu" or (accelerator == "auto" and present)


def allocate(tasks: int, workers: int, accelerator: str, gpus_per_worker: float = 1.0) -> Allocation:
    """Workers that run side by side for `tasks` tasks: `workers` of them, or as many as there is room for (0).

    gpus_per_worker: 1, or a whole fraction of one, so that several workers share a GPU. Cores are shared out evenly
    within each node. Where there is room for fewer than are asked for, says so; more than there is room for are given
    only on a cluster, which may grow: it works with those that it has until then (`room`).
    Where GPUs are demanded and none is there yet, GPUS_TO_START are, and the first is waited for; raises UserError if
    none comes within PATIENCE_SECONDS.
    """
    if wants_gpus(accelerator):
        one = Allocation(1, 1, gpus_per_worker)
        here = room(one)
        count = min(tasks, workers or here or GPUS_TO_START * round(1 / gpus_per_worker))
    else:
        cores = [int(node.get("CPU", 0)) for node in _nodes()]
        if not sum(cores):
            raise UserError(
                "the Ray cluster has no CPU to work on; add a node, or give --accelerator gpu to have one started"
            )
        here = sum(cores)
        count = min(tasks, workers or here)
        fitting = min(count, here)
        cpus = max(c for c in range(1, max(cores) + 1) if c == 1 or sum(n // c for n in cores) >= fitting)
        one = Allocation(1, cpus, 0)
    if count > here > 0:
        print(f"asked for {workers or count} workers, the cluster has room for {here}: they do the work", flush=True)
    result = Allocation(count if on_cluster() else min(count, here), one.cpus, one.gpus)
    if not here:
        wait_for_room(result)
    return result


def room(allocation: Allocation) -> int:
    """How many workers of an allocation's size the cluster's nodes hold at present, were nothing else on them."""

    def of(node: Mapping[str, float]) -> int:
        by_cores = int(node.get("CPU", 0)) // allocation.cpus
        # A worker's part is of one GPU.
        return min(by_cores, int(node.get("GPU", 0)) * int(1 / allocation.gpus)) if allocation.gpus else by_cores

    return sum(map(of, _nodes()))


def wait_for_room(allocation: Allocation) -> int:
    """Asks the cluster for the workers of an allocation; the room for them as soon as there is any.

    Raises UserError if there is none within PATIENCE_SECONDS.
    """
    demand, start = Demand(allocation), time.monotonic()
    what = f"{allocation.cpus} CPU" + (f" and {allocation.gpus:g} GPU" if allocation.gpus else "")
    shown = 0.0
    while not (found := room(allocation)):
        demand.renew(allocation.workers)
        waited = time.monotonic() - start
        if waited > PATIENCE_SECONDS:
            demand.end()
            raise UserError(
                f"no node with {what} came within {PATIENCE_SECONDS / 60:.0f} min; `ray status` says what the cluster "
                "tried: add one and run the command again, or give --accelerator cpu"
            )
        if waited >= shown:
            print(f"waiting for the cluster to start a node with {what} ({waited / 60:.0f} min)", flush=True)
            shown += WAITING_SECONDS
        time.sleep(1.0)
    demand.end()
    return found


class Demand:
    """Tasks that do nothing but ask for the place of a worker: for as long as they wait, the autoscaler knows of them,
    and when one has run, there was room."""

    def __init__(self, allocation: Allocation) -> None:
        import ray

        @ray.remote(num_cpus=allocation.cpus, num_gpus=allocation.gpus, max_retries=0)
        def place() -> None:
            pass

        self._place = place
        self._waiting: list[Any] = []

    def renew(self, missing: int) -> bool:
        """Keeps so many waiting; whether one has run since the last call."""
        import ray

        before = len(self._waiting)
        if self._waiting:
            _, self._waiting = ray.wait(self._waiting, num_returns=before, timeout=0)
        found = len(self._waiting) < before
        self._waiting += [self._place.remote() for _ in range(missing - len(self._waiting))]
        return found

    def end(self) -> None:
        import ray

        for one in self._waiting:
            ray.cancel(one)
        self._waiting = []


def begin(function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
    """Has one core of the cluster call a function, a module's own, with these arguments, while this process goes on.

    Arguments may be what `ray.put` gave. What is returned waits for the result, or raises what the function raised.
    """
    import ray

    reference = ray.remote(num_cpus=1, max_retries=3)(_call).remote(function, *arguments)
    return lambda: ray.get(reference)


def _call(function: Callable[..., T], *arguments: Any) -> T:
    from acw.process import compute_with

    compute_with(1)
    return function(*arguments)


def place_of(allocation: Allocation, device: Any) -> dict[str, Any]:
    """Where this worker works: its node (address and the beginning of Ray's id), GPU ids as Ray gave them, device."""
    import ray

    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", []) if allocation.gpus else []
    return {
        "node": f"{ray.util.get_node_ip_address()}/{context.get_node_id()[:8]}",
        "gpus": [str(gpu) for gpu in gpus],
        "device": str(device),
    }


def _nodes() -> list[Mapping[str, float]]:
    """The resources of the nodes that are alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
