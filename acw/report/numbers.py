"""Numbers as a person reads them."""

from __future__ import annotations


def number(value: float, percent: bool = False, *, signed: bool = False) -> str:
    """With a true minus sign, and digits as its size asks for. percent: of a share. signed: a difference."""
    digits = 0 if isinstance(value, int) else 1 if percent or abs(value) >= 100 else 4 if signed else 3
    # Rounded first, and -0.0 + 0.0 is 0.0: no sign without a difference to be seen.
    rounded = round(100 * value if percent else value, digits) + 0.0
    sign = "+" if signed and rounded else ""
    return minus(f"{rounded:{sign},.{digits}f}" + (" %" if percent else ""))


def interval(low: float, high: float, signed: bool = False) -> str:
    """Its ends, which stay on one line."""
    return f"[{number(low, signed=signed)},\N{NO-BREAK SPACE}{number(high, signed=signed)}]"


def minus(text: str) -> str:
    """The text of a number with a true minus sign."""
    return text.replace("-", "\N{MINUS SIGN}")
