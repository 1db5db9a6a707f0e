"""Predicts where people look in very many images, by all workers of a Ray cluster: a row an image in Parquet files.

python jobs/predict.py IMAGES OUT --model RUN

The same command again goes on where it was: what was being worked on when it was killed is done again, nothing else.
OUT then has shard-NNNNN.parquet, which together hold every image once, the list of images (images.txt), and
failures.csv. Exit status 1 if any image could not be predicted.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from acw.cluster import joining
from acw.cluster.allocation import Allocation, allocate
from acw.cluster.costs import Cost
from acw.model.description import describe
from acw.pipeline import image_list
from acw.pipeline.image_list import Shard
from acw.pipeline.options import Parser, check_writable, local_path
from acw.pipeline.prediction_shards import (
    HEADER,
    PARQUET,
    ShardPredictor,
    Work,
    failures_path,
    table_path,
)
from acw.storage.addresses import in_cache, shown
from acw.storage.checksums import fingerprint, sha256_file
from acw.storage.errors import UserError
from acw.storage.files import csv_rows, csv_text, fetch, is_model_uri, listing, write_atomic, write_json

LIST, RECORD, ALL_FAILURES = "images.txt", "predictions.json", "failures.csv"
SHARD_IMAGES = 128
SECONDS_BETWEEN_LINES = 10.0
# Of a worker that dies, as of too large an image: how often its shard is tried again.
TRIES = 3


def add_options(parser: Parser) -> None:
    about = "a folder or s3://BUCKET/PREFIX, with all below it, or a file with one path or address a line"
    parser.add_argument("images", metavar="PATH", help=about)
    about = "folder to write, here or in S3; on a cluster, one that all nodes share"
    parser.add_argument("out", metavar="FOLDER", help=about)
    about = "a run's folder, a model's folder or, without a cluster, an MLflow URI such as models:/acw@champion"
    parser.add_argument("--model", metavar="MODEL", help=f"{about} (default: the starter model)")
    about = "parquet: all in the tables; npy, png16, overlay: maps as files of their own, named by the tables"
    parser.add_argument("--format", choices=(PARQUET, "npy", "png16", "overlay"), default=PARQUET, help=about)
    about = "cells of the longer side of the densities in tables; 0: the model's own grid (default: 0)"
    parser.add_argument("--long-side", type=int, default=0, metavar="PX", help=about)
    about = "category of all images, one that the model knows (default: inferred from each)"
    parser.add_argument("--category", metavar="NAME", help=about)
    about = f"images a shard, and a table (default: {SHARD_IMAGES})"
    parser.add_argument("--shard-images", type=int, default=SHARD_IMAGES, metavar="N", help=about)
    parser.add_argument("--retry-failed", action="store_true", help="do shards with failures again")
    about = "auto: GPUs where the cluster has any; gpu: demand (default: auto)"
    parser.add_argument("--accelerator", choices=("auto", "gpu", "cpu"), default="auto", help=about)
    about = "that work side by side; 0: one a GPU, or one a CPU core (default: 0)"
    parser.add_argument("--workers", type=int, default=0, metavar="N", help=about)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    for name, least in (("long_side", 0), ("shard_images", 1), ("workers", 0)):
        if options[name] < least:
            raise UserError(f"--{name.replace('_', '-')} {options[name]}: give at least {least}")
    images, out = local_path(options["images"], "PATH"), local_path(options["out"], "FOLDER")
    model = _model(options["model"])
    check_writable(out)
    _begin(out, options, shown(images), model)
    shards = image_list.shards(out / LIST, options["shard_images"])
    names = {path.name for path in (listing(out) if in_cache(out) else out.iterdir())}
    waiting = [shard for shard in shards if not _is_done(out, shard, names, options["retry_failed"])]
    count = sum(shard.images for shard in waiting)
    there = sum(shard.images for shard in shards) - count
    print(f"predict: {there + count} images in {len(shards)} shards; {there} images are there", flush=True)
    if waiting:
        joining.connect()
        allocation = allocate(len(waiting), options["workers"], options["accelerator"])
        work = Work(
            out / LIST,
            out,
            model,
            options["format"],
            options["long_side"],
            options["category"],
            allocation.cpus,
            allocation.gpus > 0,
        )
        print(f"predict: {_predict(waiting, work, allocation, count)}", flush=True)
    failures = list(_failures(out, shards))
    write_atomic(out / ALL_FAILURES, csv_text(HEADER, failures))
    print(shown(out), flush=True)
    if failures:
        table = shown(out / ALL_FAILURES)
        print(f"error: {len(failures)} of {there + count} images could not be predicted: {table}", file=sys.stderr)
        sys.exit(1)


def _model(given: str | None) -> Path:
    """The folder of the model, which every worker reads."""
    from acw.tracking.load import folder_of

    if given and is_model_uri(given):
        if joining.on_cluster():
            raise UserError(f"--model {given}: is for this machine alone; on a cluster, give the run's folder or s3://")
        location: str | Path | None = given
    else:
        location = local_path(given, "--model") if given else None
    folder = folder_of(location)
    describe(folder)
    return folder


def _begin(out: Path, options: Mapping[str, Any], images: str, model: Path) -> None:
    """Writes the list of images, and then of what the predictions are; where that is noted already, raises UserError
    unless it is the same, and leaves the list as it is."""
    content = [sha256_file(fetch(model / name)) for name in ("heads.safetensors", "fusion.safetensors")]
    content += describe(model)["categories"]
    names = ("format", "long_side", "category", "shard_images")
    record = {"images": images, "model": fingerprint(content)} | {name: options[name] for name in names}
    path = fetch(out / RECORD)
    if not path.exists():
        image_list.write(images, out / LIST)
        write_json(path, record)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in record.items():
        if before.get(name) != value:
            raise UserError(
                f"{shown(out)}: has predictions with another {name.replace('_', '-')} ({before.get(name)}, not {value})"
                "; give the same as then, or another folder"
            )


def _is_done(out: Path, shard: Shard, names: set[str], retry: bool) -> bool:
    failed = failures_path(out, shard.number).name in names
    return table_path(out, shard.number).name in names and not (retry and failed)


def _predict(shards: Sequence[Shard], work: Work, allocation: Allocation, count: int) -> Cost:
    """Has a pool of workers write the shards; prints how far they are. Raises UserError for what ends the job."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # that its bars are off, for one
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Rows are shards, so that each is written by whom it was given to, whole, before it counts.
    rows = [{"number": shard.number, "offset": shard.offset, "images": shard.images} for shard in shards]
    least = 1 if joining.on_cluster() else allocation.workers
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardPredictor,
        fn_constructor_args=(work,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=least, max_size=allocation.workers, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=allocation.cpus,
        num_gpus=allocation.gpus or None,
        max_restarts=TRIES,
        max_task_retries=TRIES,
    )
    start = last = time.monotonic()
    finished = peak = 0
    for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
        for problem in batch["problem"]:
            if problem:
                raise UserError(str(problem))
        finished, peak = finished + int(batch["images"].sum()), max(peak, int(batch["peak_rss"].max()))
        if (now := time.monotonic()) > last + SECONDS_BETWEEN_LINES:
            last, rate = now, finished / (now - start)
            left = (count - finished) / rate / 60
            print(f"predict: {finished} of {count} images, {rate:.1f} images/s, {left:.1f} min left", flush=True)
    return Cost(time.monotonic() - start, finished, peak)


def _failures(out: Path, shards: Sequence[Shard]) -> Iterator[tuple[str, str]]:
    """Image and error of all that could not be predicted, by whichever command."""
    names = {path.name for path in (listing(out) if in_cache(out) else out.iterdir())}
    for shard in shards:
        path = failures_path(out, shard.number)
        if path.name in names:
            yield from ((row["image"], row["error"]) for row in csv_rows(path))
