"""What a run of a recipe on a data set will take: bytes, memory, hours and cost; by earlier runs under its root.

Writes nothing but the file that --json names. Here --price-per-hour is that of one core or, with --hardware, of one GPU
and its share of a machine's cores.
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
    about = "plan for GPUs such as the one that `python benchmarks/gpu.py --json FILE` has measured; cat2000 without "
    about += "--dataset is then planned for CAT2000's 2,000 images"
    parser.add_argument("--hardware", metavar="FILE", help=about)
    add_recipe_options(parser, base)


def main(argv: Sequence[str]) -> None:
    options = read_options(argv, __doc__, add_options)
    job = job_of(options, writes=False)
    from acw.pipeline import plan, plan_hardware

    if options["hardware"]:
        results = plan_hardware.Results.read(local_path(options["hardware"], "--hardware"))
        made = plan_hardware.make(job, results, dataset_given=options["dataset"] != "synthetic")
    else:
        made = plan.make(job)
    print(plan.text(made, job.recipe.price_per_hour or None))
    if options["json"]:
        figures = dataclasses.asdict(made) | {
            "seconds": {str(row[0]): made.seconds(row[0]) for row in made.table(None)},
            "paying_cores": made.paying(),
        }
        write_atomic(local_path(options["json"], "--json"), json.dumps(figures, indent=2) + "\n")
