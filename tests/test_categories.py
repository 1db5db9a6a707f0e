"""Category inference: scikit-learn's softmax regression, the penalty and the accuracy from images left out."""

from __future__ import annotations

import numpy as np
import pytest

from acw.fusion.classifier import PENALTIES, fit


def clusters(count: int, apart: float, dimensions: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of as many clusters, of very different scales, `apart` in widths; the category and fold of each."""
    generator = np.random.default_rng(count)
    category = np.arange(30 * count) % count
    centres = generator.normal(0, apart, (count, dimensions))
    scale = 10.0 ** generator.integers(-3, 4, dimensions)
    pooled = (centres[category] + generator.normal(size=(30 * count, dimensions))) * scale + 5 * scale
    return pooled, category, generator.permutation(30 * count) % 5


@pytest.mark.parametrize(("count", "apart"), [(2, 0.2), (2, 0.7), (5, 0.2), (5, 0.7)])
def test_probabilities_are_scikit_learns_with_the_penalty_that_predicts_best(count: int, apart: float) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, log_loss
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.preprocessing import StandardScaler

    pooled, category, fold = clusters(count, apart)
    standard = StandardScaler().fit_transform(pooled)
    plain = [LogisticRegression(C=penalty, max_iter=1000) for penalty in PENALTIES]
    inferred = [
        cross_val_predict(one, standard, category, cv=PredefinedSplit(fold), method="predict_proba") for one in plain
    ]
    best = int(np.argmin([log_loss(category, one) for one in inferred]))
    classifier = fit(pooled, category, count, fold)
    probabilities = classifier.probabilities(pooled)
    assert probabilities.shape == (30 * count, count)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
    expected = plain[best].fit(standard, category).predict_proba(standard)
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)
    assert classifier.accuracy == pytest.approx(accuracy_score(category, inferred[best].argmax(1)))


def test_separate_clusters_are_told_apart() -> None:
    pooled, category, fold = clusters(5, apart=3.0)
    classifier = fit(pooled, category, 5, fold)
    assert classifier.accuracy > 0.99
    assert (classifier.probabilities(pooled).argmax(1) == category).all()


def test_labels_that_mean_nothing_are_inferred_at_chance() -> None:
    """More features than images: only a classifier that never saw an image's fold is honest about it."""
    generator = np.random.default_rng(0)
    pooled, category = generator.normal(size=(300, 400)), np.arange(300) % 5
    classifier = fit(pooled, category, 5, generator.permutation(300) % 5)
    assert abs(classifier.accuracy - 0.2) < 0.07
    assert (classifier.probabilities(pooled).argmax(1) == category).mean() > 0.5


def test_a_single_category_is_certain() -> None:
    pooled = np.random.default_rng(0).normal(size=(10, 4))
    classifier = fit(pooled, np.zeros(10, dtype=np.int64), 1, np.arange(10) % 5)
    np.testing.assert_array_equal(classifier.probabilities(pooled), np.ones((10, 1)))
    assert classifier.accuracy == 1
