"""What a worker makes of a shard of a list of images: one Parquet file with a row an image, whole or absent.

A row: image, height, width; `log_density`, the density on a grid as natural logs over its greatest value, float16, row
by row, with `grid_height` and `grid_width`, or `file` with the whole map; likeliest places; p(category | image); and,
where an image could not be predicted, `error` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from acw.cluster.costs import peak_rss
from acw.cluster.process import compute_with, give_back
from acw.pipeline.image_list import Shard, images_of
from acw.pipeline.sources import Source, read
from acw.storage.addresses import shown
from acw.storage.errors import UserError
from acw.storage.files import csv_text, plain_name, remove, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

    from acw.model.model import Model
    from acw.model.prediction import Prediction

PARQUET = "parquet"
FAILURES = ".failures.csv"
HEADER = ("image", "error")


@dataclass(frozen=True)
class Work:
    """What is to be done with each shard. model: its folder. form: of `prediction.FORMATS`, or PARQUET alone.

    long_side: cells of the longer side of the grid of densities; 0: the model's own grid. cpus, gpu: of a worker.
    """

    images: Path
    out: Path
    model: Path
    form: str
    long_side: int
    category: str | None
    cpus: int
    gpu: bool


def table_path(out: Path, shard: int) -> Path:
    return out / f"shard-{shard:05d}.parquet"


def failures_path(out: Path, shard: int) -> Path:
    """Of a shard's images that could not be predicted; there only if there are any."""
    return out / f"shard-{shard:05d}{FAILURES}"


class ShardPredictor:
    """A worker of Ray Data's pool: loads the model once, then writes shard after shard."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns number, offset and images of shards in; images, peak_rss and problem of each out.

        problem: what ends the job, an error of the user's; a column, as Ray would wrap an exception.
        """
        rows = zip(*(batch[name].tolist() for name in ("number", "offset", "images")), strict=True)
        done = [self._done(Shard(*row)) for row in rows]
        return {name: np.array([row[name] for row in done]) for name in done[0]}

    def _done(self, shard: Shard) -> dict[str, Any]:
        problem = ""
        try:
            self._write(shard)
        except UserError as error:
            problem = shown(str(error))
        give_back()
        return {"images": shard.images, "peak_rss": peak_rss(), "problem": problem}

    @functools.cached_property
    def _model(self) -> Model:
        import torch

        from acw.model import files

        compute_with(self._work.cpus)
        # A GPU that Ray only pretends to have, as in tests, is no CUDA device.
        model = files.load(self._work.model, "cuda" if self._work.gpu and torch.cuda.is_available() else "cpu")
        model.load_backbones()
        return model

    def _write(self, shard: Shard) -> None:
        """Writes a shard's files, the table last."""
        import pyarrow.parquet as pq

        work, locations = self._work, images_of(self._work.images, shard)
        rows: list[dict[str, Any]] = [{"image": location} for location in locations]
        for number, result in self._predicted(locations):
            if isinstance(result, str):
                rows[number]["error"] = result
            else:
                rows[number] |= self._row(result, shard, number, locations[number])
        failed = [(row["image"], row["error"]) for row in rows if "error" in row]
        if failed:
            write_atomic(failures_path(work.out, shard.number), csv_text(HEADER, failed))
        import pyarrow as pa

        table = pa.Table.from_pylist(rows, schema=schema(self._model.categories, work.form))
        write_atomic(table_path(work.out, shard.number), lambda path: pq.write_table(table, path, compression="zstd"))
        # Not before: killed in between, a table of an earlier try would be there with failures that nothing tells of.
        if not failed:
            remove(failures_path(work.out, shard.number))

    def _predicted(self, locations: Sequence[str]) -> Iterator[tuple[int, Prediction | str]]:
        """Of each image its number and its prediction, or why there is none. Images that fail together are tried one by
        one, so that none but the culprit is lost."""
        left = dict(enumerate(locations))
        try:
            for number, result in self._of(list(left.items())):
                yield number, result
                del left[number]
        except UserError:
            raise
        except Exception as error:
            print(f"one by one, as together they fail ({type(error).__name__}: {error})", file=sys.stderr)
            for number, location in left.items():
                yield next(self._alone(number, location))

    def _alone(self, number: int, location: str) -> Iterator[tuple[int, Prediction | str]]:
        try:
            yield from self._of([(number, location)])
        except (UserError, MemoryError):
            raise
        except Exception as error:
            if "out of memory" in str(error):  # of the GPU: nothing is wrong with the image
                raise
            yield number, " ".join(f"{type(error).__name__}: {error}".split())[:300]

    def _of(self, images: Sequence[tuple[int, str]]) -> Iterator[tuple[int, Prediction | str]]:
        waiting: deque[int] = deque()
        failed: deque[tuple[int, str]] = deque()

        def pixels() -> Iterator[np.ndarray]:
            found = read(Source(location, str(number)) for number, location in images)
            for (number, _), (_, image) in zip(images, found, strict=True):
                if isinstance(image, UserError):
                    failed.append((number, " ".join(shown(str(image)).split())))
                else:
                    waiting.append(number)
                    yield image

        given, alike = itertools.tee(pixels())
        for prediction in self._model.predict_batch(given, (self._work.category for _ in alike)):
            yield waiting.popleft(), prediction
        yield from failed

    def _row(self, prediction: Prediction, shard: Shard, number: int, location: str) -> dict[str, Any]:
        work, (height, width) = self._work, prediction.log_density.shape
        row: dict[str, Any] = {"height": height, "width": width, "categories": prediction.categories}
        row["category"] = work.category or max(prediction.categories, key=prediction.categories.__getitem__)
        row["places"] = [dataclasses.asdict(place) for place in prediction.places()]
        if work.form == PARQUET:
            grid = self._grid((height, width))
            row["grid_height"], row["grid_width"] = grid
            row["log_density"] = reduced(prediction.log_density, grid).ravel()
        else:
            from acw.model.prediction import FORMATS

            stem = plain_name(PurePosixPath(location).stem)[:60]
            row["file"] = f"shard-{shard.number:05d}/{number:04d}-{stem}{FORMATS[work.form].suffix}"
            write_atomic(work.out / row["file"], prediction.encoded(work.form))
        return row

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        if not self._work.long_side:
            return self._model.finalizer.grid(size)
        scale = min(1.0, self._work.long_side / max(size))
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def reduced(log_density: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """float16 (h, w): the natural log of the mean density in each cell of a grid, less its greatest value.

    So the error, at most 1 in 2048 of the value, is least where people look. `values - logsumexp(values)` is the log of
    each cell's mass.
    """
    import torch

    density = torch.from_numpy(np.exp(log_density.astype(np.float64)))[None, None]
    cells = torch.nn.functional.adaptive_avg_pool2d(density, grid)[0, 0].clamp_min(np.finfo(float).tiny).log()
    return (cells - cells.max()).half().numpy()


def schema(categories: Sequence[str], form: str) -> pa.Schema:
    """Columns of a shard's table; all but the image are empty where there is an error."""
    import pyarrow as pa

    place = [("x", pa.int32()), ("y", pa.int32()), ("share", pa.float32()), ("radius", pa.float32())]
    density = [("grid_height", pa.int32()), ("grid_width", pa.int32()), ("log_density", pa.list_(pa.float16()))]
    return pa.schema(
        [
            ("image", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            *(density if form == PARQUET else [("file", pa.string())]),
            ("places", pa.list_(pa.struct(place))),
            ("category", pa.string()),
            ("categories", pa.struct([(name, pa.float32()) for name in categories])),
            ("error", pa.string()),
        ]
    )
