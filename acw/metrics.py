"""The field's eight scores of one density on one image, equal to pysaliency 0.2.22's and fast enough for full-HD maps.

`Target` holds what depends on the image and its fixations alone, so that many models are scored against one; `score`
takes a log-density and gives the eight numbers. All maps are float32: pysaliency computes in float64, the scores agree
to 1e-4 (IG and LL to 1e-6), and the blur, which is most of the time, takes half as long. On CUDA the blur needs full
float32 matrix products, which is PyTorch's default (no TF32).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from acw.storage import UserError

METRICS = ("IG", "LL", "AUC", "sAUC", "NSS", "CC", "KLDiv", "SIM")

# The regulariser of the Tuebingen/MIT saliency benchmark, as in pysaliency.metrics.MIT_KLDiv.
_KLDIV_REGULARISER = 2.2204e-16
_BAND = 64


def gaussian_blur(maps: Tensor, sigma: float, mode: Literal["constant", "reflect"]) -> Tensor:
    """Blurs maps as `scipy.ndimage.gaussian_filter(map, sigma, mode=mode)` does (cval 0, truncate 4).

    `maps` is (..., H, W), float32 or float64, on any device; sigma is in pixels, positive. Returns the same shape and
    dtype. The blur is linear: a mixture's blurred map is the mixture of its components' blurred maps.
    """
    assert sigma > 0, sigma
    height, width = maps.shape[-2:]
    # A Gaussian is separable, and its matrix is banded; products of 64-row blocks of the band were 3 times as fast as
    # the dense products, and 14 times as fast as scipy, on 1080 x 1920 maps with sigma 40 on one core.
    vertical = _bands(height, sigma, mode, maps.dtype, maps.device)
    maps = torch.cat([block @ maps[..., first:last, :] for first, last, block in vertical], dim=-2)
    horizontal = _bands(width, sigma, mode, maps.dtype, maps.device)
    return torch.cat([maps[..., first:last] @ block.T for first, last, block in horizontal], dim=-1)


@lru_cache(maxsize=32)
def _bands(
    length: int, sigma: float, mode: str, dtype: torch.dtype, device: torch.device
) -> list[tuple[int, int, Tensor]]:
    """The blur along one axis as blocks (first input, last input + 1, matrix) for every 64 outputs."""
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    source = np.arange(length)[:, None] + offsets
    weight = np.broadcast_to(kernel, source.shape)
    if mode == "reflect":
        source = source % (2 * length)
        source = np.minimum(source, 2 * length - 1 - source)
    else:
        assert mode == "constant", mode
        weight = np.where((source >= 0) & (source < length), weight, 0)
        source = source.clip(0, length - 1)
    entry = (np.arange(length)[:, None] * length + source).ravel()
    matrix = np.bincount(entry, weight.ravel(), minlength=length**2).reshape(length, length)
    bands = []
    for start in range(0, length, _BAND):
        first, last = max(0, start - radius), min(length, start + _BAND + radius)
        block = np.ascontiguousarray(matrix[start : start + _BAND, first:last])
        bands.append((first, last, torch.from_numpy(block).to(device, dtype)))
    return bands


def auc(positives: Tensor, negatives: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive exceeds a negative, ties counted as one half.

    Both are flat tensors of one dtype without NaN, on one device. Exact; equals pysaliency's `general_roc`.
    """
    assert len(positives)
    assert len(negatives)
    return _auc_sorted(positives, _sort(negatives))


def _auc_sorted(positives: Tensor, negatives: Tensor) -> float:
    below = torch.searchsorted(negatives, positives)
    not_above = torch.searchsorted(negatives, positives, right=True)
    return int((below + not_above).sum()) / (2 * len(positives) * len(negatives))


def _sort(values: Tensor) -> Tensor:
    # On a CPU NumPy's vectorised sort (8 ms for a full-HD map) beats torch.sort (153 ms), and also torch.bucketize of
    # the pixels into the fixations' values (48 ms).
    return torch.sort(values).values if values.is_cuda else torch.from_numpy(np.sort(values.numpy()))


