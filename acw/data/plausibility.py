"""What data can be meant to say: coordinates that cannot be px of their images are refused with the likely reason.

Eye trackers and programs write px from 0 or from 1, from the corner or the centre, shares of the screen, percent or
degrees, and 0 or -32768 for a lost eye. A wrong guess trains a model on nonsense without a word, so nothing is
converted unasked: what cannot be meant is refused; what is odd becomes a note, which jobs print and the report shows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from acw.data.recording import Recording, listed
from acw.storage.errors import UserError

# Judged on the share of fixations for which a reading holds, as a few stray from any screen.
MOST = 0.95
# From so many fixations on, what holds for all of them is no coincidence.
FEW, MANY = 10, 1000
# An image of fewer px a side is a toy, whose px are no larger than shares, degrees or percent.
SMALLEST_SIDE = 20
SMALLEST_SIDE_OF_PERCENT = 250
# Shares of the fixations: at (0, 0), as which trackers write a lost eye; and of lines that are there twice.
MOST_AT_ZERO, MOST_REPEATED = 0.005, 0.2
# No screen is seen under more degrees to one side, and nobody looks at the corner alone: this share of the sides.
WIDEST_DEGREES = 45
NEAR_CORNER = 0.045
# px of a degree of visual angle.
FEWEST_PER_DEGREE = 1.0


@dataclass(frozen=True)
class Placed:
    """Fixations: x, y float64 (F,), in px or as they are given; height, width int64 (F,) of their images, px."""

    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    width: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """bool (F,): whether a fixation, in px, is in its image."""
        return (self.x >= 0) & (self.x < self.width) & (self.y >= 0) & (self.y < self.height)

    @property
    def extent(self) -> str:
        """Of coordinates and images, in words."""
        return (
            f"x goes from {self.x.min():.4g} to {self.x.max():.4g} and y from {self.y.min():.4g} to {self.y.max():.4g} "
            f"in images of {self.width.max():g}x{self.height.max():g} px"
        )


def contradiction(given: Placed, units: str, origin: str) -> str | None:
    """Why coordinates as they are given cannot be in these units from this origin, with the remedy; None if they may.

    given: before any conversion, so x and y are in `units`.
    """
    if len(given.x) < 1 or min(given.height.min(), given.width.min()) < SMALLEST_SIDE:
        return None
    zero = (given.x == 0) & (given.y == 0)
    seen = Placed(*(values[~zero] for values in (given.x, given.y, given.height, given.width)))
    if units == "px" and len(seen.x) and (reason := _no_px(seen, origin)):
        return f"{given.extent}: they look like {reason}"
    if units != "px" and np.mean(np.maximum(np.abs(given.x), np.abs(given.y)) > 3) > 0.5:
        return f"{given.extent}: they look like px; leave out --units {units}"
    if zero.sum() > 1 and len(zero) >= FEW and zero.mean() > MOST_AT_ZERO and origin == "corner":
        count = f"{zero.sum()} of {len(zero)}"
        return f"{count} fixations are exactly at x=0 y=0, as a lost eye is written; remove those lines"
    return None


def _no_px(seen: Placed, origin: str) -> str | None:
    """What coordinates that are called px rather are; a lost eye's, far away, and a few that stray hide nothing."""
    x, y = seen.x, seen.y
    broken = np.any(x != np.floor(x)) or np.any(y != np.floor(y))
    if not broken and len(x) < FEW:
        return None
    near_x, near_y = (np.mean(np.abs(values) <= 1.5) > 0.5 for values in (x, y))
    centred = origin == "centre" or _counted_from_within(x) or _counted_from_within(y)
    if near_x and near_y:
        return _shares(seen, centred)
    if broken and len(x) >= FEW and (near_x or near_y):
        axis, of = ("x", "width") if near_x else ("y", "height")
        return f"a share of the {of} in {axis} alone; convert it to px"
    reach = float(np.quantile(np.maximum(np.abs(x), np.abs(y)), 0.95))
    sides = min(seen.height.min(), seen.width.min())
    if sides < SMALLEST_SIDE_OF_PERCENT or len(x) < FEW:
        return None
    if centred and reach <= WIDEST_DEGREES:
        return "degrees of visual angle from the centre; multiply them by px a degree, and say --origin centre"
    if not centred and reach <= min(WIDEST_DEGREES, NEAR_CORNER * sides):
        return "degrees of visual angle or another unit than px; convert them to px"
    if not centred and np.quantile(x, 0.95) <= 105 and np.quantile(y, 0.95) <= 105 and min(x.max(), y.max()) > 60:
        return "percent; divide by 100 and say --units share"
    return None


def _shares(seen: Placed, centred: bool) -> str:
    if not centred:
        return "shares of the width and height; say --units share, or convert them to px"
    x, y = (float(np.quantile(np.abs(values), 0.95)) for values in (seen.x, seen.y))
    if x <= 0.6 and y <= 0.6:
        return (
            "shares from the centre; say --units share --origin centre, or --units height --origin centre if both are "
            "in the image's height, as PsychoPy has it, with --y-axis up if y goes up"
        )
    if y <= 0.6 and x > 0.5:
        return "shares of the height from the centre; say --units height --origin centre, with --y-axis up if y goes up"
    return (
        "shares of half the width and height from the centre (-1 to 1); halve them and say --units share --origin "
        "centre, with --y-axis up if y goes up"
    )


