"""MLflow's sqlite file where the root is in S3: this process works on a copy of it, and puts that back.

A database cannot be written to in S3, only replaced. So what is put back replaces the very object that was taken;
where another job has put back its own meanwhile, what was logged here is logged again, on top of that.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from acw.storage import cache, s3
from acw.storage.errors import UserError
from acw.storage.files import fetch

ATTEMPTS = 5
# Database in the cache -> this process's copy, and the ETag of the object that it was copied from, if there was one.
_taken: dict[Path, tuple[Path, str | None]] = {}


def take(database: Path) -> Path:
    """A copy of the newest version, in a folder of its own; a file that is not there yet where there is none."""
    folder = Path(tempfile.mkdtemp(prefix="acw-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / database.name
    while True:
        etag = cache.etag(database)
        if fetch(database).exists():
            shutil.copyfile(database, copy)
        if cache.etag(database) == etag:
            break
    _taken[database] = copy, etag
    return copy


def put_back(database: Path) -> bool:
    """Uploads the copy that was taken last; False, and nothing is changed, if another job has put back its own."""
    copy, etag = _taken[database]
    new = s3.replace(copy, cache.uri(database), etag)
    if new is None:
        return False
    _taken[database] = copy, new
    return True


def contended(database: Path) -> UserError:
    """For whoever has tried ATTEMPTS times."""
    return UserError(
        f"{cache.uri(database)}: other jobs keep changing it; run again, or start an MLflow server for jobs that run "
        "side by side and give --tracking-uri"
    )
