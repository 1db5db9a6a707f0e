"""The `acw` command, and how a command or job ends.

`acw run RECIPE ...` trains, scores and registers; `acw` alone lists all commands. Most are modules of acw/pipeline, as
are the jobs that `ray job submit` runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from acw.cluster.errors import user_error
from acw.pipeline.job import parse
from acw.pipeline.options import Parser, check_writable, local_path
from acw.storage import secrets
from acw.storage.addresses import local, shown
from acw.storage.errors import UserError
from acw.storage.files import give_home, is_model_uri, write_atomic


def plan(argv: Sequence[str]) -> None:
    """what a recipe will take on a data set: bytes, memory, hours, cost"""
    own = Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--price-per-hour", type=float)
    own.add_argument("--json")
    options, rest = own.parse_known_args(list(argv))
    if options.price_per_hour is not None and not options.price_per_hour >= 0:
        raise UserError(f"--price-per-hour {options.price_per_hour}: give what a core costs an hour, 0 or more")
    about = "Writes nothing. --price-per-hour X (of one core), --json FILE (all figures)"
    job = parse(rest, f"What a run will take: half a minute of calibration on this machine. {about}", writes=False)

    from acw.pipeline import plan as planning

    made = planning.make(job)
    print(planning.text(made, options.price_per_hour))
    if options.json:
        figures = dataclasses.asdict(made) | {
            "seconds": {str(row[0]): made.seconds(row[0]) for row in made.table(None)},
            "paying_cores": made.paying(),
        }
        write_atomic(local_path(options.json, "--json"), json.dumps(figures, indent=2) + "\n")


def status(argv: Sequence[str]) -> None:
    """what of a run or a search is done, what is running and when it will end"""
    parser = Parser(description=status.__doc__, allow_abbrev=False)
    parser.add_argument(
        "run", help="folder of a run or a search, which jobs print first as `run: FOLDER`; or s3://BUCKET/KEY of it"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")
    options = parser.parse_args(list(argv))
    from acw.training import status as standing

    folder = local(options.run) if options.run.startswith("s3://") else local_path(options.run, "RUN")
    figures = standing.status(folder, time.time())
    print(json.dumps(figures) if options.json else standing.text(figures), flush=True)


def import_deepgaze(argv: Sequence[str]) -> None:
    """make a model of deepgaze2e.pth, the checkpoint of DeepGaze IIE's authors"""
    parser = Parser(description=import_deepgaze.__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="the authors' deepgaze2e.pth, or s3://BUCKET/KEY of it")
    parser.add_argument("--out", required=True, help="folder to write, for acw.load and for --heads of a recipe")
    options = parser.parse_args(list(argv))
    out = local_path(options.out, "--out")
    check_writable(out)
    from acw.model.deepgaze import import_checkpoint

    s3 = options.checkpoint.startswith("s3://")
    model = import_checkpoint(options.checkpoint if s3 else str(local_path(options.checkpoint, "CHECKPOINT")))
    model.save(out, [model.loaded(backbone) for backbone in model.backbones])
    print("it brings no centre bias: give predict one, or take one from a data set's images, with category weights:")
    print(f"  acw run deepgaze_iie --heads {shown(out)} --category_weights true --dataset FOLDER")
    print(shown(out), flush=True)


def export_submission(argv: Sequence[str]) -> None:
    """write a model's log-densities of a folder of images as the benchmark takes them"""
    parser = Parser(description=f"{export_submission.__doc__}: HDF5, checked after writing", allow_abbrev=False)
    parser.add_argument("model", help="a run's folder, a model's folder or an MLflow URI such as models:/acw@champion")
    _add_stimuli(parser)
    parser.add_argument("--out", required=True, help="HDF5 file to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    options = parser.parse_args(list(argv))
    out = local_path(options.out, "--out")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    check_writable(out.parent)
    import torch

    from acw.evaluation import submission
    from acw.tracking.load import load

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use; leave it out")
    location = options.model if is_model_uri(options.model) else local_path(options.model, "MODEL")
    print(submission.export(load(location, options.device), local_path(options.stimuli, "--stimuli"), out))
    print(shown(out), flush=True)


def check_submission(argv: Sequence[str]) -> None:
    """read a submission back: every image there, of its size, a density"""
    parser = Parser(description=check_submission.__doc__, allow_abbrev=False)
    parser.add_argument("file", help="HDF5 file, of acw export-submission or another program")
    _add_stimuli(parser)
    options = parser.parse_args(list(argv))
    from acw.evaluation import submission

    print(submission.check(local_path(options.file, "FILE"), local_path(options.stimuli, "--stimuli")), flush=True)


def _add_stimuli(parser: Parser) -> None:
    about = "folder of images, or CAT2000's testSet (categories are folders)"
    parser.add_argument("--stimuli", required=True, help=about)


def _step(name: str, about: str) -> Callable[[Sequence[str]], None]:
    """A module of `acw.pipeline` as a command; it is imported when it is called, so that help costs nothing."""

    def step(argv: Sequence[str]) -> None:
        importlib.import_module(f"acw.pipeline.{name}").main(argv)

    step.__doc__ = about
    return step


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": _step("whole", "all of a recipe on a data set: features, heads, weights, scores, registry"),
    "search": _step("search", "search recipe fields with Ray Tune"),
    "evaluate": _step("evaluate", "score a finished model, and others beside it, on a data set"),
    "reproduce": _step("reproduce", "every system of the paper on one data set, with both its tables"),
    "plan": plan,
    "status": status,
    "stage": _step("stage", "put a data set into S3"),
    "import-deepgaze": import_deepgaze,
    "export-submission": export_submission,
    "check-submission": check_submission,
}


def _command(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: acw COMMAND ...\n\ncommands:")
        for name, function in COMMANDS.items():
            print(f"  {name:20}{function.__doc__}")
        print("\nacw COMMAND --help says more.")
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"no command '{argv[0]}'; commands are {', '.join(COMMANDS)}")
    sys.argv[0] = str(Path(sys.argv[0]).with_name(f"acw {argv[0]}"))
    COMMANDS[argv[0]](argv[1:])


def main() -> None:
    """Entry of the console command."""
    run(_command)


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a job: exit status 0 if it did all that it says, 2 and one line on stderr for an error of the user's."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without the letters of a name ends no job
    try:
        give_home()
        secrets.refuse(sys.argv[1:])
        main(sys.argv[1:])
    except Exception as error:
        if (known := user_error(error)) is None:
            raise
        from acw.cluster.joining import disconnect

        # Ray may have complaints of its own about work that is given up: ours is the last line.
        disconnect()
        message = " ".join(shown(str(known)).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)
