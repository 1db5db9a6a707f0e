"""The field's eight scores of many mixtures of one image's densities, equal to pysaliency 0.2.22's, at full HD.

Most of a score is linear or quadratic in the mixture's weights: likelihoods and means, variances, covariances and blurs
of the components give those of any mixture. `Components` holds them, `Target` holds what depends on the image and its
fixations alone, and `score_mixtures` makes one pass over the pixels, in blocks that stay in the cache, for what is
left: ranks (AUC), logarithms (KLDiv) and minima (SIM); sAUC, which needs other images, is in sauc.py. Ranks
come from float64 densities, the other maps are float32: pysaliency computes in float64, the scores agree to 1e-4 (IG
and LL to 1e-6). On CUDA the blur needs full float32 matrix products, which is PyTorch's default (no TF32).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from acw.evaluation.blur import blurred_fixations, gaussian_blur
from acw.evaluation.ranks import Ranking
from acw.storage.errors import UserError


@dataclass(frozen=True)
class Metric:
    """A row of METRICS.

    better: 1 where more is better, -1 where less is. function: of one density, float64 (H, W) with sum 1, and the
    image's Target; its mean over images is what is reported. The field's eight have none: `score_mixtures` makes them
    of many mixtures at once, `sauc` the one that needs other images, and `exact` all of them by pysaliency.
    """

    name: str
    unit: str
    better: int
    function: Callable[[Tensor, Target], float] | None = None


# By name, in the order of tables. A new metric is a row here, with its function.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("IG", "bit/fixation", 1),
        Metric("LL", "bit/fixation", 1),
        Metric("AUC", "", 1),
        Metric("sAUC", "", 1),
        Metric("NSS", "", 1),
        Metric("CC", "", 1),
        Metric("KLDiv", "nat", -1),
        Metric("SIM", "", 1),
    )
}
SIM_OPT = Metric("SIM_opt", "", 1)  # SIM of a map that is made for it; only where it is asked for


def in_order(present: Iterable[str]) -> list[str]:
    """Names of metrics in the order of tables; what is no metric of this version comes last."""
    known = [*METRICS, SIM_OPT.name]
    there = set(present)
    return [name for name in known if name in there] + sorted(there - set(known))


def better(name: str) -> int:
    """1 where more of a metric is better, -1 where less is, 0 for what is no metric."""
    row = {**METRICS, SIM_OPT.name: SIM_OPT}.get(name)
    return row.better if row else 0


def added_scores(density: Tensor, target: Target) -> dict[str, float]:
    """The scores, by their names, that functions of METRICS give a density, float64 (H, W) with sum 1.

    Raises ValueError for NaN.
    """
    scores = {name: float(row.function(density, target)) for name, row in METRICS.items() if row.function}
    if undefined := [name for name, value in scores.items() if math.isnan(value)]:
        raise ValueError(f"the function of {', '.join(undefined)} gives NaN; it must give a number for every density")
    return scores


# The regulariser of the Tuebingen/MIT saliency benchmark, as in pysaliency.metrics.MIT_KLDiv.
_KLDIV_REGULARISER = 2.2204e-16
# Relative standard deviation below which a map is flat: float32 log-densities of full-HD images cannot tell less, and a
# map that is blurred in float32, even where it is one value, differs from it by more.
FLAT, _FLAT_BLURRED = 1e-9, 1e-6
# Pixels that are worked on at a time: what is made of them stays in the cache.
_BLOCK = 1 << 17
# Fixations that are rescaled at a time.
_FIXATIONS = 1 << 20


@dataclass(frozen=True, eq=False)
class ShuffledFixations:
    """The negatives of sAUC for images of one size: fixations of many images, rescaled to that size.

    `pixels` (int64, ascending) were fixated `counts` (int64) times: no more memory than the image takes, however many
    fixations the data set has.
    """

    size: tuple[int, int]
    pixels: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(
        cls,
        size: tuple[int, int],
        sizes: np.ndarray,
        among: np.ndarray,
        image: np.ndarray,
        x: np.ndarray,
        y: np.ndarray,
    ) -> ShuffledFixations:
        """Those of the images that are `among` (bool (N,)) the negatives' images.

        `sizes` is int (N, 2), height and width of each image in px; `image` int (F,), `x` and `y` float (F,) in px say
        where each fixation of the data set fell. Truncated as pysaliency's `FullShuffledNonfixationProvider` does
        (`nonfixations="shuffled"`).
        """
        counts = np.zeros(size[0] * size[1], dtype=np.int64)
        for start in range(0, len(image), _FIXATIONS):
            some = start + np.flatnonzero(among[image[start : start + _FIXATIONS]])
            scale = np.array(size) / sizes[image[some]]
            # A fixation less than an ulp from the edge may be rounded onto it.
            rows = np.minimum((y[some] * scale[:, 0]).astype(np.int64), size[0] - 1)
            columns = np.minimum((x[some] * scale[:, 1]).astype(np.int64), size[1] - 1)
            counts += np.bincount(rows * size[1] + columns, minlength=len(counts))
        pixels = np.flatnonzero(counts)
        return cls(size, pixels, counts[pixels])

    def without(self, x: np.ndarray, y: np.ndarray) -> ShuffledFixations:
        """Without the fixations of one of the images, which has this size."""
        mine = y.astype(np.int64) * self.size[1] + x.astype(np.int64)
        counts = self.counts.copy()
        np.subtract.at(counts, np.searchsorted(self.pixels, mine), 1)
        return ShuffledFixations(self.size, self.pixels, counts)


@dataclass(frozen=True, eq=False)
class Components:
    """B densities of one image or image size, and what is known of every mixture of them.

    `density` (float64, (B, H * W)) is over uniform, so that it has mean 1, and `blurred` (float32) is it blurred by
    `blur_sigma` px with zeros outside: at full HD 24 MB a component. `mean` (B,) and `covariance` (B, B), and those of
    the blurred densities, are over pixels, float64.
    """

    size: tuple[int, int]
    blur_sigma: float
    density: Tensor
    blurred: Tensor
    mean: Tensor
    covariance: Tensor
    blurred_mean: Tensor
    blurred_covariance: Tensor

    @classmethod
    def of(cls, log_densities: Tensor, blur_sigma: float) -> Components:
        """`log_densities` are float32 (B, H, W) natural logs whose exp sums to 1 over the pixels; -inf is legal.

        Raises ValueError for another shape or dtype, NaN, and densities that do not sum to 1 (within 1e-2 nat).
        """
        if log_densities.dtype != torch.float32 or log_densities.dim() != 3:
            found = f"{log_densities.dtype} {tuple(log_densities.shape)}"
            raise ValueError(f"log-densities are {found}, not float32 (B, H, W)")
        components, height, width = log_densities.shape
        logs = log_densities.reshape(components, -1)
        # In float64 no density of a head underflows.
        density = torch.empty(logs.shape, dtype=torch.float64, device=logs.device)
        for part in _blocks(height * width):
            density[:, part].copy_(logs[:, part]).add_(math.log(height * width)).exp_()
        mean, covariance = _moments(density)
        for mass in mean.tolist():
            if math.isnan(mass):
                raise ValueError("a log-density holds NaN")
            if not math.exp(-1e-2) < mass < math.exp(1e-2):
                raise ValueError(f"a log-density is not normalised: the density sums to {mass:.6g}, not 1")
        blurred = torch.stack(
            [gaussian_blur(one.float().view(height, width), blur_sigma, "constant").flatten() for one in density]
        )
        return cls((height, width), blur_sigma, density, blurred, mean, covariance, *_moments(blurred))


def _blocks(pixels: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, pixels, _BLOCK))


def _moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B,) and population covariance (B, B) of maps (B, pixels) with means near 1, float64."""
    total = torch.zeros(len(maps), dtype=torch.float64, device=maps.device)
    squares = torch.zeros(len(maps), len(maps), dtype=torch.float64, device=maps.device)
    for part in _blocks(maps.shape[1]):
        # With the mean nearly gone, nothing cancels later.
        block = maps[:, part].double() - 1
        total += block.sum(1)
        squares += block @ block.T
    mean = total / maps.shape[1]
    return mean + 1, squares / maps.shape[1] - mean[:, None] * mean


