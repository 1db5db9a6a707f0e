"""Finalizers against PyTorch's own resizing, and densities that are the same on the grid, at pixels and in full."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import make_interp_spline
from torch import Tensor

from acw.features.tensors import Features
from acw.heads import readout
from acw.heads.ensemble import ensemble
from acw.heads.finalizer import Finalizer, finalize, normalise, spline_matrix

STEPS = ((16, 30), (64, 120), (512, 960))
FINALIZERS = [Finalizer(), Finalizer("nearest", 2.0), Finalizer("nearest", 8.0), Finalizer("bicubic", 8.0, STEPS)]


def map_of(size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def unsmoothed(priority: Tensor, grid: tuple[int, int], how: Finalizer) -> Tensor:
    """What a head without smoothing and centre bias makes of a priority map (h, w)."""
    bank = readout.new_heads(3, 0.0, [0])
    return finalize(bank, priority[None, None], torch.zeros(1, *grid), how)[0, 0]


def test_progressive_upsampling_goes_through_the_papers_sizes() -> None:
    """8x15 -> 16x30 -> 64x120 -> the grid of 8 px cells of a 1080x1920 image; 512x960 is finer than that."""
    how = Finalizer("bicubic", 8.0, STEPS)
    grid = how.grid((1080, 1920))
    assert grid == (135, 240)
    expected = map_of((8, 15))[None, None]
    for size in (*STEPS[:2], grid):
        expected = F.interpolate(expected, size, mode="bicubic", align_corners=False)
    torch.testing.assert_close(unsmoothed(map_of((8, 15)), grid, how), expected[0, 0], rtol=1e-4, atol=1e-4)


def test_steps_of_another_image_are_scaled_with_its_long_side() -> None:
    how = Finalizer("bicubic", 2.0, STEPS[:2])
    grid = how.grid((800, 600))  # upright: 120 cells along its height
    expected = map_of((12, 9))[None, None]
    for size in ((28, 23), (114, 90), grid):
        expected = F.interpolate(expected, size, mode="bicubic", align_corners=False)
    torch.testing.assert_close(unsmoothed(map_of((12, 9)), grid, how), expected[0, 0], rtol=1e-4, atol=1e-4)


def test_no_weight_is_a_denormal_number() -> None:
    """Some CPUs multiply those thirty times slower than others; a spline's fade by a factor of four a cell."""
    how, size = Finalizer(), (600, 800)
    target = how.target_map(np.array([3.0, 790.0]), np.array([5.0, 300.0]), size, how.grid(size))
    for weights in (spline_matrix(100, 800), target):
        assert weights[weights != 0].abs().min() > 1e-30
    exact = make_interp_spline(np.arange(100) + 0.5, np.eye(100))((np.arange(800) + 0.5) / 8)
    assert (spline_matrix(100, 800).double() - torch.from_numpy(exact)).abs().max() < 1e-7


def test_nearest_is_pytorchs_both_times() -> None:
    how, size = Finalizer("nearest", 2.0), (75, 101)
    grid = how.grid(size)
    assert grid == (37, 50)
    on_grid = F.interpolate(map_of((5, 7))[None, None], grid, mode="nearest")
    torch.testing.assert_close(unsmoothed(map_of((5, 7)), grid, how), on_grid[0, 0])
    full = normalise(F.interpolate(on_grid, size, mode="nearest")[0, 0])
    torch.testing.assert_close(how.upsample(on_grid[0, 0], size), full)


@pytest.mark.parametrize("how", FINALIZERS, ids=lambda how: f"{how.upsampling}-{how.cell:g}")
def test_fixations_are_read_from_the_full_map(how: Finalizer) -> None:
    """At odd sizes too: `at_pixels`, and the mean that `target_map` takes, up to the map's normalisation."""
    size = (61, 95)
    log_density = normalise(map_of(how.grid(size)))
    generator = np.random.default_rng(0)
    y, x = generator.random((2, 30)) * np.array(size)[:, None]
    full = how.upsample(log_density, size)
    assert float(full.logsumexp((0, 1))) == pytest.approx(0, abs=1e-5)
    expected = full[y.astype(int), x.astype(int)].double().numpy()
    found = how.at_pixels(log_density, x, y, size)
    # One number: how the map's mass on the grid differs from its mass over the pixels.
    np.testing.assert_allclose(found - expected, found[0] - expected[0], atol=1e-5)
    mean = float((how.target_map(x, y, size, how.grid(size)) * log_density).sum())
    pixels_per_cell = math.prod(size) / log_density.numel()
    assert mean - math.log(pixels_per_cell) == pytest.approx(found.mean(), abs=1e-5)


def test_each_head_is_normalised_over_the_images_pixels() -> None:
    """Not over the cells, of which nearest upsampling repeats some once more than others."""
    how, size = Finalizer("nearest", 8.0), (45, 61)
    grid, area = how.grid(size), how.area(size)
    assert area is not None
    taps = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    features = Features([taps], taps.mean((1, 2, 3)), taps.var((1, 2, 3), correction=0), (4, 6))
    bank = readout.new_heads(5, 4.0, [1, 2, 3])
    bank["conv5.weight"] *= 40
    bias = map_of(grid)
    maps = finalize(bank, readout.readout(bank, features), bias.expand(3, -1, -1), how)[:, 0]
    expected = torch.stack([how.upsample(one, size).exp() for one in maps]).mean(0).log()
    actual = how.upsample(ensemble(bank, features, bias, how, area)[0], size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert Finalizer("nearest", 8.0).area((48, 64)) is None
