"""Where DeepGaze IIE's authors publish their files, and these files on this node: downloaded once, and checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from acw.storage import http
from acw.storage.checksums import fingerprint
from acw.storage.errors import UserError
from acw.storage.kept import kept

RELEASE = "https://github.com/matthias-k/DeepGaze/releases/download/v1.0.0"
CHECKPOINT, CENTER_BIAS = "deepgaze2e.pth", "centerbias_mit1003.npy"
MOST_BYTES = {CHECKPOINT: 2**31, CENTER_BIAS: 2**28}
TRAINED_ON = "MIT1003"  # the data set of both
SECONDS_BETWEEN_LINES = 5.0


def fetch(release: str = RELEASE) -> tuple[Path, Path]:
    """Checkpoint and centre bias of a release, on this node: downloaded if they are not here yet, and looked at.

    Of neither is the SHA-256 published, so the checks are: as long as the server says, and `deepgaze.check`. Raises
    UserError where they cannot be had.
    """
    return _fetched(release, CHECKPOINT, _check_checkpoint), _fetched(release, CENTER_BIAS, _check_map)


def _check_checkpoint(path: Path) -> None:
    from acw.model.deepgaze import check

    check(path)


def _check_map(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise UserError(f"{path}: is no NPY file; correct the address")


def _fetched(release: str, name: str, check: Callable[[Path], None]) -> Path:
    address = f"{release.rstrip('/')}/{name}"
    by_hand = f"acw import-deepgaze {CHECKPOINT} --center-bias {CENTER_BIAS}"

    def bring(path: Path) -> None:
        new = path.with_name(f"{path.name}.new")
        remedy = f"without a network, bring {name} here by hand: {by_hand}"
        http.download_large(address, new, MOST_BYTES[name], _progress(name), remedy)
        try:
            check(new)
        except UserError as error:
            new.unlink()
            raise UserError(str(error).replace(str(new), http.shown(address))) from error
        new.replace(path)

    return kept(f"{fingerprint(release)}-{name}", bring)


def _progress(name: str) -> Callable[[int, int], None]:
    """Prints how far a download is, every few seconds and at its end."""
    start = last = time.monotonic()
    first: list[int] = []

    def told(size: int, total: int) -> None:
        nonlocal last
        first[:] = first or [size]
        if (now := time.monotonic()) < last + SECONDS_BETWEEN_LINES and size != total:
            return
        last = now
        rate = (size - first[0]) / 1e6 / max(now - start, 1e-9)
        of = f" of {total / 1e6:.0f}" if total else ""
        print(f"{name}: {size / 1e6:.0f}{of} MB, {rate:.1f} MB/s", flush=True)

    return told
