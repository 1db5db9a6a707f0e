"""Other models' predictions on a data set's stimuli, to be scored beside ours.

They come from a folder of maps (`open_maps`), from an HDF5 file as pysaliency writes it (`open_predictions`), or from
one of pysaliency's models (`open_object`, `of_pysaliency`). Two kinds:

density: natural log-densities, or densities; which of them, their values say. The image's size, as resizing would
    change what is scored. They are renormalised exactly. PNG and JPEG cannot hold a density exactly: there, grey
    values over their sum are taken for it, and a grey of 0 is a density of 0, which costs an infinite score where
    anybody looks.
saliency: any finite values, of any size. They are resized as pysaliency's `ResizingSaliencyMapModel` does it: linearly,
    the centres of the corner pixels on those of the image, without smoothing first. Turned on their side, coloured or
    partly transparent ones are refused: each would be scored without a word, as another map than was meant.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, get_args

import h5py
import numpy as np
from scipy.ndimage import zoom
from scipy.special import logsumexp

from acw.data import Dataset, Stimulus, pysaliency_compat
from acw.data.dataset import SYNTHETIC
from acw.evaluation.map_files import check_array, read_grey, read_npy
from acw.storage.addresses import expanded
from acw.storage.errors import UserError
from acw.storage.files import resolve_inside
from acw.storage.hdf5 import keys_of, open_hdf5

Kind = Literal["density", "saliency"]
SUFFIXES = (".npy", ".png", ".jpg", ".jpeg")
# Of logsumexp from 0, and of a sum from 1: as pysaliency's HDF5Model tolerates it.
TOLERANCE = 1e-2
# Of an aspect ratio, that whoever scales a map may round it by, beside whole pixels.
ASPECT = 0.02


class _Source(Protocol):
    def read(self, index: int) -> tuple[str, np.ndarray]:
        """What to call the map of stimulus `index` in an error, and its values, float64 (H, W) as they are stored."""


@dataclass(frozen=True)
class ExternalModel:
    """A model's predictions on `stimuli`, read when asked for. It holds paths, not data, and can be pickled.

    Raises ValueError for another kind than `density` and `saliency`.
    """

    name: str
    kind: Kind
    stimuli: tuple[Stimulus, ...]
    source: _Source
    location: str = ""  # where they were read from

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind '{self.kind}': predictions are of the kind {' or '.join(get_args(Kind))}")

    def of(self, index: int) -> np.ndarray:
        """float64 (H, W) of the size of stimulus `index`: a natural log-density with logsumexp 0, or a saliency map.

        Raises UserError for a map that is damaged, coloured, transposed, of another size (density), negative, not
        finite or not normalised.
        """
        where, values = self.source.read(index)
        prepare = _log_density if self.kind == "density" else _saliency
        return prepare(values, self.stimuli[index].size, where)

    def check(self, dataset: Dataset) -> None:
        """Reads every map, so that what is wrong with one is known before hours of scoring.

        Raises UserError as `of` does, for a density of 0 where somebody looked, whose score is infinite, and where most
        saliency maps are the same all over. A live model is not asked: its predictions take as long as the scoring.
        """
        if isinstance(self.source, _Live):
            return
        flat = []
        for index, stimulus in enumerate(self.stimuli):
            values = self.of(index)
            if self.kind == "saliency":
                flat += [stimulus.name] * bool(np.ptp(values) <= 1e-9 * np.abs(values).max())  # but for rounding
                continue
            x, y, _ = dataset.fixations_of(index)
            if not np.isfinite(values[y.astype(int), x.astype(int)]).all():
                raise UserError(
                    f"{self.name}: its density for {stimulus.name} is 0 where somebody looked, which costs "
                    "an infinite score; give densities that are positive everywhere, or --kind saliency"
                )
        if 2 * len(flat) > len(self.stimuli):
            raise UserError(
                f"{self.name}: {len(flat)} of its {len(self.stimuli)} maps have one value all over (as that of "
                f"{flat[0]}), which says nothing of where people look; write them anew"
            )


def open_maps(spec: str, kind: Kind, dataset: Dataset) -> ExternalModel:
    """A model's maps in a folder, `FOLDER` or `NAME=FOLDER`: per stimulus one NPY, PNG or JPEG file of its name.

    For the stimulus `Street/001.jpg` that is `Street/001.npy`, `.png`, `.jpg` or `.jpeg`. 16-bit grey is kept; what is
    stored in colour has to be grey. Raises UserError unless every stimulus has exactly one, of its own.
    """
    name, folder = _named(spec)
    if not folder.is_dir():
        raise UserError(f"maps {spec}: {folder} is no folder; give FOLDER or NAME=FOLDER")
    maps = [(stimulus, _maps_of(stimulus, folder)) for stimulus in dataset.stimuli]
    missing = [stimulus for stimulus, paths in maps if not paths]
    if missing:
        stem = _stem(missing[0])
        raise UserError(
            f"{folder / stem}: no map for the stimulus {missing[0].name} ({len(missing)} of {len(maps)} have none); "
            f"add {stem}.npy, .png, .jpg or .jpeg"
        )
    owner: dict[Path, Stimulus] = {}
    for stimulus, paths in maps:
        if len(paths) > 1:
            raise UserError(f"{paths[0]}: there is {paths[1].name} too; keep the one that is to be scored")
        if other := owner.get(paths[0]):
            raise UserError(f"{paths[0]}: would be the map of {other.name} and {stimulus.name}; rename one stimulus")
        resolve_inside(paths[0], folder)
        owner[paths[0]] = stimulus
    return ExternalModel(name or folder.name, kind, dataset.stimuli, _Maps(tuple(owner), kind), str(folder))


def open_predictions(spec: str, dataset: Dataset, kind: Kind | None = None) -> ExternalModel:
    """A model's predictions in an HDF5 file, `FILE` or `NAME=FILE`, as pysaliency's `export_model_to_hdf5` writes it.

    Keys are the stimuli's paths without some of the leading folders that all share. The kind is the file's attribute
    `kind` where it has one; else the first stimulus decides: what is normalised as a density is one. Raises UserError
    for a file that is damaged or lacks a stimulus, and for what look like log-densities and are not normalised; more
    keys than stimuli are no error.
    """
    name, path = _named(spec)
    with open_hdf5(path) as file:
        source = _Predictions(path, _matching(dataset.stimuli, keys_of(file), path))
        stated: Any = file.attrs.get("kind")
    stated = stated.decode(errors="replace") if isinstance(stated, bytes) else stated
    if stated is not None and stated not in get_args(Kind):
        raise UserError(f"{path}: its attribute kind is {stated}; correct it to {' or '.join(get_args(Kind))}")
    if kind is None and stated is None:
        where, values = source.read(0)
        stated = "density" if _is_normalised(values) else "saliency"
        if stated == "saliency" and values.max() <= 0:
            raise UserError(
                f"{where}: has no value above 0 as log-densities, but no natural logs that sum to 1 "
                f"(logsumexp {logsumexp(values):.3g}); write them so, or say --kind saliency if they are none"
            )
    return ExternalModel(name or path.stem, kind or stated, dataset.stimuli, source, str(path))


def open_object(spec: str, dataset: Dataset) -> ExternalModel:
    """`MODULE:OBJECT` or `NAME=MODULE:OBJECT`: one of pysaliency's models in a module of the user's (`of_pysaliency`).

    The module must be found by this process and by Ray's workers, on PYTHONPATH. Raises UserError where there is no
    such module, object or model.
    """
    name, _, path = spec.rpartition("=")
    module, _, attribute = path.partition(":")
    try:
        model = getattr(importlib.import_module(module), attribute)
        return dataclasses.replace(of_pysaliency(model, dataset, name or attribute), location=path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--object {spec}: {error}; give MODULE:OBJECT, a pysaliency model on PYTHONPATH") from None


def of_pysaliency(model: Any, dataset: Dataset, name: str) -> ExternalModel:
    """What a pysaliency `Model` (density) or `SaliencyMapModel` (saliency) makes of the stimuli's pixels.

    The pixels are uint8 (H, W, 3), also of grey images. The model keeps no cache of these predictions. It is pickled
    with the object: one that holds an open file, such as `HDF5Model`, cannot be; use `open_predictions`. Raises
    ValueError for anything that is no such model.
    """
    pysaliency = pysaliency_compat.load()
    if not isinstance(model, pysaliency.Model | pysaliency.SaliencyMapModel):
        raise ValueError(f"{name}: is a {type(model).__name__}, but has to be a pysaliency Model or SaliencyMapModel")
    kind: Kind = "density" if isinstance(model, pysaliency.Model) else "saliency"
    uncached = copy.copy(model)
    uncached.caching = False
    return ExternalModel(name, kind, dataset.stimuli, _Live(uncached, name, kind, dataset.stimuli))


# --- Where maps come from ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maps:
    """One file a stimulus."""

    paths: tuple[Path, ...]
    kind: Kind

    def read(self, index: int) -> tuple[str, np.ndarray]:
        path = self.paths[index]
        if path.suffix == ".npy":
            return str(path), read_npy(path)
        grey = read_grey(path)
        if self.kind == "saliency":
            return str(path), grey
        if not grey.any():
            raise UserError(f"{path}: is black all over, which is no density; write it anew")
        return str(path), grey / grey.sum()


@dataclass(frozen=True)
class _Predictions:
    """Keys of one HDF5 file, which is opened anew for each map, so that any process can read."""

    path: Path
    keys: tuple[str, ...]

    def read(self, index: int) -> tuple[str, np.ndarray]:
        where = f"{self.path}, {self.keys[index]}"
        with open_hdf5(self.path) as file:
            if not isinstance(stored := file.get(self.keys[index]), h5py.Dataset):
                raise UserError(f"{where}: is gone since the file was opened; restore it")
            check_array(stored, where)
            return where, stored[()].astype(np.float64)


@dataclass(frozen=True)
class _Live:
    """One of pysaliency's models."""

    model: Any
    name: str
    kind: Kind
    stimuli: tuple[Stimulus, ...]

    def read(self, index: int) -> tuple[str, np.ndarray]:
        where = f"{self.name} on {self.stimuli[index].name}"
        predict = self.model.log_density if self.kind == "density" else self.model.saliency_map
        values = np.asarray(predict(self.stimuli[index].pixels()))
        check_array(values, where)
        return where, values.astype(np.float64)


