"""Category weights on CAT2000's numbers: our EM against scipy's SLSQP and plain EM steps, to the same optimum.

    python benchmarks/fusion.py                  # a minute
    python benchmarks/fusion.py --fixations 60   # as many as an eye tracker gives in some seconds

A fit is the global weights and, under priors of all strengths, those of the categories: 20 of 80 images each. The
densities of 4 backbones are drawn at random, and alike as those of real backbones are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import harness
import numpy as np
from harness import Figures
from scipy.optimize import minimize

from acw.fusion import category_weights
from acw.fusion.category_weights import EM_GAP, EM_STEPS, PRIOR_STRENGTHS, Likelihoods

BACKBONES = 4
PLACES = 60  # where an image can be fixated
ALIKE = 0.5  # what the backbones' densities have in common
STRENGTHS = [strength for strength in PRIOR_STRENGTHS if math.isfinite(strength)]


def drawn(categories: int, images: int, fixations: int) -> tuple[Likelihoods, np.ndarray]:
    """Likelihoods at fixations drawn from mixtures with weights of each category, and the images' categories."""
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.full(BACKBONES, 3), categories)
    category = np.repeat(np.arange(categories), images)
    log_p = []
    for c in category:
        densities = generator.dirichlet(np.full(PLACES, 0.3), BACKBONES) + 1e-4
        densities = ALIKE * densities.mean(0) + (1 - ALIKE) * densities
        densities /= densities.sum(1, keepdims=True)
        log_p.append(np.log(densities[:, generator.choice(PLACES, fixations, p=weights[c] @ densities)]).T)
    image = np.repeat(np.arange(len(category)), fixations)
    return Likelihoods(np.concatenate(log_p), image, len(category)), category


def densities_and_shares(likelihoods: Likelihoods) -> tuple[np.ndarray, np.ndarray]:
    """Densities up to a factor a fixation, and each fixation's share of its image."""
    scaled = np.exp(likelihoods.log_p - likelihoods.log_p.max(1, keepdims=True))
    return scaled, 1 / np.bincount(likelihoods.image)[likelihoods.image]


def by_slsqp(likelihoods: Likelihoods, prior: np.ndarray) -> np.ndarray:
    scaled, share = densities_and_shares(likelihoods)
    mass = likelihoods.images + prior.sum()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        weights = np.maximum(weights, 1e-12)
        mixed = scaled @ weights
        return -(share @ np.log(mixed) + prior @ np.log(weights)) / mass, -(
            scaled.T @ (share / mixed) + prior / weights
        ) / mass

    sums_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
    start = np.full(BACKBONES, 1 / BACKBONES)
    bounds = [(0, 1)] * BACKBONES
    found = minimize(
        loss, start, jac=True, method="SLSQP", bounds=bounds, constraints=sums_to_one, options={"ftol": 1e-10}
    )
    return np.maximum(found.x, 0) / np.maximum(found.x, 0).sum()


def by_plain_em(likelihoods: Likelihoods, prior: np.ndarray) -> np.ndarray:
    scaled, share = densities_and_shares(likelihoods)
    mass = likelihoods.images + prior.sum()
    weights = np.full(BACKBONES, 1 / BACKBONES)
    for _ in range(EM_STEPS):
        slope = (scaled.T @ (share / (scaled @ weights)) + prior / weights) / mass
        if slope.max() - 1 < EM_GAP:
            break
        weights = weights * slope
    return weights


def benchmark(arguments: argparse.Namespace) -> Figures:
    likelihoods, category = drawn(arguments.categories, arguments.images, arguments.fixations)
    groups = [np.flatnonzero(category == c) for c in range(arguments.categories)]

    def one_by_one(solve: Callable[[Likelihoods, np.ndarray], np.ndarray]) -> np.ndarray:
        overall = solve(likelihoods, np.zeros(BACKBONES))
        parts = [likelihoods.subset(members) for members in groups]
        return np.array([[solve(part, strength * overall) for part in parts] for strength in STRENGTHS])

    def ours() -> np.ndarray:
        overall = category_weights.global_weights(likelihoods)
        return category_weights._fit_groups(likelihoods, category, len(groups), overall, STRENGTHS)

    def heights(weights: np.ndarray) -> np.ndarray:
        """(strengths, categories): the objectives, in nats per fixation."""
        overall = category_weights.global_weights(likelihoods)
        result = np.empty(weights.shape[:2])
        for (s, g), _ in np.ndenumerate(result):
            prior, row = STRENGTHS[s] * overall, weights[s, g]
            part = likelihoods.subset(groups[g])
            held = float(prior @ np.log(np.maximum(row, 1e-300)))
            result[s, g] = (part.mean_log_likelihood(row).sum() + held) / (part.images + prior.sum())
        return result

    figures: Figures = {"fixations": len(likelihoods.image), "problems": len(STRENGTHS) * len(groups) + 1}
    figures |= harness.alternate(
        {"ours, s": ours, "SLSQP, s": lambda: one_by_one(by_slsqp), "plain EM, s": lambda: one_by_one(by_plain_em)},
        arguments.rounds,
    )
    best = heights(ours())
    for name, solve in (("SLSQP", by_slsqp), ("plain EM", by_plain_em)):
        figures[f"times faster than {name}"] = figures[f"{name}, s"] / figures["ours, s"]
        above = best - heights(one_by_one(solve))
        figures[f"nats above {name}'s optimum, least"] = float(above.min())
        figures[f"nats above {name}'s optimum, most"] = float(above.max())
    whole = harness.alternate(
        {"": lambda: category_weights.fit(likelihoods, category, arguments.categories, 0)}, rounds=arguments.rounds
    )
    return figures | {"fit with cross-validation and 200 bootstrap samples, s": whole[""]}


if __name__ == "__main__":
    harness.run(__doc__ or "", benchmark, categories=20, images=80, fixations=325, rounds=3)
