"""Images in the report: what each model predicts of an example a category, and where the model loses most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape

import numpy as np

from acw.report import markup
from acw.report.figures import CENTRE_BIAS, GOLD_STANDARD, OURS, Example
from acw.report.markup import Interval, Row, figure, minus
from acw.report.pictures import Pictures, colour_bar

HEADLINE = "category_weights"  # the model, of all in per_image.csv
WORST = 10
# Examples end here, so that the page stays below 20 MB with any number of categories.
BYTES = 12_000_000
MAPS = ("density", "log-density")
Weights = Mapping[str, Mapping[str, Interval]]  # category -> backbone -> weight
Gains = Mapping[str, Mapping[str, float]]  # image -> model -> IG


def typical(category: Mapping[str, str], gains: Gains) -> dict[str, str]:
    """Category -> its image (category: of each image) with the median IG of the model."""
    result = {}
    for name in sorted(set(category.values())):
        images = sorted((image for image in category if category[image] == name), key=lambda i: gains[i][HEADLINE])
        result[name] = images[(len(images) - 1) // 2]
    return result


def worst(gains: Gains) -> list[str]:
    """The images on which the model is furthest below the gold standard; where there is none, those of lowest IG."""
    return sorted(gains, key=lambda i: gains[i][HEADLINE] - gains[i].get("gold_standard", 0.0))[:WORST]


def examples(images: Mapping[str, str], weights: Weights, example: Callable[[str], Example]) -> str:
    """The section with the example of each category (category -> image)."""
    parts: dict[str, str] = {}
    size = 0
    for category, image in images.items():
        part = _example(category, image, weights, Pictures(example(image)))
        size += len(part)
        if size > BYTES:
            break
        parts[category] = part
    missing = len(images) - len(parts)
    return (
        "<p>The held-out image of each category whose IG is its median. Lines enclose 25, 50 and 75 % of the mass; the "
        "colours of one image are on one scale; IG on this image is in bits per fixation."
        + (f" Pictures of {missing} categories are left out, to keep this file small." if missing else "")
        + f'</p><div class="controls">{markup.switch("Category", "category", list(parts))}'
        + f"{markup.switch('Show', 'map', MAPS)}</div>"
        + markup.switched("category", parts)
    )


def _example(category: str, image: str, weights: Weights, pictures: Pictures) -> str:
    example = pictures.example
    figures = [_figure(pictures.fixations(), f"{len(example.x)} fixations", image)]
    for name, log_density in example.log_densities.items():
        if name != GOLD_STANDARD:
            figures.append(_maps(pictures, name, log_density))
    low, high = pictures.range
    legend = {
        "density": f"<span>0{colour_bar('inferno')}{2**high:.0f} times uniform, as square roots</span>",
        "log-density": f"<span>{minus(f'{low:.1f}')}{colour_bar('viridis')}{high:.1f} bits over uniform</span>",
    }
    shown = f'<div class="maps">{"".join(figures)}</div><div class="legend">{markup.switched("map", legend)}</div>'
    if example.wrong is None:
        return shown
    return shown + _right_and_wrong(category, weights, pictures, *example.wrong)


def _right_and_wrong(category: str, weights: Weights, pictures: Pictures, other: str, log_density: np.ndarray) -> str:
    right = pictures.example.log_densities[OURS]
    picture, scale = pictures.ratio(right, log_density)
    bar = (
        f"<span>{minus(f'{-scale:g}')}{colour_bar('RdBu_r')}{scale:g} bits: more under the right category is red</span>"
    )
    rows: list[Row] = [
        {"weights": backbone, "right": weight.mean, "wrong": weights[other][backbone].mean}
        for backbone, weight in weights[category].items()
    ]
    return (
        "<h3>The same image under the right category's weights, and under the most unlike ones</h3>"
        f'<div class="maps">{_maps(pictures, f"as {category}, right", right)}'
        f"{_maps(pictures, f'as {other}, wrong', log_density)}{_figure(picture, 'log ratio of the two', '')}"
        f'{markup.table(["weights", "right", "wrong"], {"": rows})}</div><div class="legend">{bar}</div>'
    )


def failures(images: list[str], gains: Gains, example: Callable[[str], Example]) -> str:
    """The section with the worst images, each with the model's density and, where there is one, the gold standard's."""
    known = all("gold_standard" in gains[image] for image in images)
    what = "is furthest below the gold standard, which knows other people's fixations" if known else "has its lowest IG"
    items = []
    for image in images:
        pictures = Pictures(example(image))
        densities = pictures.example.log_densities
        shown = [name for name in (OURS, GOLD_STANDARD, CENTRE_BIAS) if name in densities][:2]
        gain = gains[image][HEADLINE]
        text = f"IG {figure(gain)}"
        if known:
            gold = gains[image]["gold_standard"]
            text = f"{figure(gain - gold)} bits: IG {figure(gain)} of {figure(gold)}"
        figures = [_figure(pictures.fixations(), "fixations", "")]
        figures += [_figure(pictures.density(densities[name]), name, "") for name in shown]
        items.append(
            f"<article><h3><span>{escape(image)}</span><span>{text}</span></h3>"
            f'<div class="maps">{"".join(figures)}</div></article>'
        )
    return (
        f'<p>The {len(images)} held-out images on which {HEADLINE} {what}.</p><div class="worst">{"".join(items)}</div>'
    )


def _maps(pictures: Pictures, name: str, log_density: np.ndarray) -> str:
    """A density and its logarithm, of which the switch `map` shows one."""
    both = {"density": pictures.density(log_density), "log-density": pictures.log_density(log_density)}
    return _figure(markup.switched("map", both), name, f"IG {figure(pictures.information_gain(log_density))}")


def _figure(picture: str, name: str, value: str) -> str:
    return f"<figure>{picture}<figcaption><b>{escape(name)}</b><span>{escape(value)}</span></figcaption></figure>"
