"""What a recipe's field is: a default, what it means, which values it takes, in which unit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Which numbers a field takes: those from `low` to `high`, and `off`, a number that switches something off."""

    low: float
    high: float = math.inf
    _: dataclasses.KW_ONLY
    ends: bool = True  # whether low and high are among them; infinity never is
    off: float | None = None

    def __contains__(self, value: float) -> bool:
        inside = self.low <= value <= self.high if self.ends else self.low < value < self.high
        return (inside and math.isfinite(value)) or value == self.off

    def __str__(self) -> str:
        if self.high < math.inf:
            text = f"from {self.low:g} to {self.high:g}" if self.ends else f"between {self.low:g} and {self.high:g}"
        else:
            text = f"{self.low:g} or more" if self.ends else f"above {self.low:g}"
        return text if self.off is None else f"{text}, or {self.off:g}"


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, ends=False)
SHARE = Range(0, 1, ends=False)


def field(
    default: Any,
    meaning: str,
    allowed: Range | Collection[str] | None = None,
    unit: str = "",
    identity: bool = True,
    later: bool = False,
) -> Any:
    """A recipe's field; the command line's option, its help and its checks are made of it.

    allowed: the numbers or the names that it takes, if not all of its type; of a tuple, the names that may be in it.
    identity: False where changing the field changes how a run is computed, not which run it is. later: whether there
    were runs before the field, which keep their names where it has its default.
    """
    metadata = {"help": meaning, "allowed": allowed, "unit": unit, "identity": identity, "later": later}
    return dataclasses.field(default=default, metadata=metadata)
