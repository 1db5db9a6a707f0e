"""Runs one command as a Ray job on a Ray head of its own on this machine, and leaves nothing running.

    python jobs/local_cluster.py -- python jobs/pipeline.py demo --root "$PWD/runs"

does on the loopback interface what `ray up` and `ray job submit` do on a cluster: it starts a head, submits the command
with the current folder (less what .gitignore and .rayignore name) as its working directory, streams its output, and
stops the head, whatever happens. The exit status is the command's own. The last line on stdout is the command's last.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

STARTUP_SECONDS = 120
"""How long a head may take before we give up: 5-15 s on an idle machine, more on a first start from a cold disk."""

GRACE_SECONDS = 5
"""How long processes may take to end on SIGTERM before they get SIGKILL."""

ENTRY_BYTES = 300
"""What a file adds to the package besides its own bytes."""

LARGE = 5
"""So many of the largest files are named where a folder is too large to be sent."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="+", help="what to run, after `--`; `python` is the one that runs this file")
    command = parser.parse_args().command
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    try:
        refuse_what_is_too_large(Path.cwd())
        with local_head() as (address, environment):
            return submit(address, environment, command)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


# --- The head -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def local_head() -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head on 127.0.0.1 with its job server.

    Yields the job server's URL and the environment in which Ray's own commands reach it. On exit every process that
    the head or a job started has ended and its temporary folder is gone.
    """
    # Ray puts Unix sockets below this folder, whose paths may not exceed 107 bytes: hence not below $TMPDIR.
    folder = Path(tempfile.mkdtemp(prefix="acw-ray-", dir="/tmp"))
    environment = _environment(folder)
    dashboard_port, agent_port, client_port = _free_ports(3)
    address = f"http://127.0.0.1:{dashboard_port}"
    command = [
        *_ray("start", "--head", "--block", "--port=0", f"--temp-dir={folder}", "--include-dashboard=true"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        *(f"--dashboard-agent-listen-port={agent_port}", f"--ray-client-server-port={client_port}"),
    ]
    head: subprocess.Popen[bytes] | None = None
    try:
        print(f"Starting a Ray head on this machine ({address}) ...", flush=True)
        with open(folder / "head.log", "wb") as log:
            # A session of its own, so that Ctrl-C reaches this process alone, which then ends the rest in order.
            head = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        _wait_until_ready(head, address, environment, folder / "head.log")
        yield address, environment
    finally:
        # A second Ctrl-C must not interrupt the clean-up, which is bounded in time.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if head is not None:
            _stop(head, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent() -> None:
    # So that the head ends even if this process is killed with SIGKILL, when it can clean up nothing.
    parent_death_signal = 1
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def _environment(folder: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    no_proxy = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    loopback_only = ",".join(filter(None, [no_proxy, "127.0.0.1", "localhost"]))
    return environment | {
        # On Linux Ray listens on every interface unless it is told that this is no cluster, which this switch does.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        # Other users of this machine can reach the loopback interface too, and a job server runs whatever it is sent.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "ACW_COMMIT": _commit(),
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": loopback_only,
        "no_proxy": loopback_only,
        # The job says `python`; it has to be the one that has Ray and the project's dependencies.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}",
    }


def _commit() -> str:
    """The commit of the current folder: what is submitted has no .git, so the job cannot ask itself."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _ray(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_ready(head: subprocess.Popen[bytes], address: str, environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and head.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            _get(f"{address}/api/version", environment)
            return
        time.sleep(0.2)
    print(log.read_text(errors="replace", encoding="utf-8"), file=sys.stderr)
    problem = f"gave no answer in {STARTUP_SECONDS} s" if head.poll() is None else f"ended with status {head.poll()}"
    raise SystemExit(f"The Ray head {problem}; its output is above.")


def _get(url: str, environment: dict[str, str]) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"})
    with opener.open(request, timeout=10) as answer:
        return json.load(answer)


# --- The job ------------------------------------------------------------------------------------------------------


def refuse_what_is_too_large(folder: Path) -> None:
    """Raises SystemExit where Ray's job server would not take a folder as a working directory; it names no file."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size + ENTRY_BYTES

    excludes = [packaging._get_excludes(folder, get_runtime_env_default_excludes())]
    # Its files as Ray finds them.
    packaging._dir_travel(folder, excludes, note, include_gitignore=True, logger=logging.getLogger(__name__))
    total = sum(sizes.values())
    if total >= DASHBOARD_CLIENT_MAX_SIZE:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:LARGE]
        named = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 1e6:.0f} MB)" for path in largest)
        raise SystemExit(
            f"error: {folder}: {total / 1e6:.0f} MB would be sent with the job, and Ray takes "
            f"{DASHBOARD_CLIENT_MAX_SIZE / 1e6:.0f}; name in .rayignore, or move elsewhere, the largest files: {named}"
        )


def submit(address: str, environment: dict[str, str], command: list[str]) -> int:
    """Run `command` as a job from the current folder, stream its output, and return its exit status."""
    job = f"acw-{os.getpid()}"
    arguments = ["job", "submit", "--address", address, "--submission-id", job, "--working-dir", "."]
    arguments += ["--log-style=pretty", "--log-color=false", "--", *command]
    with subprocess.Popen(_ray(*arguments), env=environment, start_new_session=True) as client:
        try:
            client_status = client.wait()
        except BaseException:
            client.kill()
            raise
    # `ray job submit` knows only 0 and 1, and says 0 for a job that was stopped.
    try:
        info = _get(f"{address}/api/jobs/{job}", environment)
        if info["status"] == "SUCCEEDED":
            print(_get(f"{address}/api/jobs/{job}/logs", environment)["logs"].rstrip().rpartition("\n")[2], flush=True)
            return 0
    except urllib.error.HTTPError:
        return client_status or 1  # the job was not taken, and `ray job submit` has said why
    except urllib.error.URLError as error:
        raise SystemExit(f"The local Ray head no longer answers ({error}); the job's fate is unknown.") from error
    status = info.get("driver_exit_code") or client_status or 1
    return status if status > 0 else 128 - status


# --- The end ------------------------------------------------------------------------------------------------------


def _stop(head: subprocess.Popen[bytes], folder: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        head.send_signal(number)
        for pid in processes_of(head.pid, folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if head.poll() is not None and not processes_of(head.pid, folder):
                return
            time.sleep(0.1)
    raise SystemExit(f"Could not end these processes of the local Ray head: {processes_of(head.pid, folder)}")


def processes_of(session: int, folder: Path) -> list[int]:
    """Ids of the processes that a head, or a job on it, has started and that still run, the head's own included.

    Ray's processes stay in the head's session, some under names that overwrite their environment; a job's command
    gets a session of its own, but inherits the head's temporary folder in `RAY_TMPDIR`. Empty where there is no /proc
    (macOS): there we rely on the head, which ends its processes on SIGTERM.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # A process may end between the listing and the reading, and those of others are not ours to read.
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes()  # empty for one that has ended and awaits its parent
            if environment and (os.getsid(int(entry.name)) == session or os.fsencode(folder) in environment):
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
