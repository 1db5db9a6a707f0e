"""Options that jobs and commands share: the data set, and folders to write to."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from acw.data import Dataset, exports, load_dataset
from acw.data.convention import Origin, Units, YAxis
from acw.data.coordinates import MOST_DROPPED
from acw.data.plausibility import degree
from acw.data.readers import READERS
from acw.storage.addresses import expanded, local
from acw.storage.errors import UserError
from acw.storage.files import is_model_uri, refuse_undecodable, remove, write_atomic

# A shell's variable, which in single quotes stays as it is.
VARIABLE = re.compile(r"\$[A-Za-z_]\w*|\$\{\w+\}|%[A-Za-z_]\w*%")


# Of `add_reader_options`, what `load_dataset` takes besides the files.
READER_OPTIONS = ("reader", "columns", "units", "origin", "y_axis", "first_px", "screen", "scale", "drop_outside")


class Parser(argparse.ArgumentParser):
    """Of every job and command: one style of help, and one line and status 2 for a mistake."""

    def __init__(self, about: str | None = None, **more: Any) -> None:
        """about: the docstring of the module whose command it is."""
        name = Path(sys.argv[0]).name
        ours: dict[str, Any] = {
            "prog": name if name.split(" ")[0] == "acw" else f"python jobs/{name}",
            "description": about and inspect.cleandoc(about),
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        }
        super().__init__(**ours | more)

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options, by their names with underscores. Underscores are taken for hyphens, as once they were typed."""
        texts = [hyphenated(text) for text in argv]
        # An optional MODEL may stand apart from what follows it; what comes after -- is only understood without that.
        parse = self.parse_args if "--" in texts else self.parse_intermixed_args
        return vars(parse(texts))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def hyphenated(text: str) -> str:
    """An option's name as the help spells it; what is no option stays as it is."""
    name, separator, value = text.partition("=")
    return f"{name.replace('_', '-')}{separator}{value}" if name.startswith("--") else text


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        default="synthetic",
        metavar="PATH",
        help="synthetic (default); a CAT2000 folder; a folder with pysaliency's stimuli.hdf5 and fixations.hdf5; "
        "or a folder of images, with --fixations; or s3://BUCKET/PREFIX of one of these",
    )
    add_reader_options(parser)
    about = "of the images; the width of the Gaussian of CC, KLDiv and SIM (default: what the folder's acw.json says, "
    about += "else a 48th of the width, which is CAT2000's 40)"
    parser.add_argument("--pixels-per-degree", type=float, metavar="PX", help=about)


def add_reader_options(parser: argparse.ArgumentParser) -> None:
    """How the files of a data set are to be understood; `reader_options` takes them from the parsed options."""
    about = "CSV with columns image, x, y (0-based px), optionally subject, category; or what --columns says"
    parser.add_argument("--fixations", metavar="FILE", help=about)
    about = f"what wrote the fixations: {', '.join(exports.NAMES)}; or which columns hold what: image=A,x=B,y=C,"
    about += "subject=D,category=E, those not named being called so; or both, the name first; or a JSON file of these"
    parser.add_argument("--columns", metavar="COLUMNS", help=about)
    parser.add_argument("--reader", choices=tuple(READERS), help="where a folder could be read in two ways")
    about = "of x and y: px (default); share of the image's width and height; or both in its height, as in PsychoPy"
    parser.add_argument("--units", choices=get_args(Units), help=about)
    about = "where x and y are counted from: the corner (default) or the image's centre"
    parser.add_argument("--origin", choices=get_args(Origin), help=about)
    about = "where y goes: down from the upper left corner (default), or up from the lower left one, as in PsychoPy"
    parser.add_argument("--y-axis", choices=get_args(YAxis), help=about)
    about = "what the first px is called: 0 (default), or 1, as MATLAB counts"
    parser.add_argument("--first-px", type=int, choices=(0, 1), help=about)
    about = (
        "the screen that x and y are of, in px; images were in its middle, or, with +X+Y, their upper left corner there"
    )
    parser.add_argument("--screen", metavar="WxH+X+Y", help=about)
    about = "how many px of the screen, or of x and y, an image's px was shown as; fit: as many as the screen allows"
    parser.add_argument("--scale", metavar="FACTOR", help=about)
    about = f"drop fixations outside their image, up to this share of all ({MOST_DROPPED:g} unless given), and say so"
    parser.add_argument(
        "--drop-outside", nargs="?", type=float, const=MOST_DROPPED, default=0.0, metavar="SHARE", help=about
    )


def add_stimuli_option(parser: argparse.ArgumentParser) -> None:
    about = "folder of images, or CAT2000's testSet (categories are folders)"
    parser.add_argument("--stimuli", required=True, metavar="PATH", help=about)


def reader_options(options: dict[str, Any]) -> dict[str, Any]:
    """What `load_dataset` takes of parsed options."""
    chosen = {name: options[name] for name in READER_OPTIONS}
    if (columns := chosen["columns"]) and columns.endswith(".json"):
        chosen["columns"] = str(local_path(columns, "--columns"))
    return chosen


def read_dataset(options: dict[str, Any]) -> Dataset:
    spec, fixations = options["dataset"], options["fixations"]
    if spec != "synthetic":
        spec = str(local_path(spec, "--dataset"))
    if fixations:
        fixations = str(local_path(fixations, "--fixations"))
    dataset = load_dataset(spec, fixations=fixations, **reader_options(options))
    for note in dataset.notes:
        print(f"data set {dataset.name}: {note}", flush=True)
    if (stated := options["pixels_per_degree"]) is None:
        return dataset
    widest = max(stimulus.size[1] for stimulus in dataset.stimuli)
    return dataclasses.replace(dataset, blur_sigma=degree(stated, widest, "--pixels-per-degree"))


# Of an argument or option, that may be left out, which names a model.
MODEL_MEANS = "a run's folder, a model's folder or an MLflow URI such as models:/acw@champion (default: acw's starter)"


def model_location(given: str | None, option: str) -> str | Path | None:
    """Where a model is that a command was given; None for the package's own."""
    return given if given is None or is_model_uri(given) else local_path(given, option)


def local_path(location: str, option: str) -> Path:
    """An absolute path; on a cluster a relative one is refused, as a job's folder is not the one it was typed in.

    Of an s3:// address, where the copy belongs on this node. Raises UserError if its bucket cannot be had, for another
    address, and for a variable that no shell has written out, unless there is a file of that name.
    """
    refuse_undecodable(location, option)
    if location.startswith("s3://"):
        from acw.storage import s3

        s3.reach(location)
        return local(location)
    path = expanded(location)
    if not path.exists():
        if re.match(r"[sS]3:/", location):
            raise UserError(f"{option} {location}: write s3://BUCKET/PREFIX, in lower case and with two slashes")
        if found := VARIABLE.search(location):
            raise UserError(f"{option} {location}: {found[0]} is not written out; write the path in full")
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(f"{option} {location}: a relative path means nothing on a cluster; use an absolute path")
    return path.resolve()


def root_folder(location: str) -> Path:
    """The root as an absolute path; it need not be there."""
    # One letter alone is a Windows drive.
    if re.match(r"\w[\w+.-]+:/", location) and not location.lower().startswith("s3:/"):
        raise UserError(f"--root {location}: give s3://BUCKET/PREFIX, or a folder on a disk that all nodes share")
    return local_path(location, "--root")


def check_writable(folder: Path) -> None:
    """Raises UserError for a folder in which no file can be written, before anything is computed for it."""
    probe = folder / ".writable"
    write_atomic(probe, b"")
    remove(probe)
