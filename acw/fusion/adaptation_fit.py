"""Fits category adaptation: maximum likelihood with a prior on the values for all images, by Newton's method.

Everything is computed on one coarse grid of relative coordinates for all images, on which a fixation is a cell: the
numbers are few and change a density smoothly, so that cells do. The likelihood is one of an exponential family in
log t, a and b up to the logarithm of t, and a mixture's in the weights; near its maximum the mean of its curvature over
what the model expects (Fisher's information) is that of a bowl, and a step by it arrives in some five steps. A test
holds slopes against autograd and maxima against scipy's optimiser and other starts.
Shape suffixes: N images, S kernels, C views, M cells, P numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from threadpoolctl import threadpool_limits
from torch import Tensor

from acw.fusion.adaptation import GRID, KERNELS, SMALLEST, Adaptation, Numbers, blurring
from acw.fusion.category_weights import CROSSVALIDATION_FOLDS, dealt
from acw.heads.center_bias import CenterBias

# Of the prior's images whose fixations are distributed as the model's centre bias, in a category's own centre bias.
OWN_PRIOR = 5.0
# How far a category's numbers may lie from those for all before any image of it is seen: standard deviations of log t,
# a, b and of the logarithms of weights and shares, all of which the prior's strength scales.
SCALES = {"temperature": 0.3, "center_bias": 0.3, "own": 0.3, "weights": 1.0, "kernels": 3.0}
# Strengths of the prior that cross-validation chooses from; at infinity a category has the numbers for all.
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
# Of the prior of the numbers for all, on no adaptation: of weight where there are few images only.
OVERALL_STRENGTH = 1.0
LEAST_SHARE = 1e-2
# Added to the curvature, in images: what no image says anything about stays where it is.
RIDGE = 1e-6
STEPS = 100
# Fitted when a step would gain less, nats per fixation of the mean over images.
TOLERANCE = 1e-8
HALVINGS = 20


@dataclass(frozen=True, eq=False)
class Maps:
    """What N images say, on GRID. density: (N, S, C, M) mass per cell of each view under each kernel.

    fixated: (N, M) share of the fixations in each cell. spread: (N, M) the same, smoothed as the centre bias is.
    center_bias: (N, M) log c. All are of one floating-point type.
    """

    density: Tensor
    fixated: Tensor
    spread: Tensor
    center_bias: Tensor

    def __len__(self) -> int:
        return len(self.fixated)

    @classmethod
    def of(
        cls,
        densities: Sequence[np.ndarray],
        fixations: Sequence[tuple[np.ndarray, np.ndarray]],
        sizes: Sequence[tuple[int, int]],
        center_biases: Sequence[CenterBias],
    ) -> Maps:
        """Of N images: the views' densities, as `on_grid` gives them; x and y of the fixations and (H, W), in px; the
        centre biases, by a kernel density estimate, that they were predicted with."""
        density, fixated, spread, center_bias = [], [], [], []
        for of_views, (x, y), size, bias in zip(densities, fixations, sizes, center_biases, strict=True):
            density.append(_blurred(torch.from_numpy(of_views), size))
            counts = np.zeros(GRID)
            np.add.at(counts, ((y / size[0] * GRID[0]).astype(int), (x / size[1] * GRID[1]).astype(int)), 1 / len(x))
            fixated.append(counts.ravel())
            assert bias.bandwidth is not None
            smooth = gaussian_filter(counts, [bias.bandwidth * cells for cells in GRID], mode="constant", truncate=5)
            spread.append(smooth.ravel() / smooth.sum())
            center_bias.append(bias.of_size(GRID).ravel())
        arrays = (torch.from_numpy(np.stack(each)).float() for each in (fixated, spread, center_bias))
        return cls(torch.stack(density), *arrays)

    def subset(self, chosen: np.ndarray) -> Maps:
        of = torch.from_numpy(chosen)
        return Maps(self.density[of], self.fixated[of], self.spread[of], self.center_bias[of])


def on_grid(log_densities_CHW: Tensor) -> np.ndarray:
    """(C, *GRID) float32 mass per cell of GRID, from log-densities of an image on its own grid."""
    density = F.interpolate(log_densities_CHW.exp()[None], GRID, mode="bilinear", antialias=True)[0]
    return (density / density.sum((1, 2), keepdim=True)).cpu().numpy().astype(np.float32)


def _blurred(density_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """(S, C, M) float32 mass per cell of the densities of an image of `size` px, under each of KERNELS."""
    result = []
    for width in KERNELS:
        rows, columns = (matrix.float() for matrix in blurring(width, size, GRID))
        blurred = (rows @ density_CHW @ columns.T).flatten(1).clamp_min(SMALLEST)
        result.append(blurred / blurred.sum(1, keepdim=True))
    return torch.stack(result)


def log_likelihood(theta_P: Tensor, maps: Maps, own_NM: Tensor) -> Tensor:
    """(N,) nats per fixation (of cells) of each image; own_NM: log c_own - log c."""
    return _terms(theta_P, maps, own_NM)[0]


def slopes(theta_P: Tensor, maps: Maps, own_NM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log-likelihood, (N, P) its slopes and (N, P, P) Fisher's information, of each image.

    Of log p = s - log sum exp s, the slope is the mean of ds/dtheta over the fixations less its mean over p, and the
    information is its covariance over p.
    """
    log_likelihood_N, log_p_NM, slope_NPM = _terms(theta_P, maps, own_NM, derive=True)
    p_NM = log_p_NM.exp()
    expected_NP, at_fixations_NP = (slope_NPM @ torch.stack([p_NM, maps.fixated], 2)).unbind(2)
    slope_NP = at_fixations_NP - expected_NP
    squares_NPP = (slope_NPM * p_NM[:, None]) @ slope_NPM.mT
    return log_likelihood_N, slope_NP, squares_NPP - expected_NP[:, :, None] * expected_NP[:, None]