@dataclass(frozen=True, eq=False)
class Target:
    """What an image's scores need that does not depend on the model.

    `pixels` (int64, (F,)) were fixated, `negatives` are sAUC's; `baseline` (float64, (F,)) is the log of the baseline's
    density over uniform at the fixations. `empirical` (float32, (H * W,)) are the fixations blurred by `blur_sigma` px,
    over their mean (8 MB at full HD: keep few targets at once). `std`, its standard deviation, and `information`, in
    nats, its divergence from uniform, are the parts of CC and KLDiv without the model.
    """

    size: tuple[int, int]
    blur_sigma: float
    pixels: Tensor
    negatives: tuple[Tensor, Tensor]
    baseline: Tensor
    empirical: Tensor
    std: float
    information: float

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, negatives: ShuffledFixations, baseline: Components) -> Target:
        """The target of an image with fixations at `x`, `y` (float (F,), px), on the device of the baseline.

        A fixation falls on the pixel (int(y), int(x)); repeats count. The image's size, and the blur's, are the
        baseline's, which is one density.
        The empirical map is `pysaliency.FixationMap(stimuli, fixations, kernel_size=blur_sigma)`, whose blur reflects
        at the borders, over its mean.
        Raises UserError for an image without fixations or without negatives, or with a fixation outside of the image.
        """
        device, size = baseline.density.device, baseline.size
        assert negatives.size == size
        pixels = torch.from_numpy(_pixels(size, x, y)).to(device)
        if not negatives.counts.any():
            raise UserError("sAUC needs fixations of a second image; give a data set with more than one")
        empirical = blurred_fixations(pixels, size, baseline.blur_sigma).flatten()
        empirical /= empirical.double().mean()
        return cls(
            size=size,
            blur_sigma=baseline.blur_sigma,
            pixels=pixels,
            negatives=(torch.from_numpy(negatives.pixels).to(device), torch.from_numpy(negatives.counts).to(device)),
            baseline=(baseline.density[0, pixels] / baseline.mean[0]).log(),
            empirical=empirical,
            std=float(_moments(empirical[None])[1]) ** 0.5,
            information=float(torch.special.xlogy(empirical, empirical).double().mean()),
        )


