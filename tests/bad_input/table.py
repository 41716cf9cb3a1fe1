"""The table: every entrance that takes a pair times every bad input of its places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch

from .entrances import ENTRANCES, Classes, Entrance, data
from .inputs import ARGUMENTS, LOADERS, PAIRS, Bad
from .judge import Outcome, in_doubt, judged, not_finite, same_numbers

PLACES = {"the argument of the model": ARGUMENTS, "the loader": LOADERS, "model and guide": PAIRS}
IN_DOUBT = "in doubt"
SHOWN = "not finite, and shown"  # a loss; where it is NaN Pyro warns too


class Cell(NamedTuple):
    place: str
    bad: Bad
    entrance: Entrance

    def __str__(self) -> str:
        return f"{self.entrance.name}, {self.place}, {self.bad.row}"


def applies(place: str, bad: Bad, entrance: Entrance) -> bool:
    if entrance.costly and (not bad.refused or bad.same_as or place != "the loader" or bad.late):
        return False
    if place == "the loader":
        return entrance.over_loader
    return place != "model and guide" or entrance.pair is not Classes


def cells(entrances: Sequence[Entrance] = ENTRANCES) -> list[Cell]:
    return [
        Cell(place, bad, entrance)
        for entrance in entrances
        for place, bads in PLACES.items()
        for bad in bads
        if applies(place, bad, entrance)
    ]


def started(entrance: Entrance) -> Any:
    """A fresh pair, and the same state for every call."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    return entrance.pair()


def call_of(cell: Cell, pair: Any) -> Callable[[], Any]:
    entrance, bad, x = cell.entrance, cell.bad, data()
    model, guide = pair.model, pair.guide
    if cell.place == "model and guide":
        model, guide = bad.make(model, guide)
        given: Any = [(x,)] if entrance.over_loader else x
    elif cell.place == "the loader":
        given = bad.make(x)
    else:
        given = [(bad.make(x),)] if entrance.over_loader else bad.make(x)
    return lambda: entrance.call(model, guide, given)


def good_result(entrance: Entrance) -> Any:
    pair = started(entrance)
    return judged(
        lambda: entrance.call(pair.model, pair.guide, [(data(),)] if entrance.over_loader else data()), [pair], leaves=True
    ).result


def outcome_of(cell: Cell, good: Any) -> Outcome:
    """What became of one bad input; `good` is the result of the correct call."""
    pair = started(cell.entrance)
    outcome = judged(call_of(cell, pair), [] if cell.entrance.leaves else [pair], cell.bad.own, cell.entrance.leaves)
    if outcome.cell != "right answer":
        return outcome
    if not cell.entrance.reads and cell.place != "the loader":
        return outcome  # the data are a template, and the guide is not asked
    outcome = checked(outcome)
    if outcome.cell != "right answer":
        return outcome
    if cell.bad.refused or cell.bad.same_as:
        other = same_numbers(outcome.result, good)
        return Outcome(f"FAULT: other numbers: {other}") if other else outcome
    return outcome


def checked(outcome: Outcome) -> Outcome:
    """Of a right answer, whether its numbers are finite; if not, whether it says so."""
    broken = not_finite(outcome.result) if outcome.cell == "right answer" else []
    if isinstance(outcome.result, float) and broken:
        shown = outcome.result == float("inf") or "NaN" in outcome.message
        return Outcome(SHOWN if shown else f"FAULT: the loss is {outcome.result}", outcome.message)
    if broken:
        return Outcome(IN_DOUBT) if in_doubt(outcome.result) else Outcome(f"FAULT: without doubt not finite: {broken}")
    return outcome


def outcomes(entrance: Entrance) -> Iterator[tuple[Cell, Outcome]]:
    good = good_result(entrance)
    for cell in cells([entrance]):
        yield cell, outcome_of(cell, good)
