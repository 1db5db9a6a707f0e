"""S3: the few requests that are made; where it is, s3_settings.py knows, and what its errors mean, s3_errors.py."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acw.storage.addresses import parts
from acw.storage.checksums import sha256_file
from acw.storage.s3_errors import away, cause_of, code_of, explained
from acw.storage.s3_settings import client

CHECKSUM = "sha256"  # the objects' metadata that holds it
# A server may be away for so long, as in a restart, and no job ends: boto3's budget of repeats would not last.
AWAY_SECONDS = 90.0
LONGEST_PAUSE = 10.0


def _outlasting(request: Callable[[], Any]) -> Any:
    """The request's answer; it is repeated while the server is away or overloaded, up to AWAY_SECONDS."""
    end, pause = time.monotonic() + AWAY_SECONDS, 0.5
    while True:
        try:
            return request()
        except Exception as error:
            if not away(cause_of(error)) or time.monotonic() + pause > end:
                raise
        # Not all of a cluster's workers at the same time.
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE)


@dataclass(frozen=True)
class ObjectInfo:
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


def head(uri: str) -> ObjectInfo | None:
    """The object as it is now; None where there is none."""
    bucket, key = parts(uri)
    if not key:
        return None
    with explained(uri):
        try:
            answer = _outlasting(lambda: client().head_object(Bucket=bucket, Key=key))
        except Exception as error:
            if code_of(error) in ("404", "NoSuchKey"):
                return None
            if code_of(error) == "403":
                # HEAD's answers do not say which of several reasons it is; this one's do.
                client().list_objects_v2(Bucket=bucket, MaxKeys=1)
            raise
    modified = answer["LastModified"].timestamp()
    return ObjectInfo(key, answer["ETag"], answer["ContentLength"], modified, answer["Metadata"].get(CHECKSUM, ""))


def listing(uri: str) -> Iterator[ObjectInfo]:
    """All objects below a prefix, without their checksums, in order of their keys."""
    bucket, prefix = parts(uri)
    where = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    with explained(uri):
        while where:
            # Page by page: of a million objects, all would be a gigabyte.
            page = _outlasting(functools.partial(client().list_objects_v2, **where))
            more = page.get("NextContinuationToken")
            where = where | {"ContinuationToken": more} if more else {}
            for entry in page.get("Contents", []):
                # A key that ends so is how some programs show an empty folder.
                if not entry["Key"].endswith("/"):
                    yield ObjectInfo(entry["Key"], entry["ETag"], entry["Size"], entry["LastModified"].timestamp())


def upload(path: Path, uri: str) -> ObjectInfo | None:
    """Uploads a file with its checksum, in parts if it is large, and asks how it is there.

    Returns None if another's upload has replaced it already. Raises UserError where that cannot be done.
    """
    bucket, key = parts(uri)
    checksum, size = sha256_file(path), path.stat().st_size
    metadata = {"Metadata": {CHECKSUM: checksum}}
    with explained(uri):
        _outlasting(lambda: client().upload_file(str(path), bucket, key, ExtraArgs=metadata))
    info = head(uri)
    return info if info and (info.sha256, info.size) == (checksum, size) else None


def replace(path: Path, uri: str, etag: str | None) -> str | None:
    """Uploads a file in the place of an object that still has this ETag, or of none; its new ETag, None if it had
    changed."""
    bucket, key = parts(uri)
    content, metadata = path.read_bytes(), {CHECKSUM: sha256_file(path)}
    condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
    with explained(uri):
        try:
            return _outlasting(
                lambda: client().put_object(Bucket=bucket, Key=key, Body=content, Metadata=metadata, **condition)
            )["ETag"]
        except Exception as error:
            if code_of(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                return None
            raise


def download(uri: str, info: ObjectInfo, path: Path) -> bool:
    """Downloads an object to a file, in parts if it is large; whether its size and checksum are those of the upload."""
    bucket, key = parts(uri)
    with explained(uri):
        _outlasting(lambda: client().download_file(bucket, key, str(path)))
    return path.stat().st_size == info.size and info.sha256 in ("", sha256_file(path))


def delete(uri: str) -> None:
    """Deletes an object; there may be none."""
    bucket, key = parts(uri)
    with explained(uri):
        _outlasting(lambda: client().delete_object(Bucket=bucket, Key=key))
