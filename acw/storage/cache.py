"""Copies on this node of what is in S3: each object is downloaded once a node, checked, and given up for want of space.

The copy of `s3://bucket/key` is the file `CACHE/acw-s3-mirror/bucket/key`, so that a path says where it belongs, on
whatever node it is unpickled. Beside that folder, `CACHE/acw-s3-state` holds a lock for each file and an entry for the
object that it is a copy of, whose time of change is that of the copy's last use. A file is uploaded before it gets its
place in the cache: what is there is in the bucket too, and may go.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from acw.storage import addresses, s3
from acw.storage.addresses import CACHE_FOLDER
from acw.storage.errors import Damaged, UserError

STATE = "acw-s3-state"
LIMIT = "ACW_CACHE_GB"
# Without a limit given, the copies may take this share of the space that their disk has without them.
SHARE = 0.5
# The folder is looked through when this share of the limit has been added, not at every file.
SLACK = 0.05
# What was used so lately may be about to be opened.
RECENT_SECONDS = 30.0
REQUESTS_AT_ONCE = 16
LONGEST_NAME = 255 - len(".json")  # bytes, on most disks, with what an entry has behind it


@dataclass(frozen=True)
class CacheEntry:
    """Which object a file is a copy of, and the file's size and time of change by which it is known to be untouched.

    kept: written by this node, and not read through `fetch` by all who need it.
    """

    etag: str
    size: int
    time: int
    kept: bool


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache, the object that it is a copy of, and what is known of it."""

    path: Path

    @property
    def _split(self) -> tuple[Path, Path]:
        here = self.path.parts.index(CACHE_FOLDER)
        return Path(*self.path.parts[:here]), Path(*self.path.parts[here + 1 :])

    @property
    def cache(self) -> Path:
        return self._split[0]

    @property
    def uri(self) -> str:
        return f"s3://{self._split[1].as_posix()}"

    def state(self, suffix: str) -> Path:
        cache, key = self._split
        path = cache / STATE / key
        return path.with_name(path.name + suffix)

    def lock(self) -> FileLock:
        path = self.state(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def known(self) -> CacheEntry | None:
        """What the file is a copy of; None where there is none, or it was changed or cut short."""
        try:
            entry = CacheEntry(**json.loads(self.state(".json").read_text(encoding="utf-8")))
            status = self.path.stat()
        except (OSError, ValueError, TypeError):
            return None
        return entry if (status.st_size, status.st_mtime_ns) == (entry.size, entry.time) else None

    def used(self) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.state(".json"))

    def settle(self, temporary: Path, etag: str, kept: bool) -> None:
        """Gives a finished file its place."""
        status = temporary.stat()
        temporary.replace(self.path)
        entry = self.state(".json")
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = entry.with_name(f".{os.getpid()}.{threading.get_ident()}.partial")
        partial.write_text(
            json.dumps(asdict(CacheEntry(etag, status.st_size, status.st_mtime_ns, kept))), encoding="utf-8"
        )
        partial.replace(entry)
        _added(self.cache, status.st_size)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self.state(".json").unlink(missing_ok=True)


def uri(path: Path) -> str:
    """The object's, or the prefix's, that a path of the cache stands for."""
    return CachedFile(path).uri


def put(temporary: Path, path: Path) -> None:
    """Uploads a finished file, then moves it to its place in the cache. Raises UserError where that cannot be done."""
    cached = CachedFile(path)
    with cached.lock():
        info = s3.upload(temporary, cached.uri)
        if info is None:
            cached.forget()  # another node has written it since; whoever reads it fetches that one
            return
        # Shards, of features and of predictions, are read through `fetch` wherever they are, and are many; of other
        # files a job may rely on what it has written.
        cached.settle(temporary, info.etag, kept=not any(part.startswith("shard-") for part in path.parts))


def fetch(path: Path, immutable: bool = False) -> None:
    """Makes the newest version of a file be in its place; where the bucket has none, no file is left there.

    immutable: an untouched copy needs no request, as the object cannot have changed.
    Raises Damaged if the object's bytes are not those that were uploaded, UserError if it cannot be had.
    """
    cached = CachedFile(path)
    known = cached.known()
    if known and immutable:
        cached.used()
        return
    info = s3.head(cached.uri)
    if known and info and known.etag == info.etag:
        cached.used()
        return
    with _writing(cached), cached.lock():
        known = cached.known()  # another process may have been faster
        if info is None:
            # Not what was written here meanwhile.
            if s3.head(cached.uri) is None:
                cached.forget()
        elif known is None or known.etag != info.etag:
            _download(cached, info)


