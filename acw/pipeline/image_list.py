"""A list of images that may be longer than memory: streamed into a file once, then read in shards, always the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from acw.data.images import SUFFIXES
from acw.pipeline.sources import is_image
from acw.storage import addresses
from acw.storage.addresses import local
from acw.storage.errors import UserError
from acw.storage.files import fetch, present, refuse_undecodable, write_atomic


@dataclass(frozen=True)
class Shard:
    """Consecutive lines of a list: how many, and in which byte of it they begin."""

    number: int
    offset: int
    images: int


def write(location: str, path: Path) -> None:
    """Writes the paths and addresses of all images that `location` means, one a line, to a file.

    location: a folder or an s3:// prefix with all below it, or a file with one path or address a line, http(s):// too.
    What is in memory does not grow with their number. Raises UserError where there are none, or a name is none that a
    list can hold.
    """

    def stream(temporary: Path) -> None:
        count = 0
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for image in _meant(location):
                refuse_undecodable(image, location)
                if "\n" in image or "\r" in image:
                    raise UserError(f"{location}: {image!r} has a line break in its name; rename it")
                file.write(f"{image}\n")
                count += 1
        if not count:
            endings = ", ".join(sorted(SUFFIXES))
            raise UserError(f"{location}: there is no image in it, no file that ends in {endings}; correct its name")

    write_atomic(path, stream)


def _meant(location: str) -> Iterator[str]:
    if location.startswith("s3://") and not present(local(location)):
        from acw.storage import s3

        bucket, _ = addresses.parts(location)
        for found in s3.listing(location):
            if is_image(PurePosixPath(found.key)):
                yield f"s3://{bucket}/{found.key}"
    elif os.path.isdir(location):
        yield from _below(location)
    else:
        yield from _lines(location)


def _lines(location: str) -> Iterator[str]:
    """Of a list; relative paths are those of the folder that the command was given in."""
    path = fetch(local(location))
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if image := line.rstrip("\r\n"):
                    yield image if "://" in image else os.path.abspath(os.path.expanduser(image))
    except OSError as error:
        raise UserError(f"{location}: cannot be read ({error.strerror}); give a folder, a list or a prefix") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{location}: is no list in UTF-8, one path or address a line; give a folder or a list"
        ) from error


def _below(folder: str) -> Iterator[str]:
    """The images in a folder and those below it, in order."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path)
        elif is_image(PurePosixPath(entry.path)) and entry.is_file():
            yield os.path.abspath(entry.path)


def shards(path: Path, images: int) -> list[Shard]:
    """A list's shards, of so many images each; the last one has what is left."""
    result: list[Shard] = []
    start = offset = count = 0
    with fetch(path, immutable=True).open("rb") as file:
        for line in file:
            offset, count = offset + len(line), count + 1
            if count == images:
                result.append(Shard(len(result), start, count))
                start, count = offset, 0
    return [*result, Shard(len(result), start, count)] if count else result


def images_of(path: Path, shard: Shard) -> list[str]:
    """The paths and addresses of a shard."""
    with fetch(path, immutable=True).open("rb") as file:
        file.seek(shard.offset)
        return [file.readline().decode().rstrip("\n") for _ in range(shard.images)]
