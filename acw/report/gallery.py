"""Images in the report: what each model predicts of an example a category, and where the model loses most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from acw.report.numbers import number
from acw.report.pictures import CENTRE_BIAS, GOLD_STANDARD, OURS, Example, Picture, Pictures, colour_bar
from acw.report.tables import Row, table
from acw.report.weights import Weights

WORST = 10
# Examples end here, so that the page stays below 20 MB with any number of categories.
BYTES = 12_000_000
MAPS = ("density", "log-density")
Gains = Mapping[str, Mapping[str, float]]  # image -> model -> IG


class Shown(NamedTuple):
    """Pictures of one thing, by the choice of the switch `map` where there are two, with a name and a value."""

    pictures: Mapping[str, Picture]
    name: str
    value: str = ""


def typical(category: Mapping[str, str], gains: Gains, model: str) -> dict[str, str]:
    """Category -> its image (category: of each image) with the median IG of a model."""
    result = {}
    for name in sorted(set(category.values())):
        images = sorted((image for image in category if category[image] == name), key=lambda i: gains[i][model])
        result[name] = images[(len(images) - 1) // 2]
    return result


def worst(gains: Gains, model: str) -> list[str]:
    """The images on which a model is furthest below the gold standard; where there is none, those of lowest IG."""
    return sorted(gains, key=lambda i: gains[i][model] - gains[i].get("gold_standard", 0.0))[:WORST]


def examples(images: Mapping[str, str], weights: Weights, example: Callable[[str], Example]) -> dict[str, Any]:
    """The example of each category (category -> image), as far as their size allows."""
    parts: dict[str, dict[str, Any]] = {}
    size = 0
    for category, image in images.items():
        part = _example(category, image, weights, Pictures(example(image)))
        size += sum(picture.bytes for one in part["every"] for picture in one.pictures.values())
        if size > BYTES:
            break
        parts[category] = part
    bars = {name: colour_bar(name) for name in ("inferno", "viridis", "RdBu_r")}
    return {"categories": parts, "missing": len(images) - len(parts), "maps": MAPS, "bars": bars}


def _example(category: str, image: str, weights: Weights, pictures: Pictures) -> dict[str, Any]:
    example = pictures.example
    maps = [Shown({"": pictures.fixations()}, f"{len(example.x)} fixations", image)]
    maps += [_maps(pictures, name, one) for name, one in example.log_densities.items() if name != GOLD_STANDARD]
    low, high = pictures.range
    compared: list[Shown] = []
    part = {"category": category, "maps": maps, "low": low, "high": high, "compared": compared, "every": maps}
    if example.wrong is None:
        return part
    other, log_density = example.wrong
    right = example.log_densities[OURS]
    picture, scale = pictures.ratio(right, log_density)
    compared += [_maps(pictures, f"as {category}, right", right), _maps(pictures, f"as {other}, wrong", log_density)]
    compared.append(Shown({"": picture}, "log ratio of the two"))
    rows: list[Row] = [
        {"weights": backbone, "right": weight.mean, "wrong": weights[other][backbone].mean}
        for backbone, weight in weights[category].items()
    ]
    columns = ("weights", "right", "wrong")
    return part | {"scale": scale, "weights": table({"": rows}, columns), "every": maps + compared}


def failures(images: Sequence[str], gains: Gains, model: str, example: Callable[[str], Example]) -> dict[str, Any]:
    """The worst images, each with the model's density and, where there is one, the gold standard's."""
    known = all("gold_standard" in gains[image] for image in images)
    items = []
    for image in images:
        pictures = Pictures(example(image))
        densities = pictures.example.log_densities
        names = [name for name in (OURS, GOLD_STANDARD, CENTRE_BIAS) if name in densities][:2]
        gain = gains[image][model]
        text = f"IG {number(gain)}"
        if known:
            gold = gains[image]["gold_standard"]
            text = f"{number(gain - gold)} bits: IG {number(gain)} of {number(gold)}"
        maps = [Shown({"": pictures.fixations()}, "fixations")]
        maps += [Shown({"": pictures.density(densities[name])}, name) for name in names]
        items.append({"image": image, "text": text, "maps": maps})
    return {"known": known, "items": items, "model": model}


def _maps(pictures: Pictures, name: str, log_density: np.ndarray) -> Shown:
    gain = f"IG {number(pictures.information_gain(log_density))}"
    return Shown(dict(zip(MAPS, pictures.both(log_density), strict=True)), name, gain)
