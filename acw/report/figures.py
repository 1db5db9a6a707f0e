"""Charts, each drawn by one function on matplotlib: `svg` makes text for a page of one, `save` a PNG.

Sizes are in px of the page, which an SVG has as its units and a PNG twice over. Nothing needs a display or keeps state.
"""

from __future__ import annotations

import functools
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from markupsafe import Markup

from acw.report.numbers import minus, number
from acw.storage.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from acw.report.tables import Interval
    from acw.training.bank import Bank

# Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7a6a00")
INK, SOFT, FAINT, GRID, PAPER = "#1b1f24", "#59636e", "#8c959f", "#e3e7eb", "#fffffe"
# In a page these colours are those of its theme, light or dark.
VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", FAINT: "var(--line)", GRID: "var(--grid)", PAPER: "var(--paper)"}
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "text.parse_math": False,  # a category may be called anything, "$" included
    "axes.edgecolor": FAINT,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "figure.constrained_layout.h_pad": 3 / 72,
    "figure.constrained_layout.w_pad": 3 / 72,
    "figure.constrained_layout.hspace": 0,
    "figure.constrained_layout.wspace": 0,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.handlelength": 1,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
}
LINES_SIZE = (520, 270)
CHARACTER = 7.6  # px, of 12 px text, on average
PANELS = 4  # side by side in a figure
LONGEST_NAME = 28  # characters of a category beside its row

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, or writes what is drawn, in STYLE."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inner


def blank(width: float, height: float) -> Figure:
    """A figure of so many px."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")


@styled
def save(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG, of two pixels a px."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=144))


@styled
def svg(figure: Figure, label: str, titles: Mapping[str, str] | None = None) -> Markup:
    """The figure for a page, in the colours of its theme.

    label: says what it shows, and is another one for each figure of a page. titles: gid of an artist -> the text that
    is shown where the pointer is on it.
    """
    import matplotlib

    buffer = io.StringIO()
    # The names of its parts depend on the label: equal ones in a page's hidden figures could not be referred to.
    with matplotlib.rc_context({"svg.hashsalt": label}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().partition("<svg ")[2]
    # The page's style sheet has this, for charts alone.
    text = re.sub(r"<style.*?</style>|<!--.*?-->|\s+(?=<)", "", text, flags=re.DOTALL)
    # Every figure has the same names of groups, which nothing refers to.
    text = re.sub(r'<g id="[\w.]+_\d+"', "<g", text)
    text = re.sub(r' d="[^"]+"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(path[0].split("\n"))), text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    for gid, title in (titles or {}).items():
        text = text.replace(f'<g id="{gid}">', f"<g><title>{escape(title)}</title>")
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    head = f'class="chart" role="img" aria-label="{escape(label)}" width="{width}" height="{height}"'
    return Markup(f'<svg {head} viewBox="0 0 {width} {height}">{text.partition(">")[2]}')


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in order; they repeat where there are more names than colours."""
    return {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(dict.fromkeys(names))}


@styled
def lines(
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    first: int,
    limits: tuple[float, float],
    colour: Mapping[str, str],
    faint: Sequence[Sequence[float]] = (),
) -> Figure:
    """Values over steps `first`, `first` + 1, ..., each line named with its last value.

    limits: of the vertical axis; lines run out of the frame beyond them. faint: further lines, thin and without a name
    (NaN where they have stopped).
    """
    figure = blank(*LINES_SIZE)
    # A page has many of these, and a layout that measures all texts takes as long as drawing them does.
    figure.set_layout_engine("none")
    names = max(map(len, series)) * CHARACTER + 80
    width, height = LINES_SIZE
    axes = figure.add_axes((44 / width, 42 / height, (width - 44 - names) / width, (height - 68) / height))
    _draw_lines(axes, series, first, colour, faint)
    axes.set(ylim=limits, xlabel=x_label)
    axes.set_title(title, weight="bold")
    handles = sorted(axes.lines[len(faint) :], key=lambda line: -np.asarray(line.get_ydata())[-1])
    axes.legend(handles=handles, bbox_to_anchor=(1, 1), loc="upper left", borderaxespad=0)
    return figure


