"""A view of the images: one or more frozen networks whose features one readout reads side by side.

The mixture's components are views. DeepGaze IIE's four are of one network each; a readout on several networks of
different kinds, as DeepGaze MSDB has them (Kuemmerer et al., ICCV 2025), sees in one what the others do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from acw.features.backbone import Backbone

JOIN = "+"  # between the names of a view's parts


@dataclass(frozen=True)
class View:
    """parts: the networks, in the order in which their features are concatenated."""

    parts: tuple[Backbone, ...]

    @property
    def name(self) -> str:
        return JOIN.join(part.name for part in self.parts)

    def readout_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in cells of the readout's grid for an image of (height, width) px: the finest part's."""
        return finest(part.readout_size(image_size) for part in self.parts)


def finest(grids: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The grid of the most cells; of several, the first."""
    return max(grids, key=lambda grid: grid[0] * grid[1])


def parts_of(views: Iterable[View]) -> list[Backbone]:
    """The networks of some views, each once, in order."""
    return list(dict.fromkeys(part for view in views for part in view.parts))