def _pixels(size: tuple[int, int], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if not len(x):
        raise UserError("an image has no fixations to be scored on; leave it out")
    height, width = size
    # Written so that NaN fails too; the truncation takes -0.5 to pixel 0, as pysaliency does.
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    if not inside.all():
        k = int(np.argmin(inside))
        raise UserError(f"fixation {k} at x={x[k]}, y={y[k]} is outside of its image of {width} x {height} px; drop it")
    return y.astype(np.int64) * width + x.astype(np.int64)


def score(log_density: Tensor, target: Target) -> dict[str, float]:
    """The scores but sAUC of one density, float32 (H, W): see `Components.of` and `score_mixtures`."""
    weight = torch.ones(1, 1, dtype=torch.float64)
    return score_mixtures(Components.of(log_density[None], target.blur_sigma), weight, target)[0]


def score_mixtures(components: Components, weights: Tensor, target: Target) -> list[dict[str, float]]:
    """The scores but sAUC, in the order of METRICS, of M mixtures of the components, normalised, on an image.

    `weights` is float64 (M, B), not negative, each row with a positive sum. The components are on the target's device.

    With pysaliency's model `m` of the same map, `density = DensitySaliencyMapModel(m)`,
    `smooth = BluringSaliencyMapModel(density, blur_sigma, mode="constant")` and
    `empirical = FixationMap(stimuli, fixations, kernel_size=blur_sigma)`, the same numbers are, for one image:

    - IG, bits a fixation: `m.information_gain(stimuli, fixations, baseline)`
    - LL, bits a fixation: `m.information_gain(stimuli, fixations, UniformModel())`
    - AUC: `density.AUC(stimuli, fixations, nonfixations="uniform")`, all pixels are negatives
    - NSS: `density.NSS(stimuli, fixations)`; 0 for a flat map
    - CC: `smooth.CC(stimuli, empirical)`; 0 also where the blurred fixations are flat
    - KLDiv, nats: `smooth.KLDiv(stimuli, empirical, minimum_value=0, log_regularization=2.2204e-16,
      quotient_regularization=2.2204e-16)`, which is KL(empirical || model)
    - SIM: `smooth.SIM(stimuli, empirical)`

    Raises ValueError for components of another size or blur. A zero density (-inf) at a fixation is legal and gives
    IG = LL = -inf.
    """
    if (components.size, components.blur_sigma) != (target.size, target.blur_sigma):
        found, expected = (f"{of.size}, blurred by {of.blur_sigma} px" for of in (components, target))
        raise ValueError(f"densities are {found}, their image's are {expected}")
    device = components.density.device
    sharp = weights.to(device) / (weights.to(device) @ components.mean)[:, None]
    smooth = weights.to(device) / (weights.to(device) @ components.blurred_mean)[:, None]
    at_fixations = sharp @ components.density[:, target.pixels]
    log_p = at_fixations.log()
    std = _std(sharp, components.covariance)
    columns = {
        "IG": (log_p - target.baseline).mean(1) / math.log(2),
        "LL": log_p.mean(1) / math.log(2),
        "AUC": _auc(components.density, sharp, at_fixations),
        "NSS": torch.where(std > FLAT, (at_fixations.mean(1) - 1) / std, 0),
        **_map_scores(components, smooth, target),
    }
    scores = [dict(zip(columns, row, strict=True)) for row in torch.stack(list(columns.values()), 1).tolist()]
    if any(row.function for row in METRICS.values()):
        for row, scored in zip(sharp / len(components.density[0]), scores, strict=True):
            scored |= added_scores((row @ components.density).view(target.size), target)
    return scores


def _std(weights: Tensor, covariance: Tensor) -> Tensor:
    """(M,) standard deviations of mixtures, from the components' covariance."""
    return ((weights @ covariance) * weights).sum(1).clamp_min(0).sqrt()


def _auc(density: Tensor, weights: Tensor, at_fixations: Tensor) -> Tensor:
    """(M,) AUC: the chance that a fixation exceeds a pixel, ties counted as one half."""
    rankings = [Ranking(positives) for positives in at_fixations]
    totals = torch.zeros(len(weights), dtype=torch.int64, device=density.device)
    for part in _blocks(density.shape[1]):
        block = density[:, part].T
        for k, ranking in enumerate(rankings):
            totals[k] += ranking.doubled(block @ weights[k]).sum()
    return totals / (2 * at_fixations.shape[1] * density.shape[1])


def _map_scores(components: Components, weights: Tensor, target: Target) -> dict[str, Tensor]:
    """CC, KLDiv and SIM, each (M,), of blurred mixtures against the blurred fixations."""
    pixels = len(target.empirical)
    # Of each component with the empirical map, and of each mixture: sum of logarithms and of minima.
    products = torch.zeros(len(components.blurred), dtype=torch.float64, device=weights.device)
    sums = torch.zeros(2, len(weights), dtype=torch.float64, device=weights.device)
    rows = weights.float()
    for part in _blocks(pixels):
        blurred, empirical = components.blurred[:, part], target.empirical[part]
        products += blurred.double() @ (empirical.double() - 1)
        for k, row in enumerate(rows):
            mixed = blurred.T @ row
            sums[1, k] += torch.minimum(mixed, empirical).sum()
            # pysaliency's second regulariser, inside the logarithm of empirical / model, changes nothing: the
            # empirical map times log(regulariser + q) differs from the map times log(q) by less than 1e-15. So the
            # model's part stands alone.
            sums[0, k] += torch.dot(mixed.add_(_KLDIV_REGULARISER * pixels).log_(), empirical)
    std = _std(weights, components.blurred_covariance)
    varies = (std > _FLAT_BLURRED) & (target.std > _FLAT_BLURRED)
    return {
        "CC": torch.where(varies, weights @ products / pixels / (std * target.std), 0),
        "KLDiv": target.information - sums[0] / pixels,
        "SIM": sums[1] / pixels,
    }


def score_saliency(saliency: Tensor, target: Target) -> dict[str, float]:
    """AUC, NSS, CC, KLDiv and SIM of a saliency map that is no density, float64 (H, W), as it is: without a blur.

    As pysaliency's `SaliencyMapModel` scores it: NSS and CC of a constant map are 0; for KLDiv and SIM, a map with
    negative values is lifted to a minimum of 0, and both maps are taken over their sums. Raises ValueError for another
    shape, or values that are not finite.
    """
    if saliency.shape != target.size or not bool(saliency.isfinite().all()):
        raise ValueError(f"a saliency map is finite and {target.size} as its image, not {tuple(saliency.shape)}")
    values, empirical = saliency.flatten(), target.empirical.double()
    # Ranks of any values: float64 itself, where a density's leading bits would do.
    order = values[target.pixels].sort().values
    below, not_above = (torch.searchsorted(order, values, right=right) for right in (False, True))
    doubled = 2 * len(order) - below - not_above
    # The scale changes no other score, and no square of these overflows, or vanishes.
    values = values / values.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    lifted = values - values.min().clamp_max(0)
    density = lifted / lifted.mean() if bool(lifted.any()) else torch.ones_like(lifted)
    std, at_fixations = values.std(correction=0), values[target.pixels]
    # The mean of equal values need not equal them.
    varies = bool(values.max() > values.min()) and bool(std > 0)
    covariance = ((values - values.mean()) * (empirical - 1)).mean()
    quotient = empirical / (density + _KLDIV_REGULARISER * len(values))
    return {
        "AUC": float(doubled.sum()) / (2 * len(order) * len(values)),
        "NSS": float((at_fixations.mean() - values.mean()) / std) if varies else 0.0,
        "CC": float(covariance / std) / target.std if varies and target.std > _FLAT_BLURRED else 0.0,
        "KLDiv": float((empirical * (_KLDIV_REGULARISER + quotient).log()).mean()),
        "SIM": float(torch.minimum(density, empirical).mean()),
    }
