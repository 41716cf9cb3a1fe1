"""Checks of options: numbers of Python and NumPy are accepted and converted to plain ones; bools are not numbers."""

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, get_args

import numpy
from torch import Tensor

from .errors import OptionError, described

MOST_DIMS = 64  # of a tensor
LARGEST = 2**63 - 1  # whole number that a tensor can hold
# largest number of particles, steps and the like per datum: a larger one is a typing error, or would run for years
MOST = 10**9


def is_whole(value: Any) -> TypeGuard[Integral]:
    """Whether a value is a whole number of Python or NumPy; 100.0 is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> TypeGuard[Real]:
    """Whether a value is a number of Python or NumPy, also infinite or NaN."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole_number(name: str, value: Any, lowest: int = 1, why: str = "", highest: int = LARGEST) -> int:
    """Check a whole number; `why` is added to the message."""
    if not is_whole(value) or int(value) < lowest:
        raise OptionError(f"{name} must be a whole number of at least {lowest}, got {value!r}{why and f': {why}'}")
    if int(value) > highest:
        raise OptionError(f"{name} must be a whole number from {lowest} to {highest:,}, got {briefly(value)}: pass fewer")
    return int(value)


def amount(name: str, value: Any, lowest: int = 1, why: str = "") -> int:
    """Check a whole number of particles, steps, chains, or the width of a layer."""
    return whole_number(name, value, lowest, why, highest=MOST)


def widths_of(name: str, value: Any) -> tuple[int, ...]:
    """Check a list of numbers of features, channels or columns."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise OptionError(f"{name} must be a list of whole numbers, got {described(value)}: write {name}=(8, 8)")
    return tuple(amount(f"each number of {name}", width) for width in value)


def briefly(value: Any) -> str:
    """A value in a message; of numbers with very many digits, the number of digits."""
    text = f"{value:,}" if is_whole(value) and abs(int(value)) < 10**30 else ""
    return text or (f"one of {len(str(int(value)))} digits" if is_whole(value) else repr(value))


def flag(name: str, value: Any) -> bool:
    """Check a bool of Python or NumPy: a string such as "no" would count as true in Python."""
    if not isinstance(value, (bool, numpy.bool_)):
        raise OptionError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_function(name: str, value: Any, what: str) -> None:
    """Check that a value can be called; `what` describes the arguments and the result in words."""
    if not callable(value):
        raise OptionError(f"{name} must be {what}, got {described(value)}, which cannot be called")


def real_number(
    name: str,
    value: Any,
    lowest: float = 0.0,
    highest: float = math.inf,
    *,
    ends: Literal["[]", "(]", "[)", "()"] = "[]",
    why: str = "",
) -> float:
    """Check a finite number from `lowest` to `highest`; a round bracket in `ends` excludes that end."""
    number = plain_float(value) if is_real(value) else math.nan
    above = number > lowest if ends[0] == "(" else number >= lowest
    below = number < highest if ends[1] == ")" else number <= highest
    if not (above and below and math.isfinite(number)):
        limit = f"in {ends[0]}{lowest:g}, {highest:g}{ends[1]}"
        if highest == math.inf:
            limit = f"above {lowest:g}" if ends[0] == "(" else f"of at least {lowest:g}"
        raise OptionError(f"{name} must be a finite number {limit}, got {value!r}{why and f': {why}'}")
    return number


def plain_float(value: Any) -> float:
    """A float; infinity for a whole number that is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def one_of(name: str, value: Any, choices: Any) -> None:
    """Check a choice; `choices` is a `Literal` of strings."""
    allowed = get_args(choices)
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def names_of_sites(name: str, value: Any) -> tuple[str, ...]:
    named = isinstance(value, Collection) and not isinstance(value, (str, Tensor, numpy.ndarray))
    if not named or not all(isinstance(site, str) for site in value):
        raise OptionError(f"{name} must be a list of names of sites, got {value!r}")
    return tuple(value)


def plate_or_none(plate: Any) -> str | None:
    if not (plate is None or isinstance(plate, str)):
        raise OptionError(f"datum_plate must be the name of a plate, or None for the whole call as one datum, got {plate!r}")
    return plate


def seed_or_none(seed: Any) -> int | None:
    if seed is not None and not (is_whole(seed) and int(seed) >= 0):
        raise OptionError(f"seed must be a whole number of at least 0, or None, got {seed!r}")
    return None if seed is None else int(seed)
