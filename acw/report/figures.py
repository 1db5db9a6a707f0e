"""Figures of a run: category weights, training curves, densities on images. Drawn without a display or global state."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acw.storage.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from acw.training.bank import Bank

INK, FAINT, LINE = "#22272e", "#8a929c", "#3b6ea5"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a category may be called anything, "$" included
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlepad": 4,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.hspace": 0,
    "figure.constrained_layout.wspace": 0,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "savefig.facecolor": "white",
}
DPI = 160
# Longer sides are thinned out for drawing: no figure shows more than this many px of an image.
LONGEST_SIDE = 640
# Contours enclose the most likely pixels that hold these shares of a density.
ENCLOSED_MASS = (0.25, 0.5, 0.75)
# Names in `Example.log_densities` that mean something: what the model predicts, IG's baseline, what other people saw.
OURS, UNIFORM, CENTRE_BIAS, GOLD_STANDARD = "acw", "uniform mixture", "centre bias", "gold standard"


@dataclass(frozen=True)
class Example:
    """An image and what models predict of it.

    pixels: uint8 (H, W, 3). x, y: (F,) fixations in px. log_densities: name -> (H, W), natural logs, logsumexp 0.
    wrong: the category whose weights differ most from those of the image's, and the density (H, W) under them.
    """

    title: str
    pixels: np.ndarray
    x: np.ndarray
    y: np.ndarray
    log_densities: Mapping[str, np.ndarray]
    wrong: tuple[str, np.ndarray] | None = None


def weights_figure(weights: Path, path: Path) -> None:
    """PNG heat map, categories by backbones, of a CSV with columns category, backbone, weight, low, high.

    The small number is half the width of the weight's 95 % interval.
    """
    with weights.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    categories = list(dict.fromkeys(row["category"] for row in rows))
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    value = np.full((len(categories), len(backbones)), np.nan)
    half_width = value.copy()
    for row in rows:
        cell = categories.index(row["category"]), backbones.index(row["backbone"])
        value[cell] = float(row["weight"])
        half_width[cell] = (float(row["high"]) - float(row["low"])) / 2

    with _figure(path, 1.6 + 1.05 * len(backbones), 0.7 + 0.32 * len(categories)) as figure:
        axes = figure.subplots()
        highest = max(float(np.nanmax(value)), 1e-9)
        axes.imshow(value, cmap="Blues", vmin=0, vmax=1.25 * highest, aspect="auto")
        for (row_index, column), weight in np.ndenumerate(value):
            colour = "white" if weight > 0.72 * highest else INK
            axes.text(column - 0.04, row_index, f"{weight:.2f}", ha="right", va="center", color=colour)
            interval = f"± {half_width[row_index, column]:.2f}"
            axes.text(column + 0.04, row_index, interval, ha="left", va="center", color=colour, size=6.5, alpha=0.75)
        axes.set_xticks(range(len(backbones)), backbones)
        axes.set_yticks(range(len(categories)), categories)
        axes.xaxis.tick_top()
        _bare(axes)
        axes.set_xticks(np.arange(1, len(backbones)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(categories)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)


def curves_figure(histories: Mapping[Bank, Sequence[dict[str, Any]]], path: Path) -> None:
    """PNG of validation IG per epoch: a panel per backbone, a thin line per head, the heads' mean in bold.

    histories: `BankState.history` of each bank. In the mean, a head that has stopped keeps its last value.
    """
    heads = head_curves(histories)
    longest = max(len(curve) for curves in heads.values() for curve in curves)
    panels = {name: np.stack([extended(curve, longest) for curve in curves]) for name, curves in heads.items()}

    with _figure(path, 0.7 + 2.1 * len(panels), 2.5) as figure:
        every_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (backbone, curves), stopping in zip(every_axes, panels.items(), heads.values(), strict=True):
            for curve in stopping:
                axes.plot(np.arange(1, len(curve) + 1), curve, color=LINE, linewidth=0.6, alpha=0.4, marker=".", ms=1.5)
            mean = curves.mean(0)
            axes.plot(np.arange(1, longest + 1), mean, color=LINE, linewidth=2)
            axes.set_title(f"{backbone}   {mean[-1]:.3f}")
            axes.set_xlabel("epoch")
            axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        # The first epochs may be far below zero; they run out of the frame rather than flatten the rest.
        values = np.concatenate([curves.ravel() for curves in panels.values()])
        low, high = np.percentile(values, 5), values.max()
        margin = 0.06 * max(high - low, 1e-3)
        every_axes[0].set_ylim(low - margin, high + margin)
        every_axes[0].set_ylabel("validation IG, bits per fixation")
        every_axes[0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def head_curves(histories: Mapping[Bank, Sequence[dict[str, Any]]]) -> dict[str, list[np.ndarray]]:
    """Backbone -> validation IG per epoch of each of its heads, NaN where a head has stopped."""
    heads: dict[str, list[np.ndarray]] = defaultdict(list)
    for bank, history in histories.items():
        curves = np.array([entry["ig"] for entry in history], dtype=float).reshape(len(history), len(bank.members))
        heads[bank.backbone] += list(curves.T)
    return dict(heads)


def joint_curves(histories: Sequence[Sequence[dict[str, Any]]]) -> dict[str, list[np.ndarray]]:
    """The same of jointly trained systems, from each one's `SystemState.history`; empty where there are none."""
    curves = [np.array([entry["ig"] for entry in history], dtype=float) for history in histories]
    return {"trained jointly": curves} if curves else {}


