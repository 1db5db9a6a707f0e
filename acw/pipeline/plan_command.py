"""What a run of a recipe on a data set will take: bytes, memory, hours and cost; by earlier runs under its root.

Writes nothing but the file that --json names. Here --price-per-hour is that of one core.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from acw.pipeline.job import add_recipe_options, job_of, read_options
from acw.pipeline.options import Parser, local_path
from acw.recipes import Recipe
from acw.storage.files import write_atomic


def add_options(parser: Parser, base: Recipe | None = None) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all figures as one JSON object, too")
    add_recipe_options(parser, base)


def main(argv: Sequence[str]) -> None:
    options = read_options(argv, __doc__, add_options)
    job = job_of(options, writes=False)
    from acw.pipeline import plan

    made = plan.make(job)
    print(plan.text(made, job.recipe.price_per_hour or None))
    if options["json"]:
        figures = dataclasses.asdict(made) | {
            "seconds": {str(row[0]): made.seconds(row[0]) for row in made.table(None)},
            "paying_cores": made.paying(),
        }
        write_atomic(local_path(options["json"], "--json"), json.dumps(figures, indent=2) + "\n")