def _terms(theta_P: Tensor, maps: Maps, own_NM: Tensor, derive: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log-likelihood; (N, M) log p; (N, P, M) the slopes of the unnormalised s, if asked for.

    theta: log t, a, b, then the weights' logarithms up to a constant, then those of the kernels' shares.
    """
    views = maps.density.shape[2]
    temperature = theta_P[0].exp()
    weight_C, share_S = theta_P[3 : 3 + views].softmax(0), theta_P[3 + views :].softmax(0)
    of_kernel_NSM = (weight_C @ maps.density.flatten(0, 1)).view(len(maps), len(share_S), -1)
    mixed_NM = share_S @ of_kernel_NSM
    log_mixed_NM = mixed_NM.log()
    score_NM = temperature * log_mixed_NM + theta_P[1] * maps.center_bias + theta_P[2] * own_NM
    log_p_NM = score_NM - score_NM.logsumexp(1, keepdim=True)
    log_likelihood_N = (maps.fixated * log_p_NM).sum(1)
    if not derive:
        return log_likelihood_N, log_p_NM, log_p_NM
    slope_NPM = log_p_NM.new_empty(len(maps), len(theta_P), log_p_NM.shape[1])
    torch.mul(log_mixed_NM, temperature, out=slope_NPM[:, 0])
    slope_NPM[:, 1], slope_NPM[:, 2] = maps.center_bias, own_NM
    scaled_N1M = (temperature / mixed_NM)[:, None]
    of_view_NCM = (share_S @ maps.density.flatten(2)).view(len(maps), views, -1)
    slope_NPM[:, 3 : 3 + views] = weight_C[:, None] * (of_view_NCM * scaled_N1M - temperature)
    slope_NPM[:, 3 + views :] = share_S[:, None] * (of_kernel_NSM * scaled_N1M - temperature)
    return log_likelihood_N, log_p_NM, slope_NPM


def own_center_bias(maps: Maps, others: Maps | None = None) -> Tensor:
    """(N, M) log c_own - log c at the images of a category: c_own of `others`, or of all but the image itself.

    The category's fixations, each image counting equally, and OWN_PRIOR images of the model's centre bias.
    """
    center_bias = maps.center_bias.exp()
    if others is None:
        total, images = maps.spread.sum(0) - maps.spread, len(maps) - 1
    else:
        total, images = others.spread.sum(0).expand_as(center_bias), len(others)
    return ((total + OWN_PRIOR * center_bias) / (images + OWN_PRIOR)).log() - maps.center_bias


def climb(
    maps: Maps, own_NM: Tensor, centre_P: Tensor, precision_P: Tensor, start_P: Tensor, free_P: Tensor | None = None
) -> Tensor:
    """(P,) float64: the numbers that maximise the sum of the images' log-likelihood and of a normal prior's.

    centre_P, precision_P: of the prior, the latter in images per square. free_P: bool, those that are not kept as they
    start. Raises nothing: where no step climbs, it has arrived, up to rounding.
    """
    theta, images = start_P.clone(), len(maps)
    free = torch.ones(len(theta), dtype=torch.bool) if free_P is None else free_P

    def height(at: Tensor) -> float:
        total = log_likelihood(at.to(maps.density.dtype), maps, own_NM).double().sum()
        return float(total - (precision_P * (at - centre_P).square()).sum() / 2)

    reached = height(theta)
    for _ in range(STEPS):
        _, slope_NP, information_NPP = slopes(theta.to(maps.density.dtype), maps, own_NM)
        slope = (slope_NP.double().sum(0) - precision_P * (theta - centre_P))[free]
        ridge = torch.diag(precision_P + RIDGE * images)[free][:, free]
        step = torch.linalg.solve(information_NPP.double().sum(0)[free][:, free] + ridge, slope)
        promised = float(slope @ step)
        if promised < TOLERANCE * images:
            break
        for halving in range(HALVINGS):
            there = theta.clone()
            there[free] += step / 2**halving
            if (now := height(there)) > reached:
                break
        else:
            break
        theta, reached = there, now
    return theta


def unadapted(weights: np.ndarray) -> Tensor:
    """(P,) float64: the numbers of the mixture with these weights (C,) as it is."""
    return theta_of(Adaptation.none(weights[None]).row(-1))


def theta_of(numbers: Numbers) -> Tensor:
    """(P,) float64: the same numbers as they are fitted, without a centre bias of their own."""
    # A weight of 0 has no logarithm, and one near it no slope by which it could return.
    logs = [np.log(np.maximum(values, LEAST_SHARE)) for values in (numbers.weights, numbers.kernels)]
    return torch.from_numpy(
        np.concatenate([[math.log(numbers.temperature), numbers.center_bias_weight, 0.0], *logs]).astype(np.float64)
    )


def precision(views: int, strength: float) -> Tensor:
    """(P,) float64, of the prior, in images per square."""
    widths = [SCALES["temperature"], SCALES["center_bias"], SCALES["own"]]
    widths += [SCALES["weights"]] * views + [SCALES["kernels"]] * len(KERNELS)
    return strength / torch.tensor(widths, dtype=torch.float64).square()


def fit_all(maps: Maps, weights: np.ndarray) -> Tensor:
    """(P,) the numbers for all images together, which have no centre bias of their own; weights: (C,) to start at."""
    start, nothing = unadapted(weights), torch.zeros_like(maps.center_bias)
    free = torch.ones(len(start), dtype=torch.bool)
    free[2] = False
    return climb(maps, nothing, start, precision(len(weights), OVERALL_STRENGTH), start, free)


def fit_category(maps: Maps, overall_P: Tensor, strengths: Sequence[float]) -> list[Tensor]:
    """The numbers of a category for each finite strength of the prior, strongest first: each starts at the last."""
    own, views, theta = own_center_bias(maps), maps.density.shape[2], overall_P
    result = []
    for strength in sorted(strengths, reverse=True):
        theta = climb(maps, own, overall_P, precision(views, strength), theta)
        result.append(theta)
    return result


@dataclass(frozen=True, eq=False)
class FittedAdaptation:
    """adaptation: the numbers, at the strength of the prior that cross-validation chose; crossvalidation: strength ->
    mean left-out nats per fixation (of cells), and `NONE` -> that of one weight vector for all, unadapted.

    area: (G,) how many times as large a part of its images a category's density fills as by the numbers for all.
    gain: (N,) nats per fixation by which each image is foretold better than without adaptation, by numbers that were
    fitted without it.
    """

    adaptation: Adaptation
    strength: float
    crossvalidation: dict[str, float]
    area: np.ndarray
    gain: np.ndarray

    @property
    def pays(self) -> bool:
        """Whether images that no number was fitted on are foretold better, by more than chance would have it."""
        return pays(self.gain)


NONE = "none"
# Thousands of steps on small tensors, of which two threads never made more: at 12 to 767 images, 1.5 to .9 of the time;
# and twenty times it where another program had one of their cores.
one_thread = threadpool_limits.wrap(limits=1)


def pays(gain: np.ndarray) -> bool:
    """Whether the mean of some images' gain, (N,), is more than its standard error."""
    return bool(gain.mean() > gain.std(ddof=1) / math.sqrt(len(gain)))


@one_thread
def fit(maps: Maps, weights: np.ndarray, group: np.ndarray, groups: int, seed: int) -> FittedAdaptation:
    """The numbers of each group of images (category) and of all, the prior's strength by cross-validation over images.

    weights: (C,) of the mixture for all; group: (N,) int64 in 0..groups-1; a group without an image has the numbers for
    all.
    """
    left_out = crossvalidate(maps, weights, group, groups, seed)
    scores = {strength: float(values.mean()) for strength, values in left_out.items() if strength != NONE}
    strength = max(scores, key=lambda s: (scores[s], float(s)))
    overall = fit_all(maps, weights)
    thetas, own, areas = [], [], []
    for g in range(groups):
        members = maps.subset(np.flatnonzero(group == g))
        finite = len(members) and math.isfinite(float(strength))
        thetas.append(fit_category(members, overall, [float(strength)])[0] if finite else overall)
        own.append(own_on_grid(members))
        areas.append(area(members, thetas[g], members, overall))
    return FittedAdaptation(
        adaptation_of([*thetas, overall], np.stack(own), len(weights)),
        float(strength),
        {name: float(values.mean()) for name, values in left_out.items()},
        np.array(areas),
        left_out[strength] - left_out[NONE],
    )


def crossvalidate(maps: Maps, weights: np.ndarray, group: np.ndarray, groups: int, seed: int) -> dict[str, np.ndarray]:
    """Strength, or NONE -> (N,) log-likelihood of each image under numbers that were fitted without it."""
    fold = dealt(group, groups, seed)
    result = {str(strength): np.empty(len(maps)) for strength in STRENGTHS} | {NONE: np.empty(len(maps))}
    finite = sorted(filter(math.isfinite, STRENGTHS), reverse=True)
    for left_out in np.unique(fold):
        inside = np.flatnonzero(fold != left_out)
        overall = fit_all(maps.subset(inside), weights)
        for g in range(groups):
            outside = np.flatnonzero((fold == left_out) & (group == g))
            if not len(outside):
                continue
            training, test = maps.subset(inside[group[inside] == g]), maps.subset(outside)
            nothing = torch.zeros_like(test.center_bias)
            result[NONE][outside] = log_likelihood(unadapted(weights).float(), test, nothing).numpy()
            result["inf"][outside] = log_likelihood(overall.float(), test, nothing).numpy()
            own = own_center_bias(test, training)
            for strength, theta in zip(finite, fit_category(training, overall, finite), strict=True):
                result[str(strength)][outside] = log_likelihood(theta.float(), test, own).numpy()
    return result


@one_thread
def fit_new(maps: Maps, overall_P: Tensor, seed: int) -> tuple[Tensor, float]:
    """The numbers of a category that a model does not know yet, from some of its images and the model's for all.

    And the strength of the prior by which those of the images that are left out are foretold best.
    """
    fold = np.random.default_rng(seed).permutation(len(maps)) % min(CROSSVALIDATION_FOLDS, len(maps))
    finite = sorted(filter(math.isfinite, STRENGTHS), reverse=True)
    total = dict.fromkeys([math.inf, *finite], 0.0)
    for left_out in np.unique(fold):
        training, test = maps.subset(np.flatnonzero(fold != left_out)), maps.subset(np.flatnonzero(fold == left_out))
        own = own_center_bias(test, training)
        thetas = zip([math.inf, *finite], [overall_P, *fit_category(training, overall_P, finite)], strict=True)
        for strength, theta in thetas:
            shift = own if math.isfinite(strength) else torch.zeros_like(own)
            total[strength] += float(log_likelihood(theta.float(), test, shift).sum())
    strength = max(total, key=lambda s: (total[s], s))
    theta = overall_P if math.isinf(strength) else fit_category(maps, overall_P, [strength])[0]
    return theta, strength


def area(members: Maps, theta_P: Tensor, before: Maps, overall_P: Tensor) -> float:
    """The geometric mean over images of exp(entropy) by a category's numbers over that by the numbers for all.

    before: what the images were said to be before the category was known; `members`, where its readouts are all's.
    """
    if not len(members):
        return 1.0
    entropies = []
    for maps, numbers, own in (
        (members, theta_P, own_center_bias(members)),
        (before, overall_P, torch.zeros_like(before.center_bias)),
    ):
        log_p = _terms(numbers.float(), maps, own)[1]
        entropies.append(-(log_p.exp() * log_p).sum(1))
    return float((entropies[0] - entropies[1]).mean().exp())


def own_on_grid(members: Maps) -> np.ndarray:
    """(*GRID,) float32, log c_own - log c of a category's images; 0 where there are none."""
    if not len(members):
        return np.zeros(GRID, np.float32)
    center_bias = members.center_bias.exp().mean(0)
    own = (members.spread.sum(0) + OWN_PRIOR * center_bias) / (len(members) + OWN_PRIOR)
    return (own / center_bias).log().view(GRID).numpy()


def adaptation_of(thetas: Sequence[Tensor], own: np.ndarray, views: int) -> Adaptation:
    """The numbers of G categories, with own centre biases (G, *GRID), and in the last place those for all."""
    stacked = torch.stack(list(thetas))
    return Adaptation(
        stacked[:, 3 : 3 + views].softmax(1).numpy(),
        stacked[:, 3 + views :].softmax(1).numpy(),
        stacked[:, 0].exp().numpy(),
        stacked[:, 1].numpy(),
        stacked[:, 2].numpy(),
        own,
    )
