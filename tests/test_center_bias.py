"""The centre bias: a density where we know the truth, chosen on images that were left out, and the formula of ACW."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import truncnorm

from acw.data import Dataset, Stimulus, split
from acw.heads import center_bias
from acw.heads.center_bias import BANDWIDTHS, GRID, CenterBias, fixed_gaussian, kde
from acw.recipes import Recipe
from acw.training.training_set import training_set


def gaussian_and_uniform(count: int, seed: int, sd: float = 0.12, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """x and y in [0, 1): from a Gaussian at (0.45, 0.55), and the given share from everywhere."""
    generator = np.random.default_rng(seed)
    points = generator.normal([0.45, 0.55], sd, (count * 2, 2))
    points = points[((points >= 0) & (points < 1)).all(1)][:count]
    anywhere = generator.random(count) < share
    points[anywhere] = generator.random((anywhere.sum(), 2))
    return points[:, 0], points[:, 1]


def truth(x: np.ndarray, y: np.ndarray, sd: float = 0.12, share: float = 0.2) -> np.ndarray:
    axes = [truncnorm(-c / sd, (1 - c) / sd, c, sd).pdf(values) for c, values in ((0.45, x), (0.55, y))]
    return np.log((1 - share) * axes[0] * axes[1] + share)


def at(bias: CenterBias, x: np.ndarray, y: np.ndarray, size: tuple[int, int] = (400, 500)) -> np.ndarray:
    """Log-density relative to uniform."""
    values = bias.of_size(size)[(y * size[0]).astype(int), (x * size[1]).astype(int)]
    return values + np.log(size[0] * size[1])


def test_the_kde_recovers_a_known_density() -> None:
    x, y = gaussian_and_uniform(6000, seed=0)
    bias = kde(x, y, np.arange(6000) // 30)
    fresh = gaussian_and_uniform(20000, seed=1)
    gap = truth(*fresh).mean() - at(bias, *fresh).mean()
    assert 0 < gap < 0.015
    assert truth(*fresh).mean() > 0.8, "the truth must be far from uniform for this to mean anything"


def test_the_density_is_that_of_scikit_learns_kde() -> None:
    """Away from the borders, where the kernel's mass outside the image counts for nothing."""
    from sklearn.neighbors import KernelDensity

    generator = np.random.default_rng(0)
    x, y = generator.normal(0.5, 0.05, (2, 400)).clip(0.3, 0.7)
    bias = kde(x, y, np.arange(400) // 10)
    assert bias.bandwidth is not None
    assert bias.uniform_weight is not None
    assert bias.bandwidth < 0.06
    reference = KernelDensity(bandwidth=bias.bandwidth).fit(np.stack([x, y], 1))
    centres = (np.arange(GRID) + 0.5) / GRID
    grid = np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)
    expected = (1 - bias.uniform_weight) * np.exp(reference.score_samples(grid)) + bias.uniform_weight
    actual = np.exp(bias.log_density.ravel().astype(np.float64)) * GRID**2
    # A fixation is moved to the centre of its cell, which widens the kernel by a cell's 1/sqrt(12).
    np.testing.assert_allclose(actual, expected, atol=0.03 * expected.max())
    assert np.abs(actual - expected).mean() < 0.02 * expected.mean()


def test_the_bandwidth_is_chosen_by_the_likelihood_of_images_left_out() -> None:
    from sklearn.neighbors import KernelDensity

    x, y = gaussian_and_uniform(600, seed=2)
    image = np.arange(600) // 15
    bias = kde(x, y, image)
    points = np.stack([x, y], 1)
    scores = []
    for bandwidth in BANDWIDTHS:
        density = np.empty(600)
        for fold in range(10):
            test = image % 10 == fold
            density[test] = np.exp(KernelDensity(bandwidth=bandwidth).fit(points[~test]).score_samples(points[test]))
        scores.append(max(np.log((1 - share) * density + share).mean() for share in np.geomspace(1e-3, 0.8, 40)))
    best = int(np.argmax(scores))
    assert 0 < best < len(BANDWIDTHS) - 1
    assert bias.bandwidth in BANDWIDTHS[best - 1 : best + 2]


