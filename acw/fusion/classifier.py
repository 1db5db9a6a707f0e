"""Category inference: p(category | image), a softmax regression on the backbones' pooled features."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import softmax

# Inverse strengths of the L2 penalty that cross-validation chooses from.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
# Share of the development images that are taken for unlike all others. At .05, a third of photographs of crowds and of
# grey interiors were recognised as unlike eight categories of other photographs; but of the built-in displays so many
# were taken for unlike that .07 bit were lost on them (docs/log.md).
UNLIKE = 0.01


@dataclass(frozen=True)
class CategoryClassifier:
    """Softmax regression on standardised features.

    mean, scale: (D,) of the features. weight: (G, D), bias: (G,). accuracy: share of development images whose category
    was inferred rightly by a classifier that did not train on their fold. centroids: (G, D) mean standardised features
    of each category; farthest: how far an image may be from the nearest of them (mean square over features) before it
    is unlike all that is known. Without either, none is.
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    accuracy: float
    centroids: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    farthest: float = math.inf

    def probabilities(self, pooled: np.ndarray) -> np.ndarray:
        """(N, G) float64: p(category | image) from pooled features (N, D)."""
        return softmax((pooled - self.mean) / self.scale @ self.weight.T + self.bias, axis=1)

    def shares(self, pooled: np.ndarray) -> np.ndarray:
        """(N, G + 1) float64 with sum 1: p(category | image), or all of it in the last, unlike all categories."""
        known = self.probabilities(pooled)
        unlike = np.zeros(len(pooled), dtype=bool)
        if len(self.centroids):
            unlike = _distance((pooled - self.mean) / self.scale, self.centroids) > self.farthest
        return np.column_stack([np.where(unlike[:, None], 0, known), unlike])


def _distance(standard: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N,) mean square over features, to the nearest of (G, D)."""
    return np.min([np.square(standard - centroid).mean(1) for centroid in centroids], axis=0)


def _centroids(standard: np.ndarray, category: np.ndarray) -> np.ndarray:
    return np.stack([standard[category == c].mean(0) for c in np.unique(category)])


def fit(pooled: np.ndarray, category: np.ndarray, categories: int, fold: np.ndarray) -> CategoryClassifier:
    """Fits on all images, the penalty chosen by out-of-fold log-loss.

    pooled: (N, D) features; category: (N,) int64 in 0..categories-1, each present; fold: (N,) of the cross-validation.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from threadpoolctl import threadpool_limits

    mean, scale = pooled.mean(0), pooled.std(0) + 1e-6
    standard = (pooled - mean) / scale
    apart = np.empty(len(pooled))
    for left_out in np.unique(fold):
        inside = fold != left_out
        apart[~inside] = _distance(standard[~inside], _centroids(standard[inside], category[inside]))
    farthest = float(np.quantile(apart, 1 - UNLIKE))
    if categories == 1:
        centroids = _centroids(standard, category)
        return CategoryClassifier(mean, scale, np.zeros((1, pooled.shape[1])), np.zeros(1), 1.0, centroids, farthest)
    # With an L2 penalty the weights lie in the span of the images, which are fewer than the features: rotated into an
    # orthonormal basis of it, the same problem is an order of magnitude smaller.
    basis = np.linalg.svd(standard, full_matrices=False)[2]
    rotated = standard @ basis.T

    def fitted(penalty: float, chosen: np.ndarray) -> CategoryClassifier:
        # Thousands of products of small matrices: with two threads, they spend nine tenths of the time on each other.
        with threadpool_limits(1):
            regression = LogisticRegression(C=penalty, max_iter=1000).fit(rotated[chosen], category[chosen])
        weight, bias = regression.coef_, regression.intercept_
        if categories == 2:  # scikit-learn keeps only the second class's row of a symmetric pair
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        assert weight.shape[0] == categories
        return CategoryClassifier(mean, scale, weight @ basis, bias, 0.0)

    results = {}
    for penalty in PENALTIES:
        inferred = np.zeros((len(pooled), categories))
        for left_out in np.unique(fold):
            inferred[fold == left_out] = fitted(penalty, fold != left_out).probabilities(pooled[fold == left_out])
        accuracy = float((inferred.argmax(1) == category).mean())
        results[penalty] = (-log_loss(category, inferred, labels=range(categories)), accuracy)
    penalty = max(results, key=lambda p: results[p][0])
    final = fitted(penalty, np.full(len(pooled), True))
    accuracy = results[penalty][1]
    return CategoryClassifier(mean, scale, final.weight, final.bias, accuracy, _centroids(standard, category), farthest)
