"""A density drawn: its likeliest places, the lines that enclose shares of its mass, and both on its image.

Places and lines are in px of the image, which spans (0, 0) to (W, H): pixel (x, y) is the square from there to
(x + 1, y + 1).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

ENCLOSED_MASS = (0.25, 0.5, 0.75)  # shares that contours enclose unless others are asked for
PLACES = 5  # that are drawn and listed unless another number is asked for
RADIUS = 1 / 24  # of a place, in long sides: two degrees where an image is 48 degrees wide, as scores take it
# Cells of the grid, along its long side, on which lines and peaks are looked for: a density has nothing finer.
GRID = 256
# "inferno" (van der Walt, Smith 2015), whose lightness rises evenly, in even steps.
COLOURS = (
    "#000004", "#0b0724", "#210c4a", "#3d0965", "#57106e", "#71196e", "#8a226a", "#a32c61", "#bc3754",
    "#d24644", "#e45a31", "#f1731d", "#f98e09", "#fcac11", "#f9cb35", "#f2ea69", "#fcffa4",
)  # fmt: skip
COLOURFULNESS, BRIGHTNESS = 0.6, 0.88  # of the image below the density, as shares of its own
OPACITY = 0.85  # of the density's colours where it is highest
# A density whose highest place is less than so many times the uniform one does not get the brightest colour.
LEAST_PEAK = 8.0
LIGHT, DARK = "#ffffff", "#101018"
OPACITIES = {"casing": 0.55, "outermost": 0.7, "innermost": 1.0, "disc": 0.72}
MOST_SUPERSAMPLED = 2**23  # px of a mask on which lines are drawn finer than they are shown
GREYS = 2**16 - 1


@dataclass(frozen=True)
class Place:
    """A peak of a density: its pixel, and the share of the mass in pixels whose centres lie within `radius` px."""

    x: int
    y: int
    share: float
    radius: float


Lines = Mapping[float, Sequence[np.ndarray]]  # share of the mass -> closed lines (n, 2), x and y, that enclose it


def mass_levels(density: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """For each share, the level such that the pixels at or above it hold that share of the density's mass."""
    descending = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(descending, dtype=np.float64)
    return descending[np.minimum(np.searchsorted(mass, np.asarray(shares) * mass[-1]), len(mass) - 1)]


def contours(log_density: np.ndarray, shares: Sequence[float] = ENCLOSED_MASS) -> Lines:
    """Share -> the lines that enclose this share of a density (H, W), of its likeliest places; each is closed, at an
    edge of the image by that edge, and a line within another is around a hole.

    Raises ValueError for a share that is not between 0 and 1.
    """
    if bad := [share for share in shares if not 0 < share < 1]:
        raise ValueError(f"contours enclose shares of the mass between 0 and 1, not {bad[0]}")
    from contourpy import LineType, contour_generator

    density = np.exp(log_density - log_density.max())
    step, thinned = _thinned(density)
    # To the edges it goes on as it is; a frame of zeros just outside closes the lines that would end there.
    framed = np.pad(np.pad(thinned, 1, "edge"), 1)
    size = density.shape[::-1]
    x, y = (_frame(step, cells, side) for cells, side in zip(thinned.shape[::-1], size, strict=True))
    generator = contour_generator(x, y, framed, line_type=LineType.Separate)
    found: dict[float, Any] = {
        share: generator.lines(float(level)) for share, level in zip(shares, mass_levels(density, shares), strict=True)
    }
    return {share: [line.clip(0, size) for line in lines] for share, lines in found.items()}