def shuffled_fixations(
    sizes: np.ndarray, image: np.ndarray, x: np.ndarray, y: np.ndarray, i: int
) -> tuple[np.ndarray, np.ndarray]:
    """The negatives of sAUC: all other images' fixations, rescaled to the size of image `i`.

    `sizes` is int (N, 2), height and width of each image in px; `image` int (F,), `x` and `y` float (F,) in px say
    where each fixation of the data set fell. Returns rows and columns, int64, truncated as pysaliency's
    `FullShuffledNonfixationProvider` does (`nonfixations="shuffled"`).
    """
    height, width = (int(length) for length in sizes[i])
    other = image != i
    heights, widths = sizes[image[other]].astype(np.float64).T
    rows = (y[other].astype(np.float64) * (height / heights)).astype(np.int64)
    cols = (x[other].astype(np.float64) * (width / widths)).astype(np.int64)
    # A fixation less than an ulp from the edge may be rounded onto it.
    return np.minimum(rows, height - 1), np.minimum(cols, width - 1)


@dataclass(frozen=True, eq=False)
class Target:
    """What an image's scores need that does not depend on the model.

    `rows`, `cols` (int64, (F,)) are the fixated pixels, `negative_rows`, `negative_cols` (int64) those of sAUC's
    negatives; `baseline` (float64, (F,)) is the baseline's log-density at the fixations, in nats; `empirical`
    (float32, (H, W)) the fixations blurred by `blur_sigma` px, with sum 1 (8 MB at full HD: keep few targets at
    once). `empirical_std`, its standard deviation, and `empirical_entropy`, in nats, are the parts of CC and KLDiv
    without the model.
    """

    rows: Tensor
    cols: Tensor
    negative_rows: Tensor
    negative_cols: Tensor
    baseline: Tensor
    empirical: Tensor
    blur_sigma: float
    empirical_std: float
    empirical_entropy: float

    @classmethod
    def of(
        cls,
        size: tuple[int, int],
        x: np.ndarray,
        y: np.ndarray,
        negatives: tuple[np.ndarray, np.ndarray],
        baseline_log_density: Tensor,
        blur_sigma: float,
        device: torch.device | str = "cpu",
    ) -> Target:
        """The target of an image of `size` (height, width) px with fixations at `x`, `y` (float (F,), px).

        A fixation falls on the pixel (int(y), int(x)); repeats count. `negatives` are rows and columns as from
        `shuffled_fixations`, `baseline_log_density` is float32 (H, W) as for `score`, `blur_sigma` is in px.
        The empirical map is `pysaliency.FixationMap(stimuli, fixations, kernel_size=blur_sigma)`, whose blur reflects
        at the borders, over its sum.
        Raises UserError for an image without fixations or without negatives, or with one outside of the image, and
        ValueError for a baseline that is no log-density.
        """
        rows, cols = _pixels(size, np.asarray(y), np.asarray(x), "fixation", device)
        negative_rows, negative_cols = _pixels(size, *negatives, "shuffled fixation", device)
        baseline_log_density = baseline_log_density.to(device)
        _relative_density(baseline_log_density, size, "the baseline's log-density")
        counts = torch.zeros(size, device=device).index_put_((rows, cols), torch.ones((), device=device), True)
        empirical = gaussian_blur(counts, blur_sigma, "reflect")
        empirical /= empirical.sum()
        return cls(
            rows=rows,
            cols=cols,
            negative_rows=negative_rows,
            negative_cols=negative_cols,
            baseline=baseline_log_density[rows, cols].double(),
            empirical=empirical,
            blur_sigma=blur_sigma,
            empirical_std=_centre(empirical)[1],
            empirical_entropy=-float(torch.special.xlogy(empirical, empirical).sum()),
        )


