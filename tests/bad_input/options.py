"""Every option of every entrance, found by its signature, times every value of the wrong kind or size."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro_vae as pv

from .entrances import Entrance, data
from .judge import Outcome, judged
from .table import checked, started
from .values import HOPELESS, OF_OPTIONS, VALUES

OF_PYRO = ("num_particles", "max_plate_nesting", "vectorize_particles")  # behind **options of an objective
LOADERS = ("train", "test")  # arguments, in the table of loaders

# Right, but not for a test.
LEFT_OUT = {
    ("seed", "`None`"): "draws from the caller's random state, as its docs say",
    ("num_epochs", "10^12"): "trains for as long as it is asked to",
    ("compile", "`True`"): "compiles for seconds: see `tests/objectives`",
    ("compile", "a dict"): "compiles too",
    ("checkpoint", "a string"): "is the path of a folder: see `tests/evaluation`",
}


class OptionCell(NamedTuple):
    entrance: Entrance
    option: str
    row: str

    def __str__(self) -> str:
        return f"{self.entrance.name}, {self.option}={self.row}"


def options_of(name: str) -> list[str]:
    """What has to be named in a call, when the thing is built or when it is called, and the weights of objectives."""
    thing = getattr(pv, name)
    found = [*parameters_of(thing), *(parameters_of(thing.__call__) if inspect.isclass(thing) else ())]
    names = [p.name for p in found if p.kind is p.KEYWORD_ONLY or p.name in ("beta", "betas")]
    if any(p.kind is p.VAR_KEYWORD for p in found) and name.startswith("Beta"):
        names += OF_PYRO
    return [name for name in dict.fromkeys(names) if name not in LOADERS]


def parameters_of(thing: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(thing).parameters.values())


def option_cells(entrance: Entrance) -> list[OptionCell]:
    rows = HOPELESS if entrance.costly else OF_OPTIONS
    options = options_of(entrance.name)
    return [OptionCell(entrance, option, row) for option in options for row in rows if (option, row) not in LEFT_OUT]


def option_outcomes(entrance: Entrance) -> Iterator[tuple[OptionCell, Outcome]]:
    for cell in option_cells(entrance):
        pair = started(entrance)
        given = [(data(),)] if entrance.over_loader else data()

        def call(cell: OptionCell = cell, pair: Any = pair, given: Any = given) -> Any:
            return entrance.call(pair.model, pair.guide, given, **{cell.option: VALUES[cell.row]})

        outcome = judged(call, [] if entrance.leaves else [pair], leaves=entrance.leaves)
        one_datum = cell.option == "datum_plate"  # whose spread is not known
        yield cell, outcome if one_datum or outcome.is_fault else checked(outcome)
