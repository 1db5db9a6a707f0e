"""Mixtures of densities: category weights by EM on out-of-fold predictions, with a Dirichlet prior and intervals.

A mixture is `log sum_b w[c, b] p_b`, never a weighted sum of log-densities. The mean log-likelihood is concave in w, so
EM finds the global optimum. Responsibilities are averaged within an image first: images count equally.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

# Strength of the prior, in images: what is added to a category is as if it had that many more with the global weights.
PRIOR_STRENGTHS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, math.inf)
# EM stops when the objective is within this many nats per fixation of its optimum, by its duality gap.
EM_GAP = 1e-6
EM_STEPS = 10_000
ROUNDING = 1e-13
HALVINGS = 12
NEGLIGIBLE = 1e-12
# Problems that are solved side by side, and how many numbers are worked on at a time: as many as the cache holds.
EM_COLUMNS = 100
EM_CELLS = 1 << 15
CROSSVALIDATION_FOLDS = 5
BOOTSTRAP_SAMPLES = 200


@dataclass(frozen=True)
class Likelihoods:
    """Densities of B models at F fixations of N images.

    log_p: (F, B) natural log-densities per px. image: (F,) int64 in 0..N-1. images: N.
    """

    log_p: np.ndarray
    image: np.ndarray
    images: int

    def subset(self, chosen: np.ndarray) -> Likelihoods:
        """Only the images whose number is in `chosen` (sorted, unique), numbered anew."""
        number = np.full(self.images, -1)
        number[chosen] = np.arange(len(chosen))
        kept = number[self.image] >= 0
        return Likelihoods(self.log_p[kept], number[self.image[kept]], len(chosen))

    def mean_log_likelihood(self, weights: np.ndarray) -> np.ndarray:
        """(N,) nats per fixation of each image under the mixture; weights: (B,), or (N, B) for one an image."""
        # In the logarithm: left out, the one model that knew of a fixation may have a weight of 0.
        mixed = logsumexp(self.log_p, axis=1, b=weights[self.image] if weights.ndim == 2 else weights)
        return np.bincount(self.image, mixed, self.images) / np.bincount(self.image, minlength=self.images)

    def _scaled(self) -> np.ndarray:
        """(F, B) densities up to a factor a fixation."""
        return np.exp(self.log_p - self.log_p.max(1, keepdims=True))


def mix(log_densities: Tensor, weights: Tensor) -> Tensor:
    """log sum_b w_b p_b: log_densities (B, ...), weights (B,) that sum to 1; a weight of 0 leaves its density out."""
    shape = (-1,) + (1,) * (log_densities.dim() - 1)
    return torch.logsumexp(log_densities + weights.log().view(shape), 0)


def em(
    likelihoods: Likelihoods, counts: np.ndarray, prior: np.ndarray, steps: list[np.ndarray] | None = None
) -> np.ndarray:
    """(R, B) weights that maximise R objectives at once.

    Objective r: sum_i counts[i, r] * (mean log-likelihood of image i) + sum_b prior[r, b] * log w_b. counts: (N, R) how
    often each image counts, all > 0 in sum with the prior; prior: (R, B) pseudo-counts >= 0, alpha - 1 of a Dirichlet.
    steps: takes the weights (R, B) at the start and after each step, for R up to EM_COLUMNS.
    """
    fixations = np.bincount(likelihoods.image, minlength=likelihoods.images)
    scaled = likelihoods._scaled()
    results = []
    for first in range(0, counts.shape[1], EM_COLUMNS):
        columns = slice(first, first + EM_COLUMNS)
        mass = counts[:, columns].sum(0) + prior[columns].sum(1)
        assert (mass > 0).all()
        share = counts[:, columns] / mass / fixations[:, None]
        objectives = _Objectives(scaled, likelihoods.image, share, prior[columns] / mass[:, None])
        results.append(_em(objectives, steps))
    return np.concatenate(results)


@dataclass(frozen=True)
class _Objectives:
    """R objectives, over the sum of all that counts in them: where one is best, its slope is 1 in all that may grow.

    scaled: (F, B) densities up to a factor a fixation; image: (F,); share: (N, R) how much each fixation of an image
    counts; prior: (R, B).
    """

    scaled: np.ndarray
    image: np.ndarray
    share: np.ndarray
    prior: np.ndarray

    def at(self, weights: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Height (S,), slope (S, B) and, of the likelihood alone, negative curvature (S, B, B) at weights (S, B)."""
        models = weights.shape[1]
        rows, other = np.triu_indices(models)
        share, prior = self.share[:, columns], self.prior[columns]
        with np.errstate(divide="ignore", invalid="ignore"):  # where a shorter step has to be taken
            height = np.where(prior > 0, prior * np.log(weights), 0).sum(1)
            slope = np.where(prior > 0, prior / weights, 0)
            products = np.zeros((len(columns), len(rows)))
            at_once = -(-EM_CELLS // len(columns))
            for first in range(0, len(self.scaled), at_once):
                part = slice(first, first + at_once)
                scaled, weight = self.scaled[part], share[self.image[part]]
                mixed = scaled @ weights.T
                height += np.einsum("fs,fs->s", weight, np.log(mixed))
                weight /= mixed
                slope += weight.T @ scaled
                weight /= mixed
                products += weight.T @ (scaled[:, rows] * scaled[:, other])
        curvature = np.empty((len(columns), models, models))
        curvature[:, rows, other] = curvature[:, other, rows] = products
        return height, slope, curvature


def _em(objectives: _Objectives, steps: list[np.ndarray] | None) -> np.ndarray:
    """EM whose steps are replaced by Newton's where those climb: near twins need thousands of EM's own."""
    prior = objectives.prior
    result = np.full(prior.shape, 1 / prior.shape[1])
    open_ = np.arange(len(prior))  # columns that have not converged
    height, slope, curvature = objectives.at(result, open_)
    for _ in range(EM_STEPS):
        if steps is not None:
            steps.append(result.copy())
        # For a concave objective on the simplex, max slope - 1 bounds the distance to the optimum (Frank-Wolfe gap).
        going = slope.max(1) - 1 > EM_GAP
        if not going.any():
            break
        open_, height, slope, curvature = open_[going], height[going], slope[going], curvature[going]
        weights = result[open_]
        step = _newton(curvature, weights, slope, prior[open_])
        down, before, own = np.arange(len(open_)), height.copy(), weights * slope
        for halving in range(HALVINGS + 1):
            # EM's own step where not even a small part of Newton's climbs.
            point = np.maximum(weights[down] + step[down] / 2**halving, 0) if halving < HALVINGS else own[down]
            point /= point.sum(1, keepdims=True)
            reached = objectives.at(point, open_[down])
            # Near the optimum all heights are equal up to rounding, and Newton's step is the one that arrives.
            climbs = reached[0] >= before[down] - ROUNDING * np.abs(before[down])
            climbs |= halving == HALVINGS
            there = down[climbs]
            result[open_[there]] = point[climbs]
            height[there], slope[there], curvature[there] = (values[climbs] for values in reached)
            down = down[~climbs]
            if not len(down):
                break
    return result / result.sum(1, keepdims=True)


def _newton(curvature: np.ndarray, weights: np.ndarray, slope: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """(R, B) Newton's step towards slope 1, cut where the first weight reaches 0.

    Without the constraint that weights sum to 1, the objective less its mass times their sum has the same maximum, so
    only the signs are left as constraints: an active-set method, in which weights of 0 that want to fall stay there.
    """
    diagonal = np.arange(weights.shape[1])
    hessian = curvature.copy()
    hessian[:, diagonal, diagonal] += 1e-12 * np.trace(curvature, axis1=1, axis2=2)[:, None]
    hessian[:, diagonal, diagonal] += np.divide(prior, weights**2, out=np.zeros_like(weights), where=prior > 0)
    zero = (weights < NEGLIGIBLE) & (prior == 0)
    fixed = zero & (slope <= 1)
    while True:
        free = np.where(fixed[:, :, None] | fixed[:, None, :], 0, hessian)
        free[:, diagonal, diagonal] += fixed
        step = np.linalg.solve(free, np.where(fixed, 0, slope - 1)[:, :, None])[:, :, 0]
        # Of two twins at 0 that both want to rise, one may be made to fall: it would end the step before it began.
        stuck = zero & ~fixed & (step < 0)
        if not stuck.any():
            break
        fixed |= stuck
    room = np.divide(weights, -step, out=np.full_like(weights, np.inf), where=(step < 0) & ~fixed)
    # With a prior no weight may reach 0, where its logarithm ends.
    length = np.minimum(1, (room * np.where(prior > 0, 0.99, 1)).min(1, keepdims=True))
    return np.where(fixed | (room <= length), -weights, length * step)


def global_weights(likelihoods: Likelihoods) -> np.ndarray:
    """(B,) the weights that maximise the likelihood of all images."""
    models = likelihoods.log_p.shape[1]
    return em(likelihoods, np.ones((likelihoods.images, 1)), np.zeros((1, models)))[0]


@dataclass(frozen=True)
class CategoryWeights:
    """weights, low, high: (G, B), the fit and its 95 % bootstrap interval over images; global_weights: (B,).

    strength: of the prior, chosen by cross-validation; crossvalidation: strength -> left-out nats per fixation.
    left_out: (N,) nats per fixation of each image under weights that were fitted without it, at that strength.
    history: per group (S, B), the weights from their uniform start on, after each step of the fit.
    """

    weights: np.ndarray
    low: np.ndarray
    high: np.ndarray
    global_weights: np.ndarray
    strength: float
    crossvalidation: dict[float, float]
    left_out: np.ndarray
    history: list[np.ndarray]


def fit(likelihoods: Likelihoods, group: np.ndarray, groups: int, seed: int) -> CategoryWeights:
    """Weights per group (category, source) with prior alpha = 1 + s * w_global, s by cross-validation over images.

    group: (N,) int64 of each image, in 0..groups-1; a group without one has the global weights.
    """
    left_out = _crossvalidate(likelihoods, group, groups, seed)
    scores = {strength: float(values.mean()) for strength, values in left_out.items()}
    strength = max(scores, key=lambda s: (scores[s], s))
    overall = global_weights(likelihoods)
    low, high = _bootstrap(likelihoods, group, groups, strength, seed)
    history = [_history(likelihoods, np.flatnonzero(group == g), overall, strength) for g in range(groups)]
    weights = np.stack([steps[-1] for steps in history])
    return CategoryWeights(weights, low, high, overall, strength, scores, left_out[strength], history)


def _history(likelihoods: Likelihoods, members: np.ndarray, overall: np.ndarray, strength: float) -> np.ndarray:
    """(S, B) the steps of one group's fit; with an infinite prior, or no image, of the global weights."""
    if math.isinf(strength) or not len(members):
        members, prior = np.arange(likelihoods.images), np.zeros((1, len(overall)))
    else:
        prior = strength * overall[None]
    steps: list[np.ndarray] = []
    fitted = em(likelihoods.subset(members), np.ones((len(members), 1)), prior, steps)
    return np.concatenate([*steps, fitted])


def _fit_groups(
    likelihoods: Likelihoods, group: np.ndarray, groups: int, overall: np.ndarray, strengths: Sequence[float]
) -> np.ndarray:
    """(S, G, B) weights for each strength of the prior; a group without an image gets the overall weights."""
    result = np.tile(overall, (len(strengths), groups, 1))
    finite = [index for index, strength in enumerate(strengths) if math.isfinite(strength)]
    for g in range(groups):
        chosen = np.flatnonzero(group == g)
        if len(chosen) and finite:
            prior = np.stack([strengths[index] * overall for index in finite])
            result[finite, g] = em(likelihoods.subset(chosen), np.ones((len(chosen), len(finite))), prior)
    return result


def dealt(group: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """(N,) int64: the fold that leaves out each image, the images of a group dealt in turn, in random order."""
    fold = np.empty(len(group), dtype=int)
    generator = np.random.default_rng(seed)
    for g in range(groups):
        members = generator.permutation(np.flatnonzero(group == g))
        fold[members] = (np.arange(len(members)) + g) % CROSSVALIDATION_FOLDS
    return fold


def _crossvalidate(likelihoods: Likelihoods, group: np.ndarray, groups: int, seed: int) -> dict[float, np.ndarray]:
    """Strength -> (N,) log-likelihood of each image under a fit without it, the global weights too."""
    fold = dealt(group, groups, seed)
    result = np.empty((len(PRIOR_STRENGTHS), likelihoods.images))
    for left_out in np.unique(fold):
        inside, outside = np.flatnonzero(fold != left_out), np.flatnonzero(fold == left_out)
        training, test = likelihoods.subset(inside), likelihoods.subset(outside)
        fitted = _fit_groups(training, group[inside], groups, global_weights(training), PRIOR_STRENGTHS)
        result[:, outside] = [test.mean_log_likelihood(weights[group[outside]]) for weights in fitted]
    return dict(zip(PRIOR_STRENGTHS, result, strict=True))


def _bootstrap(
    likelihoods: Likelihoods, group: np.ndarray, groups: int, strength: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(G, B) ends of the weights' 95 % intervals, images resampled within their group, the global weights refitted."""
    generator = np.random.default_rng(seed)
    counts = np.zeros((likelihoods.images, BOOTSTRAP_SAMPLES))
    # A source may have held-out images only: such a group has the overall weights.
    present = [np.flatnonzero(group == g) for g in range(groups) if (group == g).any()]
    for members in present:
        even = np.full(len(members), 1 / len(members))
        counts[members] = generator.multinomial(len(members), even, BOOTSTRAP_SAMPLES).T
    models = likelihoods.log_p.shape[1]
    overall = em(likelihoods, counts, np.zeros((BOOTSTRAP_SAMPLES, models)))
    samples = np.tile(overall, (groups, 1, 1))
    if math.isfinite(strength):
        for members in present:
            samples[group[members[0]]] = em(likelihoods.subset(members), counts[members], strength * overall)
    low, high = np.percentile(samples, [2.5, 97.5], axis=1)
    return low, high


def oracle(likelihoods: Likelihoods) -> np.ndarray:
    """(N, B) the best weights of each image for its own fixations: an upper bound of any mixing, not a model."""
    models = likelihoods.log_p.shape[1]
    return np.concatenate(
        [
            em(likelihoods.subset(np.array([image])), np.ones((1, 1)), np.zeros((1, models)))
            for image in range(likelihoods.images)
        ]
    )
