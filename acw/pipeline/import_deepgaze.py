"""Makes a model of the checkpoint of DeepGaze IIE's authors, and registers it if it has a centre bias.

acw import-deepgaze --download                                                 fetches both files and checks them
acw import-deepgaze deepgaze2e.pth --center-bias centerbias_mit1003.npy        of files that are here already

Downloads are kept below ACW_CACHE (default: ~/.cache); one that was interrupted goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from acw.model import deepgaze_release
from acw.pipeline.models import add_store_options
from acw.pipeline.options import Parser, check_writable, local_path, root_folder
from acw.storage.addresses import shown
from acw.storage.errors import UserError

if TYPE_CHECKING:
    from acw.model.model import Model

DESCRIPTION = """\
# DeepGaze IIE

Networks, heads and weights of its authors (Linardos, Kümmerer, Press, Bethge, ICCV 2021; \
github.com/matthias-k/DeepGaze), with the centre bias of {bias_of}. Trained elsewhere: no run here has scored it; \
`acw evaluate` and `acw promote --dataset` do."""


def add_options(parser: Parser) -> None:
    about = "the authors' deepgaze2e.pth, or s3://BUCKET/KEY of it"
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=about)
    parser.add_argument("--download", action="store_true", help="fetch it, and their centre bias of MIT1003")
    about = f"address of the folder that --download fetches both from (default: {deepgaze_release.RELEASE})"
    parser.add_argument("--from", default=deepgaze_release.RELEASE, metavar="URL", help=about)
    about = "the centre bias, an NPY file (H, W) of a density or natural log-density"
    parser.add_argument("--center-bias", metavar="FILE", help=about)
    about = "folder to write, for acw.load and for --heads of a recipe (default: deepgaze2e)"
    parser.add_argument("--out", default="deepgaze2e", metavar="PATH", help=about)
    add_store_options(parser)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    given = options["checkpoint"]
    if bool(given) == options["download"]:
        raise UserError("give either the authors' checkpoint, CHECKPOINT, or --download")
    out = local_path(options["out"], "--out")
    check_writable(out)
    bias_file, bias_of = options["center_bias"], options["center_bias"] and Path(options["center_bias"]).name
    if options["download"]:
        checkpoint, center_bias = map(str, deepgaze_release.fetch(options["from"]))
        if not bias_file:
            bias_file, bias_of = center_bias, deepgaze_release.TRAINED_ON
    else:
        checkpoint = given if given.startswith("s3://") else str(local_path(given, "CHECKPOINT"))
    from acw.model import deepgaze

    if not bias_file:
        _save(deepgaze.import_checkpoint(checkpoint), out)
        print("it brings no centre bias: give --center-bias, or adapt it to a data set, which brings one:")
        print(f"  acw run cat2000_iie --heads {shown(out)} --dataset FOLDER")
        print(shown(out), flush=True)
        return
    from acw.pipeline.predict import read_center_bias
    from acw.tracking import mlflow_store, registry

    store = mlflow_store.ready(root_folder(options["root"]), options["tracking_uri"])
    _save(deepgaze.import_checkpoint(checkpoint, read_center_bias(bias_file), bias_of), out)
    version = registry.register_imported(store, out, DESCRIPTION.format(bias_of=bias_of))
    print(f"registered: acw version {version}; acw promote {version} --dataset FOLDER compares it with the champion")
    print(shown(out), flush=True)


def _save(model: Model, out: Path) -> None:
    from acw.model import files

    files.save(model, out / "model", [model.loaded(backbone) for backbone in model.backbones])
