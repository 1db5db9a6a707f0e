"""S3: one settings object for boto3, pyarrow and MLflow, the few requests that are made, and what their errors mean.

Credentials are never seen here: boto3, pyarrow and MLflow each find them in their own chain (environment, profile,
instance role), so that they cannot get into a log, a pickle or a file.
"""

from __future__ import annotations

import functools
import os
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from acw.storage.addresses import parts
from acw.storage.checksums import sha256_file
from acw.storage.errors import UserError

if TYPE_CHECKING:
    from pyarrow.fs import S3FileSystem

CA_BUNDLE = "AWS_CA_BUNDLE"
CHECKSUM = "sha256"  # the objects' metadata that holds it
CONNECT_SECONDS = 10
READ_SECONDS = 30
# boto3's own, with back-off, within seconds.
ATTEMPTS = 4
# Of pyarrow and MLflow, which nothing of ours repeats: with their back-off they last for about a minute.
OTHERS_ATTEMPTS = 15
# A server may be away for so long, as in a restart, and no job ends: boto3's budget of repeats would not last.
AWAY_SECONDS = 90.0
LONGEST_PAUSE = 10.0
# Larger objects go in parts of this size, several at once.
PART_BYTES = 16 * 2**20
PARTS_AT_ONCE = 8

_WRONG_KEY = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_OVERLOADED = {"500", "502", "503", "504", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
_WRONG_REGION = {"301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
# What servers that are older than S3's checksums of 2024 say of an upload that brings one.
_REFUSED_CHECKSUM = {
    "400",
    "411",
    "501",
    "BadDigest",
    "ContentSHA256Mismatch",
    "IncompleteBody",
    "InvalidArgument",
    "InvalidDigest",
    "InvalidRequest",
    "MalformedTrailerError",
    "MissingContentLength",
    "NotImplemented",
    "SignatureDoesNotMatch",
    "XAmzContentSHA256Mismatch",
}
_UPLOADS = {"CreateMultipartUpload", "PutObject", "UploadPart"}
CALCULATION, VALIDATION = "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"
# pyarrow's errors, which are an OSError's text: the SDK's name of the error, the operation, the server's code.
_ARROW = re.compile(r"AWS Error (\w+).*? during (\w+) operation: (?:Unable to parse ExceptionName: (\w+))?")
# libcurl's numbers for what is wrong with TLS.
_CURL_TLS = re.compile(r"curlCode: (35|51|53|54|58|59|60|64|66|77|80|82|83|90|91),")


@dataclass(frozen=True)
class Settings:
    """Where S3 is: endpoint (empty for AWS's own), region and profile (empty for what ~/.aws/config says).

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
    def shown(self) -> str:
        """The endpoint as messages name it."""
        return (urlsplit(self.endpoint).netloc or self.endpoint).rpartition("@")[2] or "AWS"

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

        Raises UserError for an endpoint that is no address, and for a file of authorities that cannot be used.
        """
        import boto3
        from botocore.config import Config

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
            raise UserError(f"AWS_ENDPOINT_URL: is no address ({self.shown}); write http://HOST:PORT") from error

    def filesystem(self, attempts: int = OTHERS_ATTEMPTS) -> S3FileSystem:
        """pyarrow's file system, for Ray's own checkpoints; attempts: of each request."""
        import boto3
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        region = self.region or boto3.Session(profile_name=self.profile or None).region_name
        address = urlsplit(self.endpoint)
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


def _outlasting(request: Callable[[], Any]) -> Any:
    """The request's answer; it is repeated while the server is away or overloaded, up to AWAY_SECONDS."""
    end, pause = time.monotonic() + AWAY_SECONDS, 0.5
    while True:
        try:
            return request()
        except Exception as error:
            if not _away(getattr(error, "last_exception", error)) or time.monotonic() + pause > end:
                raise
        # Not all of a cluster's workers at the same time.
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE)


def _away(error: BaseException) -> bool:
    from botocore import exceptions

    # Time-outs have been waited for long enough.
    if isinstance(error, exceptions.ConnectTimeoutError | exceptions.ReadTimeoutError) or _of_tls(error):
        return False
    kinds = exceptions.ConnectionError | exceptions.HTTPClientError
    return isinstance(error, kinds) or _code(error) in _OVERLOADED | {"NetworkConnection"}


def _of_tls(error: BaseException) -> bool:
    from botocore import exceptions

    return isinstance(error, exceptions.SSLError) or bool(_CURL_TLS.search(str(error)))


@dataclass(frozen=True)
class Found:
    """An object as it is in its bucket.

    etag: another for other bytes. modified: when, in seconds since 1970. sha256: as noted at its upload, or empty.
    """

    key: str
    etag: str
    size: int
    modified: float
    sha256: str = ""


def reach(uri: str) -> None:
    """Raises UserError, within seconds, where the bucket is not there or may not be read: before any work is done."""
    bucket, _ = parts(uri)
    with explained(uri):
        # Of all requests that need no object, this one has answers that say what is wrong.
        client().list_objects_v2(Bucket=bucket, MaxKeys=1)


def ray_filesystem(uri: str) -> S3FileSystem:
    """pyarrow's file system, with which an object below an address could be written and deleted.

    Ray would say of one that cannot that its workers were lost. Raises UserError.
    """
    bucket, key = parts(uri)
    settings, probe = Settings.from_environment(), f"{bucket}/{key}/.writable"

    def write() -> None:
        once = settings.filesystem(attempts=1)
        with once.open_output_stream(probe) as file:
            file.write(b"\n")
        once.delete_file(probe)

    with explained(uri):
        _outlasting(write)
        return settings.filesystem()


def head(uri: str) -> Found | None:
    """The object as it is now; None where there is none."""
    bucket, key = parts(uri)
    if not key:
        return None
    with explained(uri):
        try:
            answer = _outlasting(lambda: client().head_object(Bucket=bucket, Key=key))
        except Exception as error:
            if _code(error) in ("404", "NoSuchKey"):
                return None
            if _code(error) == "403":
                # HEAD's answers do not say which of several reasons it is; this one's do.
                client().list_objects_v2(Bucket=bucket, MaxKeys=1)
            raise
    modified = answer["LastModified"].timestamp()
    return Found(key, answer["ETag"], answer["ContentLength"], modified, answer["Metadata"].get(CHECKSUM, ""))


def listing(uri: str) -> Iterator[Found]:
    """All objects below a prefix, without their checksums, in order of their keys."""
    bucket, prefix = parts(uri)
    with explained(uri):
        pages = client().get_paginator("list_objects_v2")
        start = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        for page in _outlasting(lambda: list(pages.paginate(**start))):
            for entry in page.get("Contents", []):
                # A key that ends so is how some programs show an empty folder.
                if not entry["Key"].endswith("/"):
                    yield Found(entry["Key"], entry["ETag"], entry["Size"], entry["LastModified"].timestamp())


def upload(path: Path, uri: str) -> Found | None:
    """Uploads a file with its checksum, in parts if it is large, and asks how it is there.

    Returns None if another's upload has replaced it already. Raises UserError where that cannot be done.
    """
    bucket, key = parts(uri)
    checksum, size = sha256_file(path), path.stat().st_size
    options = {"ExtraArgs": {"Metadata": {CHECKSUM: checksum}}, "Config": _transfer_config(size)}

    def send() -> None:
        with path.open("rb") as file:
            client().upload_fileobj(file, bucket, key, **options)

    with explained(uri):
        _outlasting(send)
    found = head(uri)
    return found if found and (found.sha256, found.size) == (checksum, size) else None


def replace(path: Path, uri: str, etag: str | None) -> str | None:
    """Uploads a file in the place of an object that still has this ETag, or of none; its new ETag, None if it had
    changed."""
    bucket, key = parts(uri)
    options = {"Metadata": {CHECKSUM: sha256_file(path)}, **({"IfMatch": etag} if etag else {"IfNoneMatch": "*"})}

    def send() -> str:
        with path.open("rb") as file:
            return client().put_object(Bucket=bucket, Key=key, Body=file, **options)["ETag"]

    with explained(uri):
        try:
            return _outlasting(send)
        except Exception as error:
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                return None
            raise


def download(uri: str, found: Found, path: Path) -> bool:
    """Downloads an object to a file, in parts if it is large; whether its size and checksum are those of the upload."""
    bucket, key = parts(uri)

    def receive() -> None:
        with path.open("wb") as file:
            client().download_fileobj(bucket, key, file, Config=_transfer_config(found.size))

    with explained(uri):
        _outlasting(receive)
    return path.stat().st_size == found.size and found.sha256 in ("", sha256_file(path))


def delete(uri: str) -> None:
    """Deletes an object; there may be none."""
    bucket, key = parts(uri)
    with explained(uri):
        _outlasting(lambda: client().delete_object(Bucket=bucket, Key=key))


def _transfer_config(size: int) -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=PARTS_AT_ONCE,
        use_threads=size > PART_BYTES,
    )


