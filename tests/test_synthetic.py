"""The built-in displays: their density is exact, their fixations follow it, and they do not change by accident."""

from __future__ import annotations

import numpy as np
import pytest

from acw.data import known, load_dataset, synthetic
from acw.data.displays import HEIGHT, WIDTH, Draws, oklch
from acw.data.folds import split
from acw.data.layouts import CATEGORIES, lay_out
from acw.recipes import named_recipe
from acw.storage.errors import UserError

COUNT = len(CATEGORIES) * synthetic.IMAGES


def test_contents() -> None:
    dataset = load_dataset("synthetic")
    assert len(dataset.stimuli) == COUNT
    assert dataset.categories == tuple(CATEGORIES)
    assert np.bincount(dataset.category_index).tolist() == [synthetic.IMAGES] * len(CATEGORIES)
    assert dataset.fingerprint == synthetic.load().fingerprint
    assert len({stimulus.digest for stimulus in dataset.stimuli}) == COUNT
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
    for index in range(0, COUNT, 7):
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


def test_pixels_are_drawn_from_the_density_along_both_axes() -> None:
    """Of a display with decay, spread and a centre bias of its own; 200,000 draws, against the sums of the density."""
    density = np.exp(known.log_density("Posters", 5).astype(np.float64))
    rows, columns = known.draw_pixels("Posters", 5, Draws("test"), 200_000)
    for axis, drawn, cells in ((1, rows, HEIGHT), (0, columns, WIDTH)):
        found, expected = np.bincount(drawn, minlength=cells) / len(drawn), density.sum(axis)
        assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() < 0.005  # Kolmogorov-Smirnov: .004 at p = .01
    together = np.histogram2d(rows, columns, bins=(8, 8), range=((0, HEIGHT), (0, WIDTH)))[0] / len(rows)
    blocks = density.reshape(8, HEIGHT // 8, 8, WIDTH // 8).sum((1, 3))
    assert np.abs(together - blocks).max() < 0.005


def test_the_optimum_is_far_above_any_one_density_for_all_images() -> None:
    """Even the mean of all densities, the best centre bias there could be, leaves 1 bit in every category."""
    dataset = load_dataset("synthetic")
    some = np.arange(0, COUNT, 4)
    densities = [dataset.optimum_log_density(index) for index in some.tolist()]
    center_bias = np.log(np.mean([np.exp(density) for density in densities if density is not None], axis=0))
    gain = np.zeros(len(some))
    for place, density in enumerate(densities):
        x, y, _ = dataset.fixations_of(int(some[place]))
        pixels = y.astype(int), x.astype(int)
        assert density is not None
        gain[place] = (density[pixels] - center_bias[pixels]).mean() / np.log(2)
    of_category = np.bincount(dataset.category_index[some], gain) / np.bincount(dataset.category_index[some])
    assert (of_category > 1).all()
    assert 1.5 < gain.mean() < 3


@pytest.mark.parametrize("category", CATEGORIES)
def test_pixels(category: str) -> None:
    pixels = known.stimulus_pixels(category, 3)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, known.stimulus_pixels(category, 3))
    assert (pixels != known.stimulus_pixels(category, 4)).any()
    mine, items = CATEGORIES[category], lay_out(known.VERSION, category, 3).items
    assert len(items) == mine.rows * mine.columns
    assert {item.kind for item in items if item.salient} == {mine.kind, *mine.among}
    for item in items:
        assert 0 <= item.x < WIDTH
        assert 0 <= item.y < HEIGHT


def test_displays_stay_as_they_are_until_the_version_changes() -> None:
    """Features are stored under the version: if this fails on purpose, raise `known.VERSION`."""
    assert known.VERSION == 2
    means = [known.stimulus_pixels(category, 0).mean() for category in CATEGORIES]
    assert means == pytest.approx([129.62, 97.28, 103.83, 111.24, 108.2, 101.6, 92.45, 102.76], abs=0.05)
    dataset = load_dataset("synthetic")
    assert len(dataset.x) == 43215
    assert dataset.x.mean(dtype=np.float64) == pytest.approx(248.07, abs=0.01)


def test_what_stands_out_beside_the_sought_draws_nobody() -> None:
    """Salient items of other kinds are no likelier than bare ground as far from every salient item that is sought."""
    for category, mine in CATEGORIES.items():
        items, density = lay_out(known.VERSION, category, 0).items, np.exp(known.log_density(category, 0))
        salient = [item for item in items if item.salient]
        targets = [item for item in salient if item.kind == mine.kind]
        peak = max(density[int(item.y), int(item.x)] for item in targets)
        decoys = [item for item in salient if item.kind != mine.kind]
        assert bool(decoys) == bool(mine.among)
        assert all(density[int(item.y), int(item.x)] < peak / 5 for item in decoys)


def test_readers_of_posters_begin_at_the_top_left() -> None:
    """Of two texts that are alike, the nearer to where reading begins is looked at more; elsewhere both alike."""
    for category, alike in (("Posters", False), ("Text", True)):
        mine, shares = CATEGORIES[category], []
        for index in range(synthetic.IMAGES):
            targets = [i for i in lay_out(known.VERSION, category, index).items if i.salient and i.kind == mine.kind]
            density = np.exp(known.log_density(category, index))
            if len(targets) == 2:
                begin = sorted(targets, key=lambda item: np.hypot(item.x / WIDTH - 0.2, item.y / HEIGHT - 0.25))
                near, far = (density[int(item.y), int(item.x)] * item.scale**2 for item in begin)
                shares.append(near / far)
        assert len(shares) > 10
        assert 0.9 < np.median(shares) < 1.1 if alike else np.median(shares) > 1.5


def test_the_demo_adapts_heads_to_half_of_the_categories_and_scores_forty_displays_of_each() -> None:
    recipe, dataset = named_recipe("displays"), load_dataset("synthetic")
    held_out = split(dataset, recipe.seed, recipe.folds, recipe.holdout).held_out
    assert np.bincount(dataset.category_index[held_out]).tolist() == [40] * len(CATEGORIES)
    assert set(recipe.unseen) < set(CATEGORIES)
    assert len(recipe.unseen) == len(CATEGORIES) / 2


def test_oklch_white_black_and_red() -> None:
    assert oklch(1.0, 0.0, 0.0) == pytest.approx((255, 255, 255), abs=0.5)
    assert oklch(0.0, 0.0, 0.0) == pytest.approx((0, 0, 0), abs=0.5)
    assert oklch(0.62796, 0.25768, np.radians(29.2339)) == pytest.approx((255, 0, 0), abs=0.5)
