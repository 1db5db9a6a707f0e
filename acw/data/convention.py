"""How a file writes where a fixation is, and the screen on which its images were shown."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from acw.storage.errors import UserError

Units = Literal["px", "share", "height"]
Origin = Literal["corner", "centre"]
YAxis = Literal["down", "up"]

_SCREEN = re.compile(r"(\d{1,6})x(\d{1,6})(?:([+-]\d+(?:\.\d+)?)([+-]\d+(?:\.\d+)?))?")
FIT = "fit"  # for a scale: as large as the screen allows


@dataclass(frozen=True)
class Screen:
    """width, height of a screen in px; corner: x and y, in its px, of every image's upper left corner, or None where
    images were shown in its middle."""

    width: int
    height: int
    corner: tuple[float, float] | None = None

    def __str__(self) -> str:
        offset = "" if self.corner is None else "{:+g}{:+g}".format(*self.corner)
        return f"{self.width}x{self.height}{offset}"


def screen_of(text: str) -> Screen:
    """A screen as it is typed, `1920x1080` or `1920x1080+560+240`. Raises UserError for anything else."""
    match = _SCREEN.fullmatch(text.strip())
    if not match or not int(match[1]) or not int(match[2]):
        raise UserError(
            f"--screen {text}: give its width and height in px, such as 1920x1080, and, unless images were shown in "
            "its middle, where their upper left corner was: 1920x1080+100+50"
        )
    corner = None if match[3] is None else (float(match[3]), float(match[4]))
    return Screen(int(match[1]), int(match[2]), corner)


def scale_of(text: str) -> float | str:
    """A scale as it is typed: a number above 0, or `fit`. Raises UserError for anything else."""
    if text == FIT:
        return FIT
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"--scale {text}: give how many px an image's px was shown as, such as 1.25; or {FIT}")
    return value


@dataclass(frozen=True)
class Convention:
    """How a file writes where a fixation is.

    units: px; `share` of the width and height, where 1 is the edge; or both in the height, as PsychoPy does.
    origin: the upper left `corner`, or the `centre`; where y goes `up`, the corner is the lower left one.
    first_px: what the first px is called, 0 or 1.
    screen: what units and origin are of; None where they are the image's.
    scale: how many px each px of an image was shown as, or `fit`, as many as the screen has room for.
    Raises UserError for any other.
    """

    units: Units = "px"
    origin: Origin = "corner"
    y_axis: YAxis = "down"
    first_px: int = 0
    screen: Screen | None = None
    scale: float | str = 1.0

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--units", self.units, Units), ("--origin", self.origin, Origin), ("--y-axis", self.y_axis, YAxis)
        ):  # fmt: skip
            if value not in get_args(choices):
                raise UserError(f"{option} {value}: choose one of {', '.join(get_args(choices))}")
        if self.first_px not in (0, 1):
            raise UserError(f"--first-px {self.first_px}: choose 0, or 1, as MATLAB counts")
        if self.first_px and (self.units != "px" or self.origin != "corner"):
            raise UserError("--first-px 1: px are counted from a corner; leave out --units and --origin")
        if self.scale == FIT and self.screen is None:
            raise UserError(f"--scale {FIT}: say on which screen, --screen WxH")

    def replaced(self, **given: Any) -> Convention:
        """With those of the fields that are not None."""
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})

    @property
    def note(self) -> tuple[str, ...]:
        """In words, where it is not what everything here is in."""
        parts = []
        if (self.units, self.origin, self.y_axis) != ("px", "corner", "down"):
            parts.append(f"read as {self.units} from the {self.origin}, y going {self.y_axis}")
        if self.first_px:
            parts.append("counted from 1")
        if self.screen is not None:
            parts.append(f"on a screen of {self.screen}" + ("" if self.screen.corner else ", images in its middle"))
        if self.scale != 1:
            parts.append("of images as large as the screen" if self.scale == FIT else f"of images {self.scale:g} times")
        return (f"coordinates {', '.join(parts)}",) if parts else ()

    def frame(self, height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Height and width in px of what x and y are written in: the screen, or the images (F,) as they were shown."""
        if self.screen is None:
            factor = self._factor(height, width)
            return height * factor, width * factor
        return np.full_like(height, self.screen.height), np.full_like(width, self.screen.width)

    def pixels(
        self, x: np.ndarray, y: np.ndarray, height: np.ndarray, width: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """x and y as they are written -> px of the images, from the upper left corner. All float64 or int64 (F,);
        height and width: the images', px."""
        rows, columns = self.frame(height, width)
        scale_x, scale_y = {"px": (1, 1), "share": (columns, rows), "height": (rows, rows)}[self.units]
        x, y = x * scale_x - self.first_px, y * scale_y - self.first_px
        if self.y_axis == "up":
            y = -y if self.origin == "centre" else rows - y
        if self.origin == "centre":
            x, y = x + columns / 2, y + rows / 2
        factor = self._factor(height, width)
        left, top = (columns - width * factor) / 2, (rows - height * factor) / 2
        if self.screen is not None and self.screen.corner is not None:
            left, top = (np.full_like(x, value) for value in self.screen.corner)
        x, y = (x - left) / factor, (y - top) / factor
        if self.units != "px":  # 1 is the image's edge, and belongs to it
            x, y = (np.where(v == edge, np.nextafter(edge, 0), v) for v, edge in ((x, width), (y, height)))
        return x, y

    def _factor(self, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """float64 (F,): px on the screen of each px of the image."""
        if isinstance(self.scale, str):
            assert self.screen is not None
            return np.minimum(self.screen.height / height, self.screen.width / width)
        return np.full(len(height), self.scale)


PX = Convention()