def why_outside(recording: Recording, places: Placed, units: str, origin: str) -> str | None:
    """What explains that fixations lie outside their images, if something does; nothing is converted on its account."""
    return misread(recording, places, origin) or too_far(places, units)


def misread(recording: Recording, places: Placed, origin: str) -> str | None:
    """What the fixations outside their images, that there are, must have been read otherwise than they are meant by."""
    x, y, height, width = places.x, places.y, places.height, places.width
    outside = ~places.inside

    def fits(x: np.ndarray, y: np.ndarray) -> bool:
        return bool(np.mean(Placed(x, y, height, width).inside) >= MOST)

    turned = [i for i in np.unique(recording.image[outside]).tolist() if recording.stimuli[i].orientation >= 5]
    mine = np.isin(recording.image, turned)
    if turned and np.mean(Placed(x[mine], y[mine], width[mine], height[mine]).inside) >= MOST:
        return (
            f"{recording.stimuli[turned[0]].name} has an EXIF orientation that turns it, and the fixations are on the "
            "turned image, but pixels are read as stored; store the image turned, without EXIF"
        )
    if np.all(x < width + 1) and np.all(y < height + 1) and min(x.min(), y.min()) >= 1:
        return "they look like px counted from 1; subtract 1, or say --first-px 1"
    centred = _counted_from_within(x) or _counted_from_within(y)
    if origin == "corner" and centred and fits(x + width / 2, y + height / 2):
        return "they look like px from the images' centre; say --origin centre, with --y-axis up if y goes up"
    if _lost_eye(x, outside) or _lost_eye(y, outside):
        return "one value comes again and again, as a lost eye is written; remove those lines"
    if not fits(x, y) and fits(y, x):
        return "they fit when x and y are swapped; swap the columns (of a table, --columns x=y,y=x)"
    return None


def too_far(places: Placed, units: str) -> str | None:
    """How much further than their images fixations reach, if more than a few do."""
    x, y = places.x, places.y
    if np.mean(places.inside) >= MOST or units != "px" or min(x.min(), y.min()) < 0:
        return None
    factor = max(np.max(x / places.width), np.max(y / places.height))
    return (
        f"they reach {factor:.2g} times as far as the images: are they px of a screen or of another size? say "
        "--screen WxH, or --scale FACTOR"
    )


def corner(places: Placed) -> tuple[float, float] | None:
    """The shares of width and height that all fixations lie in, if they are so many that some would lie further out."""
    right, down = float(np.max(places.x / places.width)), float(np.max(places.y / places.height))
    few, many = len(places.x) >= 100 and max(right, down) <= 0.5, len(places.x) >= MANY and max(right, down) < 0.8
    return (right, down) if few or many else None


def refuse_repeated(recording: Recording, where: str) -> None:
    """Raises UserError if many fixations are there several times, to all decimals: samples, or a table pasted twice."""
    if recording.pixels or len(recording.x) < 2 * FEW or np.all(recording.x == np.floor(recording.x)):
        return
    lines = np.column_stack([recording.image, recording.subject, recording.x, recording.y])
    repeated = len(lines) - len(np.unique(lines, axis=0))
    if repeated > MOST_REPEATED * len(lines):
        raise UserError(
            f"{where}: {repeated} of {len(lines)} fixations repeat others, to all decimals of x and y: are the lines "
            "samples instead of fixations, or there twice? keep one line a fixation"
        )


def oddities(recording: Recording, places: Placed) -> tuple[str, ...]:
    """What is odd and may be right, in words: EXIF orientations, images that are there twice, categories that differ in
    their capitals, fixations in one corner."""
    notes = []
    stimuli = recording.stimuli
    if turned := [stimulus.name for stimulus in stimuli if stimulus.orientation != 1]:
        notes.append(f"pixels are read as stored, whatever EXIF says of {len(turned)} images ({listed(turned)})")
    digests = Counter(stimulus.digest for stimulus in stimuli)
    if twins := [stimulus.name for stimulus in stimuli if digests[stimulus.digest] > 1]:
        notes.append(f"{len(twins)} images are there twice, under other names ({listed(twins)})")
    names = {stimulus.category for stimulus in stimuli}
    if len({name.casefold() for name in names}) < len(names):
        notes.append(f"categories differ in their capitals alone ({listed(sorted(names), 6)})")
    if reached := corner(places):
        notes.append(
            f"all fixations lie in the upper left {reached[0]:.0%} by {reached[1]:.0%} of their images: are the "
            "coordinates those of images of another size?"
        )
    return tuple(notes)


def degree(stated: float, widest: int, where: str) -> float:
    """px of a degree of visual angle as it is stated; raises UserError for what it cannot be in images so wide."""
    if not FEWEST_PER_DEGREE <= stated <= widest:
        raise UserError(
            f"{where}: {stated:g} px a degree of visual angle cannot be in images {widest} px wide; give px a degree, "
            "such as 40"
        )
    return stated


def _counted_from_within(values: np.ndarray) -> bool:
    """Whether so many are below 0 that it is where they are counted from, not a few that stray."""
    return bool(np.mean(values < 0) > 0.2)


def _lost_eye(values: np.ndarray, outside: np.ndarray) -> bool:
    """Whether what lies outside is one value, or two."""
    return outside.sum() >= FEW and len(np.unique(values[outside])) <= 2
