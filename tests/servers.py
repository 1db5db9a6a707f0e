"""Servers on 127.0.0.1 that tests start on free ports and end by their ids, and how to wait for one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from three_nodes import PATIENCE, running, wait_for


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_it_answers(url: str) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
        return False

    wait_for(answers, f"for {url} to answer")


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int, artifacts: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's own server, its database in the folder and, unless they have an address, the artifacts too."""
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    store += ["--artifacts-destination", artifacts or str(folder / "a")]
    listen = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    serve = [sys.executable, "-m", "mlflow", "server", *store, *listen]
    with running(serve, folder / "server.log") as server:
        wait_until_it_answers(f"http://127.0.0.1:{port}/health")
        yield server


@contextlib.contextmanager
def acw_serve(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`acw serve` with these arguments on a free port: its address, ending in a slash, and its process, which is ended
    as by Ctrl-C."""
    words = [sys.executable, "-m", "acw.cli", "serve", *map(str, arguments), "--port", "0"]
    # A busy machine may need more than the half minute that Ray waits for its own start.
    patient = os.environ | {"RAY_raylet_start_wait_time_s": f"{PATIENCE:.0f}"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, encoding="utf-8", env=patient) as server:
        try:
            assert server.stdout
            last = next((line for line in server.stdout if line.startswith("http://")), None)
            assert last, "it ended before it answered; stderr says why"
            yield last.strip(), server
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(PATIENCE)


def processes_of(pid: int) -> list[Any]:
    """A process and all that come from it, as psutil has them, which Ray brings along."""
    import ray  # noqa: F401
    from psutil import Process

    return [Process(pid), *Process(pid).children(recursive=True)]
