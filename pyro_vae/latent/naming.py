"""Look up latent units by name or by number."""

from collections.abc import Sequence

from ..errors import OptionError, quoted
from ..options import is_whole

SHOWN = 5  # names in a message


def unit_numbers(units: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Indices in `names` of units given by name or by number, without repetition."""
    if isinstance(units, str) or not isinstance(units, Sequence):
        raise OptionError(f"units must be a list of names or numbers, got {units!r}")
    numbers = [number_of(unit, names) for unit in units]
    if not numbers or len(set(numbers)) < len(numbers):
        raise OptionError(f"units must name at least one unit and none twice, got {list(units)!r}")
    return numbers


def number_of(unit: int | str, names: Sequence[str]) -> int:
    if isinstance(unit, str) and unit in names:
        return list(names).index(unit)
    if is_whole(unit) and 0 <= int(unit) < len(names):
        return int(unit)
    listed = quoted(names[:SHOWN]) + (" and so on" if len(names) > SHOWN else "")
    raise OptionError(f"there is no unit {unit!r}: pass a name ({listed}) or a number from 0 to {len(names) - 1}")
