"""Numbers as text: an error has two significant digits, and its value as many decimals."""

from __future__ import annotations

import math

from ..records import Estimate

MOST_DECIMALS = 3  # in a sentence


def with_error(estimate: Estimate, *, sampling: bool = False, most: int = MOST_DECIMALS, unit: str = " nats") -> str:
    """ "6.31 +- 0.28 nats", with at most `most` decimals; an error that is too small to be seen in them is left out."""
    value, error = float(estimate.value), float(estimate.sampling_error if sampling else estimate.std_error)
    if estimate.doubt:
        return f"{value:.{most}f}{unit} (error not to be trusted)"
    if not math.isfinite(error):
        return f"{value:.{most}f}{unit} (error unknown)"
    digits = decimals(error, most)
    if float(f"{error:.{digits}f}") == 0:
        return f"{value:.{digits}f}{unit}"
    return f"{value:.{digits}f} +- {error:.{digits}f}{unit}"


def decimals(error: float, most: int) -> int:
    """How many decimals give an error two significant digits; `most` at the most, and for an error of zero."""
    return most if error <= 0 else min(_decimals(error, 2), most)


def plain(value: float) -> str:
    """A number without an error: whole numbers whole, others with three significant digits, without an exponent."""
    if value == int(value):
        return str(int(value))
    return f"{value:.{_decimals(value, 3)}f}"


def _decimals(number: float, significant: int) -> int:
    """Of a number that is rounded to so many significant digits; none for a large one."""
    rounded = float(f"{number:.{significant - 1}e}")  # 0.0996 has the decimals of 0.10
    return max(significant - 1 - math.floor(math.log10(abs(rounded))), 0)
