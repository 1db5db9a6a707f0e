"""The Ray cluster that a job runs on: joining it, and how many workers of which size fit."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from acw.storage.errors import UserError

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
REMEDY = "give HOST:PORT of its head, or unset RAY_ADDRESS to work on this machine"

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


def on_cluster() -> bool:
    """Whether RAY_ADDRESS, which `ray job submit` sets for its jobs, names a cluster; otherwise Ray is started here."""
    return _named() not in ("", "local")


def _named() -> str:
    return os.environ.get("RAY_ADDRESS", "").strip()


def address() -> str:
    """What ray.init takes: HOST:PORT of the cluster that RAY_ADDRESS names, or `local` for a Ray of our own.

    `auto` stays so where Ray has noted no cluster, as `ray.init` looks among this machine's processes, too. Ray left to
    itself would join what a file in its temporary folder names, be that dead or another's. Raises UserError within
    seconds where no Ray answers, which Ray itself would try for minutes.
    """
    if not on_cluster():
        return "local"
    named = _named()
    shown = re.sub(r"//[^/@]*@", "//", named)  # without a password
    if "://" in named:
        raise UserError(
            f"RAY_ADDRESS {shown}: a job cannot join a cluster through this; submit it there (ray job submit --address "
            f"http://HEAD:8265 --working-dir . -- python jobs/...), {REMEDY}"
        )
    host, _, port = named.rpartition(":")
    if named != "auto" and not (
        re.fullmatch(r"\[[\w:]+\]|[^\s:/]+", host) and port.isdecimal() and 0 < int(port) < 2**16
    ):
        raise UserError(f"RAY_ADDRESS {shown}: is no address of a Ray cluster; {REMEDY}")
    os.environ["RAY_ADDRESS"] = named  # Ray knows no spaces around it
    found = _latest() if named == "auto" else _as_nodes_name_it(host, port)
    if not found:
        return named  # Ray looks for it among this machine's processes
    try:
        _reach(found)
    except (OSError, ValueError) as error:
        there = "" if found == named else f" at {found}"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"RAY_ADDRESS {shown}: no Ray answers{there} ({reason}); start it, {REMEDY}") from None
    return found


def _latest() -> str:
    """HOST:PORT of the cluster that `ray start` has last started or joined here, where Ray notes it; "" for none."""
    try:
        return (_ray_folder()[1] / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _as_nodes_name_it(host: str, port: str) -> str:
    """For this machine's own names, its address in the network, which Ray takes; others as they are."""
    if host.strip("[]") not in ("localhost", "127.0.0.1", "::1"):
        return f"{host}:{port}"
    import ray.util

    found = ray.util.get_node_ip_address()
    return f"[{found}]:{port}" if ":" in found else f"{found}:{port}"


def _reach(address: str) -> None:
    """Raises OSError, or ValueError for what is no address, where nothing like Ray listens."""
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
        if where == "auto" and isinstance(error, ConnectionError):
            raise UserError(
                f"RAY_ADDRESS auto: no Ray runs on this machine; start one (ray start --head), {REMEDY}"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"RAY_ADDRESS {_named()}: this cluster cannot be joined ({reason}); have its versions of Ray and Python "
            "here, and its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN), or unset RAY_ADDRESS to work on this machine"
        ) from error


def _of_our_own() -> str:
    """Prepares the environment for a Ray that only this process and its workers reach; where it keeps its files."""
    keep_to_loopback()
    if "RAY_AUTH_TOKEN_PATH" not in os.environ and not _home_can_be_written():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", _token())
    return str(_temporary_folder())


def keep_to_loopback() -> None:
    """Has a Ray of our own listen on 127.0.0.1 alone, if this is called before Ray is imported; else it listens on all
    interfaces, as a cluster's own nodes must."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _home_can_be_written() -> bool:
    """Whether Ray can keep its token there, as it does unless it is given one."""
    try:
        return os.access(Path.home(), os.W_OK)
    except RuntimeError:  # no HOME, and a user without a name
        return False


@functools.cache
def _token() -> str:
    """One for all of a process's life: Ray reads it once."""
    return secrets.token_hex(32)


def _ray_folder() -> tuple[str, Path]:
    """Where Ray keeps its files unless it is told otherwise, and what says so: a variable, or /tmp."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    name = next((name for name in names if os.environ.get(name)), "/tmp")
    return name, Path(os.environ.get(name, name)).absolute() / "ray"


def _temporary_folder() -> Path:
    """Where a Ray of our own keeps its files: where Ray would, if need be through a short link that goes at exit.

    Ray's sockets lie in it, whose paths must be short. Raises UserError where nothing can be written.
    """
    name, folder = _ray_folder()
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
