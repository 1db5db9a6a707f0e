"""Coordinates of fixations as files give them, converted to px from the upper left corner, and those outside images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from acw.data import plausibility
from acw.data.plausibility import Placed
from acw.data.recording import Recording, listed
from acw.storage.errors import UserError

Units = Literal["px", "share", "height"]
Origin = Literal["corner", "centre"]
YAxis = Literal["down", "up"]

# Share of the fixations that --drop-outside drops without being given a share.
MOST_DROPPED = 0.1


@dataclass(frozen=True)
class Convention:
    """How a file writes where a fixation is.

    units: px; `share` of the image's width and height, where 1 is the edge; or both in its `height`, as PsychoPy does.
    origin: the image's upper left `corner`, or its `centre`; where y goes `up`, the corner is the lower left one.
    Raises UserError for any other.
    """

    units: Units = "px"
    origin: Origin = "corner"
    y_axis: YAxis = "down"

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--units", self.units, Units), ("--origin", self.origin, Origin), ("--y-axis", self.y_axis, YAxis)
        ):  # fmt: skip
            if value not in get_args(choices):
                raise UserError(f"{option} {value}: choose one of {', '.join(get_args(choices))}")

    @property
    def note(self) -> tuple[str, ...]:
        """In words, where it is not what everything here is in."""
        text = f"coordinates read as {self.units} from the {self.origin}, y going {self.y_axis}"
        return () if self == Convention() else (text,)


def placed(recording: Recording, convention: Convention, where: str) -> Placed:
    """A recording's fixations in px from the upper left corner, x to the right and y down.

    Raises UserError, which begins with `where`, for what cannot be meant so.
    """
    height, width = np.array([stimulus.size for stimulus in recording.stimuli])[recording.image].T
    given = Placed(recording.x, recording.y, height, width)
    if recording.pixels:
        if convention != Convention():
            raise UserError(f"{where}: marks pixels of the images, so leave out --units, --origin and --y-axis")
        return given
    if reason := plausibility.contradiction(given, convention.units, convention.origin):
        raise UserError(f"{where}: {reason}")
    scale_x, scale_y = {"px": (1, 1), "share": (width, height), "height": (height, height)}[convention.units]
    x, y = given.x * scale_x, given.y * scale_y
    if convention.y_axis == "up":
        y = -y if convention.origin == "centre" else height - y
    if convention.origin == "centre":
        x, y = x + width / 2, y + height / 2
    if convention.units != "px":  # 1 is the image's edge, and belongs to it
        x, y = (np.where(values == edge, np.nextafter(edge, 0), values) for values, edge in ((x, width), (y, height)))
    return Placed(x, y, height, width)


def inside(
    recording: Recording, places: Placed, convention: Convention, share: float, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
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
    reason = plausibility.why_outside(recording, places, convention.units, convention.origin)
    because = f"; {reason}" if reason else ""
    if len(outside) > share * len(kept):
        remedy = "correct them, or leave them out with --drop-outside (drop_outside=True)"
        if share > 0:
            remedy = f"more than {share:g} of all; correct them, or say how many may be left out: --drop-outside SHARE"
        raise UserError(f"{where}: fixations outside their image: {counts} ({listed(first)}){because}; {remedy}")
    total, lost = (np.bincount(recording.image[mask], minlength=len(recording.stimuli)) for mask in (kept >= 0, ~kept))
    worst = [i for i in np.argsort(-lost / np.maximum(total, 1), kind="stable") if lost[i] > MOST_DROPPED * total[i]]
    by_image = [f"{recording.stimuli[i].name} {lost[i]} of {total[i]}" for i in worst]
    note = f"dropped {counts} fixations outside their image (at the user's request)"
    note += f"; most of {listed(by_image)}" if by_image else ""
    return kept, (note + because,)
