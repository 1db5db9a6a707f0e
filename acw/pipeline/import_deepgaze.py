"""Makes a model of deepgaze2e.pth, the checkpoint of DeepGaze IIE's authors."""

from __future__ import annotations

from collections.abc import Sequence

from acw.pipeline.options import Parser, check_writable, local_path
from acw.storage.addresses import shown


def add_options(parser: Parser) -> None:
    about = "the authors' deepgaze2e.pth, or s3://BUCKET/KEY of it"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=about)
    about = "folder to write, for acw.load and for --heads of a recipe"
    parser.add_argument("--out", required=True, metavar="PATH", help=about)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    checkpoint, out = options["checkpoint"], local_path(options["out"], "--out")
    check_writable(out)
    from acw.model import files
    from acw.model.deepgaze import import_checkpoint

    s3 = checkpoint.startswith("s3://")
    model = import_checkpoint(checkpoint if s3 else str(local_path(checkpoint, "CHECKPOINT")))
    files.save(model, out, [model.loaded(backbone) for backbone in model.backbones])
    print("it brings no centre bias: give predict one, or adapt it to a data set, which brings one:")
    print(f"  acw run cat2000_iie --heads {shown(out)} --dataset FOLDER")
    print(shown(out), flush=True)
