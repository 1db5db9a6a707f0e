"""Coordinates of fixations as files give them: converted to px from the upper left corner, and held to the plausible.

Eye trackers and programs write px from 0 or from 1, from the corner or the centre, shares of the screen or percent. A
wrong guess trains a model on nonsense without a word, so nothing is guessed: what cannot be px in the image is refused
with the likely reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from acw.data.images import inspect_image
from acw.data.recording import Recording, listed
from acw.storage.errors import UserError

Units = Literal["px", "share"]
Origin = Literal["corner", "centre"]

# Judged on the share of fixations for which a reading holds, as a few stray from any screen.
MOST = 0.95
# From so many whole-numbered fixations on, all of them in an image's first 2 px is no coincidence.
FEW = 10
# An image of fewer px a side is a toy, whose px are no larger than shares or percent.
SMALLEST_SIDE = 20
SMALLEST_SIDE_OF_PERCENT = 250
# Share of the fixations that may lie exactly at (0, 0), as which trackers write a lost eye.
MOST_AT_ORIGIN = 0.05
# Share of the fixations that --drop-outside drops without being given a share.
MOST_DROPPED = 0.1


@dataclass(frozen=True)
class Placed:
    """Fixations in px: x, y float64 (F,); height, width int64 (F,) of their images."""

    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    width: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """bool (F,): whether a fixation is in its image."""
        return (self.x >= 0) & (self.x < self.width) & (self.y >= 0) & (self.y < self.height)


def placed(recording: Recording, units: Units, origin: Origin, where: str) -> Placed:
    """A recording's fixations in px from the corner, x to the right and y down.

    units: `share` of the image's width and height, where 1 is the last px. origin: `centre` of the image; y still goes
    down. Raises UserError, which begins with `where`, for what cannot be in these units.
    """
    if units not in get_args(Units):
        raise UserError(f"--units {units}: choose one of {', '.join(get_args(Units))}")
    if origin not in get_args(Origin):
        raise UserError(f"--origin {origin}: choose one of {', '.join(get_args(Origin))}")
    height, width = np.array([stimulus.size for stimulus in recording.stimuli])[recording.image].T
    given = Placed(recording.x, recording.y, height, width)
    if recording.pixels:
        if (units, origin) != ("px", "corner"):
            raise UserError(f"{where}: marks pixels of the images, so leave out --units and --origin")
        return given
    if units == "px" and (reason := _other_units(given, origin)):
        raise UserError(f"{where}: {reason}")
    if _at_origin(given) > MOST_AT_ORIGIN:
        raise UserError(
            f"{where}: {_at_origin(given):.0%} of the fixations are exactly at x=0 y=0, as a lost eye is written; "
            "remove those lines"
        )
    x, y = given.x, given.y
    if units == "share":
        x, y = x * width, y * height
    if origin == "centre":
        x, y = x + width / 2, y + height / 2
    if units == "share":  # 1 is the image's edge, and belongs to it
        x, y = (np.where(values == edge, np.nextafter(edge, 0), values) for values, edge in ((x, width), (y, height)))
    return Placed(x, y, height, width)


def inside(recording: Recording, places: Placed, share: float, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """bool (F,) which fixations are in their images, and a note on the others if there are any.

    share: how many of all may lie outside. Raises UserError if more do, with the likely reason.
    """
    kept = places.inside
    outside = np.flatnonzero(~kept)
    if not len(outside):
        return kept, ()
    names = [recording.stimuli[i].name for i in recording.image]
    first = [f"{names[i]} x={places.x[i]:g} y={places.y[i]:g} in {places.width[i]}x{places.height[i]}" for i in outside]
    counts = f"{len(outside)} of {len(kept)}"
    reason = _reason(recording, places)
    if len(outside) > share * len(kept):
        remedy = "correct them, or leave them out with --drop-outside (drop_outside=True)"
        if share > 0:
            remedy = f"more than {share:g} of all; correct them, or say how many may be left out: --drop-outside SHARE"
        because = f"; {reason}" if reason else ""
        raise UserError(f"{where}: fixations outside their image: {counts} ({listed(first)}){because}; {remedy}")
    total, lost = (np.bincount(recording.image[mask], minlength=len(recording.stimuli)) for mask in (kept >= 0, ~kept))
    worst = [i for i in np.argsort(-lost / np.maximum(total, 1), kind="stable") if lost[i] > MOST_DROPPED * total[i]]
    by_image = [f"{recording.stimuli[i].name} {lost[i]} of {total[i]}" for i in worst]
    note = f"dropped {counts} fixations outside their image (at the user's request)"
    note += f"; most of {listed(by_image)}" if by_image else ""
    return kept, (note + (f"; {reason}" if reason else ""),)


def corner_only(places: Placed) -> tuple[str, ...]:
    """A note if no fixation lies beyond the upper left quarter of any image, as it is with another resolution's px."""
    if len(places.x) < 100 or np.any(places.x > places.width / 2) or np.any(places.y > places.height / 2):
        return ()
    right, down = np.max(places.x / places.width), np.max(places.y / places.height)
    return (
        f"all fixations lie in the upper left {right:.0%} by {down:.0%} of their images: are the coordinates those of "
        "images of another size?",
    )