@styled
def training_curves(curves: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Validation IG after each epoch: a panel per title, a thin line per head, the heads' mean in bold.

    curves: as `head_curves` and `joint_curves` give them. In the mean, a head that has stopped keeps its last value.
    """
    longest = max(len(curve) for heads in curves.values() for curve in heads)
    columns = min(len(curves), PANELS)
    rows = -(-len(curves) // columns)
    figure = blank(50 + 250 * columns, 20 + 195 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colour = colours(curves)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    for axes, (name, heads) in zip(grid.flat, curves.items(), strict=False):
        mean = np.mean([extended(curve, longest) for curve in heads], 0)
        _draw_lines(axes, {"mean": mean.tolist()}, 1, {"mean": colour[name]}, heads)
        axes.set_title(name, weight="bold")
        axes.set_title(f"mean {number(mean[-1])}", loc="right", color=SOFT, size=11)
    figure.supxlabel("epoch", size=12, color=SOFT)
    figure.supylabel("validation IG", size=12, color=SOFT)
    # The first epochs may be far below zero; they run out of the frame rather than flatten the rest.
    values = np.concatenate([curve[np.isfinite(curve)] for heads in curves.values() for curve in heads])
    grid[0, 0].set_ylim(padded(float(np.percentile(values, 5)), float(values.max())))
    return figure


def _draw_lines(
    axes: Axes,
    series: Mapping[str, Sequence[float]],
    first: int,
    colour: Mapping[str, str],
    faint: Sequence[Sequence[float] | np.ndarray],
) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve in faint:
        axes.plot(np.arange(first, first + len(curve)), curve, color=FAINT, linewidth=0.8, alpha=0.5)
    for name, curve in series.items():
        marker = "o" if len(curve) <= 25 and not len(faint) else ""
        steps, label = np.arange(first, first + len(curve)), f"{name} {number(curve[-1])}"
        axes.plot(steps, curve, color=colour[name], linewidth=2.2, marker=marker, markersize=4, label=label)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def padded(low: float, high: float) -> tuple[float, float]:
    """Limits a little beyond the values."""
    margin = 0.06 * max(high - low, 1e-3)
    return low - margin, high + margin


def head_curves(histories: Mapping[Bank, Sequence[dict[str, Any]]]) -> dict[str, list[np.ndarray]]:
    """Backbone -> validation IG per epoch of each of its heads, NaN where a head has stopped.

    histories: `BankState.history` of each bank.
    """
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


@dataclass(frozen=True)
class Marks:
    """What `dots` draws of one model: `marker` is matplotlib's; intervals, if any, as whiskers."""

    name: str
    marker: str
    colour: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] | None = None
    hollow: bool = False


@styled
def dots(categories: Sequence[str], marks: Sequence[Marks], *, label: str, width: int = 860) -> Figure:
    """A line a category with a mark for each model, and the legend; what is drawn last lies on top."""
    figure = blank(width, 90 + 24 * len(categories))
    axes = figure.subplots()
    height = {category: len(categories) - 1 - number for number, category in enumerate(categories)}
    for mark in marks:
        for category, ends in (mark.intervals or {}).items():
            axes.hlines(height[category], *ends, color=mark.colour, linewidth=1.8)
        shown = [category for category in categories if category in mark.values]
        axes.plot(
            [mark.values[category] for category in shown],
            [height[category] for category in shown],
            color=mark.colour,
            marker=mark.marker,
            linestyle="",
            markersize={"|": 12, "D": 7}.get(mark.marker, 9),
            markeredgewidth=1.8,
            markerfacecolor=PAPER if mark.hollow else None,
            label=mark.name,
        )
    low, high = axes.dataLim.intervalx
    axes.set_xlim(padded(min(low, 0.0), max(high, 0.0)))
    axes.axvline(0, color=FAINT, linewidth=1, zorder=0.6)
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in categories]
    axes.set_yticks([height[category] for category in categories], names, color=INK)
    axes.set_ylim(-0.6, len(categories) - 0.4)
    axes.set_xlabel(label)
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(marks) > 1:
        figure.legend(loc="outside upper left", ncols=min(len(marks), 8), columnspacing=1.2, handletextpad=0.3)
    return figure


