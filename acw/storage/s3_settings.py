"""Where S3 is: one settings object for boto3, pyarrow and MLflow, and boto3's client.

Credentials are never seen here: boto3, pyarrow and MLflow each find them in their own chain (environment, profile,
instance role), so that they cannot get into a log, a pickle or a file.
"""

from __future__ import annotations

import functools
import os
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from acw.storage.errors import UserError

if TYPE_CHECKING:
    from pyarrow.fs import S3FileSystem

CA_BUNDLE = "AWS_CA_BUNDLE"
CONNECT_SECONDS = 10
READ_SECONDS = 30
# boto3's own, with back-off, within seconds.
ATTEMPTS = 4
# Of pyarrow and MLflow, which nothing of ours repeats: with their back-off they last for about a minute.
OTHERS_ATTEMPTS = 15
# Parts of one large object, several at once.
PARTS_AT_ONCE = 8


@dataclass(frozen=True)
class Settings:
    """Where S3 is, by the environment: endpoint, region and profile, each empty for what ~/.aws/config says.

    authorities: AWS_CA_BUNDLE, the PEM file of those whom this machine trusts to sign servers' certificates; empty for
    what the profile says. How checksums go with requests, all clients read for themselves.
    """

    endpoint: str
    region: str
    profile: str
    authorities: str = ""

    @classmethod
    def from_environment(cls) -> Settings:
        def first(*names: str) -> str:
            return next((os.environ[name] for name in names if os.environ.get(name)), "")

        return cls(
            first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
            first("AWS_REGION", "AWS_DEFAULT_REGION"),
            first("AWS_PROFILE"),
            first(CA_BUNDLE),
        )

    @property
    def address(self) -> str:
        """The endpoint, also one that only the profile names, as boto3 finds it; empty for AWS's own."""
        if self.endpoint:
            return self.endpoint
        url = _client(self).meta.endpoint_url
        return "" if ".amazonaws.com" in urlsplit(url).netloc else url

    @property
    def shown(self) -> str:
        """The endpoint as messages name it."""
        from botocore.exceptions import BotoCoreError

        try:
            address = self.address
        except (BotoCoreError, UserError):
            address = ""  # whoever asks has that error to tell of
        return (urlsplit(address).netloc or address).rpartition("@")[2] or "AWS"

    def _bundle(self) -> str | None:
        """The file of authorities, as boto3 looks for one; None for those that come with each client.

        Raises UserError where this node does not have it, or no certificate is in it.
        """
        import botocore.session

        if os.environ.get(CA_BUNDLE) == "":
            raise UserError(f"{CA_BUNDLE}: is empty, which boto3 does not take; unset it")
        if urlsplit(self.endpoint).scheme == "http":
            return None
        profile = botocore.session.Session(profile=self.profile or None).get_scoped_config().get("ca_bundle")
        named = {CA_BUNDLE: self.authorities, "ca_bundle in AWS's config file": profile}
        named["REQUESTS_CA_BUNDLE"] = os.environ.get("REQUESTS_CA_BUNDLE")
        for name, path in named.items():
            if path:
                try:
                    ssl.create_default_context().load_verify_locations(path)
                except OSError as error:
                    problem = "no certificate is in it" if isinstance(error, ssl.SSLError) else error.strerror
                    raise UserError(
                        f"{name} ({path}): cannot be used on {socket.gethostname()} ({problem}); name a PEM file that "
                        "is at the same place on all nodes, or unset it"
                    ) from error
                return path
        return None

    def client(self) -> Any:
        """boto3's client, whose requests end in finite time: they are repeated with back-off, ATTEMPTS in all.

        Raises UserError for an endpoint that is no address, and for a file of authorities that cannot be used;
        BotoCoreError for other settings that boto3 does not take, as `s3_errors.explained` explains them.
        """
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = Config(
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            max_pool_connections=4 * PARTS_AT_ONCE,
        )
        session = boto3.Session(profile_name=self.profile or None, region_name=self.region or None)
        bundle = self._bundle()  # without one, botocore has its own
        try:
            return session.client("s3", endpoint_url=self.endpoint or None, config=config, verify=bundle)
        except ValueError as error:
            if isinstance(error, BotoCoreError):
                raise
            raise UserError(f"AWS_ENDPOINT_URL: is no address ({self.shown}); write http://HOST:PORT") from error

    def filesystem(self, attempts: int = OTHERS_ATTEMPTS) -> S3FileSystem:
        """pyarrow's file system, for Ray's own checkpoints; attempts: of each request. Raises as `client` does."""
        import boto3
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        region = self.region or boto3.Session(profile_name=self.profile or None).region_name
        address = urlsplit(self.address)
        return S3FileSystem(
            region=region,
            scheme=address.scheme or "https",
            endpoint_override=address.netloc or None,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=READ_SECONDS,
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=attempts),
            tls_ca_file_path=self._bundle(),
        )

    def mlflow_environment(self) -> dict[str, str]:
        """What MLflow's clients of artifacts read, beside boto3's own variables."""
        found = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": str(OTHERS_ATTEMPTS)}
        if self.endpoint:
            found["MLFLOW_S3_ENDPOINT_URL"] = self.endpoint
        if self.region:
            found["AWS_DEFAULT_REGION"] = self.region
        return found


@functools.lru_cache(maxsize=8)
def _client(settings: Settings) -> Any:
    return settings.client()


def client() -> Any:
    """This process's client by the environment's settings, one for all threads."""
    return _client(Settings.from_environment())