def _most(condition: np.ndarray) -> bool:
    return bool(np.mean(condition) >= MOST)


def _within(low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: (values >= low) & (values <= high)


def _other_units(given: Placed, origin: Origin) -> str | None:
    """Why coordinates that are given as px are none, with the remedy; None if they may be."""
    x, y = given.x, given.y
    if min(given.height.min(), given.width.min()) < SMALLEST_SIDE:
        return None
    fractions = bool(np.any((x != np.floor(x)) | (y != np.floor(y))))
    largest = f"x goes from {x.min():.4g} to {x.max():.4g} and y from {y.min():.4g} to {y.max():.4g}"
    images = f"in images of {given.width.max()}x{given.height.max()} px"
    near = _within(-1.5, 1.5)
    if _most(near(x) & near(y)) and (fractions or len(x) >= FEW):
        centred = origin == "centre" or _most_negative(x) or _most_negative(y)
        if centred and origin == "corner" and _most(_within(-0.6, 0.6)(x) & _within(-0.6, 0.6)(y)):
            return f"{largest} {images}: they look like shares from the centre; say --units share --origin centre"
        if centred and origin == "corner":
            return (
                f"{largest} {images}: they look like shares of half the width and height from the centre (-1 to 1); "
                "halve them and say --units share --origin centre (y down), or convert them to px"
            )
        option = "--units share" + (" --origin centre" if origin == "centre" else "")
        return f"{largest} {images}: they look like shares of the width and height; say {option}, or convert them to px"
    percent = _within(-5, 105)
    sides = min(given.height.min(), given.width.min())
    reach = min(x.max(), y.max())
    if sides >= SMALLEST_SIDE_OF_PERCENT and len(x) >= FEW and reach > 60 and _most(percent(x) & percent(y)):
        return f"{largest} {images}: they look like percent; divide by 100 and say --units share"
    return None


def _most_negative(values: np.ndarray) -> bool:
    """Whether so many are below 0 that it is where they are counted from, not a few that stray."""
    return bool(np.mean(values < 0) > 0.2)


def _at_origin(given: Placed) -> float:
    at = (given.x == 0) & (given.y == 0)
    return float(at.mean()) if len(at) >= FEW else 0.0


def _reason(recording: Recording, places: Placed) -> str | None:
    """What explains that fixations lie outside their images, if something does; nothing is converted on its account."""
    x, y, height, width = places.x, places.y, places.height, places.width
    outside = ~places.inside

    def fits(x: np.ndarray, y: np.ndarray, height: np.ndarray = height, width: np.ndarray = width) -> bool:
        return _most(Placed(x, y, height, width).inside)

    if turned := _turned(recording, outside):
        mine = np.isin(recording.image, turned)
        if np.mean(Placed(x[mine], y[mine], width[mine], height[mine]).inside) >= MOST:
            return (
                f"{recording.stimuli[turned[0]].name} has an EXIF orientation that turns it, and the fixations are on "
                "the turned image, but pixels are read as stored; store the image turned, without EXIF"
            )
    if np.all(x[outside] <= width[outside]) and np.all(y[outside] <= height[outside]) and min(x.min(), y.min()) >= 1:
        return "they look like px counted from 1; subtract 1"
    if (_most_negative(x) or _most_negative(y)) and fits(x + width / 2, y + height / 2):
        return "they look like px from the images' centre; say --origin centre if y goes down from there"
    if not places.inside.all() and not fits(x, y):
        if fits(y, x):
            return "they fit when x and y are swapped; swap the columns"
        if _missing_code(x, outside) or _missing_code(y, outside):
            return "one value comes again and again, as a lost eye is written; remove those lines"
        if np.min(x) >= 0 and np.min(y) >= 0:
            factor = max(np.max(x / width), np.max(y / height))
            return f"they reach {factor:.2g} times as far as the images: are they px of a screen or of another size?"
    return None


def _turned(recording: Recording, outside: np.ndarray) -> list[int]:
    """The images with fixations outside that EXIF turns by 90 degrees."""
    suspects = np.unique(recording.image[outside]).tolist()
    return [i for i in suspects if inspect_image(Path(recording.stimuli[i].path)).orientation >= 5]


def _missing_code(values: np.ndarray, outside: np.ndarray) -> bool:
    distinct = np.unique(values[outside])
    return outside.sum() >= FEW and len(distinct) <= 2
