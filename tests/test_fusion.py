"""Mixtures: EM against a general optimiser, images that count equally, and honest category weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from acw.fusion import category_weights
from acw.fusion.category_weights import EM_GAP, PRIOR_STRENGTHS, Likelihoods, em, mix


def random_likelihoods(images: int, models: int, twins: float, seed: int) -> Likelihoods:
    """Log-densities with images of different sizes; the last model is the first but for noise of the size `twins`."""
    generator = np.random.default_rng(seed)
    image = np.repeat(np.arange(images), generator.integers(1, 30, images))
    # A part common to all models, as some fixations are hard for each of them.
    log_p = -13 + generator.normal(0, 1.5, (len(image), 1)) + generator.normal(0, 1, (len(image), models))
    log_p[:, -1] = log_p[:, 0] + twins * generator.normal(0, 1, len(image))
    return Likelihoods(log_p, image, images)


def objective(likelihoods: Likelihoods, counts: np.ndarray, prior: np.ndarray, weights: np.ndarray) -> float:
    """By its definition: counts (N,), prior (B,), weights (B,)."""
    log_mixture = np.log(np.exp(likelihoods.log_p + 13) @ weights) - 13
    means = np.array([log_mixture[likelihoods.image == i].mean() for i in range(likelihoods.images)])
    held = prior > 0
    return float(counts @ means + prior[held] @ np.log(np.maximum(weights[held], 1e-300)))


def best_of_slsqp(likelihoods: Likelihoods, counts: np.ndarray, prior: np.ndarray) -> float:
    models = likelihoods.log_p.shape[1]
    mass = counts.sum() + prior.sum()
    starts = [np.full(models, 1 / models), *np.random.default_rng(0).dirichlet(np.ones(models), 4)]
    found = [
        minimize(
            lambda w: -objective(likelihoods, counts, prior, np.maximum(w, 1e-12) / np.maximum(w, 1e-12).sum()) / mass,
            start,
            method="SLSQP",
            bounds=[(0, 1)] * models,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        for start in starts
    ]
    return -min(one.fun for one in found) * mass


@pytest.mark.parametrize("twins", [1.0, 1e-2, 1e-4], ids=["different", "near twins", "twins"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 40.0])
def test_em_finds_the_optimum(twins: float, strength: float) -> None:
    for seed in range(3):
        likelihoods = random_likelihoods(25, 4, twins, seed)
        generator = np.random.default_rng(seed)
        counts = generator.integers(0, 4, 25).astype(float)
        # One model without a prior, which may then end with the weight 0.
        prior = strength * np.append(0, generator.dirichlet(np.ones(3)))
        weights = em(likelihoods, counts[:, None], prior[None])[0]
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        mass = counts.sum() + prior.sum()
        reached = objective(likelihoods, counts, prior, weights)
        assert reached >= best_of_slsqp(likelihoods, counts, prior) - 2 * EM_GAP * mass
        for other in generator.dirichlet(np.ones(4), 200):
            assert reached >= objective(likelihoods, counts, prior, other) - 2 * EM_GAP * mass


def hard_problem(seed: int) -> tuple[Likelihoods, np.ndarray, np.ndarray]:
    """Few fixations, up to 8 models, exact and near twins, likelihoods that span many decades, priors near 0."""
    generator = np.random.default_rng(seed)
    models, images = int(generator.integers(2, 9)), int(generator.integers(1, 30))
    fixations = int(generator.integers(images, images * 6 + 1))
    image = np.sort(np.append(np.arange(images), generator.integers(0, images, fixations - images)))
    log_p = generator.normal(-13, [1, 4, 0.1, 10][seed % 4], (fixations, models))
    if generator.random() < 0.5:
        log_p[:, -1] = log_p[:, 0] + 10.0 ** -generator.integers(1, 9) * generator.normal(size=fixations)
    if generator.random() < 0.3:
        log_p[:, -1] = log_p[:, 0]
    counts = np.append(1.0, generator.integers(0, 3, images - 1))
    strength = generator.choice([0, 1e-3, 1, 300])
    prior = strength * generator.dirichlet(np.full(models, 0.3)) * (generator.random(models) < 0.8)
    return Likelihoods(log_p, image, images), counts, prior


def test_em_arrives_whatever_the_problem() -> None:
    """By the optimality conditions: no weight could gain by more than the gap that EM promises."""
    for seed in range(300):
        likelihoods, counts, prior = hard_problem(seed)
        weights = em(likelihoods, counts[:, None], prior[None])[0]
        assert weights.min() >= 0
        assert (weights[prior > 0] > 0).all()
        share = (counts / np.bincount(likelihoods.image))[likelihoods.image]
        p = np.exp(likelihoods.log_p - likelihoods.log_p.max(1, keepdims=True))
        slope = p.T @ (share / (p @ weights))
        slope[prior > 0] += prior[prior > 0] / weights[prior > 0]
        assert slope.max() / (counts.sum() + prior.sum()) - 1 < 2 * EM_GAP, seed


def test_em_finds_a_vertex_and_a_needle() -> None:
    """Optima on the simplex's edge, where multiplicative steps are slowest: the worst model's weight must vanish."""
    generator = np.random.default_rng(0)
    image = np.repeat(np.arange(40), 10)
    best = generator.normal(-12, 1, len(image))
    worse = best - generator.exponential(0.05, len(image))
    rarely = np.where(np.arange(len(image)) % 100 == 0, best + 5, best - 5)
    likelihoods = Likelihoods(np.stack([best, worse, rarely], 1), image, 40)
    counts, prior = np.ones(40), np.zeros(3)
    weights = em(likelihoods, counts[:, None], prior[None])[0]
    reached = objective(likelihoods, counts, prior, weights)
    assert reached >= best_of_slsqp(likelihoods, counts, prior) - 2 * EM_GAP * 40
    assert weights[1] < 1e-2
    assert 1e-3 < weights[2] < 0.1


def test_problems_solved_side_by_side_are_those_solved_alone() -> None:
    likelihoods = random_likelihoods(30, 3, 1.0, 0)
    generator = np.random.default_rng(1)
    columns = category_weights.EM_COLUMNS + 4
    counts = generator.integers(0, 3, (30, columns)).astype(float)
    prior = generator.exponential(1, (columns, 3)) * generator.choice([0.0, 1.0, 50.0], (columns, 1))
    together = em(likelihoods, counts, prior)
    alone = np.concatenate([em(likelihoods, counts[:, [r]], prior[[r]]) for r in range(columns)])
    np.testing.assert_allclose(together, alone, atol=2e-3)
    for r in range(columns):
        values = [objective(likelihoods, counts[:, r], prior[r], weights[r]) for weights in (together, alone)]
        assert values[0] == pytest.approx(values[1], abs=EM_GAP * (counts[:, r].sum() + prior[r].sum()))


def test_images_count_equally_however_many_fixations_they_have() -> None:
    likelihoods = random_likelihoods(12, 3, 1.0, 0)
    repeats = np.where(likelihoods.image == 4, 10, 1)
    repeated = Likelihoods(likelihoods.log_p.repeat(repeats, 0), likelihoods.image.repeat(repeats), 12)
    group = np.arange(12) % 2
    np.testing.assert_allclose(
        category_weights.global_weights(repeated), category_weights.global_weights(likelihoods), atol=1e-9
    )
    expected, actual = (category_weights.fit(one, group, 2, 0) for one in (likelihoods, repeated))
    np.testing.assert_allclose(actual.weights, expected.weights, atol=1e-9)
    np.testing.assert_allclose(actual.left_out, expected.left_out, atol=1e-9)


def sampled(weights: np.ndarray, images: int, fixations: int, seed: int) -> tuple[Likelihoods, np.ndarray]:
    """Fixations drawn from a mixture whose weights are a row a group, of densities over 60 places, new in each."""
    generator = np.random.default_rng(seed)
    group = np.arange(images) % len(weights)
    log_p = []
    for g in group:
        densities = generator.dirichlet(np.full(60, 0.3), weights.shape[1]) + 1e-4
        densities /= densities.sum(1, keepdims=True)
        places = generator.choice(60, fixations, p=weights[g] @ densities)
        log_p.append(np.log(densities[:, places]).T)
    image = np.repeat(np.arange(images), fixations)
    return Likelihoods(np.concatenate(log_p), image, images), group


def test_fit_recovers_the_weights_that_the_fixations_were_drawn_with() -> None:
    truth = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    likelihoods, group = sampled(truth, images=120, fixations=40, seed=0)
    fitted = category_weights.fit(likelihoods, group, 2, seed=0)
    np.testing.assert_allclose(fitted.weights, truth, atol=0.05)
    np.testing.assert_allclose(fitted.global_weights, truth.mean(0), atol=0.03)
    assert (fitted.low <= fitted.weights).all()
    assert (fitted.weights <= fitted.high).all()
    assert (fitted.high - fitted.low).max() < 0.1
    assert fitted.strength < 30
    assert fitted.crossvalidation[fitted.strength] > fitted.crossvalidation[math.inf] + 0.01
    assert fitted.crossvalidation[fitted.strength] == pytest.approx(fitted.left_out.mean())


def test_categories_that_do_not_differ_get_the_global_weights() -> None:
    likelihoods, _ = sampled(np.array([[0.6, 0.4]]), images=60, fixations=15, seed=1)
    fitted = category_weights.fit(likelihoods, np.arange(60) % 12, 12, seed=0)
    assert fitted.strength >= 10
    assert np.abs(fitted.weights - fitted.global_weights).max() < 0.1


def test_an_infinite_prior_is_the_global_weights_and_a_large_one_is_close() -> None:
    likelihoods, group = sampled(np.array([[0.8, 0.2], [0.2, 0.8]]), images=30, fixations=20, seed=2)
    overall = category_weights.global_weights(likelihoods)
    infinite, large = category_weights._fit_groups(likelihoods, group, 2, overall, [math.inf, 1e6])
    np.testing.assert_array_equal(infinite, np.stack([overall, overall]))
    np.testing.assert_allclose(large, infinite, atol=1e-3)
    assert math.inf in PRIOR_STRENGTHS
    assert 0 in PRIOR_STRENGTHS


def test_crossvalidation_never_fits_on_the_image_it_scores() -> None:
    """With weights that do not depend on an image's own densities, its likelihood is linear in them."""
    likelihoods, group = sampled(np.array([[0.7, 0.3], [0.4, 0.6]]), images=20, fixations=1, seed=3)
    for image in (0, 7, 19):
        scores = []
        for own in (np.array([1.0, 3.0]), np.array([2.0, 0.5]), np.array([3.0, 3.5])):
            log_p = likelihoods.log_p.copy()
            log_p[image] = np.log(own)
            result = category_weights._crossvalidate(Likelihoods(log_p, likelihoods.image, 20), group, 2, seed=0)
            scores.append(np.array([result[strength][image] for strength in PRIOR_STRENGTHS]))
        np.testing.assert_allclose(np.exp(scores[2]), np.exp(scores[0]) + np.exp(scores[1]), rtol=1e-9)


