"""Images as people name them: files, folders, patterns, addresses, and lists of these."""

from __future__ import annotations

import functools
import glob
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

import numpy as np

from acw.data.images import FORMATS, SUFFIXES, decode_image, names_stimulus
from acw.model.prediction import FORMATS as RESULTS
from acw.storage import addresses, http
from acw.storage.addresses import expanded, local, shown
from acw.storage.errors import UserError
from acw.storage.files import fetch, listing, plain_name

MOST_DOWNLOADED = 2**27  # bytes of an image from a server
# Files that are brought here while others are predicted.
AHEAD = 4
SUFFIX_OF = {f"image/{name.lower()}": suffix for suffix, name in FORMATS.items()}  # of a content type


@dataclass(frozen=True)
class Source:
    """An image: a path or an address, and the name of its results, with slashes and without an ending."""

    location: str
    name: str

    @property
    def shown(self) -> str:
        return http.shown(self.location) if _is_http(self.location) else self.location


def sources(locations: Iterable[str]) -> list[Source]:
    """The images that are meant, each once, in order.

    Their results are named by their paths from the deepest folder on that all are in, without the ending unless that
    tells them apart. Raises UserError for a folder, a pattern or a prefix in S3 in which no image is, and for an
    address that is none.
    """
    images = list(dict.fromkeys(location for given in locations for location in _meant(given)))
    paths = [_path(location) for location in images]
    shared = len(PurePosixPath(os.path.commonpath([path.parent for path in paths])).parts) if paths else 0
    names = _names([PurePosixPath(*path.parts[shared:]) for path in paths])
    return [Source(*both) for both in zip(images, names, strict=True)]


def _is_http(location: str) -> bool:
    return location.lower().startswith(("http://", "https://"))


def is_image(path: PurePosixPath | Path) -> bool:
    """Whether a file that was not named itself is meant: an image, and none that `acw predict` wrote."""
    return names_stimulus(path) and not path.name.endswith(tuple(suffix for suffix, _ in RESULTS.values()))


def _meant(given: str) -> list[str]:
    """The locations of the images that a word of a command or a line of a list means."""
    if _is_http(given):
        return [given]
    if given.startswith("s3://"):
        path = local(given)
        if is_image(path):
            return [given]
        _reach(addresses.parts(given)[0])
        found = [file for file in listing(path) if is_image(file)]
    else:
        path = expanded(given)
        if "://" in given and not path.exists():
            raise UserError(f"{given}: images are files, or at http://, https:// and s3://; download it first")
        if path.is_dir():
            found = [file for file in listing(path) if is_image(file)]
        elif path.exists() or not glob.has_magic(str(path)):
            return [str(path)]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            found = [match for match in matches if match.is_file() and is_image(match)]
    if not found:
        endings = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{given}: there is no image in it, no file that ends in {endings}; correct its name")
    return [shown(file) for file in found]


@functools.cache
def _reach(bucket: str) -> None:
    """Raises UserError where a bucket is not there: within seconds, not after the patience that a request has."""
    from acw.storage import s3

    s3.reach(f"s3://{bucket}")


def _path(location: str) -> PurePosixPath:
    """Where an image is, as one path whatever kind of place it is in; of an address in letters that any disk has."""
    if _is_http(location):
        parts = urlsplit(location)
        named = [plain_name(unquote(part)) for part in parts.path.split("/")]
        return PurePosixPath("/http", plain_name(parts.netloc), *(part for part in named if part.strip(".")))
    if location.startswith("s3://"):
        return PurePosixPath("/s3", *location.removeprefix("s3://").split("/"))
    return PurePosixPath("/file" + os.path.abspath(location))


def _names(paths: Sequence[PurePosixPath]) -> list[str]:
    """A name for each image's results, no two of which are the same on any disk."""
    whole = [str(path) for path in paths]
    stems = [str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else str(path) for path in paths]
    count = Counter(name.casefold() for name in stems)
    others = {name.casefold() for name, stem in zip(whole, stems, strict=True) if name != stem}
    taken: Counter[str] = Counter()
    names = []
    for stem, name in zip(stems, whole, strict=True):
        alone = count[stem.casefold()] == 1 and stem.casefold() not in others
        chosen = stem if alone else name
        taken[chosen.casefold()] += 1
        # Addresses that differ in what is behind `?` alone.
        names.append(chosen if (number := taken[chosen.casefold()]) == 1 else f"{chosen}-{number}")
    return names


# --- Reading -----------------------------------------------------------------------------------------------------


def read(images: Iterable[Source]) -> Iterator[tuple[Source, np.ndarray | UserError]]:
    """Of each image, in order, uint8 (H, W, 3) RGB, upright, or what is wrong with it; one is in memory at a time.

    Files that are elsewhere are brought here before their turn, a few at a time; what was downloaded is deleted then.
    """
    with TemporaryDirectory(prefix="acw-images-") as folder, ThreadPoolExecutor(AHEAD) as pool:
        coming: deque[tuple[Source, Future[Path]]] = deque()
        for number, source in enumerate(images):
            coming.append((source, pool.submit(_bring, source, Path(folder) / f"{number}")))
            if len(coming) > AHEAD:
                yield _decoded(*coming.popleft())
        while coming:
            yield _decoded(*coming.popleft())


def _bring(source: Source, temporary: Path) -> Path:
    """The image's file on this machine; temporary: its path, without an ending, if it has to be downloaded."""
    if source.location.startswith("s3://"):
        _reach(addresses.parts(source.location)[0])
        return fetch(local(source.location))
    if not _is_http(source.location):
        return Path(source.location)
    try:
        kind = http.download(source.location, temporary, MOST_DOWNLOADED)
        suffix = SUFFIX_OF.get(kind, PurePosixPath(urlsplit(source.location).path).suffix.lower())
        if suffix not in SUFFIXES:
            raise UserError(f"{source.shown}: is no image but {kind}; give the address of the image itself")
        return temporary.rename(temporary.with_suffix(suffix))
    except UserError:
        temporary.unlink(missing_ok=True)
        raise


def _decoded(source: Source, brought: Future[Path]) -> tuple[Source, np.ndarray | UserError]:
    try:
        path = brought.result()
    except UserError as error:
        return source, error
    try:
        return source, decode_image(path, upright=True)
    except UserError as error:
        return source, UserError(str(error).replace(str(path), source.shown))
    finally:
        if _is_http(source.location):
            path.unlink()
