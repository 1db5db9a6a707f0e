"""The built-in displays: their density is exact, their fixations follow it, and they do not change by accident."""

from __future__ import annotations

import numpy as np
import pytest

from acw.data import known, load_dataset, synthetic
from acw.data.displays import CATEGORIES, HEIGHT, WIDTH, lay_out, oklch
from acw.storage.errors import UserError


def test_contents() -> None:
    dataset = load_dataset("synthetic")
    assert len(dataset.stimuli) == 192
    assert dataset.categories == CATEGORIES
    assert np.bincount(dataset.category_index).tolist() == [24] * 8
    assert dataset.fingerprint == synthetic.load().fingerprint
    assert len({stimulus.digest for stimulus in dataset.stimuli}) == 192
    counts = np.bincount(dataset.image)
    assert counts.min() >= 60
    assert counts.max() <= 120
    assert dataset.summary()["subjects"] == 15
    with pytest.raises(UserError, match="generated"):
        load_dataset("synthetic", reader="csv")


def test_density_is_normalised_and_fixations_follow_it() -> None:
    """The mean log-density at the fixations must be the negative entropy, within its standard error."""
    dataset = load_dataset("synthetic")
    surprise, variance = [], []
    for index in range(0, 192, 3):
        log_density = dataset.optimum_log_density(index)
        assert log_density is not None
        assert log_density.dtype == np.float32
        density = np.exp(log_density.astype(np.float64))
        assert density.sum() == pytest.approx(1, abs=1e-5)
        entropy = -(density * log_density).sum()
        x, y, _ = dataset.fixations_of(index)
        found = log_density[y.astype(int), x.astype(int)]
        surprise.append(found.sum() + len(x) * entropy)
        variance.append(len(x) * ((density * log_density**2).sum() - entropy**2))
    assert abs(sum(surprise)) < 3 * np.sqrt(sum(variance))


def test_the_optimum_is_far_above_any_one_density_for_all_images() -> None:
    """Even the mean of all densities, the best centre bias there could be, leaves 1.5 bit in every category."""
    dataset = load_dataset("synthetic")
    densities = [dataset.optimum_log_density(index) for index in range(192)]
    center_bias = np.log(np.mean([np.exp(density) for density in densities if density is not None], axis=0))
    gain = np.zeros(192)
    for index, density in enumerate(densities):
        x, y, _ = dataset.fixations_of(index)
        pixels = y.astype(int), x.astype(int)
        assert density is not None
        gain[index] = (density[pixels] - center_bias[pixels]).mean() / np.log(2)
    assert (np.bincount(dataset.category_index, gain) / 24 > 1.5).all()
    assert 2 < gain.mean() < 4


@pytest.mark.parametrize("category", CATEGORIES)
def test_pixels(category: str) -> None:
    pixels = known.stimulus_pixels(category, 3)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, known.stimulus_pixels(category, 3))
    assert (pixels != known.stimulus_pixels(category, 4)).any()
    for spot in lay_out(known.VERSION, category, 3).spots:
        assert 0 <= spot.x < WIDTH
        assert 0 <= spot.y < HEIGHT


def test_displays_stay_as_they_are_until_the_version_changes() -> None:
    """Features are stored under the version: if this fails on purpose, raise `synthetic.VERSION`."""
    assert known.VERSION == 1
    means = [known.stimulus_pixels(category, 0).mean() for category in CATEGORIES]
    assert means == pytest.approx([92.14, 106.64, 101.32, 106.17, 122.93, 109.03, 102.86, 89.89], abs=0.05)
    dataset = load_dataset("synthetic")
    assert len(dataset.x) == 17177
    assert dataset.x.mean(dtype=np.float64) == pytest.approx(250.86, abs=0.01)


def test_a_vivid_decoy_draws_nobody() -> None:
    """The big light item among colours, which would be the target among sizes, is no likelier than its surroundings."""
    display = lay_out(known.VERSION, "Colour", 0)
    density = np.exp(known.log_density("Colour", 0))
    decoys = [mark for mark in display.marks if mark.reach > 30]
    assert decoys
    target = display.spots[0]
    for decoy in decoys:
        at_target, at_decoy = density[int(target.y), int(target.x)], density[int(decoy.y), int(decoy.x)]
        assert at_decoy < at_target / 20


def test_oklch_white_black_and_red() -> None:
    assert oklch(1.0, 0.0, 0.0) == pytest.approx((255, 255, 255), abs=0.5)
    assert oklch(0.0, 0.0, 0.0) == pytest.approx((0, 0, 0), abs=0.5)
    assert oklch(0.62796, 0.25768, np.radians(29.2339)) == pytest.approx((255, 0, 0), abs=0.5)
