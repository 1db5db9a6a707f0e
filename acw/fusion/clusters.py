"""Categories of images that have none: clusters of the backbones' pooled features, by a mixture of Gaussians.

How many there are is not asked of the features, of which a mixture of more Gaussians nearly always says more, but of
the fixations: categories are made where numbers of their own (`adaptation_fit`) foretell images that were left out
better than the numbers for all do, by more than chance would have it. Else there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from acw.fusion.adaptation_fit import NONE, Maps, crossvalidate

# How many categories are tried; CAT2000 has the last number.
TRIED = (2, 3, 4, 6, 8, 12, 20)
# Images of a category that numbers are fitted to, at least.
FEWEST = 20
# What more categories have to gain: so many standard errors, and nats per fixation (.002 bit), as somebody is to name
# them.
ERRORS, LEAST_GAIN = 2.0, 0.0014
# Principal components of the features that the mixtures are of, and starts of each.
COMPONENTS, STARTS = 12, 5


@dataclass(frozen=True, eq=False)
class Clusters:
    """number: (N,) int64, each image's category, 0 that of most images. typical: (N,) float64, log-density of its
    features in that category, up to a constant. gain: number of categories -> nats per fixation over numbers for all,
    of images that were left out: the mean, and its standard error.
    """

    number: np.ndarray
    typical: np.ndarray
    gain: dict[int, tuple[float, float]]


def find(pooled: np.ndarray, images: np.ndarray, maps: Maps, weights: np.ndarray, seed: int) -> Clusters:
    """The categories of N images.

    pooled: (N, D) features of all. images: (M,) indices of those that decide: mixtures are fitted to their features,
    and maps, of them, say where people looked; the others are put where their features belong. weights: (C,) of the
    mixture for all. Computed by all cores of the Ray cluster.
    """
    import ray

    from acw.cluster.tasks import submit

    shared, components = ray.put(maps), _principal(pooled, images)
    grouped = {1: (np.zeros(len(pooled), np.int64), np.zeros(len(pooled)))}
    for categories in (number for number in TRIED if number * FEWEST <= len(images)):
        of_all = clustered(components, images, categories, seed)
        if np.bincount(of_all[0][images], minlength=categories).min() >= FEWEST:
            grouped[categories] = of_all
    pending = {
        categories: submit(_left_out, shared, weights, number[images], categories, seed)
        for categories, (number, _) in grouped.items()
    }
    left_out = {categories: result() for categories, result in pending.items()}
    gain = {categories: _mean_and_error(values - left_out[1]) for categories, values in left_out.items()}
    return Clusters(*grouped[_chosen(left_out)], {c: of for c, of in gain.items() if c > 1})


def clustered(
    components: np.ndarray, fitted_on: np.ndarray, categories: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 the cluster of each image, 0 that of most, and (N,) float64 how typical of it the image is.

    components: (N, D) features of the images; fitted_on: indices of those that decide.
    """
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        mixture = GaussianMixture(categories, covariance_type="diag", n_init=STARTS, reg_covar=1e-4, random_state=seed)
        mixture.fit(components[fitted_on])
        number, share = mixture.predict(components), mixture.predict_proba(components)
    rank = np.argsort(np.argsort(-np.bincount(number, minlength=categories), kind="stable"))
    typical = mixture.score_samples(components) + np.log(share[np.arange(len(number)), number])
    return rank[number].astype(np.int64), typical


def _principal(pooled: np.ndarray, fitted_on: np.ndarray) -> np.ndarray:
    """(N, COMPONENTS) principal components, the first with variance 1, of standardised features; by the images fitted
    on."""
    some = pooled[fitted_on]
    mean, scale = some.mean(0), some.std(0) + 1e-6
    _, singular, axes = np.linalg.svd((some - mean) / scale, full_matrices=False)
    kept = min(COMPONENTS, int(np.count_nonzero(singular > 1e-6 * singular[0])))
    return (pooled - mean) / scale @ axes[:kept].T / singular[0] * math.sqrt(len(some))


def _left_out(maps: Maps, weights: np.ndarray, number: np.ndarray, categories: int, seed: int) -> np.ndarray:
    """(N,) nats per fixation of images by numbers fitted without them, of the strength that is best for all of them."""
    of_strength = crossvalidate(maps, weights, number, categories, seed)
    return max((values for strength, values in of_strength.items() if strength != NONE), key=np.mean)


def _mean_and_error(difference: np.ndarray) -> tuple[float, float]:
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def _chosen(left_out: dict[int, np.ndarray]) -> int:
    """The fewest categories than which the best number is not better, be it by chance or by too little."""
    best = max(left_out.values(), key=np.mean)
    for categories in sorted(left_out):
        mean, error = _mean_and_error(best - left_out[categories])
        if mean <= max(ERRORS * error, LEAST_GAIN):
            return categories
    raise AssertionError("the best number is not better than itself")