def test_left_out_are_images_and_not_fixations() -> None:
    """Images in which people look at one spot of its own: a KDE that has seen the image would be sharp."""
    generator = np.random.default_rng(0)
    spots = generator.normal(0.5, 0.15, (40, 2)).clip(0.1, 0.9)
    x, y = (spots.repeat(25, 0) + generator.normal(0, 0.005, (1000, 2))).T
    bias = kde(x, y, np.arange(1000) // 25)
    assert bias.bandwidth is not None
    assert bias.bandwidth > 0.04
    shuffled = kde(x, y, generator.permutation(1000) // 25)
    assert shuffled.bandwidth == BANDWIDTHS[0]


def test_images_count_equally() -> None:
    x, y = gaussian_and_uniform(300, seed=3)
    image = np.arange(300) // 10
    repeats = np.where(image == 7, 20, 1)
    bias = kde(x, y, image)
    repeated = kde(x.repeat(repeats), y.repeat(repeats), image.repeat(repeats))
    np.testing.assert_allclose(repeated.log_density, bias.log_density, atol=1e-5)
    relabelled = kde(x, y, image * 17 + 3)
    np.testing.assert_array_equal(relabelled.log_density, bias.log_density)


@pytest.mark.parametrize("size", [(1, 1), (3, 300), (60, 80), (GRID, GRID), (601, 799)])
def test_it_is_normalised_at_any_size(size: tuple[int, int]) -> None:
    x, y = gaussian_and_uniform(200, seed=4)
    for bias in (kde(x, y, np.arange(200) // 10), fixed_gaussian()):
        log_density = bias.of_size(size)
        assert log_density.shape == size
        assert log_density.dtype == np.float32
        assert logsumexp(log_density.astype(np.float64)) == pytest.approx(0, abs=1e-4)


def paper(size: tuple[int, int]) -> np.ndarray:
    y, x = ((np.arange(cells) + 0.5) / cells * 2 - 1 for cells in size)
    log_density = -(y[:, None] ** 2 + x[None] ** 2) / (2 * 0.5**2)
    return log_density - logsumexp(log_density)


def test_the_fixed_gaussian_is_the_papers() -> None:
    np.testing.assert_allclose(fixed_gaussian().log_density, paper((GRID, GRID)), rtol=0, atol=2e-6)
    # Elsewhere it is interpolated linearly; only pixels beyond the outermost cells' centres are off by more.
    for size in ((75, 100), (270, 480), (1080, 1920)):
        difference = np.abs(fixed_gaussian().of_size(size) - paper(size))
        margin = [int(np.ceil(cells / GRID / 2)) for cells in size]
        assert difference[margin[0] : -margin[0], margin[1] : -margin[1]].max() < 1e-3
        assert difference.max() < 0.07


def dataset(seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    stimuli = tuple(Stimulus(f"{i:02d}.png", "", (100 + i, 200), "all", None, f"{i}") for i in range(30))
    image = np.arange(30, dtype=np.int32).repeat(20)
    x, y = generator.normal(0.5, 0.1, (2, 600)).clip(0, 0.99)
    heights = np.array([stimulus.size[0] for stimulus in stimuli])[image]
    x, y = x * 200, y * heights
    subject = np.full(600, -1, dtype=np.int32)
    return Dataset("made up", "csv", "", stimuli, image, x, y, subject, 10.0, ())


def test_a_folds_centre_bias_sees_its_training_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the held-out images nor those that validate the fold, for the baseline and for what the heads add."""
    monkeypatch.setattr(center_bias, "BANDWIDTHS", (0.05, 0.1))
    recipe = Recipe("made up", backbones=("lite0",))
    data = dataset(0)
    parts = split(data, 0)
    before = training_set(data, parts, recipe)
    for moved in range(-1, recipe.folds):
        other = dataset(0)
        theirs = np.isin(other.image, np.flatnonzero(parts.fold == moved))
        other.x[theirs] *= 0.2
        after = training_set(other, parts, recipe)
        for fold in range(recipe.folds):
            unchanged = moved in (-1, fold)
            for kind in ("baseline", "finalizer_bias"):
                pair = [getattr(one, kind)[fold].log_density for one in (before, after)]
                assert np.array_equal(*pair) == unchanged, (moved, fold, kind)
