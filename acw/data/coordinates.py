"""Coordinates of fixations as files give them, converted to px from the upper left corner, and those outside images."""

from __future__ import annotations

import numpy as np

from acw.data import plausibility
from acw.data.convention import Convention
from acw.data.plausibility import Placed
from acw.data.recording import Recording, listed
from acw.storage.errors import UserError

# Share of the fixations that --drop-outside drops without being given a share.
MOST_DROPPED = 0.1


def placed(recording: Recording, convention: Convention, where: str) -> Placed:
    """A recording's fixations in px from the upper left corner, x to the right and y down.

    Raises UserError, which begins with `where`, for what cannot be meant so.
    """
    height, width = sizes(recording)
    if recording.pixels:
        if convention != Convention():
            raise UserError(
                f"{where}: marks pixels of the images, so leave out --units, --origin and --y-axis, as well as "
                "--first-px, --screen and --scale"
            )
        return Placed(recording.x, recording.y, height, width)
    if reason := plausibility.contradiction(written(recording, convention), convention.units, convention.origin):
        raise UserError(f"{where}: {reason}")
    return Placed(*convention.pixels(recording.x, recording.y, height, width), height, width)


def sizes(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """int64 (F,) twice: height and width in px of each fixation's image."""
    height, width = np.array([stimulus.size for stimulus in recording.stimuli])[recording.image].T
    return height, width


def written(recording: Recording, convention: Convention) -> Placed:
    """Fixations as the file has them, and the size in px of what it means them in: the image, or the screen."""
    return Placed(recording.x, recording.y, *convention.frame(*sizes(recording)))


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
