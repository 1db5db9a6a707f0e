"""Writes a model's log-densities of a folder of images as the MIT/Tuebingen benchmark takes them.

One HDF5 file, checked after writing. The last line on stdout is its path.
"""

from __future__ import annotations

from collections.abc import Sequence

from acw.pipeline.options import Parser, add_stimuli_option, check_writable, local_path
from acw.storage.addresses import shown
from acw.storage.errors import UserError
from acw.storage.files import is_model_uri


def add_options(parser: Parser) -> None:
    about = "a run's folder, a model's folder or an MLflow URI such as models:/acw@champion"
    parser.add_argument("model", metavar="MODEL", help=about)
    add_stimuli_option(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="HDF5 file to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    out = local_path(options["out"], "--out")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    check_writable(out.parent)
    import torch

    from acw.evaluation import submission
    from acw.tracking.load import load

    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use; leave it out")
    model = options["model"] if is_model_uri(options["model"]) else local_path(options["model"], "MODEL")
    print(submission.export(load(model, options["device"]), local_path(options["stimuli"], "--stimuli"), out))
    print(shown(out), flush=True)
