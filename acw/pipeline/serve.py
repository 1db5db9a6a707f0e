"""Serves a model: a page in the browser that shows where people look in an image, and the same for programs.

acw serve RUN                                        # http://127.0.0.1:8000/, for this machine alone
ACW_SERVE_TOKEN=... acw serve RUN --host 0.0.0.0     # for others, who know the token
acw serve s3://BUCKET/RUN --replicas 4 --host 0.0.0.0 --write-config serve.yaml; serve deploy serve.yaml

POST /predict takes an image and answers by its Accept header: JSON, image/png, image/svg+xml or application/x-npy;
/openapi.json describes it. The last line on stdout is the address, once it answers. Ctrl-C ends it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acw.cluster.joining import keep_to_loopback, on_cluster
from acw.pipeline.options import MODEL_MEANS, Parser, local_path
from acw.storage.errors import UserError
from acw.storage.files import is_model_uri, write_atomic

TOKEN = "ACW_SERVE_TOKEN"
SHORTEST_TOKEN = 16  # characters
LOCAL = "127.0.0.1"


def add_options(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_MEANS)
    about = f"address of this machine to listen on (default: {LOCAL}); any that others reach needs a token"
    parser.add_argument("--host", default=LOCAL, metavar="ADDRESS", help=about)
    about = "port to listen on; 0 for one that is free (default: 8000)"
    parser.add_argument("--port", type=int, default=8000, metavar="N", help=about)
    about = f"what callers must send as 'Authorization: Bearer TOKEN', of {SHORTEST_TOKEN} characters or more; better "
    about += f"given as {TOKEN} in the environment, which no list of processes shows"
    parser.add_argument("--token", metavar="TOKEN", help=about)
    about = "copies of the model, which share the machine's cores (default: 1)"
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help=about)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    about = "write what `serve deploy FILE` takes, for a Ray cluster, and end; it holds the token's hash alone"
    parser.add_argument("--write-config", metavar="FILE", help=about)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    token = _token(options["token"], options["host"])
    if options["replicas"] < 1:
        raise UserError(f"--replicas {options['replicas']}: give 1 or more")
    if not importlib.util.find_spec("fastapi") or not importlib.util.find_spec("multipart"):
        raise UserError("acw serve needs FastAPI and Ray Serve: pip install 'acw[serve]'")
    location = _location(options["model"])
    if options["write_config"]:
        _write(local_path(options["write_config"], "--write-config"), location, token, options)
    elif on_cluster():
        raise UserError(
            "RAY_ADDRESS: acw serve starts a Ray of its own on this machine; for a cluster write a configuration "
            "(--write-config serve.yaml) and have it deployed (serve deploy serve.yaml), or unset RAY_ADDRESS"
        )
    else:
        _serve(location, token, options)


def _token(given: str | None, host: str) -> str | None:
    """The token, if one is needed or given."""
    token = given or os.environ.get(TOKEN) or None
    if token is None and not _is_own(host):
        raise UserError(
            f"--host {host}: others may reach it there; give a token that callers must know, as {TOKEN}, or "
            f"listen on {LOCAL}"
        )
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise UserError(f"--token: give {SHORTEST_TOKEN} printable characters or more, as `openssl rand -hex 16` makes")
    return token


def _is_own(host: str) -> bool:
    """Whether only this machine reaches an address, by which it is answered without a token (`routes.OWN_NAMES`)."""
    return host in (LOCAL, "localhost", "::1")


def _location(given: str | None) -> str | None:
    """Where the model is; None for the package's own."""
    return (
        given if given is None or given.startswith("s3://") or is_model_uri(given) else str(local_path(given, "MODEL"))
    )


def _write(path: Path, location: str | None, token: str | None, options: dict[str, Any]) -> None:
    import yaml

    from acw.serving.routes import digest
    from acw.serving.service import Service, configuration

    service = Service(location, options["device"], token and digest(token))
    cpus = max(1, (os.cpu_count() or 1) // options["replicas"])
    content = configuration(service, options["host"], options["port"] or 8000, options["replicas"], cpus)
    write_atomic(path, yaml.safe_dump(content, sort_keys=False))
    print(path, flush=True)


def _serve(location: str | None, token: str | None, options: dict[str, Any]) -> None:
    """Until it is interrupted."""
    _heed_signals()
    keep_to_loopback()
    try:
        from acw.serving.local import running
        from acw.serving.routes import digest
        from acw.serving.service import Service

        service = Service(location, options["device"], token and digest(token), own_ray=True)
        with running(service, options["host"], options["port"], options["replicas"]) as (address, about):
            _heed_signals()  # Ray has put a handler of its own there
            categories = ", ".join(about["categories"])
            print(f"model: {location or 'starter'}, recipe {about['recipe']}, categories {categories}", flush=True)
            print(address, flush=True)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        pass


def _heed_signals() -> None:
    """SIGTERM ends it as Ctrl-C does; SIGINT too where it was started with that ignored, as shells do behind `&`."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)