def _download(cached: CachedFile, info: s3.ObjectInfo | None) -> None:
    cached.path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=cached.path.parent, prefix=f".{cached.path.name[:40]}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    tried: list[str] = []
    try:
        while info:
            if s3.download(cached.uri, info, temporary):
                temporary.chmod(0o644)
                os.utime(temporary, (time.time(), info.modified))
                cached.settle(temporary, info.etag, kept=False)
                return
            # Bytes may be lost on their way, or the object be replaced meanwhile: but not twice the same.
            if info.etag in tried:
                raise Damaged(
                    f"{cached.uri}: the object is damaged, its bytes do not have the checksum that was noted at their "
                    "upload; delete it and run again, or upload it again"
                )
            tried.append(info.etag)
            info = s3.head(cached.uri)
        cached.forget()
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(cached: CachedFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(write_failure(cached.path, error)) from error


def write_failure(path: Path, error: OSError) -> str:
    """What to say of a file that cannot be written to the cache."""
    cached = CachedFile(path)
    if error.errno == errno.ENAMETOOLONG:
        return f"{cached.uri}: its name is too long for copies of it; give it one of at most {LONGEST_NAME} bytes"
    return (
        f"{cached.uri}: its copy below {cached.cache} cannot be written ({error.strerror or error}); free that disk, "
        f"lower {LIMIT} or set ACW_CACHE to a folder elsewhere"
    )


def etag(path: Path) -> str | None:
    """The object's, which is another for other bytes; None where there is no object."""
    info = s3.head(CachedFile(path).uri)
    return info.etag if info else None


def remove(path: Path) -> None:
    """Deletes the object and its copy here."""
    cached = CachedFile(path)
    with cached.lock():
        s3.delete(cached.uri)
        cached.forget()


def listing(folder: Path) -> list[tuple[Path, s3.ObjectInfo]]:
    """Where the copies of all objects below a folder belong, and the objects.

    A key that would lead out of the folder, or that no file can have, is left out.
    """
    cached = CachedFile(folder)
    _, prefix = addresses.parts(cached.uri)
    start = f"{prefix}/" if prefix else ""
    found = []
    for info in s3.listing(cached.uri):
        names = info.key.removeprefix(start).split("/")
        if all(name not in ("", ".", "..") and "\0" not in name for name in names):
            found.append((folder.joinpath(*names), info))
    return found


def synchronise(folder: Path, objects: Mapping[Path, s3.ObjectInfo], wanted: Callable[[str], bool]) -> None:
    """Makes the files below a folder, of the names that are wanted, be the bucket's as they are now, and no others.

    objects: the folder's `listing`. wanted: says so of a path in the folder, with slashes.
    Raises UserError if they are more than the copies may take.
    """
    objects = {path: info for path, info in objects.items() if wanted(path.relative_to(folder).as_posix())}
    total, limit = sum(info.size for info in objects.values()), _Copies(CachedFile(folder).cache).limit
    if total > limit:
        raise UserError(
            f"{uri(folder)}: holds {total / 1e9:.1f} GB, but copies of what is in S3 may take {limit / 1e9:.1f} GB "
            f"here; raise {LIMIT}, or set ACW_CACHE to a folder with more space"
        )
    for path in folder.rglob("*"):
        if path not in objects and path.is_file() and wanted(path.relative_to(folder).as_posix()):
            CachedFile(path).forget()
    changed = [path for path, info in objects.items() if (n := CachedFile(path).known()) is None or n.etag != info.etag]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for _ in pool.map(fetch, changed):
            pass


# --- Space -------------------------------------------------------------------------------------------------------

_until_look: dict[Path, int] = {}  # bytes that this process may add to a cache before it looks through it again
_looking = threading.Lock()


class _Copies:
    """What is in a cache now. total: bytes. entries: when each copy was last used, its size, and its path."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.total, self.entries = cache, 0, []
        for path in (cache / STATE).rglob("*.json"):
            try:
                entry, used = CacheEntry(**json.loads(path.read_text(encoding="utf-8"))), path.stat().st_mtime
            except (OSError, ValueError, TypeError):
                continue  # just being written, or gone
            self.total += entry.size
            if not entry.kept:
                self.entries.append((used, entry.size, path))

    @property
    def limit(self) -> int:
        """What the copies may take: ACW_CACHE_GB (of 1e9 bytes), or a share of what the disk has for them."""
        if given := os.environ.get(LIMIT):
            return _gigabytes(given)
        self.cache.mkdir(parents=True, exist_ok=True)
        return int(SHARE * (shutil.disk_usage(self.cache).free + self.total))

    def evict(self) -> None:
        """Gives up copies that were not used for longest, until no more than the limit is left.

        Never what a job may rely on without asking, nor what was used within RECENT_SECONDS. Whoever has a file open or
        mapped can go on reading it.
        """
        limit, latest = self.limit, time.time() - RECENT_SECONDS
        for used, size, path in sorted(self.entries):
            if self.total <= limit or used > latest:
                return
            key = path.relative_to(self.cache / STATE).with_name(path.name.removesuffix(".json"))
            cached = CachedFile(self.cache / CACHE_FOLDER / key)
            with contextlib.suppress(Timeout), FileLock(cached.state(".lock"), blocking=False):
                cached.forget()
                self.total -= size


def _gigabytes(given: str) -> int:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(f"{LIMIT}={given}: is no size; give gigabytes, such as 200")
    return int(value * 1e9)


def _added(cache: Path, size: int) -> None:
    """Takes note of bytes that were added, and looks through the cache once they are a share of its limit."""
    with _looking:
        left = _until_look.get(cache, -1) - size
        if left < 0:
            copies = _Copies(cache)
            copies.evict()
            left = int(SLACK * copies.limit)
        _until_look[cache] = left
