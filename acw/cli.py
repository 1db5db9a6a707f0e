"""The `acw` command, and how a command or job ends.

`acw run RECIPE ...` trains, scores and registers; `acw` alone lists all commands. Each is a module of acw/pipeline with
`add_options(parser)` and `main(argv)`; the jobs that `ray job submit` runs call the same `main`.
"""

from __future__ import annotations

import gc
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from acw.cluster.errors import user_error
from acw.storage import secrets
from acw.storage.addresses import shown
from acw.storage.errors import UserError
from acw.storage.files import give_home

# Command -> its module in acw.pipeline, imported when it is called, and what it does.
COMMANDS = {
    "run": ("whole", "all of a recipe on a data set: features, heads, weights, scores, registry"),
    "search": ("search", "search recipe fields with Ray Tune"),
    "evaluate": ("evaluate", "score a finished model, and others beside it, on a data set"),
    "predict": ("predict", "where people look in images: pictures, densities, contours, likeliest places"),
    "adapt": ("adapt", "adapt a model to a small data set of another kind of images, as a category more"),
    "categories": ("categories", "name the categories that a run has found by itself"),
    "models": ("models", "list the versions of the registered model with their scores and aliases"),
    "promote": ("promote", "make a version the champion, if it is better beyond chance"),
    "serve": ("serve", "serve a model: a page in the browser, and the same for programs"),
    "reproduce": ("reproduce", "every system of ACW and DeepGaze IIE on one data set, with both tables of ACW"),
    "check": ("check", "say what is wrong with a data set, what mends it, and what a run on it would take"),
    "plan": ("plan_command", "what a recipe will take on a data set: bytes, memory, hours, cost"),
    "status": ("status", "what of a run or a search is done, what is running and when it will end"),
    "fetch": ("fetch", "fetch the weights of a recipe's networks to this machine"),
    "stage": ("stage", "put a data set into S3"),
    "import-deepgaze": ("import_deepgaze", "make a model of deepgaze2e.pth, the checkpoint of DeepGaze IIE's authors"),
    "export-submission": ("export_submission", "write a model's log-densities of images as the benchmark takes them"),
    "check-submission": ("check_submission", "read a submission back: every image there, of its size, a density"),
}
SHELLS = ("bash", "zsh")
PATHS = ("PATH", "FILE", "FOLDER", "RUN", "MODEL", "CHECKPOINT")  # what options and arguments call a path


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"acw.pipeline.{COMMANDS[command][0]}")


def _command(argv: Sequence[str]) -> None:
    name = argv[0] if argv else "--help"
    if name in COMMANDS:
        sys.argv[0] = str(Path(sys.argv[0]).with_name(f"acw {name}"))
        _module(name).main(argv[1:])
    elif name in ("-h", "--help"):
        print("usage: acw COMMAND ...\n\ncommands:")
        for command, (_, about) in COMMANDS.items():
            print(f"  {command:20}{about}")
        print(
            "\nacw COMMAND --help says more; acw --print-completion bash|zsh prints a script that completes all of it."
        )
    elif name == "--print-completion":
        if len(argv) != 2 or argv[1] not in SHELLS:
            raise UserError(f"--print-completion: give a shell, {' or '.join(SHELLS)}")
        print(_completion(argv[1]))
    else:
        raise UserError(f"no command '{name}'; commands are {', '.join(COMMANDS)}")


def _completion(shell: str) -> str:
    """A script by which the shell completes commands, options, their choices and paths."""
    import shtab

    from acw.pipeline.options import Parser

    parser = Parser(prog="acw")
    parser.add_argument("--print-completion", choices=SHELLS, help="print a script for the shell's completion")
    commands = parser.add_subparsers()
    for command, (_, about) in COMMANDS.items():
        child = commands.add_parser(command, prog=f"acw {command}", help=about)
        _module(command).add_options(child)
        for action in child._actions:
            if action.metavar in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads it
    return shtab.complete(parser, shell)


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
    finally:
        # At its end Python would look through all objects for some to free, 660,000 with torch, Ray and MLflow, and
        # take classes apart: 5 to 30 s for what the system frees at once.
        gc.freeze()
    sys.exit(0)


if __name__ == "__main__":
    main()