def test_a_group_without_images_gets_the_global_weights() -> None:
    likelihoods, group = sampled(np.array([[0.8, 0.2], [0.3, 0.7]]), images=40, fixations=20, seed=4)
    fitted = category_weights.fit(likelihoods, group * 2, 3, seed=0)
    np.testing.assert_allclose(fitted.weights[1], fitted.global_weights)
    assert (fitted.low[1] <= fitted.weights[1]).all()
    assert (fitted.weights[1] <= fitted.high[1]).all()


def test_mix_adds_densities_and_not_their_logarithms() -> None:
    log_densities = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).flatten(1).log_softmax(1)
    weights = torch.tensor([0.6, 0.4, 0.0])
    mixed = mix(log_densities, weights)
    torch.testing.assert_close(mixed, torch.tensordot(weights, log_densities.exp(), 1).log())
    torch.testing.assert_close(mixed.logsumexp(0), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert (mixed - torch.tensordot(weights, log_densities, 1)).abs().max() > 0.1
    torch.testing.assert_close(mix(log_densities - 500, weights), mixed - 500)  # where exp underflows


def test_mean_log_likelihood_with_weights_an_image_and_oracle() -> None:
    likelihoods = random_likelihoods(9, 3, 1.0, 5)
    best = category_weights.oracle(likelihoods)
    reached = likelihoods.mean_log_likelihood(best)
    for weights in np.random.default_rng(0).dirichlet(np.ones(3), 50):
        shared = likelihoods.mean_log_likelihood(weights)
        for i in range(9):
            alone = np.log(np.exp(likelihoods.log_p[likelihoods.image == i]) @ weights).mean()
            assert shared[i] == pytest.approx(alone)
        assert (reached >= shared - 2 * EM_GAP).all()
