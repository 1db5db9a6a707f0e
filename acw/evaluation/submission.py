"""Submissions to the MIT/Tuebingen benchmark: one HDF5 file with a log-density for every image of a test set.

Keys, shapes and values are those that pysaliency's `export_model_to_hdf5` writes and its `HDF5Model` reads: natural
logs, float32, (H, W) of the image, logsumexp 0.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy.special import logsumexp

from acw.data.images import decode_image, inspect_image
from acw.data.recording import is_stimulus
from acw.model.model import Model
from acw.storage.errors import UserError
from acw.storage.files import resolve_inside, write_atomic
from acw.storage.hdf5 import keys_of, open_hdf5

# Of logsumexp from 0, in nat.
TOLERANCE = 1e-3
# A full-HD density: 4.0 MiB in 0.10 s, against 5.9 MiB in 0.32 s by pysaliency's level 9 without shuffled bytes.
COMPRESSION = {"compression": "gzip", "compression_opts": 4, "shuffle": True}
BYTES_A_PIXEL = 2.0
# HDF5 crashes where a disk is full, so room is looked for before each image, and for what HDF5 holds back.
SPARE_BYTES = 2**24
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Report:
    """What was found right in a file. size: its bytes; deviation: the largest |logsumexp|, in nat."""

    images: int
    shapes: int
    size: int
    deviation: float

    def __str__(self) -> str:
        shapes = "one size" if self.shapes == 1 else f"{self.shapes} sizes"
        return (
            f"valid: {self.images} log-densities of {shapes}, {self.size / 2**20:.1f} MiB, "
            f"|logsumexp| at most {self.deviation:.1e}"
        )


def stimuli_of(folder: Path) -> dict[str, Path]:
    """Key -> file of all images below a folder, in order: of CAT2000's `testSet/Stimuli/<Category>/NNN.jpg`, the folder
    itself or one of the two above it, or of any other tree.

    CAT2000's `Output` folders and `*_SaliencyMap.jpg` are left out. Keys are as pysaliency makes them: paths from the
    last folder on that all images share. Raises UserError where there is no image.
    """
    if not folder.is_dir():
        raise UserError(f"stimuli {folder}: there is no such folder; correct the path")
    top = next((inner for inner in (folder / "testSet" / "Stimuli", folder / "Stimuli") if inner.is_dir()), folder)
    files = sorted(path for path in top.rglob("*") if is_stimulus(path))
    if not files:
        raise UserError(f"stimuli {top}: there are no images in this folder; give CAT2000's testSet or one of images")
    for file in files:
        resolve_inside(file, folder)
    shared = os.path.commonpath([file.parent for file in files])
    return {file.relative_to(shared).as_posix(): file for file in files}


def export(model: Model, folder: Path, out: Path) -> Report:
    """Writes the model's log-densities of all images of a folder (`stimuli_of`) to `out`, and checks what it wrote.

    An image is weighted by the category that its folder is named after, if the model knows that; else by the inferred
    ones. A few images are in memory at a time. Until all are written and checked there is nothing under the name `out`.
    Raises UserError for an image that cannot be read and for a disk too small, before any is predicted, and for a
    folder that cannot be written.
    """
    if "imported" in model.provenance:
        raise UserError(
            "this model has no centre bias yet, so these were no densities of where people look; have it take one from "
            "a data set: acw run cat2000_iie --heads MODEL --dataset D"
        )
    files = stimuli_of(folder)
    sizes = _sizes(files)
    categories = [path.parent.name if path.parent.name in model.categories else None for path in files.values()]
    inferred = categories.count(None)
    print(f"submission: {len(files)} images, {inferred} of them of a category that has to be inferred", flush=True)
    reports = []

    def write(temporary: Path) -> None:
        _check_room(out, BYTES_A_PIXEL * sum(map(math.prod, sizes.values())))
        predictions = model.predict_batch(map(decode_image, files.values()), categories)
        start = shown = time.monotonic()
        with h5py.File(temporary, "w") as file:
            file.attrs["kind"] = "density"  # for external_models.open_predictions
            for done, (key, prediction) in enumerate(zip(files, predictions, strict=True), 1):
                _check_room(out, prediction.log_density.nbytes)
                file.create_dataset(key, data=prediction.log_density, **COMPRESSION)
                if (now := time.monotonic()) > shown + SECONDS_BETWEEN_LINES:
                    print(f"submission: {done}/{len(files)} images, {done / (now - start):.2f} images/s", flush=True)
                    shown = now
        reports.append(_check(temporary, str(out), sizes))

    write_atomic(out, write)
    return reports[0]


def check(path: Path, folder: Path) -> Report:
    """Reads a submission for the images of a folder (`stimuli_of`) back.

    Raises UserError that names the first stimulus that is missing, is none of the folder's, has another shape or type,
    NaN or an infinite density, or is not normalised to 1e-3.
    """
    return _check(path, str(path), _sizes(stimuli_of(folder)))


def _sizes(files: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    return {key: inspect_image(path).size for key, path in files.items()}


def _check_room(out: Path, size: float) -> None:
    """Raises UserError where fewer bytes than these are free."""
    free = shutil.disk_usage(out.parent).free - SPARE_BYTES
    if free < size:
        raise UserError(
            f"{out}: needs another {size / 2**20:.0f} MiB or so, but {max(free, 0) / 2**20:.0f} are free there; "
            "free the disk or choose another"
        )


def _check(path: Path, name: str, sizes: Mapping[str, tuple[int, int]]) -> Report:
    """name: of the file, in errors."""
    with open_hdf5(path) as file:
        there = set(keys_of(file))
        for missing in (key for key in sizes if key not in there):
            raise UserError(f"{name}: has no prediction for {missing}; export it anew from this folder of stimuli")
        for extra in sorted(there - set(sizes)):
            raise UserError(f"{name}: {extra} is none of the stimuli; remove it, or give the folder that it belongs to")
        deviation = max(_deviation(file[key], size, f"{name}: {key}") for key, size in sizes.items())
    return Report(len(sizes), len(set(sizes.values())), path.stat().st_size, deviation)


def _deviation(stored: h5py.Dataset, size: tuple[int, int], where: str) -> float:
    """|logsumexp| of a log-density that is right in all else, in nat."""
    if stored.shape != size:
        raise UserError(f"{where} has shape {stored.shape}, but its image {size}; predict it at the image's size")
    if stored.dtype not in (np.float32, np.float64):
        raise UserError(f"{where} is of type {stored.dtype}; store float32")
    values = stored[()].astype(np.float64)
    if np.isnan(values).any() or np.isposinf(values).any():
        raise UserError(f"{where} has values that are NaN or infinite; predict it anew")
    deviation = abs(float(logsumexp(values)))
    if not deviation < TOLERANCE:
        raise UserError(f"{where} is no natural log-density: its logsumexp is {deviation:.4g} from 0; normalise it")
    return deviation
