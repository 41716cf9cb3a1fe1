"""Every public entrance times every bad input: a named error, the right answer, or a doubt; and the page that says which."""

import inspect

import pytest

import pyro_vae as pv

from .entrances import ENTRANCES
from .inputs import ARGUMENTS
from .judge import judged
from .page import PAGE, page_of
from .table import Cell, outcome_of, outcomes

FOUND = {}


def found_by(entrance):
    """Each entrance is called once with every bad input."""
    if entrance.name not in FOUND:
        FOUND[entrance.name] = list(outcomes(entrance))
    return FOUND[entrance.name]


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.name)
def test_bad_input_is_named_or_answered_right(entrance):
    faults = [f"{cell.place}, {cell.bad.row}: {outcome.cell}" for cell, outcome in found_by(entrance) if outcome.is_fault]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.name)
def test_a_message_says_what_came(entrance):
    """At least two words more than the class, and no message twice as long as a screen."""
    for cell, outcome in found_by(entrance):
        if outcome.cell.endswith("Error"):
            assert 30 < len(outcome.message) < 2500, (cell.bad.row, outcome.message)


def test_the_page_is_that_of_today():
    found = [pair for entrance in ENTRANCES for pair in found_by(entrance)]
    assert PAGE.read_text() == page_of(found), "docs/bad_input.md is stale: python -m tests.bad_input"


def test_every_entrance_that_takes_a_pair_is_there():
    def takes_pair(thing):
        return callable(thing) and "model" in list(inspect.signature(thing).parameters)[:1]

    public = {name for name in pv.__all__ if not inspect.ismodule(getattr(pv, name)) and takes_pair(getattr(pv, name))}
    assert public <= {entrance.name for entrance in ENTRANCES}


def test_the_judge_sees_faults():
    """A bare error of torch, a silent broadcast and a changed random state."""
    import torch

    def bare(model, guide, x):
        return torch.ones(3) @ torch.ones(4)

    def silent(model, guide, x):
        return torch.zeros(3) if isinstance(x, torch.Tensor) else None

    def noisy():
        return torch.rand(1)

    entrance = ENTRANCES[0]
    assert outcome_of(Cell("the argument of the model", ARGUMENTS[0], replaced(entrance, bare)), None).is_fault
    broadcast = next(bad for bad in ARGUMENTS if "broadcast" in bad.row)
    assert outcome_of(Cell("the argument of the model", broadcast, replaced(entrance, silent)), torch.ones(3)).is_fault
    assert judged(noisy, []).is_fault


def replaced(entrance, call):
    from dataclasses import replace

    return replace(entrance, call=call)
