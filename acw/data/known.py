"""A built-in display by its name: its pixels, and the density that its fixations are drawn from."""

from __future__ import annotations

import numpy as np

from acw.data.displays import HEIGHT, WIDTH, Draws, lay_out, render

# Part of every display's digest: raise it with any change to what is drawn or to where people look.
VERSION = 1
SALIENT, CENTRAL, ANYWHERE = 0.7, 0.25, 0.05  # shares of the fixations
CENTRAL_SPREAD = 0.22  # standard deviation of the central ones, as a share of width and height


def stimulus_pixels(category: str, index: int) -> np.ndarray:
    """uint8 (384, 512, 3) RGB."""
    return render(lay_out(VERSION, category, index), Draws(VERSION, category, index, "texture"))


def log_density(category: str, index: int) -> np.ndarray:
    """float32 (384, 512), natural logs: exactly what the fixations of this display were drawn from.

    A mixture over pixels of equal Gaussians on the salient spots, a central Gaussian and a uniform part, each
    normalised over the pixels.
    """
    return np.log(_density(category, index)).astype(np.float32)


def _density(category: str, index: int) -> np.ndarray:
    """float64 (HEIGHT, WIDTH), sums to 1."""
    spots = lay_out(VERSION, category, index).spots
    total = CENTRAL * _gaussian(WIDTH / 2, HEIGHT / 2, CENTRAL_SPREAD * WIDTH, CENTRAL_SPREAD * HEIGHT)
    total += ANYWHERE / (HEIGHT * WIDTH)
    for spot in spots:
        total += SALIENT / len(spots) * _gaussian(spot.x, spot.y, spot.spread_x, spot.spread_y)
    return total


def _gaussian(x: float, y: float, spread_x: float, spread_y: float) -> np.ndarray:
    down, across = (
        np.exp(-0.5 * ((np.arange(length) + 0.5 - middle) / spread) ** 2)
        for length, middle, spread in ((HEIGHT, y, spread_y), (WIDTH, x, spread_x))
    )
    return np.outer(down / down.sum(), across / across.sum())
