"""Puts a local data set into S3, for `--dataset s3://BUCKET/PREFIX`: what its reader reads, and nothing else.

The data set is read first, so that a damaged one is refused here. What is there with the same checksum is left as it
is: run again after an interruption, it goes on. Every upload is checked. The last line on stdout is the address.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from acw.pipeline.options import Parser, add_reader_options, local_path, reader_options
from acw.storage import addresses
from acw.storage.checksums import sha256_file
from acw.storage.errors import UserError
from acw.storage.files import listing

UPLOADS_AT_ONCE = 8
PROGRESS_SECONDS = 5.0


def files(folder: Path, fixations: Path | None, **options: Any) -> dict[str, Path]:
    """The files that the data set's reader reads, by their paths in the folder, with slashes.

    options: more of what `load_dataset` takes. A file of fixations goes beside them. Raises UserError for what the
    reader refuses.
    """
    from acw.data import load_dataset
    from acw.data.images import SUFFIXES
    from acw.data.remote import reads

    table = str(fixations) if fixations else None
    dataset = load_dataset(str(folder), fixations=table, **options)
    images = {stimulus.path for stimulus in dataset.stimuli}
    chosen = {}
    for path in listing(folder):
        name = path.relative_to(folder).as_posix()
        image = path.suffix.lower() in SUFFIXES
        if reads(dataset.reader, name) and (not image or str(path) in images):
            chosen[name] = path
    return chosen | ({fixations.name: fixations} if fixations else {})


def stage(chosen: Mapping[str, Path], uri: str) -> int:
    """Uploads files below an address, several at once; how many were not there yet."""
    from acw.storage import s3

    prefix = addresses.parts(uri)[1]
    there = {entry.key.removeprefix(f"{prefix}/" if prefix else ""): entry for entry in s3.listing(uri)}

    def copy(name: str) -> int:
        path, target = chosen[name], f"{uri.rstrip('/')}/{name}"
        size = path.stat().st_size
        if name in there and there[name].size == size:
            known = s3.head(target)
            if known and known.sha256 == sha256_file(path):
                return 0
        if s3.upload(path, target) is None:
            raise UserError(f"{target}: is not what was uploaded; does another program write there? run again")
        return size

    start = shown = time.monotonic()
    done = copied = count = 0
    with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
        waiting = [pool.submit(copy, name) for name in chosen]
        try:
            for future in as_completed(waiting):
                size = future.result()
                done, copied, count = done + 1, copied + size, count + bool(size)
                now = time.monotonic()
                if now - shown > PROGRESS_SECONDS or done == len(chosen):
                    shown, rate = now, copied / 1e6 / max(now - start, 1e-3)
                    print(f"{done}/{len(chosen)} files, {copied / 1e6:.1f} MB uploaded, {rate:.1f} MB/s", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return count


def add_options(parser: Parser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the data set, as for --dataset")
    parser.add_argument("address", metavar="ADDRESS", help="s3://BUCKET/PREFIX")
    add_reader_options(parser)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    address, table = options["address"], options["fixations"]
    if not address.startswith("s3://"):
        raise UserError(f"{address}: is no S3 address; write s3://BUCKET/PREFIX")
    local_path(address, "ADDRESS")  # whether it can be had, before all is read
    fixations = local_path(table, "--fixations") if table else None
    if fixations and fixations.is_dir():
        raise UserError(
            f"--fixations {fixations}: is a folder, and a data set in S3 has one file of fixations; join them"
        )
    chosen = files(local_path(options["folder"], "FOLDER"), fixations, **reader_options(options))
    uri = address.rstrip("/")
    count = stage(chosen, uri)
    print(f"{count} files uploaded, {len(chosen) - count} were there; each checked by its checksum", flush=True)
    if fixations:
        print(f"--dataset {uri} --fixations {uri}/{fixations.name}", flush=True)
    print(uri, flush=True)
