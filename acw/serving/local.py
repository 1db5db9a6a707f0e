"""The service on this machine: a Ray of its own that nobody else reaches, and the address that answers."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
from ray import serve

from acw.cluster.joining import connect, disconnect
from acw.serving import routes
from acw.serving.service import NAME, QUIET, Predictor, Service, deployment
from acw.storage.errors import UserError
from acw.tracking.load import load

SECONDS_TO_ANSWER = 60.0


@contextlib.contextmanager
def running(service: Service, host: str, port: int, replicas: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a service that answers, and what its model says of itself; ended with the context.

    port: 0 for one that is free. Raises UserError where the port is taken, there is no such model, or this machine has
    fewer cores than replicas.
    """
    port = _free(host, port)
    about = routes.about(load(service.model, service.device))
    try:
        connect()
        resources = ray.cluster_resources()
        if replicas > (cores := int(resources.get("CPU", 1))):
            raise UserError(
                f"--replicas {replicas}: this machine has {cores} cores, and a replica needs one; give fewer"
            )
        gpus = min(1.0, resources.get("GPU", 0) / replicas) if service.device == "cuda" else 0.0
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start("HeadOnly", {"host": host, "port": port}, logging_config=QUIET)
        options = deployment(replicas, cores // replicas, gpus)
        _run(Predictor.options(**options).bind(**asdict(service)))  # type: ignore[attr-defined]
        address = f"http://{_in_address(host)}:{port}/"
        _wait(f"http://{_in_address(_own(host))}:{port}/healthz")
        yield address, about
    finally:
        if ray.is_initialized():
            serve.shutdown()
        disconnect()


def _run(application: serve.Application) -> None:
    """Deploys it; raises UserError with what a replica has stumbled over."""
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        found = serve.status().applications.get(NAME)
        said = [one.message for one in found.deployments.values()] if found else []
        last = [line.strip() for line in "\n".join(said).splitlines() if line.strip()][-1:]
        raise UserError(f"the model cannot be served ({last[0] if last else error}); see Ray's log files") from error


def _free(host: str, port: int) -> int:
    """The port, which is free; raises UserError where it is not, or the host is not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            return int(listener.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot be listened on ({reason}); give others") from None


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _own(host: str) -> str:
    """Where this machine reaches a service that listens there."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _wait(url: str) -> None:
    """Until it answers; raises UserError where it does not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + SECONDS_TO_ANSWER
    while time.monotonic() < end:
        with contextlib.suppress(OSError), opener.open(url, timeout=SECONDS_TO_ANSWER):
            return
        time.sleep(0.1)
    raise UserError(
        f"{url}: did not answer within {SECONDS_TO_ANSWER:.0f} seconds; see Ray's log files, and start anew"
    )
