"""A prediction as the service answers with it: JSON, or one of the files that `acw predict` writes.

Places and lines are in px of the upright image. Maps are on a coarse grid, row by row.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

from acw.model import drawing
from acw.model.prediction import Prediction

# Of the map of the mixture, and of those of the views: cells along the long side.
CELLS, CELLS_OF_VIEWS = 96, 48
JSON = "application/json"
FILES = {"image/png": "overlay", "image/svg+xml": "svg", "application/x-npy": "npy"}
MEDIA_TYPES = (JSON, *FILES)


class Map(BaseModel):
    """A density on a grid over the whole image."""

    width: int
    height: int
    shares: list[float] = Field(description="of the fixations, a cell each, row by row; their sum is 1")


class Place(BaseModel):
    x: int
    y: int
    share: float = Field(description="of the fixations, within the radius")
    radius: float = Field(description="px")


class View(BaseModel):
    """One of the densities that are mixed."""

    name: str
    weight: float = Field(description="share in the mixture")
    density: Map


class Answer(BaseModel):
    """Where people look in an image."""

    width: int = Field(description="px, as the image is shown: an EXIF rotation is followed")
    height: int
    category: str | None = Field(description="that was asked for; none where it was inferred")
    categories: dict[str, float] = Field(description="probability of each, given the image")
    places: list[Place] = Field(description="the likeliest first")
    contours: dict[str, list[list[tuple[float, float]]]] = Field(
        description="share of the fixations -> closed lines around it, x and y in px"
    )
    density: Map
    views: list[View]


def encoded(prediction: Prediction, category: str | None, media_type: str) -> bytes:
    """The body of an answer of one of MEDIA_TYPES."""
    if media_type in FILES:
        return prediction.encoded(FILES[media_type])
    return _answer(prediction, category).model_dump_json().encode()


def wanted(accept: str) -> str | None:
    """The media type of an Accept header that comes first among those that are made; None for none of them.

    Of equal preference, JSON; a browser's or a program's that takes anything gets it.
    """
    preferred: dict[str, float] = {}
    for part in accept.lower().split(","):
        name, *parameters = (word.strip() for word in part.split(";"))
        quality = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        try:
            preferred[name] = float(quality)
        except ValueError:
            return None

    def quality_of(media_type: str) -> float:
        ranges = (media_type, f"{media_type.split('/')[0]}/*", "*/*")
        return next((preferred[name] for name in ranges if name in preferred), 0.0)

    best = max(MEDIA_TYPES, key=quality_of)
    return best if quality_of(best) > 0 else None


def _answer(prediction: Prediction, category: str | None) -> Answer:
    height, width = prediction.log_density.shape
    lines = {f"{share:g}": [line.round(1).tolist() for line in of] for share, of in prediction.contours().items()}
    views = [
        View(name=name, weight=round(weight, 6), density=_map(prediction.by_backbone[name], CELLS_OF_VIEWS))
        for name, weight in prediction.weights.items()
    ]
    return Answer(
        width=width,
        height=height,
        category=category,
        categories={name: round(probability, 6) for name, probability in prediction.categories.items()},
        places=[Place(x=one.x, y=one.y, share=round(one.share, 6), radius=one.radius) for one in prediction.places()],
        contours=lines,
        density=_map(prediction.log_density, CELLS),
        views=views,
    )


def _map(log_density: np.ndarray, cells: int) -> Map:
    """Of (H, W): the mass of each cell, of which there are so many along the long side, or as many as there are px."""
    height, width = log_density.shape
    scale = min(1.0, cells / max(height, width))
    rows, columns = max(1, round(scale * height)), max(1, round(scale * width))
    density = Image.fromarray(np.exp(log_density))
    mass = np.asarray(density.resize((columns, rows), Image.Resampling.BOX), np.float64)
    mass /= mass.sum()
    return Map(width=columns, height=rows, shares=[float(f"{share:.3g}") for share in mass.ravel()])


def look() -> dict[str, str]:
    """What the page takes from `drawing`, so that its map looks like the overlay: by the words that stand for it."""
    return {
        "COLOURS": " ".join(drawing.COLOURS),
        "OPACITY": f"{100 * drawing.OPACITY:.0f}",
        "LEAST_PEAK": f"{drawing.LEAST_PEAK:g}",
        "SATURATION": f"{drawing.COLOURFULNESS:g}",
        "BRIGHTNESS": f"{drawing.BRIGHTNESS:g}",
    }
