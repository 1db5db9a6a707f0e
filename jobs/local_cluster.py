"""Runs one command as a Ray job on a Ray head of its own on this machine, and leaves nothing running.

    python jobs/local_cluster.py -- python jobs/pipeline.py displays --root "$PWD/runs"

does on the loopback interface what `ray up` and `ray job submit` do on a cluster: it starts a head, submits the command
with the current folder (less what .gitignore and .rayignore name) as its working directory, streams its output, and
stops the head, also on Ctrl-C and SIGTERM. The exit status is the command's own, and so is the last line on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from acw.provenance import commit

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STARTUP_SECONDS = 120  # for a head: 5-15 s on an idle machine, more on a first start from a cold disk
GRACE_SECONDS = 5  # for processes to end on SIGTERM, before they get SIGKILL
ENTRY_BYTES = 300  # what a file adds to the package besides its own bytes
LARGE = 5  # so many of the largest files are named where a folder is too large to be sent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="+", help="what to run, after `--`; `python` is the one that runs this file")
    command = parser.parse_args().command
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    # Ray puts Unix sockets below this folder, whose paths may not exceed 107 bytes: hence not below $TMPDIR.
    folder = Path(tempfile.mkdtemp(prefix="acw-ray-", dir="/tmp"))
    try:
        _set_environment(folder)
        refuse_what_is_too_large(Path.cwd())
        with local_head(folder) as client:
            return submit(client, command)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _set_environment(folder: Path) -> None:
    """Of the head and of its client here, before Ray is imported."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ |= {
        # On Linux Ray listens on every interface unless it is told that this is no cluster, which this switch does.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        # Other users of this machine can reach the loopback interface too, and a job server runs whatever it is sent.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # What is submitted has no .git, so the job cannot ask for its commit.
        "ACW_COMMIT": commit(),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(filter(None, [no_proxy, "127.0.0.1", "localhost"]))),
        # The job says `python`; it has to be the one that has Ray and the project's dependencies.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def refuse_what_is_too_large(folder: Path) -> None:
    """Raises SystemExit where Ray's job server would not take a folder as a working directory; Ray names no file."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    files: list[Path] = []
    excludes = [packaging._get_excludes(folder, get_runtime_env_default_excludes())]
    # As Ray finds them.
    packaging._dir_travel(folder, excludes, files.append, include_gitignore=True, logger=logging.getLogger(__name__))
    sizes = {path: path.stat().st_size + ENTRY_BYTES for path in files if path.is_file()}
    total = sum(sizes.values())
    if total >= DASHBOARD_CLIENT_MAX_SIZE:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:LARGE]
        named = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 1e6:.0f} MB)" for path in largest)
        raise SystemExit(
            f"error: {folder}: {total / 1e6:.0f} MB would be sent with the job, and Ray takes "
            f"{DASHBOARD_CLIENT_MAX_SIZE / 1e6:.0f}; name in .rayignore, or move elsewhere, the largest files: {named}"
        )


@contextlib.contextmanager
def local_head(folder: Path) -> Iterator[JobSubmissionClient]:
    """A client of a Ray head on 127.0.0.1; on exit every process that the head or a job started has ended."""
    dashboard_port, agent_port, client_port = free_ports(3)
    address = f"http://127.0.0.1:{dashboard_port}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
    command += [f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
    command += [f"--dashboard-agent-listen-port={agent_port}", f"--ray-client-server-port={client_port}"]
    print(f"Starting a Ray head on this machine ({address}) ...", flush=True)
    with (folder / "head.log").open("wb") as log:
        # A session of its own, so that Ctrl-C reaches this process alone, which then ends the rest in order.
        head = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        yield _client(head, address, folder / "head.log")
    finally:
        # A second Ctrl-C must not interrupt the clean-up, which is bounded in time.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        stop(head, folder)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _client(head: subprocess.Popen[bytes], address: str, log: Path) -> JobSubmissionClient:
    """Once the head answers."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and head.poll() is None:
        with contextlib.suppress(RuntimeError, OSError):
            return JobSubmissionClient(address)
        time.sleep(0.2)
    print(log.read_text(errors="replace", encoding="utf-8"), file=sys.stderr)
    problem = f"gave no answer in {STARTUP_SECONDS} s" if head.poll() is None else f"ended with status {head.poll()}"
    raise SystemExit(f"The Ray head {problem}; its output is above.")


def submit(client: JobSubmissionClient, command: list[str]) -> int:
    """Runs a command as a job from the current folder, streams its output, and returns its exit status."""
    # Ray would tell that the stream has ended, after the job's last line, which is the result's path.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

    async def stream() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    try:
        job = client.submit_job(entrypoint=shlex.join(command), runtime_env={"working_dir": "."})
        asyncio.run(stream())
        info = client.get_job_info(job)
    except (RuntimeError, OSError) as error:
        raise SystemExit(
            f"The local Ray head takes no job, or answers no more; its job's fate is unknown: {error}"
        ) from error
    if info.status == "SUCCEEDED":
        return 0
    if not info.driver_exit_code:
        raise SystemExit(f"The job has not run to its end: {info.message}")
    return info.driver_exit_code if info.driver_exit_code > 0 else 128 - info.driver_exit_code


def stop(head: subprocess.Popen[bytes], folder: Path) -> None:
    """Ends a head, and what it or a job on it has started; raises SystemExit where that cannot be done."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        head.send_signal(number)
        for pid in _processes(head.pid, folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if head.poll() is not None and not _processes(head.pid, folder):
                return
            time.sleep(0.1)
    raise SystemExit(f"Could not end these processes of the local Ray head: {_processes(head.pid, folder)}")


def _processes(session: int, folder: Path) -> list[int]:
    """Ids of the processes that a head, or a job on it, has started and that still run, the head's own included.

    Ray's processes stay in the head's session, some under names that overwrite their environment; a job's command
    gets a session of its own, but inherits the head's temporary folder in `RAY_TMPDIR`. Empty where there is no /proc
    (macOS): there we rely on the head, which ends its processes on SIGTERM.
    """
    running = []
    for entry in Path("/proc").glob("[0-9]*"):
        # A process may end between the listing and the reading, and those of others are not ours to read.
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes()  # empty for one that has ended and awaits its parent
            if environment and (os.getsid(int(entry.name)) == session or os.fsencode(folder) in environment):
                running.append(int(entry.name))
    return running


if __name__ == "__main__":
    sys.exit(main())
