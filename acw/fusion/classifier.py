"""Category inference: p(category | image), a softmax regression on the backbones' pooled features."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

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


def extended(
    classifier: CategoryClassifier, pooled: np.ndarray, category: np.ndarray, fold: np.ndarray
) -> tuple[CategoryClassifier, np.ndarray]:
    """A classifier that knows further categories, to which between those that it knew nothing changes.

    pooled: (N, D) of their images; category: (N,) int64 in 0..K-1, each present in all but each fold; fold: (N,).
    Of the images that it was fitted on it has kept their centroids alone. So they are stood in for by these, scattered
    as the new images are about theirs, and the new rows are fitted to tell both apart, the old ones staying as they
    are. Also gives (N, K + 1): how likely each image is of an old category, in the first column, or of the new ones, by
    a fit without its fold.
    """
    standard = (pooled - classifier.mean) / classifier.scale
    known = classifier.centroids if len(classifier.centroids) else np.zeros((1, standard.shape[1]))
    basis = np.linalg.svd(np.concatenate([standard, known]), full_matrices=False)[2]

    def examples(chosen: np.ndarray, middles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(M, D) images and stand-ins, and 0 for a stand-in, else the number of its category from 1 on."""
        scatter = standard[chosen] - middles[category[chosen]]
        stand_ins = (known[:, None] + scatter).reshape(-1, standard.shape[1])
        label = np.concatenate([category[chosen] + 1, np.zeros(len(stand_ins), np.int64)])
        return np.concatenate([standard[chosen], stand_ins]), label

    def fitted(images: np.ndarray, label: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        rotated = np.column_stack([images @ basis.T, np.ones(len(images))])
        old = logsumexp(images @ classifier.weight.T + classifier.bias, axis=1)
        target = np.eye(int(category.max()) + 2)[label]

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            rows = flat.reshape(target.shape[1] - 1, -1)
            log_p = log_softmax(np.column_stack([old, rotated @ rows.T]), axis=1)
            free = np.column_stack([rows[:, :-1], np.zeros(len(rows))])  # of the penalty, a bias is
            slope = ((np.exp(log_p) - target).T @ rotated)[1:] + free / penalty
            return float(np.square(free).sum() / (2 * penalty) - log_p[target == 1].sum()), slope.ravel()

        start = np.zeros((target.shape[1] - 1) * rotated.shape[1])
        rows = minimize(loss, start, jac=True, method="L-BFGS-B").x.reshape(target.shape[1] - 1, -1)
        return rows[:, :-1] @ basis, rows[:, -1]

    def log_p(images: np.ndarray, rows: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        old = logsumexp(images @ classifier.weight.T + classifier.bias, axis=1)
        return log_softmax(np.column_stack([old, images @ rows[0].T + rows[1]]), axis=1)

    results = {}
    for penalty in PENALTIES:
        left_out, total = np.empty((len(pooled), int(category.max()) + 2)), 0.0
        for number in np.unique(fold):
            middles = _centroids(standard[fold != number], category[fold != number])
            rows = fitted(*examples(np.flatnonzero(fold != number), middles), penalty)
            images, label = examples(np.flatnonzero(fold == number), middles)
            inferred = log_p(images, rows)
            total += inferred[np.arange(len(label)), label].sum()
            left_out[fold == number] = np.exp(inferred[: np.count_nonzero(fold == number)])
        results[penalty] = total, left_out
    penalty = max(results, key=lambda p: results[p][0])
    middles = _centroids(standard, category)
    weight, bias = fitted(*examples(np.arange(len(pooled)), middles), penalty)
    wider = dataclasses.replace(
        classifier,
        weight=np.concatenate([classifier.weight, weight]),
        bias=np.concatenate([classifier.bias, bias]),
    )
    if len(classifier.centroids):
        wider = dataclasses.replace(wider, centroids=np.concatenate([classifier.centroids, middles]))
    return wider, results[penalty][1]