def extended(curve: np.ndarray, length: int) -> np.ndarray:
    """A head's curve, NaN where it has stopped, with its last value to the end."""
    trained = curve[np.isfinite(curve)]
    return np.concatenate([trained, np.full(length - len(trained), trained[-1])])


def examples_figure(rows: Sequence[Example], path: Path) -> None:
    """PNG with a row per image: the stimulus with its fixations, then the density of each model.

    Colour is the density relative to the row's highest, on the dimmed image; the lines enclose 25, 50 and 75 % of the
    mass. All rows have the same models in the same order.
    """
    names = list(rows[0].log_densities)
    assert all(list(row.log_densities) == names for row in rows)
    width = 2.4
    heights = [width * row.pixels.shape[0] / row.pixels.shape[1] for row in rows]
    with _figure(path, (1 + len(names)) * (width + 0.06) + 0.2, sum(heights) + 0.06 * len(rows) + 0.2) as figure:
        grid = figure.subplots(len(rows), 1 + len(names), squeeze=False, height_ratios=heights)
        for row, (stimulus, *others) in zip(rows, grid, strict=True):
            # Not cut to its box: the marks of fixations at the edge stay whole.
            stimulus.imshow(_thinned(row.pixels), extent=_extent(row.pixels), interpolation="antialiased")
            stimulus.scatter(
                row.x, row.y, s=9, color="#ffd23f", edgecolors="#00000099", linewidths=0.5, alpha=0.85, clip_on=False
            )
            stimulus.set_ylabel(row.title)
            highest = max(float(density.max()) for density in row.log_densities.values())
            for axes, density in zip(others, row.log_densities.values(), strict=True):
                _draw_density(axes, row.pixels, density, highest)
            for axes in (stimulus, *others):
                _bare(axes)
                axes.set_xticks([])
                axes.set_yticks([])
        for axes, name in zip(grid[0], ("fixations", *names), strict=True):
            axes.set_title(name)


def _draw_density(axes: Axes, pixels: np.ndarray, log_density: np.ndarray, highest: float) -> None:
    relative = np.exp(_thinned(log_density).astype(np.float64) - highest)
    extent = _extent(pixels)
    axes.imshow(blended(_thinned(pixels), relative), extent=extent, interpolation="antialiased")
    levels = sorted({float(level) for level in mass_levels(relative, ENCLOSED_MASS)})
    axes.contour(relative, levels, colors="white", linewidths=0.7, alpha=0.9, extent=extent, origin="upper")


def blended(pixels: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """A density in [0, 1] (H, W) as colour on its dimmed image, uint8 (H, W, 3): RGB in [0, 1], float (H, W, 3)."""
    import matplotlib

    grey = pixels.astype(float).mean(2, keepdims=True) / 255
    # The square root lets the density's foothills show; where there is none, the image does, dimmed.
    colour = matplotlib.colormaps["inferno"](np.sqrt(relative))[..., :3]
    opacity = 0.25 + 0.6 * np.sqrt(relative)[..., None]
    return (1 - opacity) * (0.12 + 0.55 * grey) + opacity * colour


def mass_levels(density: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """For each share, the level such that the pixels above it hold that share of the density's mass."""
    descending = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(descending)
    return descending[np.minimum(np.searchsorted(mass, np.asarray(shares) * mass[-1]), len(mass) - 1)]


def _thinned(image: np.ndarray) -> np.ndarray:
    step = -(-max(image.shape[:2]) // LONGEST_SIDE)
    return image[::step, ::step]


def _extent(pixels: np.ndarray) -> tuple[float, float, float, float]:
    # Pixel i is centred on coordinate i, as fixations count.
    return -0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5


def _bare(axes: Axes) -> None:
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, which becomes a PNG when the block ends without an error."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))
