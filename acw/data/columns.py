"""Which columns of a table hold what, and which of its lines are fixations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from acw.data.convention import PX, Convention

FIELDS = ("image", "x", "y", "subject", "category")
NEEDED = FIELDS[:3]


@dataclass(frozen=True)
class Place:
    """The columns of x and y, what they are in, and whether that is a screen's, not an image's."""

    x: str = "x"
    y: str = "y"
    convention: Convention = PX
    on_screen: bool = False


@dataclass(frozen=True)
class Columns:
    """How a program writes a table of fixations. Of several names for a column, the first that a table has counts.

    image, subject, category: names of columns; x and y: `places`.
    keep: column -> what it says of a line that counts, in lower case: lines of samples and saccades are left out. A
        column that is not there keeps all, unless it is in `certain`, which says what the table is without it.
    fixation: columns whose equal values, with the same image and subject, are one fixation, written once a sample.
    last: whether the last line of a fixation counts, not the first.
    own: whether it is the table that this package defines: every line counts, and names are whole paths. Of what other
        programs write, lines without an image or without x and y are left out, and images are found by the last part
        of their path, with or without its ending.
    files: of a folder of such tables, the names of those to read, as patterns, of which the first that any has counts.
    image_in, subject_in: what of a table's path in that folder, with slashes, says what no column does: a regular
        expression whose first group is the image or the subject; empty where nothing does.
    """

    image: tuple[str, ...] = ("image",)
    places: tuple[Place, ...] = (Place(),)
    subject: tuple[str, ...] = ("subject",)
    category: tuple[str, ...] = ("category",)
    keep: Mapping[str, str] = field(default_factory=dict)
    certain: Mapping[str, str] = field(default_factory=dict)
    fixation: tuple[str, ...] = ()
    last: bool = False
    own: bool = False
    files: tuple[str, ...] = ("*.csv", "*.tsv", "*.txt")
    image_in: str = ""
    subject_in: str = r"(.+)\.\w+"

    @property
    def looked_for(self) -> set[str]:
        """All names of columns that are needed."""
        return {*self.image, *(name for place in self.places for name in (place.x, place.y))}


OWN = Columns(own=True)
