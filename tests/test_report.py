"""Figures: what their lines enclose, and that odd inputs are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acw.model.drawing import mass_levels
from acw.report.figures import save, svg, weights_heat_map
from acw.report.pictures import Example, examples_figure
from acw.report.weights import weights_of


def test_mass_levels_enclose_their_share() -> None:
    density = np.random.default_rng(0).gamma(0.5, size=(60, 80))
    for share, level in zip((0.25, 0.5, 0.75), mass_levels(density, (0.25, 0.5, 0.75)), strict=True):
        inside = density[density >= level].sum() / density.sum()
        assert share <= inside < share + density.max() / density.sum()


@pytest.mark.filterwarnings("error")
def test_odd_inputs_are_drawn(tmp_path: Path) -> None:
    """A flat density has no contours, an image no fixations; a name may hold a dollar sign."""
    pixels = np.zeros((30, 900, 3), np.uint8)
    flat = np.full((30, 900), -np.log(27000), np.float32)
    none = np.empty(0)
    save(examples_figure([Example("$a", pixels, none, none, {"flat$_": flat})]), tmp_path / "examples.png")
    table = tmp_path / "category_weights.csv"
    table.write_text("category,backbone,weight,low,high\n$\\x$,lite0,0,0,0\n", encoding="utf-8")
    save(weights_heat_map(weights_of(tmp_path)), tmp_path / "weights.png")
    assert "$\\x$" in svg(weights_heat_map(weights_of(tmp_path)), "weights")
    for name in ("examples.png", "weights.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 50