def _pixels(
    size: tuple[int, int], y: np.ndarray, x: np.ndarray, what: str, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    if not len(x):
        raise UserError(f"an image has no {what}s to be scored on; leave it out (sAUC also needs a second image)")
    height, width = size
    # Written so that NaN fails too; the truncation takes -0.5 to pixel 0, as pysaliency does.
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    if not inside.all():
        k = int(np.argmin(inside))
        raise UserError(f"{what} {k} at x={x[k]}, y={y[k]} is outside of its image of {width} x {height} px; drop it")
    return torch.as_tensor(y.astype(np.int64), device=device), torch.as_tensor(x.astype(np.int64), device=device)


def _relative_density(log_density: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """density / uniform - 1, float32 (H, W), after a check that the argument is a log-density of this size.

    For moments and as a check only: differences in a nearly flat map are below the resolution of float32 densities,
    and small densities are below the resolution of this.
    """
    if log_density.shape != size or log_density.dtype != torch.float32:
        found = f"{log_density.dtype} {tuple(log_density.shape)}"
        raise ValueError(f"{name} is {found}, not float32 {tuple(size)} as its image")
    relative = torch.expm1(log_density + math.log(log_density.numel()))
    mass = 1 + float(relative.mean())
    if math.isnan(mass):
        raise ValueError(f"{name} holds NaN")
    if not math.exp(-1e-2) < mass < math.exp(1e-2):
        raise ValueError(f"{name} is not normalised: the density sums to {mass:.6g}, not 1")
    return relative


def _centre(values: Tensor) -> tuple[Tensor, float]:
    """The values less their mean, and their population standard deviation."""
    centred = values - values.mean()
    return centred, float(centred.square().mean().sqrt())


def score(log_density: Tensor, target: Target, blurred: Tensor | None = None) -> dict[str, float]:
    """The eight scores of a model on an image, in the order of METRICS.

    `log_density` is float32 (H, W) on the target's device: natural log, its exp sums to 1. `blurred` (float32 (H, W))
    is `gaussian_blur(log_density.exp(), target.blur_sigma, "constant")`, computed here unless it is given; it need
    not sum to 1.

    With pysaliency's model `m` of the same map, `density = DensitySaliencyMapModel(m)`,
    `smooth = BluringSaliencyMapModel(density, blur_sigma, mode="constant")` and
    `empirical = FixationMap(stimuli, fixations, kernel_size=blur_sigma)`, the same numbers are, for one image:

    - IG, bits a fixation: `m.information_gain(stimuli, fixations, baseline)`
    - LL, bits a fixation: `m.information_gain(stimuli, fixations, UniformModel())`
    - AUC: `density.AUC(stimuli, fixations, nonfixations="uniform")`, all pixels are negatives
    - sAUC: `density.AUC(stimuli, fixations, nonfixations="shuffled", average="image")`
    - NSS: `density.NSS(stimuli, fixations)`; 0 for a flat map
    - CC: `smooth.CC(stimuli, empirical)`
    - KLDiv, nats: `smooth.KLDiv(stimuli, empirical, minimum_value=0, log_regularization=2.2204e-16,
      quotient_regularization=2.2204e-16)`, which is KL(empirical || model)
    - SIM: `smooth.SIM(stimuli, empirical)`

    Raises ValueError for another shape or dtype, NaN, a density that does not sum to 1 (within 1e-2 nat), and a
    `blurred` that cannot be a blurred density. A zero density (-inf) at a fixation is legal and gives IG = LL = -inf.
    """
    size = (target.empirical.shape[0], target.empirical.shape[1])
    relative = _relative_density(log_density, size, "the log-density")
    if blurred is None:
        blurred = gaussian_blur(log_density.exp(), target.blur_sigma, "constant")
    # Zero padding loses mass and never adds any; a blurred log-density has a negative sum.
    elif blurred.shape != size or not 0 < float(blurred.sum()) < math.exp(1e-2):
        raise ValueError(f"blurred, {tuple(blurred.shape)} with sum {float(blurred.sum()):.6g}, is no blurred density")

    at_fixations = log_density[target.rows, target.cols]
    log_likelihood = at_fixations.double()
    pixels = _sort(log_density.flatten())
    negatives = log_density[target.negative_rows, target.negative_cols]
    scores = {
        "IG": float((log_likelihood - target.baseline).mean()) / math.log(2),
        "LL": (float(log_likelihood.mean()) + math.log(log_density.numel())) / math.log(2),
        "AUC": _auc_sorted(at_fixations, pixels),
        "sAUC": auc(at_fixations, negatives),
        "NSS": 0.0,
    }
    # A flat map's standard deviation is rounding noise, not always 0.
    if pixels[0] < pixels[-1]:
        centred, std = _centre(relative)
        scores["NSS"] = float(centred[target.rows, target.cols].mean()) / std
    return scores | _map_scores(blurred, target)


def _map_scores(blurred: Tensor, target: Target) -> dict[str, float]:
    """CC, KLDiv and SIM of a blurred density against the blurred fixations."""
    density = blurred / blurred.sum()
    centred, std = _centre(density)
    # pysaliency's second regulariser, inside the logarithm of empirical / model, changes nothing: the empirical map
    # times log(regulariser + q) differs from the map times log(q) by less than 1e-15. So the model's part stands alone.
    cross_entropy = -float((torch.log(density + _KLDIV_REGULARISER) * target.empirical).sum())
    return {
        "CC": float((centred * target.empirical).sum()) / (density.numel() * std * target.empirical_std)
        if std
        else 0.0,
        "KLDiv": cross_entropy - target.empirical_entropy,
        "SIM": float(torch.minimum(density, target.empirical).sum()),
    }