def _named(spec: str) -> tuple[str, Path]:
    """The name in `NAME=PATH`, empty if there is none, and the absolute path."""
    name, separator, path = spec.partition("=")
    if not separator or os.sep in name:
        name, path = "", spec
    elif not name:
        raise UserError(f"'{spec}': the name before = is empty; write NAME=PATH or PATH alone")
    return name, expanded(path).resolve()


def _stem(stimulus: Stimulus) -> str:
    return str(PurePosixPath(stimulus.name).with_suffix(""))


def _maps_of(stimulus: Stimulus, folder: Path) -> list[Path]:
    candidates = [folder / f"{_stem(stimulus)}{suffix}" for suffix in SUFFIXES]
    return [path for path in candidates if path.is_file()]


def _matching(stimuli: Sequence[Stimulus], keys: Sequence[str], path: Path) -> tuple[str, ...]:
    """The stimuli's keys: their paths from some folder on, the longest that is there, as pysaliency's
    `get_keys_from_filenames` finds them; but no folder is left out that tells stimuli apart."""
    files = [PurePosixPath(s.name if s.path.startswith(f"{SYNTHETIC}:") else s.path) for s in stimuli]
    shared = len(PurePosixPath(os.path.commonpath([file.parent for file in files])).parts)
    there = set(keys)
    for start in range(shared + 1):
        chosen = ["/".join(file.parts[start:]) for file in files]
        if not there.isdisjoint(chosen):
            break
    for stimulus, key in zip(stimuli, chosen, strict=True):
        if key not in there:
            raise UserError(f"{path}: has no prediction for the stimulus {stimulus.name} (key {key}); add it")
    return tuple(chosen)


