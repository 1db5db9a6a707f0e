"""What went wrong at S3: boto3's errors as one line that names the thing and the remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from acw.storage import s3_settings
from acw.storage.errors import UserError
from acw.storage.s3_settings import CA_BUNDLE

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
_KEYS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_SESSION_TOKEN"
_UPLOADS = {"CreateMultipartUpload", "PutObject", "UploadPart"}
CALCULATION, VALIDATION = "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"


def away(error: BaseException) -> bool:
    """Whether the server cannot be reached or is overloaded, so that it may be there again in a while."""
    from botocore import exceptions

    # Time-outs have been waited for long enough.
    if isinstance(error, exceptions.ConnectTimeoutError | exceptions.ReadTimeoutError | exceptions.SSLError):
        return False
    kinds = exceptions.ConnectionError | exceptions.HTTPClientError
    return isinstance(error, kinds) or code_of(error) in _OVERLOADED


def code_of(error: BaseException) -> str:
    """S3's, or HTTP's, of an error of boto3's; empty where there is none."""
    # Errors without an answer have the attribute too.
    answer = getattr(error, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def cause_of(error: BaseException) -> BaseException:
    """Where a transfer has given up, why it did."""
    from boto3.exceptions import Boto3Error

    cause = getattr(error, "last_exception", error)
    return cause.__context__ or cause if isinstance(cause, Boto3Error) else cause


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns whatever boto3 raises of S3 into a UserError of one line; never quotes what might hold a key."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise UserError(f"{uri}: {_explanation(uri, cause_of(error))}") from None


def _explanation(uri: str, error: BaseException) -> str:
    """What is wrong, and the remedy."""
    from botocore import exceptions

    server, bucket = s3_settings.shown(), uri.removeprefix("s3://").partition("/")[0]
    code = code_of(error)
    name = type(error).__name__
    if isinstance(error, exceptions.SSLError):
        return _explanation_of_tls(server, str(error))
    if isinstance(error, exceptions.FlexibleChecksumError):
        return f"{server} sends other checksums than boto3 computes; set {VALIDATION}=when_required"
    if isinstance(error, exceptions.InvalidChecksumConfigError):
        return f"{CALCULATION} and {VALIDATION} are when_required or when_supported; correct or unset them"
    lenient = (os.environ.get(CALCULATION) or "").lower() == "when_required"
    if code in _REFUSED_CHECKSUM and getattr(error, "operation_name", "") in _UPLOADS and not lenient:
        key = "; if the bucket cannot be listed either, the key is wrong" if code in _WRONG_KEY else ""
        return (
            f"{server} refuses an upload ({code}), as servers do that are older than S3's checksums; set "
            f"{CALCULATION}=when_required{key}"
        )
    if any(word in name for word in ("Credential", "SSO", "Token")):
        return f"no credentials ({name}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role"
    if isinstance(error, exceptions.ConnectTimeoutError | exceptions.ReadTimeoutError):
        return (
            f"{server} answers too slowly, {s3_settings.READ_SECONDS} s several times over; see to the network and "
            "run again"
        )
    if isinstance(error, exceptions.ProxyConnectionError | exceptions.InvalidProxiesConfigError):
        return (
            f"the proxy that HTTP_PROXY or HTTPS_PROXY names does not answer ({name}); correct or unset it, or add "
            f"{server.partition(':')[0]} to NO_PROXY"
        )
    if "Invalid header value" in str(error):
        return f"{_KEYS} hold a line break or another character that no key has; set them again"
    if s3_settings.endpoint().startswith("http:") and (
        code == "400" or isinstance(error, exceptions.ConnectionClosedError)
    ):
        return (
            f"{server} does not take plain HTTP ({code or name}); write https:// in AWS_ENDPOINT_URL if it speaks TLS"
        )
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
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
    if isinstance(error, exceptions.BotoCoreError) and not isinstance(error, exceptions.IncompleteReadError):
        return _explanation_of_settings(error)
    return f"{server} fails ({code or name}); see to the server and run again"


def _explanation_of_settings(error: BaseException) -> str:
    """Of errors of boto3's that come without a request."""
    from botocore import exceptions

    if isinstance(error, exceptions.ProfileNotFound):
        return "AWS_PROFILE names a profile that this machine does not have; correct or unset it"
    if isinstance(error, exceptions.ConfigParseError | exceptions.ConfigNotFound):
        return f"{error.kwargs['path']} cannot be read as AWS's settings; correct it, or set AWS_CONFIG_FILE"
    if isinstance(error, exceptions.InvalidRegionError):
        return f"AWS_REGION '{error.kwargs['region_name']}' cannot be a region's name; correct it"
    if isinstance(error, exceptions.EndpointProviderError):
        return "AWS_ENDPOINT_URL is no address; write http://HOST:PORT"
    return f"boto3 does not take a setting ({type(error).__name__}); correct AWS's variables or its config file"


def _explanation_of_tls(server: str, said: str) -> str:
    if "certificate verify failed" in said:
        reason = re.search(r"verify failed: ([^(]+)", said)
        why = reason[1].strip() if reason else "it is not trusted"
        if "expired" in why or "not yet valid" in why:
            return (
                f"the certificate of {server} does not hold now ({why}); have it renewed, or set this machine's clock"
            )
        return (
            f"the certificate of {server} is of an authority that this machine does not know ({why}); set {CA_BUNDLE} "
            "to the PEM file of that authority, at the same place on all nodes"
        )
    if "doesn't match" in said:
        return f"the certificate of {server} is for another name; correct AWS_ENDPOINT_URL"
    if "WRONG_VERSION_NUMBER" in said or "RECORD_LAYER" in said:
        return f"{server} speaks no TLS; write http:// in AWS_ENDPOINT_URL"
    return f"{server} and this machine do not agree on TLS; see to the server's certificate and to {CA_BUNDLE}"
