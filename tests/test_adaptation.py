"""The numbers of category adaptation: their slopes, their maximum, what they are worth, and what they cost."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize
from torch import Tensor

from acw.evaluation.scoring import split_half
from acw.fusion import adaptation_fit
from acw.fusion.adaptation import GRID, KERNELS, adapt, blurring
from acw.fusion.adaptation_fit import (
    NONE,
    Maps,
    climb,
    fit,
    log_likelihood,
    on_grid,
    own_center_bias,
    precision,
    slopes,
    unadapted,
)
from acw.heads.center_bias import CenterBias, fixed_gaussian

SIZE = (300, 400)
DENSITY_GRID = (38, 50)
VIEWS = 3
EVEN = np.full(VIEWS, 1 / VIEWS)
BIAS = CenterBias(fixed_gaussian().log_density, 0.08, 0.01)
THETA = torch.tensor([0.1, 0.2, 0.3, 0.2, -0.4, 0.5, 0.0, -0.6, -1.2], dtype=torch.float64)


def views_of(generator: np.random.Generator) -> Tensor:
    """(VIEWS, *DENSITY_GRID) smooth log-densities, around the middle as the centre bias is."""
    coarse = torch.from_numpy(generator.normal(size=(1, VIEWS, 9, 12)))
    smooth = F.interpolate(coarse, DENSITY_GRID, mode="bicubic")[0] * 1.5
    return (smooth + torch.from_numpy(BIAS.of_size(DENSITY_GRID))).flatten(1).log_softmax(1).unflatten(1, DENSITY_GRID)


def looked_at(
    generator: np.random.Generator, images: int, theta: Tensor, fixations: int = 60, own: CenterBias | None = None
) -> Maps:
    """Images of which people look where the numbers say, with a centre bias of their own."""
    densities = [on_grid(views_of(generator)) for _ in range(images)]
    nobody = [(np.array([200.0]), np.array([150.0]))] * images
    maps = Maps.of(densities, nobody, [SIZE] * images, [BIAS] * images)
    shift = torch.zeros_like(maps.center_bias)
    if own is not None:
        shift = torch.from_numpy(own.of_size(GRID).ravel()).expand_as(shift) - maps.center_bias
    p = adaptation_fit._terms(theta.float(), maps, shift)[1].exp().double().numpy()
    where = [generator.choice(len(row), fixations, p=row / row.sum()) for row in p]
    places = [((cell % GRID[1] + 0.5) / GRID[1] * 400, (cell // GRID[1] + 0.5) / GRID[0] * 300) for cell in where]
    return Maps.of(densities, places, [SIZE] * images, [BIAS] * images)


def in_double(maps: Maps) -> Maps:
    values = {field.name: getattr(maps, field.name).double() for field in dataclasses.fields(maps)}
    fixated = values["fixated"]
    return Maps(**values | {"fixated": fixated / fixated.sum(1, keepdim=True)})


def test_the_slopes_are_autograds_and_the_information_is_what_they_vary_by() -> None:
    maps = in_double(looked_at(np.random.default_rng(0), 4, unadapted(EVEN)))
    own = own_center_bias(maps)
    theta = THETA.clone().requires_grad_(True)
    expected = torch.autograd.functional.jacobian(lambda t: log_likelihood(t, maps, own), theta)
    values, slope, information = slopes(THETA, maps, own)
    torch.testing.assert_close(values, log_likelihood(THETA, maps, own))
    torch.testing.assert_close(slope, expected, atol=1e-12, rtol=1e-9)
    # Were a fixation drawn from the density itself, each cell's own slope would vary by the information.
    p = adaptation_fit._terms(THETA, maps, own)[1].exp()
    each = torch.zeros(9, 9, dtype=torch.float64)
    for cell in np.linspace(0, p.shape[1] - 1, 400).astype(int):
        only = F.one_hot(torch.tensor(cell), p.shape[1]).double().expand_as(p)
        of_cell = slopes(THETA, dataclasses.replace(maps, fixated=only), own)[1][0]
        each += p[0, cell] * torch.outer(of_cell, of_cell)
    sampled = each / p[0, np.linspace(0, p.shape[1] - 1, 400).astype(int)].sum()
    assert (sampled - information[0]).abs().max() < 0.15 * information[0].abs().max()


def test_the_maximum_is_scipys_from_any_start() -> None:
    generator = np.random.default_rng(1)
    maps = in_double(looked_at(generator, 20, THETA, own=CenterBias(np.roll(BIAS.log_density, 20, 1), None, None)))
    own, overall = own_center_bias(maps), unadapted(EVEN)
    weight = precision(VIEWS, 1.0)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.from_numpy(theta)
        values, slope, _ = slopes(at, maps, own)
        height = values.sum() - (weight * (at - overall).square()).sum() / 2
        return -float(height), -(slope.sum(0) - weight * (at - overall)).numpy()

    best = minimize(loss, overall.numpy(), jac=True, method="BFGS", options={"gtol": 1e-6})
    for start in (overall, THETA, overall + torch.from_numpy(generator.normal(size=len(overall)))):
        found = climb(maps, own, overall, weight, start)
        assert loss(found.numpy())[0] == pytest.approx(best.fun, abs=1e-5)
        for numbers in (slice(0, 3), slice(3, 3 + VIEWS), slice(3 + VIEWS, None)):
            values, expected = found[numbers], torch.from_numpy(best.x)[numbers]
            if numbers.start:  # logarithms of shares of nearly 0 may be any
                values, expected = values.softmax(0), expected.softmax(0)
            torch.testing.assert_close(values, expected, atol=3e-3, rtol=0)


def test_what_a_kind_of_images_differs_by_is_found_and_pays() -> None:
    generator = np.random.default_rng(2)
    usual, other = unadapted(EVEN), unadapted(np.array([0.85, 0.1, 0.05]))
    other[0] = math.log(0.6)
    moved = CenterBias(np.roll(BIAS.log_density, 25, 0), None, None)
    maps = [looked_at(generator, 40, usual), looked_at(generator, 40, other)]
    other[1], other[2] = 0.5, 0.5
    maps.append(looked_at(generator, 40, other, own=moved))
    together = Maps(*(torch.cat([getattr(m, f.name) for m in maps]) for f in dataclasses.fields(Maps)))
    fitted = fit(together, EVEN, np.repeat([0, 1, 2], 40), 4, seed=0)
    assert fitted.pays
    assert math.isfinite(fitted.strength)
    found = fitted.adaptation
    np.testing.assert_allclose(found.weights[0], EVEN, atol=0.12)
    np.testing.assert_allclose(found.weights[1], [0.85, 0.1, 0.05], atol=0.12)
    np.testing.assert_allclose(found.temperature[:3], [1, 0.6, 0.6], atol=0.1)
    assert found.own_weight[2] > 0.25 > abs(found.own_weight[0])
    assert fitted.area[0] < 1.1 < fitted.area[1]
    # A category without an image has the numbers for all, and no centre bias of its own.
    for values in (found.weights, found.kernels, found.temperature, found.center_bias_weight, found.own_weight):
        np.testing.assert_array_equal(values[3], values[4])
    assert not found.own[3].any()
    assert found.own_weight[4] == 0


def test_categories_that_do_not_differ_cost_nothing() -> None:
    maps = looked_at(np.random.default_rng(3), 120, unadapted(EVEN))
    fitted = fit(maps, EVEN, np.arange(120) % 6, 6, seed=0)
    assert fitted.gain.mean() > -0.003 * math.log(2)
    assert max(fitted.crossvalidation.values()) - fitted.crossvalidation[NONE] < 0.005


def test_the_numbers_of_no_adaptation_change_nothing_and_adapting_is_what_was_fitted() -> None:
    """On the density's own grid, and on the coarse one on which numbers are fitted."""
    generator = np.random.default_rng(4)
    log_densities = views_of(generator).float()
    maps = looked_at(generator, 12, THETA)
    adaptation = fit(maps, EVEN, np.zeros(12, np.int64), 1, seed=0).adaptation
    numbers = adaptation.row(0)
    bias = torch.from_numpy(BIAS.of_size(DENSITY_GRID))
    adapted = adapt(log_densities, numbers, bias, SIZE)
    assert float(adapted.logsumexp((0, 1))) == pytest.approx(0, abs=1e-5)
    same = Maps.of([on_grid(log_densities)], [(np.array([9.0]), np.array([9.0]))], [SIZE], [BIAS])
    own = torch.from_numpy(adaptation.own[0].reshape(1, -1))
    theta = torch.tensor(
        [
            *(math.log(numbers.temperature), numbers.center_bias_weight, adaptation.own_weight[0]),
            *np.log(numbers.weights).tolist(),
            *np.log(numbers.kernels).tolist(),
        ]
    )
    expected = adaptation_fit._terms(theta.float(), same, own)[1].exp()
    assert float((torch.from_numpy(on_grid(adapted[None])).flatten(1) - expected).abs().sum()) < 0.02
    plain = dataclasses.replace(
        numbers,
        weights=EVEN,
        kernels=np.eye(len(KERNELS))[0],
        temperature=1.0,
        center_bias_weight=0.0,
        own=np.zeros(GRID, np.float32),
    )
    torch.testing.assert_close(adapt(log_densities, plain, bias, SIZE).exp(), log_densities.exp().mean(0))


def test_the_blur_is_scipys_and_loses_nothing() -> None:
    density = np.exp(views_of(np.random.default_rng(5))[0].numpy())
    for width in KERNELS[1:]:
        rows, columns = blurring(width, SIZE, DENSITY_GRID)
        blurred = (rows @ torch.from_numpy(density) @ columns.T).numpy()
        sigmas = [width * 400 * cells / px for cells, px in zip(DENSITY_GRID, SIZE, strict=True)]
        np.testing.assert_allclose(blurred, gaussian_filter(density, sigmas, mode="reflect", truncate=8), rtol=2e-3)
        assert blurred.sum() == pytest.approx(1)


def test_weights_of_half_of_the_subjects_foretell_the_other_half() -> None:
    log_p = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]))
    agree = split_half(log_p[[0, 1, 0, 1]], np.array([0, 1, 2, 3]))
    differ = split_half(log_p, np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(agree, np.log(0.9), atol=1e-3)
    np.testing.assert_allclose(differ, np.log(0.1), atol=1e-3)
    unknown = split_half(log_p, np.full(4, -1))
    np.testing.assert_allclose(unknown, np.log(0.5), atol=1e-3)