# --- What maps have to be ----------------------------------------------------------------------------------------


def _is_normalised(values: np.ndarray) -> bool:
    """Whether as a log-density or as a density."""
    return abs(logsumexp(values)) <= TOLERANCE or (values.min() >= 0 and abs(values.sum() - 1) <= TOLERANCE)


def _check_upright(values: np.ndarray, size: tuple[int, int], where: str) -> None:
    """Raises UserError for what has the aspect ratio of the image on its side, and not of the image.

    Of square images it cannot be known.
    """
    (height, width), aspect = values.shape, math.log(size[1] / size[0])
    mine, tolerance = math.log(width / height), ASPECT + 1 / min(values.shape)
    if abs(mine + aspect) <= tolerance < abs(mine - aspect):
        raise UserError(
            f"{where}: is {width}x{height} px, its image {size[1]}x{size[0]}, so it seems to be transposed, rows for "
            "columns; turn it or, if it is upright, scale it to the image's size"
        )


def _log_density(values: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    _check_upright(values, size, where)
    if values.shape != size:
        height, width = values.shape
        raise UserError(
            f"{where}: is {width}x{height} px, its image {size[1]}x{size[0]}; predict the density at the image's size"
        )
    if np.isnan(values).any() or np.isposinf(values).any():
        raise UserError(f"{where}: has values that are NaN or infinite; write it anew")
    total, mass = float(logsumexp(values)), float(values.sum())
    # Not both: log-densities that sum to 1 would be positive, and densities have a logsumexp above 0.9.
    if abs(total) <= TOLERANCE:
        return values - total
    if abs(mass - 1) > TOLERANCE:
        raise UserError(
            f"{where}: is neither a natural log-density (logsumexp {total:.4g}, not 0) nor a density (sum {mass:.4g}, "
            "not 1); normalise it, or give it as a saliency map"
        )
    if values.min() < 0:
        raise UserError(f"{where}: is a density with negative values, down to {values.min():.4g}; correct it")
    with np.errstate(divide="ignore"):
        return np.log(values / mass)


def _saliency(values: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UserError(f"{where}: has values that are NaN or infinite; write it anew")
    _check_upright(values, size, where)
    if values.shape == size:
        return values
    factors = [target / own for target, own in zip(size, values.shape, strict=True)]
    resized = zoom(values, factors, order=1, mode="nearest")
    assert resized.shape == size, "zoom rounds the size"
    return resized
