"""Options that jobs and commands share: the data set, and folders to write to."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any, NoReturn, get_args

from acw.data import Dataset, load_dataset
from acw.data.coordinates import MOST_DROPPED, Origin, Units
from acw.data.readers import READERS
from acw.storage.addresses import expanded, local
from acw.storage.errors import UserError
from acw.storage.files import refuse_undecodable, remove, write_atomic


class Parser(argparse.ArgumentParser):
    """Ends with one line and status 2, like every other error of the user's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        default="synthetic",
        help="synthetic (default); a CAT2000 folder; a folder with pysaliency's stimuli.hdf5 and fixations.hdf5; "
        "or a folder of images, with --fixations; or s3://BUCKET/PREFIX of one of these",
    )
    add_reader_options(parser)
    about = "of the images; the width of the Gaussian of CC, KLDiv and SIM (default: what the folder's acw.json says, "
    about += "else a 48th of the width, which is CAT2000's 40)"
    names = ("--pixels-per-degree", "--blur-sigma")
    parser.add_argument(*names, dest="pixels_per_degree", type=float, metavar="PX", help=about)


def add_reader_options(parser: argparse.ArgumentParser) -> None:
    """How the files of a data set are to be understood; `reader_options` takes them from the parsed options."""
    parser.add_argument("--fixations", help="CSV with columns image, x, y (0-based px), optionally subject, category")
    parser.add_argument("--reader", choices=tuple(READERS), help="where a folder could be read in two ways")
    about = "of x and y: px (default), or share of the image's width and height"
    parser.add_argument("--units", choices=get_args(Units), default="px", help=about)
    about = "where x and y are counted from: the upper left corner (default) or the image's centre; y goes down"
    parser.add_argument("--origin", choices=get_args(Origin), default="corner", help=about)
    about = f"drop fixations outside their image, up to this share of all ({MOST_DROPPED:g} unless given), and say so"
    parser.add_argument(
        "--drop-outside", nargs="?", type=float, const=MOST_DROPPED, default=0.0, metavar="SHARE", help=about
    )


def reader_options(options: dict[str, Any]) -> dict[str, Any]:
    """What `load_dataset` takes of parsed options."""
    return {name: options[name] for name in ("reader", "units", "origin", "drop_outside")}


def read_dataset(options: dict[str, Any]) -> Dataset:
    spec, fixations = options["dataset"], options["fixations"]
    if spec != "synthetic":
        spec = str(local_path(spec, "--dataset"))
    if fixations:
        fixations = str(local_path(fixations, "--fixations"))
    sigma = options["pixels_per_degree"]
    if sigma is not None and not 0 < sigma < float("inf"):
        raise UserError(f"--pixels-per-degree {sigma}: give px of one degree of visual angle, above 0")
    dataset = load_dataset(spec, fixations=fixations, **reader_options(options))
    for note in dataset.notes:
        print(f"data set {dataset.name}: {note}", flush=True)
    return dataset if sigma is None else dataclasses.replace(dataset, blur_sigma=sigma)


def local_path(location: str, option: str) -> Path:
    """An absolute path; on a cluster a relative one is refused, as a job's folder is not the one it was typed in.

    Of an s3:// address, where the copy belongs on this node; raises UserError if its bucket cannot be had."""
    refuse_undecodable(location, option)
    if location.startswith("s3://"):
        from acw.storage import s3

        s3.reach(location)
        return local(location)
    path = expanded(location)
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(f"{option} {location}: a relative path means nothing on a cluster; use an absolute path")
    return path.resolve()


def root_folder(location: str) -> Path:
    """The root as an absolute path; it need not be there."""
    if "://" in location and not location.startswith("s3://"):
        raise UserError(f"--root {location}: give s3://BUCKET/PREFIX, or a folder on a disk that all nodes share")
    return local_path(location, "--root")


def check_writable(folder: Path) -> None:
    """Raises UserError for a folder in which no file can be written, before anything is computed for it."""
    probe = folder / ".writable"
    write_atomic(probe, b"")
    remove(probe)
