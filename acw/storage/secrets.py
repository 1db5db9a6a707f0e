"""Passwords and signatures are given in the environment: where an address holds one, it is refused or taken out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit, urlunsplit

from acw.storage.errors import UserError

# user:password@ or token@ of an address, and what signs one, such as a presigned URL of S3.
_SECRET = re.compile(
    r"://[^/\s@]+@|[?&](x-amz-(signature|credential|security-token)|awsaccesskeyid|signature|sig|token|password)=", re.I
)


def refuse(arguments: Sequence[str]) -> None:
    """Raises UserError, which does not repeat it, if a command line holds a password or a signature.

    The machine's list of processes, Ray's list of jobs, the recipe and MLflow would show it to others.
    """
    option = "the command line"
    for argument in arguments:
        option = argument.partition("=")[0] if argument.startswith("--") else option
        if _SECRET.search(argument):
            raise UserError(
                f"{option}: holds a password or signature, which processes, jobs and results would show; give it in "
                "the environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY)"
            )


def taken_out(uri: str) -> str:
    """An MLflow server's address without user and password, which go where MLflow's client looks for them."""
    parts = urlsplit(uri)
    account, separator, host = parts.netloc.rpartition("@")
    if not separator:
        return uri
    user, _, password = account.partition(":")
    os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(user), unquote(password)
    return urlunsplit(parts._replace(netloc=host))
