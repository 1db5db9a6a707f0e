"""Confidence intervals of a mean over images."""

from __future__ import annotations

import numpy as np

SAMPLES = 1000


def interval(
    values: np.ndarray, category: np.ndarray, *, samples: int = SAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over images, and the ends of its 95 % percentile-bootstrap interval, images resampled within category.

    `values` is float, (N,) or (N, M): M scores of N images, whose categories are `category` ((N,), any labels).
    Returns mean, low end and high end, each of shape () or (M,). The interval of a paired difference is that of the
    difference of the values. All columns share their resamples, and the same seed gives the same interval. A category
    of one image adds no variance.
    Raises ValueError if there are no images, a value is NaN or infinite, or the lengths differ.
    """
    mean, sampled = _resampled(values, category, samples, seed)
    low, high = np.quantile(sampled, [0.025, 0.975], axis=0)
    return mean, low, high


def ratio_interval(
    values: np.ndarray, by: np.ndarray, category: np.ndarray, *, seed: int = 0
) -> tuple[float, float, float]:
    """As `interval`, of the mean of `values` over the mean of `by`, both float (N,) of the same images."""
    mean, sampled = _resampled(np.stack([values, by], 1), category, SAMPLES, seed)
    low, high = np.quantile(sampled[:, 0] / sampled[:, 1], [0.025, 0.975])
    return float(mean[0] / mean[1]), float(low), float(high)


def _resampled(values: np.ndarray, category: np.ndarray, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over images, and (samples, ...) means of images that are resampled within category."""
    values, category = np.asarray(values, np.float64), np.asarray(category)
    if not len(values) or category.shape != values.shape[:1]:
        raise ValueError(f"{len(values)} values and {category.shape} categories: one category for each image is needed")
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} values are NaN or infinite: no mean exists")
    rng = np.random.default_rng(seed)
    mean = values.mean(axis=0)
    deviations = np.zeros((samples, *values.shape[1:]))
    for label in np.unique(category):
        members = values[category == label]
        # How often each image is drawn: then all columns' resampled sums are one matrix product.
        drawn = rng.integers(len(members), size=(samples, len(members))) + len(members) * np.arange(samples)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        deviations += counts @ (members - members.mean(axis=0))
    return mean, mean + deviations / len(values)