def _code(error: BaseException) -> str:
    """S3's, or HTTP's, of an error of boto3's or pyarrow's; empty where there is none."""
    if isinstance(error, OSError) and (said := _ARROW.search(str(error))):
        return said[3] or said[1].title().replace("_", "")
    # Errors without an answer have the attribute too.
    answer = getattr(error, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def _operation(error: BaseException) -> str:
    said = _ARROW.search(str(error))
    return said[2] if said else getattr(error, "operation_name", "")


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns whatever boto3 and pyarrow raise of S3 into a UserError of one line; never quotes what might hold a key."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except (exceptions.BotoCoreError, exceptions.ClientError, Boto3Error, RetriesExceededError) as error:
        # Where a transfer has given up, the reason is inside, or before.
        cause = getattr(error, "last_exception", error)
        if isinstance(cause, Boto3Error):
            cause = cause.__context__ or cause
        raise UserError(f"{uri}: {_explanation(uri, cause)}") from None
    except OSError as error:
        if not _ARROW.search(str(error)):
            raise
        raise UserError(f"{uri}: {_explanation(uri, error)}") from None


def trouble_of_ray(error: BaseException, uri: str) -> tuple[UserError, bool] | None:
    """What befell pyarrow's requests to S3 inside Ray, and whether it may pass; None where its error, of which only the
    text is left, tells of none."""
    if not (said := _ARROW.search(text := str(error))):
        return None
    cause = OSError(text[said.start() :].partition("\n")[0])
    return UserError(f"{uri}: {_explanation(uri, cause)}"), _away(cause)


def _explanation(uri: str, error: BaseException) -> str:
    """What is wrong, and the remedy."""
    from botocore import exceptions

    server, bucket = Settings.from_environment().shown, uri.removeprefix("s3://").partition("/")[0]
    code = _code(error)
    name = type(error).__name__
    if _of_tls(error):
        return _explanation_of_tls(server, str(error))
    if isinstance(error, exceptions.FlexibleChecksumError):
        return f"{server} sends other checksums than boto3 computes; set {VALIDATION}=when_required"
    if isinstance(error, exceptions.InvalidChecksumConfigError):
        return f"{CALCULATION} and {VALIDATION} are when_required or when_supported; correct or unset them"
    lenient = (os.environ.get(CALCULATION) or "").lower() == "when_required"
    if code in _REFUSED_CHECKSUM and _operation(error) in _UPLOADS and not lenient:
        key = "; if the bucket cannot be listed either, the key is wrong" if code in _WRONG_KEY else ""
        return (
            f"{server} refuses an upload ({code}), as servers do that are older than S3's checksums; set "
            f"{CALCULATION}=when_required{key}"
        )
    if isinstance(error, exceptions.ProfileNotFound):
        return "AWS_PROFILE names a profile that this machine does not have; correct or unset it"
    if any(word in name for word in ("Credential", "SSO", "Token")):
        return f"no credentials ({name}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role"
    if isinstance(error, exceptions.ConnectTimeoutError | exceptions.ReadTimeoutError):
        return f"{server} answers too slowly, {READ_SECONDS} s several times over; see to the network and run again"
    if Settings.from_environment().endpoint.startswith("http:") and (
        code == "400" or isinstance(error, exceptions.ConnectionClosedError)
    ):
        return (
            f"{server} does not take plain HTTP ({code or name}); write https:// in AWS_ENDPOINT_URL if it speaks TLS"
        )
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError) or code == "NetworkConnection":
        return f"no S3 server answers at {server} ({name}); start it or correct AWS_ENDPOINT_URL"
    if code in _WRONG_KEY:
        return f"{server} refuses the key ({code}); set the right AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if code in ("403", "AccessDenied", "AllAccessDisabled"):
        return f"{server} denies access ({code}); use another key, or let this one list, read and write the bucket"
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket} at {server}; create it or correct its name"
    if code in ("404", "NoSuchKey"):
        return "there is no such object; correct the address"
    if code in _WRONG_REGION:
        return f"the bucket is in another region ({code}); set AWS_REGION to its own"
    if code == "RequestTimeTooSkewed":
        return "this machine's clock is wrong; set it"
    if isinstance(error, exceptions.ParamValidationError) or code == "InvalidBucketName":
        return f"'{bucket}' cannot be a bucket's name; correct the address"
    return f"{server} fails ({code or name}); see to the server and run again"


def _explanation_of_tls(server: str, said: str) -> str:
    if "certificate verify failed" in said or "curlCode: 60" in said:
        reason = re.search(r"(?:verify failed|verify result): ([^(]+)", said)
        why = reason[1].strip() if reason else "it is not trusted"
        if "expired" in why or "not yet valid" in why:
            return (
                f"the certificate of {server} does not hold now ({why}); have it renewed, or set this machine's clock"
            )
        return (
            f"the certificate of {server} is of an authority that this machine does not know ({why}); set {CA_BUNDLE} "
            "to the PEM file of that authority, at the same place on all nodes"
        )
    if "doesn't match" in said or "curlCode: 51" in said:
        return f"the certificate of {server} is for another name; correct AWS_ENDPOINT_URL"
    if "WRONG_VERSION_NUMBER" in said or "RECORD_LAYER" in said or "wrong version number" in said:
        return f"{server} speaks no TLS; write http:// in AWS_ENDPOINT_URL"
    return f"{server} and this machine do not agree on TLS; see to the server's certificate and to {CA_BUNDLE}"
