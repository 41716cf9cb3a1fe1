"""Every public entrance times every bad input: a named error, the right answer, or a doubt; and the page that says which."""

import inspect
import warnings

import pytest

import pyro_vae as pv

from .entrances import ENTRANCES
from .inputs import ARGUMENTS
from .judge import judged
from .options import option_outcomes
from .others import OTHERS, other_outcomes
from .page import PAGE, page_of
from .public import WITHOUT, in_tables, missing
from .public import public as public_names
from .table import Cell, outcome_of, outcomes

FOUND = {}


def found_by(entrance):
    """Each entrance is called once with every bad input."""
    if entrance.name not in FOUND:
        FOUND[entrance.name] = list(outcomes(entrance))
    return FOUND[entrance.name]


def options_by(entrance):
    key = f"options of {entrance.name}"
    if key not in FOUND:
        FOUND[key] = list(option_outcomes(entrance))
    return FOUND[key]


def others_by(other):
    key = f"arguments of {other.name}"
    if key not in FOUND:
        with warnings.catch_warnings():  # of the doubts about four data
            warnings.simplefilter("ignore")
            other.call(**other.arguments())  # the correct call raises nothing
            FOUND[key] = list(other_outcomes(other))
    return FOUND[key]


def check(found):
    """No fault; messages of at least two words more than the class, and none twice as long as a screen."""
    faults = [f"{cell}: {outcome.cell}" for cell, outcome in found if outcome.is_fault]
    assert not faults, "\n".join(faults)
    for cell, outcome in found:
        if outcome.cell.endswith("Error"):
            assert 30 < len(outcome.message) < 2500, (str(cell), outcome.message)


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.name)
def test_bad_input_is_named_or_answered_right(entrance):
    check(found_by(entrance))


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.name)
def test_options_of_another_kind_or_size_are_named_or_answered_right(entrance):
    check(options_by(entrance))


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.name)
def test_what_takes_no_pair_names_bad_arguments(other):
    check(others_by(other))


def test_the_page_is_that_of_today():
    found = [pair for entrance in ENTRANCES for pair in found_by(entrance)]
    options = [pair for entrance in ENTRANCES for pair in options_by(entrance)]
    others = [pair for other in OTHERS for pair in others_by(other)]
    stale = "docs/bad_input.md is stale: python -m tests.bad_input"
    assert PAGE.read_text() == page_of(found, options, others), stale


def test_every_entrance_that_takes_a_pair_is_there():
    def takes_pair(thing):
        return callable(thing) and "model" in list(inspect.signature(thing).parameters)[:1]

    public = {name for name in pv.__all__ if not inspect.ismodule(getattr(pv, name)) and takes_pair(getattr(pv, name))}
    of_a_model_alone = {other.name for other in OTHERS}  # AmortizedGuide: what it is called on is its own result
    assert public <= {entrance.name for entrance in ENTRANCES} | of_a_model_alone


def test_every_public_name_is_in_a_table_or_has_a_reason():
    assert not missing()
    assert WITHOUT.keys() <= public_names() - in_tables(), "a reason for a name that is gone, or is in the table"


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
    assert judged(lambda: pv.ops.size_of_tail("many"), []).is_fault  # raised in C, which leaves no frame of its own behind


def replaced(entrance, call):
    from dataclasses import replace

    return replace(entrance, call=call)
