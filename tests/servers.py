"""Servers on 127.0.0.1 that tests start on free ports and end by their ids, and how to wait for one."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from three_nodes import running, wait_for


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