def _thinned(density: np.ndarray) -> tuple[int, np.ndarray]:
    """Every step-th row and column, of which neither side has more than GRID, and the step."""
    step = -(-max(density.shape) // GRID)
    return step, density[min(step, density.shape[0]) // 2 :: step, min(step, density.shape[1]) // 2 :: step]


def _frame(step: int, cells: int, side: int) -> np.ndarray:
    """Where the values of `_thinned` are along a side, in px; before and behind them the side's ends, twice."""
    centres = min(step, side) // 2 + 0.5 + step * np.arange(cells)
    return np.concatenate([[-1e-6, 0.0], centres, [side, side + 1e-6]])


def places(log_density: np.ndarray, n: int = PLACES, radius: float | None = None) -> list[Place]:
    """The n peaks of a density (H, W) that have most of its mass around them, in this order; fewer if it has no more.

    radius: how far a place reaches, in px, by default a 24th of the long side. Places do not overlap, so their shares
    may be added.
    """
    radius = max(1.0, RADIUS * max(log_density.shape)) if radius is None else radius
    found: list[Place] = []
    for place in sorted(_peaks(log_density, radius), key=lambda place: -place.share):
        if all(np.hypot(place.x - other.x, place.y - other.y) > 2 * radius for other in found):
            found.append(place)
    return found[:n]


def _peaks(log_density: np.ndarray, radius: float) -> list[Place]:
    """All places where the density is highest within the radius along both axes, and no less than the uniform one; of
    a plateau, its centre."""
    step, thinned = _thinned(log_density)
    highest = thinned == ndimage.maximum_filter(thinned, 2 * int(radius / step) + 1, mode="nearest")
    highest &= thinned >= min(-np.log(log_density.size), thinned.max())
    plateaus, count = ndimage.label(highest, np.ones((3, 3)))
    peaks = []
    for row, column in ndimage.center_of_mass(highest, plateaus, range(1, count + 1)):
        # The pixel, which may be in a cell beside that of the grid.
        top, left = (max(0, (int(at) - (step > 1)) * step) for at in (row, column))
        around = log_density[top:, left:][: 3 * step if step > 1 else 1, : 3 * step if step > 1 else 1]
        y, x = np.unravel_index(int(around.argmax()), around.shape)
        peaks.append(_place(log_density, left + int(x), top + int(y), radius))
    return peaks


def _place(log_density: np.ndarray, x: int, y: int, radius: float) -> Place:
    reach = int(radius)
    top, left = max(y - reach, 0), max(x - reach, 0)
    around = log_density[top : y + reach + 1, left : x + reach + 1]
    rows, columns = np.ogrid[top - y : top - y + around.shape[0], left - x : left - x + around.shape[1]]
    inside = around[rows**2 + columns**2 <= radius**2]
    return Place(x, y, float(np.exp(inside.astype(np.float64)).sum()), float(radius))


# --- Pictures ----------------------------------------------------------------------------------------------------


def overlay(image: np.ndarray, log_density: np.ndarray, lines: Lines, marked: Sequence[Place]) -> Image.Image:
    """RGB of the size of an image, uint8 (H, W, 3): its density in colours, the more opaque the higher it is, on the
    muted image; contours as light lines with dark edges, places numbered in their order."""
    picture = _coloured(image, log_density)
    width = _line_width(picture.size)
    innermost_last = sorted(lines, reverse=True)
    dark = [(lines[share], OPACITIES["casing"]) for share in innermost_last]
    light = [(lines[share], _opacity(number, len(lines))) for number, share in enumerate(innermost_last)]
    for colour, drawn, wide in ((DARK, dark, 2.5 * width), (LIGHT, light, width)):
        if mask := _line_mask(picture.size, drawn, wide):
            picture.paste(colour, mask=mask)
    for number, place in enumerate(marked, 1):
        _mark(picture, place, str(number))
    return picture


def _coloured(image: np.ndarray, log_density: np.ndarray) -> Image.Image:
    original = Image.fromarray(image)
    muted = Image.blend(original.convert("L").convert("RGB"), original, COLOURFULNESS)
    muted = muted.point([round(BRIGHTNESS * value) for value in range(256)] * 3)
    highest = max(float(log_density.max()), float(np.log(LEAST_PEAK / log_density.size)))
    # The square root lets the density's foothills show.
    height = Image.fromarray((255 * np.exp((log_density - highest) / 2)).astype(np.uint8))
    colour = height.copy()
    colour.putpalette(palette().tobytes())
    return Image.composite(colour.convert("RGB"), muted, height.point([round(OPACITY * value) for value in range(256)]))


def palette() -> np.ndarray:
    """uint8 (256, 3): the colours of a density from 0 to its highest."""
    anchors = np.array([list(bytes.fromhex(colour[1:])) for colour in COLOURS], float)
    at = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.stack(channels, 1).round().astype(np.uint8)


def _line_width(size: tuple[int, int]) -> float:
    return max(1.2, max(size) / 700)


def _opacity(number: int, count: int) -> float:
    """Of the number-th light line from outside."""
    step = (OPACITIES["innermost"] - OPACITIES["outermost"]) / max(count - 1, 1)
    return OPACITIES["outermost"] + number * step


def _line_mask(size: tuple[int, int], drawn: Sequence[tuple[Sequence[np.ndarray], float]], width: float) -> Image.Image:
    """Grey of a size (W, H): the opacity of lines, each with its own, of a width in px."""
    finer = max(1, min(4, int((MOST_SUPERSAMPLED / (size[0] * size[1])) ** 0.5)))
    mask = Image.new("L", (finer * size[0], finer * size[1]))
    pen = ImageDraw.Draw(mask)
    for lines, opacity in drawn:
        for line in lines:
            points = [tuple(point) for point in (finer * line - 0.5).tolist()]
            pen.line(points, fill=round(255 * opacity), width=round(finer * width), joint="curve")
    return mask.reduce(finer) if finer > 1 else mask


def _disc_radius(size: tuple[int, int]) -> float:
    """Of a place's mark, in px."""
    return max(7.0, max(size) / 75)


def _disc_centre(place: Place, size: tuple[int, int]) -> tuple[float, float]:
    """Where a place's mark is: there, or as near as it is wholly inside an image of (W, H)."""
    radius = _disc_radius(size)
    x, y = (
        min(max(at + 0.5, radius), max(side - radius, side / 2))
        for at, side in zip((place.x, place.y), size, strict=True)
    )
    return x, y


def _mark(picture: Image.Image, place: Place, text: str) -> None:
    """Draws a dark disc with a light rim and number."""
    finer, radius = 4, _disc_radius(picture.size)
    side = finer * int(2 * radius + 3)
    disc, light = Image.new("L", (side, side)), Image.new("L", (side, side))
    centre, reach = side / 2, finer * radius
    circle = (centre - reach, centre - reach, centre + reach, centre + reach)
    ImageDraw.Draw(disc).ellipse(circle, fill=round(255 * OPACITIES["disc"]))
    pen = ImageDraw.Draw(light)
    pen.ellipse(circle, outline=255, width=round(finer * max(1.0, radius / 9)))
    font = ImageFont.load_default(finer * radius * (1.25 if len(text) == 1 else 1.0))
    pen.text((centre, centre), text, fill=255, font=font, anchor="mm")
    x, y = _disc_centre(place, picture.size)
    corner = round(x - side / finer / 2), round(y - side / finer / 2)
    for colour, mask in ((DARK, disc), (LIGHT, light)):
        small = mask.reduce(finer)
        picture.paste(colour, (*corner, corner[0] + small.width, corner[1] + small.height), small)


def svg(size: tuple[int, int], lines: Lines, marked: Sequence[Place]) -> str:
    """The same lines and numbers alone, to be laid over an image of (W, H) px: paths with `data-mass`, the share that
    they enclose, and groups with `data-share`, that of a place."""
    width, height = size
    wide, radius = _line_width(size), _disc_radius(size)
    paths = {share: "".join(_path(line) for line in lines[share]) for share in sorted(lines, reverse=True)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        "<title>Where people look: lines enclose shares of the fixations, numbers are the likeliest places</title>",
        f'<g fill="none" stroke-linejoin="round" stroke="{DARK}" stroke-width="{2.5 * wide:.2f}" '
        f'stroke-opacity="{OPACITIES["casing"]}"><path d="{"".join(paths.values())}"/></g>',
        f'<g fill="none" stroke-linejoin="round" stroke="{LIGHT}" stroke-width="{wide:.2f}">',
    ]
    for number, (share, path) in enumerate(paths.items()):
        opacity = _opacity(number, len(paths))
        parts.append(
            f'<path data-mass="{share:g}" stroke-opacity="{opacity:.2f}" d="{path}"><title>{share:.0%} of the '
            "fixations</title></path>"
        )
    parts.append(f'</g>\n<g font-family="sans-serif" font-size="{1.25 * radius:.1f}" text-anchor="middle">')
    for number, place in enumerate(marked, 1):
        x, y = _disc_centre(place, size)
        parts.append(
            f'<g data-share="{place.share:.4f}"><title>{number}: {place.share:.1%} of the fixations</title>'
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:.1f}" fill="{DARK}" fill-opacity="{OPACITIES["disc"]}" '
            f'stroke="{LIGHT}" stroke-width="{max(1.0, radius / 9):.2f}"/>'
            f'<text x="{x:g}" y="{y:g}" dy=".36em" fill="{LIGHT}">{number}</text></g>'
        )
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _path(line: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line[:-1]) + "Z"


def png(picture: Image.Image) -> bytes:
    """Compressed as fast as may be: the best takes three times as long, for a twentieth fewer bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


def grey_png(log_density: np.ndarray) -> bytes:
    """A PNG of 16 bits: the density, linear, its highest value white; at least 1, as no place is impossible.

    Grey values times the file's text `density per grey value` are the density again, within half a grey value where it
    is more than that; over their sum they are it too, but for what the sum is off by rounding.
    """
    highest = float(log_density.max())
    relative = np.exp(log_density.astype(np.float64) - highest)
    grey = np.maximum(np.rint(GREYS * relative), 1).astype(np.uint16)
    text = PngInfo()
    text.add_text("density per grey value", repr(float(np.exp(highest)) / GREYS))
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG", compress_level=2, pnginfo=text)
    return buffer.getvalue()
