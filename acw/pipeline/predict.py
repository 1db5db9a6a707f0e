"""Predicts where people look in images: for each, its density as a picture on it, or in other forms.

acw predict photo.jpg
acw predict photos/ 'more/*.png' https://HOST/photo.jpg --write overlay,csv --out results
find . -name '*.jpg' | acw predict -

Results are named after the images, and their paths are the lines on stdout. Images that cannot be read are named on
stderr and left out; the exit status is then 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from acw.pipeline.options import MODEL_MEANS, Parser, check_writable, local_path, model_location
from acw.storage.addresses import shown
from acw.storage.errors import UserError
from acw.storage.files import fetch, write_atomic

if TYPE_CHECKING:
    import numpy as np

    from acw.heads.center_bias import CenterBias
    from acw.model.model import Model
    from acw.model.prediction import Prediction
    from acw.pipeline.sources import Source

# What --write calls a file, and what is in it.
FORMATS = {
    "overlay": "the image with the density, contours and numbered places (.overlay.png)",
    "npy": "log-density, float32, natural log (.npy)",
    "png16": "density in grey of 16 bits (.density.png)",
    "svg": "contours and places alone (.svg)",
    "csv": "places with their share of the fixations (.csv)",
}
SECONDS_BETWEEN_LINES = 10.0


def add_options(parser: Parser) -> None:
    about = "files, folders, quoted patterns such as 'photos/*.jpg', http(s):// and s3:// addresses; - reads a list of "
    about += "these from standard input, one a line"
    parser.add_argument("images", nargs="+", metavar="PATH", help=about)
    parser.add_argument("--model", metavar="MODEL", help=MODEL_MEANS)
    about = "folder to write to, here or in S3 (default: predictions)"
    parser.add_argument("--out", default="predictions", metavar="FOLDER", help=about)
    described = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    about = f"what to write of each image, with commas between: {described}"
    parser.add_argument("--write", default="overlay", metavar="FORMATS", help=f"{about} (default: overlay)")
    about = "category of all images, one that the model knows (default: inferred from each)"
    parser.add_argument("--category", metavar="NAME", help=about)
    about = "where people look whatever the image shows: the model's own (default), none, or an NPY file (H, W) of a "
    about += "density or natural log-density, brought to each image's size"
    parser.add_argument("--center-bias", default="model", metavar="none|model|FILE", help=about)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    formats, location = _formats(options["write"]), model_location(options["model"], "--model")
    out = local_path(options["out"], "--out")
    from acw.pipeline.sources import sources

    images = sources(_given(options["images"]))
    if not images:
        raise UserError("no image is named on standard input; give paths or addresses, one a line")
    check_writable(out)
    model = _model(location, options["device"], options["center_bias"])
    if failed := predict(model, images, out, formats, options["category"]):
        print(f"error: {failed} of {len(images)} images could not be predicted", file=sys.stderr, flush=True)
        sys.exit(1)


def _formats(given: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--write {given}: there is no '{name}'; give some of {','.join(FORMATS)}")
    return list(dict.fromkeys(names))


def _given(words: Sequence[str]) -> Iterator[str]:
    """The images that are named, with the lines of standard input in the place of `-`."""
    for word in words:
        if word == "-":
            yield from filter(None, (line.rstrip("\r\n") for line in sys.stdin))
        else:
            yield word


def _model(location: str | Path | None, device: str, bias: str) -> Model:
    from acw.tracking.load import load

    model = load(location, device)
    if bias == "model":
        return model
    from acw.heads.center_bias import flat

    added = flat() if bias == "none" else read_center_bias(bias)
    return dataclasses.replace(model, finalizer_bias=added, center_bias=added)


def read_center_bias(location: str) -> CenterBias:
    """Of an NPY file (H, W) of any size; raises UserError for what is no density and no natural log-density."""
    import numpy as np
    from PIL import Image

    from acw.evaluation.map_files import read_npy
    from acw.heads.center_bias import GRID, CenterBias
    from acw.model.arguments import as_center_bias

    values = read_npy(fetch(local_path(location, "--center-bias")))
    if values.min() >= 0:
        with np.errstate(divide="ignore"):
            values = np.log(values)
    try:
        log_density = as_center_bias(values, (values.shape[0], values.shape[1]))
    except ValueError as error:
        raise UserError(f"--center-bias {location}: {error}") from error
    centred = Image.fromarray((log_density - log_density.max()).astype(np.float32))
    resized = np.asarray(centred.resize((GRID, GRID), Image.Resampling.BILINEAR), np.float64)
    return CenterBias((resized - np.log(np.exp(resized).sum())).astype(np.float32), None, None)


class _Readable:
    """The pixels of the images that can be read, one after the other; the others are named on stderr and counted.

    waiting: the images whose pixels were handed out, to be taken off as they are predicted.
    """

    def __init__(self, images: Sequence[Source]) -> None:
        self.images, self.failed = images, 0
        self.waiting: deque[Source] = deque()

    def __iter__(self) -> Iterator[np.ndarray]:
        from acw.pipeline.sources import read

        for source, pixels in read(self.images):
            if isinstance(pixels, UserError):
                print(f"error: {shown(str(pixels))}", file=sys.stderr, flush=True)
                self.failed += 1
            else:
                self.waiting.append(source)
                yield pixels


def predict(model: Model, images: Sequence[Source], out: Path, formats: Sequence[str], category: str | None) -> int:
    """Writes each image's prediction below a folder; how many images could not be read.

    Raises UserError for a category that the model does not know, or where nothing can be written.
    """
    from acw.cluster.process import give_back

    readable, done = _Readable(images), 0
    pixels, alike = itertools.tee(readable)
    start = last = time.monotonic()
    # Drawing and compressing a picture takes a tenth of what its prediction does; meanwhile the next one is predicted.
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for done, prediction in enumerate(model.predict_batch(pixels, (category for _ in alike)), 1):
            if writing:
                writing.result()
            writing = writer.submit(_write, prediction, out, readable.waiting.popleft().name, formats)
            if (now := time.monotonic()) > last + SECONDS_BETWEEN_LINES:
                _tell(done, len(images), now - start)
                give_back()
                last = now
        if writing:
            writing.result()
    _tell(done, len(images), time.monotonic() - start)
    return readable.failed


def _write(prediction: Prediction, out: Path, name: str, formats: Sequence[str]) -> None:
    from acw.model.prediction import FORMATS

    for form in formats:
        path = out / f"{name}{FORMATS[form].suffix}"
        write_atomic(path, prediction.encoded(form))
        print(shown(path), flush=True)


def _tell(done: int, count: int, seconds: float) -> None:
    print(f"predict: {done} of {count} images, {done / seconds:.2f} images/s", file=sys.stderr, flush=True)
