"""The service on Ray Serve: replicas of a model, each of which predicts waiting images together.

`app` is what a cluster's `serve.yaml` names, and `configuration` is such a file's content.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import ray
from ray import serve

from acw.cluster.process import compute_with, give_back
from acw.model.prediction import Prediction
from acw.serving import limits, routes
from acw.tracking.load import load

NAME = "acw"
LOOPBACK = "127.0.0.1"
BATCH = 8  # images that pass the backbones together, at most
BATCH_SECONDS = 0.01  # how long the first one waits for others
# Above what a replica admits, so that it is the replica that refuses, in a sentence of its own.
ONGOING = 16 * limits.MOST_REQUESTS
GIVE_BACK_AFTER = 16  # images, in as many sizes
GRACE_SECONDS = 5.0
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class Service:
    """model: a run's folder, a model's folder, an address or an MLflow URI; None for the package's own. token_sha256:
    of the token that callers must know, in hexadecimal; None where only this machine can call. own_ray: whether it runs
    on a Ray of this machine alone."""

    model: str | None = None
    device: str = "cpu"
    token_sha256: str | None = None
    own_ray: bool = False


@serve.deployment(
    max_ongoing_requests=ONGOING, graceful_shutdown_timeout_s=GRACE_SECONDS, graceful_shutdown_wait_loop_s=0.5
)
@serve.ingress()
class Predictor:
    """A replica: the model, loaded once, behind the application's routes."""

    def __init__(self, **fields: Any) -> None:
        self.service = Service(**fields)
        if self.service.own_ray:
            _keep_replica_to_loopback()
        self.threads = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        compute_with(self.threads)
        self.model = load(self.service.model, self.service.device)
        self.model.load_backbones()
        self.worker, self.kept_of = ThreadPoolExecutor(1), 0

    def __serve_build_asgi_app__(self) -> Any:
        return routes.application(self.model, self.predicted, self.service.token_sha256, self.threads)

    # Its types know no methods of several arguments.
    @cast(Any, serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_SECONDS))
    async def predicted(self, images: list[np.ndarray], categories: list[str | None]) -> list[Prediction]:
        """The predictions of the images that wait, each for who has sent it."""
        return await asyncio.get_running_loop().run_in_executor(self.worker, self._predict, images, categories)

    def _predict(self, images: Sequence[np.ndarray], categories: Sequence[str | None]) -> list[Prediction]:
        predictions = list(self.model.predict_batch(images, categories))
        self.kept_of += len(images)
        if self.kept_of >= GIVE_BACK_AFTER:
            give_back()
            self.kept_of = 0
        return predictions


def _keep_replica_to_loopback() -> None:
    """Has this replica listen for others on 127.0.0.1 alone: Ray Serve (2.60) does so on all interfaces, whatever Ray
    was told, and takes pickles there, which whoever reaches it could have run."""
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", LOOPBACK))


def app(arguments: dict[str, Any]) -> serve.Application:
    """What Ray Serve deploys by `import_path: acw.serving.service:app`; arguments: fields of Service."""
    return Predictor.bind(**asdict(Service(**arguments)))  # type: ignore[attr-defined]  # the decorator's


def deployment(replicas: int, cpus: int, gpus: float) -> dict[str, Any]:
    """How many replicas there are, and what each has of a node."""
    return {"num_replicas": replicas, "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus}}


def configuration(service: Service, host: str, port: int, replicas: int, cpus: int) -> dict[str, Any]:
    """Of a cluster that serves, as `serve deploy` takes it."""
    own = {"name": Predictor.name, **deployment(replicas, cpus, float(service.device == "cuda"))}  # type: ignore[attr-defined]
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "logging_config": QUIET,
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": f"{app.__module__}:{app.__name__}",
                "args": asdict(service),
                "deployments": [own],
            }
        ],
    }
