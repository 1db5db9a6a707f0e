"""The `acw` command: `acw plan RECIPE ...` says what a run would take, before anything is spent."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from acw.cli import Parser, local_path, parse, run
from acw.storage import UserError, write_atomic


def plan(argv: Sequence[str]) -> None:
    """what a recipe will take on a data set: bytes, memory, hours, cost"""
    own = Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--price-per-hour", type=float)
    own.add_argument("--json")
    options, rest = own.parse_known_args(list(argv))
    if options.price_per_hour is not None and not options.price_per_hour >= 0:
        raise UserError(f"--price-per-hour {options.price_per_hour}: give what a worker costs an hour, 0 or more")
    about = "Writes nothing. --price-per-hour X (of one worker), --json FILE (all figures)"
    job = parse(rest, f"What a run will take: half a minute of calibration on this machine. {about}", writes=False)

    from acw import plan as planning

    made = planning.make(job)
    print(planning.text(made, options.price_per_hour))
    if options.json:
        figures = dataclasses.asdict(made) | {
            "seconds": {str(row[0]): made.seconds(row[0]) for row in made.table(None)},
            "paying_workers": made.paying(),
        }
        write_atomic(local_path(options.json, "--json"), json.dumps(figures, indent=2) + "\n")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"plan": plan}


def _command(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: acw COMMAND ...\n\ncommands:")
        for name, function in COMMANDS.items():
            print(f"  {name:12}{function.__doc__}")
        print("\nacw COMMAND --help says more.")
        return
    if argv[0] not in COMMANDS:
        raise UserError(f"no command '{argv[0]}'; commands are {', '.join(COMMANDS)}")
    sys.argv[0] = str(Path(sys.argv[0]).with_name(f"acw {argv[0]}"))
    COMMANDS[argv[0]](argv[1:])


def main() -> None:
    """Entry of the console command."""
    run(_command)