@styled
def weights_heat_map(weights: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """A cell per category and backbone; the small number is half the width of the weight's 95 % interval."""
    categories, backbones = list(weights), list(next(iter(weights.values())))
    mean = np.array([[row[backbone].mean for backbone in backbones] for row in weights.values()])
    figure = blank(150 + 100 * len(backbones), 50 + 30 * len(categories))
    axes = figure.subplots()
    highest = max(float(mean.max()), 1e-9)
    axes.imshow(mean, cmap="Blues", vmin=0, vmax=1.25 * highest, aspect="auto")
    for y, row in enumerate(weights.values()):
        for x, backbone in enumerate(backbones):
            weight = row[backbone]
            colour = "white" if weight.mean > 0.72 * highest else INK
            axes.text(x - 0.04, y, f"{weight.mean:.2f}", ha="right", va="center", color=colour)
            half_width = f"± {(weight.high - weight.low) / 2:.2f}"
            axes.text(x + 0.04, y, half_width, ha="left", va="center", color=colour, size=9, alpha=0.75)
    axes.set_xticks(range(len(backbones)), backbones)
    axes.set_yticks(range(len(categories)), categories)
    axes.xaxis.tick_top()
    axes.tick_params(which="both", length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(1, len(backbones)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(categories)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    return figure


@dataclass(frozen=True)
class Scale:
    """An axis of `parallel`: from `low` at the bottom to `high`, which lie further apart where `log`; or choices."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: Sequence[object] = ()

    def place(self, value: Any) -> float | None:
        """Between 0 at the bottom and 1; None for what is not on the axis."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices) if value in self.choices else None
        if not self.low <= value <= self.high:
            return None
        low, high, at = (float(np.log(v)) if self.log else float(v) for v in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts along the axis."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        values: Sequence[Any] = self.choices
        if not self.choices:
            locator = LogLocator(subs=(1, 2, 5)) if self.log else MaxNLocator(5)
            values = [v for v in map(float, locator.tick_values(self.low, self.high)) if self.low <= v <= self.high]
            values = values if len(values) > 1 else [self.low, self.high]
        texts = [f"{value:g}" if isinstance(value, float) else str(value).lower() for value in values]
        return [(at, minus(t)) for v, t in zip(values, texts, strict=True) if (at := self.place(v)) is not None]


@dataclass(frozen=True)
class Polyline:
    """A line of `parallel`: a place between 0 and 1 on each axis, in a colour."""

    places: Sequence[float]
    colour: str
    width: float = 1.4


@styled
def parallel(scales: Sequence[Scale], rows: Mapping[str, Polyline]) -> Figure:
    """Parallel coordinates: a line a row through its values on all axes; what is drawn last lies on top.

    rows: by gid, for `svg` to say what each is.
    """
    figure = blank(860, 330)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(-0.45, len(scales) - 0.55), ylim=(-0.03, 1.03))
    for gid, row in rows.items():
        axes.plot(row.places, color=row.colour, linewidth=row.width, alpha=0.9, gid=gid)
    for k, scale in enumerate(scales):
        axes.vlines(k, 0, 1, color=INK, linewidth=1)
        axes.text(k, 1.07, scale.name, ha="center", weight="bold")
        # Those of the last axis are beyond all lines.
        side, align = (1, "left") if k == len(scales) - 1 else (-1, "right")
        for at, text in scale.ticks():
            axes.plot((k, k + 0.02 * side), (at, at), color=INK, linewidth=1)
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1, "alpha": 0.8}
            axes.text(k + 0.04 * side, at, text, ha=align, va="center", color=SOFT, bbox=box)
    return figure
