"""Where S3 is, for boto3 and MLflow: by AWS's variables and profile, as boto3 reads them.

Credentials are never seen here: boto3 finds them in its own chain (environment, profile, instance role), so that they
cannot get into a log, a pickle or a file.
"""

from __future__ import annotations

import functools
import os
import socket
import ssl
from typing import Any
from urllib.parse import urlsplit

from acw.storage.errors import UserError

CA_BUNDLE = "AWS_CA_BUNDLE"
# Variables by which a client is made: where they change, another one is.
NAMES = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"),
    *(CA_BUNDLE, "REQUESTS_CA_BUNDLE"),
)
CONNECT_SECONDS = 10
READ_SECONDS = 30
# boto3's own, with back-off, within seconds.
ATTEMPTS = 4
# Of MLflow, which nothing of ours repeats: with its back-off they last for about a minute.
MLFLOW_ATTEMPTS = 15
# Of several large objects at a time, each in as many parts at once as boto3 likes.
CONNECTIONS = 32


def _first(*names: str) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def endpoint() -> str:
    """The endpoint that the environment names; empty for what the profile says."""
    return _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def shown() -> str:
    """The server as messages name it, also one that only the profile names."""
    from botocore.exceptions import BotoCoreError

    try:
        host = _host(endpoint() or client().meta.endpoint_url)
    except (BotoCoreError, UserError):
        return "AWS"  # whoever asks has that error to tell of
    return "AWS" if ".amazonaws.com" in host else host


def _host(address: str) -> str:
    return (urlsplit(address).netloc or address).rpartition("@")[2]


def client() -> Any:
    """This process's client by the environment's settings, one for all threads.

    Its requests end in finite time: they are repeated with back-off, ATTEMPTS in all.
    Raises UserError for an endpoint that is no address, and for a file of authorities that cannot be used;
    BotoCoreError for other settings that boto3 does not take, as `s3_errors.explained` explains them.
    """
    return _client(*(os.environ.get(name) for name in NAMES))


@functools.lru_cache(maxsize=8)
def _client(*_: str | None) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=CONNECTIONS,
    )
    session = boto3.Session(region_name=_first("AWS_REGION", "AWS_DEFAULT_REGION") or None)
    bundle = _bundle()  # without one, botocore has its own
    try:
        return session.client("s3", endpoint_url=endpoint() or None, config=config, verify=bundle)
    except ValueError as error:
        if isinstance(error, BotoCoreError):
            raise
        named = str(error).rpartition(" ")[2]  # Invalid endpoint: ...
        raise UserError(f"AWS_ENDPOINT_URL: is no address ({_host(named)}); write http://HOST:PORT") from error


def _bundle() -> str | None:
    """The file of authorities, as boto3 looks for one; None for those that come with it.

    Raises UserError where this node does not have it, or no certificate is in it.
    """
    import botocore.session

    given = os.environ.get(CA_BUNDLE)
    if given == "":
        raise UserError(f"{CA_BUNDLE}: is empty, which boto3 does not take; unset it")
    if urlsplit(endpoint()).scheme == "http":
        return None
    profile = botocore.session.Session().get_scoped_config().get("ca_bundle")
    named = {CA_BUNDLE: given, "ca_bundle in AWS's config file": profile}
    named["REQUESTS_CA_BUNDLE"] = os.environ.get("REQUESTS_CA_BUNDLE")
    for name, path in named.items():
        if path:
            try:
                ssl.create_default_context().load_verify_locations(path)
            except OSError as error:
                problem = "no certificate is in it" if isinstance(error, ssl.SSLError) else error.strerror
                raise UserError(
                    f"{name} ({path}): cannot be used on {socket.gethostname()} ({problem}); name a PEM file that is "
                    "at the same place on all nodes, or unset it"
                ) from error
            return path
    return None


def mlflow_environment() -> dict[str, str]:
    """What MLflow's clients of artifacts read, beside boto3's own variables."""
    found = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": str(MLFLOW_ATTEMPTS)}
    # boto3 does not know the other name of it.
    return found | ({"AWS_DEFAULT_REGION": region} if (region := os.environ.get("AWS_REGION")) else {})
