"""Reads a submission back: every image there, of its size, a density."""

from __future__ import annotations

from collections.abc import Sequence

from acw.pipeline.options import Parser, add_stimuli_option, local_path


def add_options(parser: Parser) -> None:
    about = "HDF5 file, of acw export-submission or another program"
    parser.add_argument("file", metavar="FILE", help=about)
    add_stimuli_option(parser)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    from acw.evaluation import submission

    print(
        submission.check(local_path(options["file"], "FILE"), local_path(options["stimuli"], "--stimuli")), flush=True
    )
