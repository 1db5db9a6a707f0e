"""Bootstrap intervals against the normal theory of a stratified mean."""

from __future__ import annotations

import numpy as np
import pytest

from acw.evaluation.bootstrap import interval


def test_interval_is_that_of_a_stratified_mean() -> None:
    rng = np.random.default_rng(0)
    category = np.repeat(["a", "b", "c"], [40, 100, 260])
    # Categories differ far more than images within them: resampling all images together would be 10 times too wide.
    values = rng.normal(size=400) + 20 * (category == "a")
    mean, low, high = interval(values, category, samples=4000)
    variances = {label: values[category == label].var() for label in "abc"}
    half = 1.96 * np.sqrt(sum(np.sum(category == label) * variances[label] for label in "abc")) / 400
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.06)


def test_interval_holds_the_true_mean_in_95_percent_of_data_sets() -> None:
    category = np.repeat([0, 1], [40, 80])
    data_sets = np.random.default_rng(0).exponential(size=(120, 1000)) + category[:, None]
    _, low, high = interval(data_sets, category)
    covered = np.mean((low < 1 + 80 / 120) & (high > 1 + 80 / 120))
    assert 0.92 < covered < 0.97


def test_columns_and_repeats_give_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=(30, 4))
    category = np.tile([0, 1, 2], 10)
    together = np.array(interval(values, category, seed=3))
    alone = np.array([interval(values[:, k], category, seed=3) for k in range(4)]).T
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    assert not np.array_equal(together, interval(values, category, seed=4))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_without_a_mean_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 values are NaN or infinite"):
        interval(np.array([0.0, bad]), np.array(["a", "a"]))
