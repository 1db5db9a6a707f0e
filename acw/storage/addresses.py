"""Paths of files here and of copies of what is in S3, and their s3:// addresses."""

from __future__ import annotations

import os
from pathlib import Path

from acw.storage.errors import UserError

# The folder, in whatever cache, below which paths are `bucket/key`.
CACHE_FOLDER = "acw-s3-mirror"


def local(location: str | Path) -> Path:
    """The path of a file or folder, given by its path or by `s3://bucket/key`; nothing need be there.

    Raises UserError for an address that is none.
    """
    text = str(location)
    if not text.startswith("s3://"):
        return Path(location)
    bucket, key = parts(text)
    return _mirror() / bucket / key


def expanded(location: str | Path) -> Path:
    """A path with its `~` written out; raises UserError where that is nobody's home directory."""
    try:
        return Path(location).expanduser()
    except RuntimeError:
        raise UserError(f"{location}: there is no such home directory; write the path in full") from None


def cache_folder() -> Path:
    """Where this node keeps copies of what is elsewhere: ACW_CACHE, or ~/.cache."""
    folder = os.environ.get("ACW_CACHE") or "~/.cache"
    try:
        return expanded(folder).resolve()
    except UserError:
        raise UserError(
            f"{folder}: there is no home directory for copies of what is elsewhere; set ACW_CACHE to a folder for them"
        ) from None


def _mirror() -> Path:
    return cache_folder() / CACHE_FOLDER


def shown(text: str | Path) -> str:
    """A path, or a text with paths in it, with s3:// addresses for what is in S3."""
    try:
        return str(text).replace(f"{_mirror()}/", "s3://")
    except UserError:  # without a place for copies there are none
        return str(text)


def in_cache(path: Path) -> bool:
    """Whether a path is that of something in S3."""
    return CACHE_FOLDER in path.parts


def parts(uri: str) -> tuple[str, str]:
    """Bucket and key, or prefix, of `s3://bucket/key`; raises UserError for what is none."""
    bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
    if not uri.startswith("s3://") or not bucket or any(part in ("", ".", "..") for part in key.split("/") if key):
        raise UserError(f"{uri}: is no S3 address; write s3://BUCKET or s3://BUCKET/PREFIX")
    return bucket, key
