"""Says what of a run or a search is done, what is running and when it will end."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from acw.pipeline.options import Parser, local_path
from acw.storage.addresses import local


def add_options(parser: Parser) -> None:
    about = "folder of a run or a search, which jobs print first as `run: FOLDER`; or s3://BUCKET/KEY of it"
    parser.add_argument("run", metavar="RUN", help=about)
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    from acw.training import status

    run = options["run"]
    folder = local(run) if run.startswith("s3://") else local_path(run, "RUN")
    figures = status.status(folder, time.time())
    print(json.dumps(figures) if options["json"] else status.text(figures), flush=True)
