"""Schedules against their formulas at steps worked out by hand, and the warning about one that is cut short."""

import copy
import itertools
import math
import pickle
import re
import warnings

import numpy as np
import pytest

from pyro_vae.errors import OptionError, ScheduleWarning
from pyro_vae.training import CosineAnnealing, CyclicalAnnealing, LinearAnnealing, SigmoidAnnealing
from pyro_vae.training.schedules import warn_if_unfinished

RAMPS = [LinearAnnealing, SigmoidAnnealing, CosineAnnealing]
ENDS = [(0.0, 1.0), (0.0, 4.0), (1.0, 0.1), (0.1, 0.3), (0.7, 0.7), (3, 0), (1e-12, 1e12)]


def logistic(x):
    return 1 / (1 + math.exp(-x))


# Values


@pytest.mark.parametrize(("step", "beta"), [(0, 0.5), (2, 0.5), (3, 0.75), (4, 1.0), (5, 1.25), (6, 1.5), (7, 1.5)])
def test_linear(step, beta):
    assert LinearAnnealing(4, start=0.5, end=1.5, delay=2)(step) == beta


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (2, 1 - math.sqrt(0.5)), (4, 1.0), (6, 1 + math.sqrt(0.5)), (8, 2.0)])
def test_cosine(step, share):
    """(1 - cos(pi t)) / 2 at t = 0, 1/4, 1/2, 3/4, 1, in halves."""
    assert CosineAnnealing(8, end=2.0)(step) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("steepness", [1e-6, 0.5, 10.0, 100.0])
def test_sigmoid_is_the_rescaled_logistic_function(steepness):
    schedule = SigmoidAnnealing(10, start=1.0, end=3.0, steepness=steepness)
    low, high = logistic(-steepness / 2), logistic(steepness / 2)
    for step in range(11):
        share = (logistic(steepness * (step / 10 - 0.5)) - low) / (high - low)
        assert schedule(step) == pytest.approx(1 + 2 * share, rel=1e-9), step


def test_a_flat_sigmoid_is_a_line_and_a_steep_one_a_step():
    flat, steep = SigmoidAnnealing(10, steepness=1e-3), SigmoidAnnealing(10, steepness=1e4)
    assert [flat(step) for step in range(11)] == pytest.approx([step / 10 for step in range(11)], abs=1e-6)
    assert [steep(step) for step in range(11)] == pytest.approx([0.0] * 5 + [0.5] + [1.0] * 5)


def test_cyclical():
    """Two cycles of 8: four steps up, four on the plateau; then the plateau for good."""
    cycle = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    schedule = CyclicalAnnealing(8, 2)
    assert [schedule(step) for step in range(20)] == cycle + cycle + [1.0] * 4


def test_cyclical_without_a_plateau_and_between_other_ends():
    schedule = CyclicalAnnealing(4, 2, ramp=1.0, start=0.5, end=2.5)
    assert [schedule(step) for step in range(9)] == [0.5, 1.0, 1.5, 2.0] * 2 + [2.5]


@pytest.mark.parametrize("ramp", [0.1, 0.3, 0.7])
def test_the_ramp_of_a_cycle_ends_where_it_says(ramp):
    schedule = CyclicalAnnealing(30, 2, ramp=ramp)
    top = round(30 * ramp)
    assert schedule(top) == pytest.approx(1.0)
    assert schedule(top - 1) == pytest.approx((top - 1) / top)


# What all have in common


@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize(("start", "end"), ENDS)
@pytest.mark.parametrize(("num_steps", "delay"), [(1, 0), (7, 0), (7, 3), (1000, 50)])
def test_a_ramp_goes_from_start_to_end_and_never_back(kind, start, end, num_steps, delay):
    schedule = kind(num_steps, start=start, end=end, delay=delay)
    values = [schedule(step) for step in range(delay + num_steps + 5)]
    assert values[: delay + 1] == [start] * (delay + 1)
    assert values[delay + num_steps :] == [end] * 5
    rising = 1 if end >= start else -1
    fuzz = 1e-15 * max(start, end)
    assert all(rising * (b - a) >= -fuzz for a, b in itertools.pairwise(values))
    assert all(isinstance(value, float) and math.isfinite(value) and value >= 0 for value in values)
    assert all(min(start, end) - fuzz <= value <= max(start, end) + fuzz for value in values)


@pytest.mark.parametrize(
    ("kind", "slope"), [(LinearAnnealing, 1.0), (CosineAnnealing, math.pi / 2), (SigmoidAnnealing, 2.6)]
)
def test_no_step_of_a_ramp_is_larger_than_the_steepest_slope(kind, slope):
    """Continuity: |beta(t + 1) - beta(t)| <= max slope / num_steps; of the sigmoid, steepness / 4 over its rescaling."""
    schedule = kind(500)
    steps = [b - a for a, b in itertools.pairwise(schedule(step) for step in range(501))]
    assert max(steps) <= slope / 500 * (1 + 1e-9)
    assert max(steps) >= 0.9 * slope / 500


@pytest.mark.parametrize("kind", [SigmoidAnnealing, CosineAnnealing])
def test_curves_are_symmetric_about_their_middle(kind):
    schedule = kind(10)
    for step in range(6):
        assert schedule(step) + schedule(10 - step) == pytest.approx(1.0, abs=1e-15)


SCHEDULES = [
    LinearAnnealing(10, end=2.0),
    SigmoidAnnealing(10, steepness=5.0, delay=1),
    CosineAnnealing(10, start=1.0, end=0.0),
    CyclicalAnnealing(10, 3, ramp=0.25),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), lambda s: eval(repr(s))])
def test_copies_are_equal_and_repr_builds_one(schedule, copied):
    other = copied(schedule)
    assert other == schedule and hash(other) == hash(schedule)
    assert [other(step) for step in range(40)] == [schedule(step) for step in range(40)]


def test_schedules_are_equal_by_value():
    assert LinearAnnealing(10) == LinearAnnealing(10, start=0, end=1)
    assert LinearAnnealing(10) != LinearAnnealing(11)
    assert LinearAnnealing(10) != CosineAnnealing(10)
    with pytest.raises(AttributeError):
        LinearAnnealing(10).end = 2.0
    with pytest.raises(TypeError):
        LinearAnnealing(10, 0.0, 1.0)  # options by name


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_any_step_from_zero_on(schedule):
    assert schedule(10**30) == schedule.end
    assert schedule(np.int64(3)) == schedule(3)
    with pytest.raises(OptionError, match="step >= 0.*-1"):
        schedule(-1)


def test_numbers_of_numpy_are_numbers():
    assert LinearAnnealing(np.int64(4), end=np.float32(2.0))(1) == 0.5


# What is refused


@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize("num_steps", [0, -1, 2.0, 2.5, math.nan, math.inf, "10", None, True])
def test_num_steps(kind, num_steps):
    with pytest.raises(OptionError, match="num_steps.*at least 1"):
        kind(num_steps)


@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize(
    "option",
    [{"delay": -1}, {"delay": 0.5}, *({n: v} for n in ("start", "end") for v in (-0.1, math.nan, math.inf, "1", None))],
)
def test_other_options_of_a_ramp(kind, option):
    with pytest.raises(OptionError, match=next(iter(option))):
        kind(10, **option)


@pytest.mark.parametrize("steepness", [0.0, -1.0, math.nan, math.inf, 5e-324, "10"])
def test_steepness(steepness):
    with pytest.raises(OptionError, match="steepness"):
        SigmoidAnnealing(10, steepness=steepness)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("period", v) for v in (1, 0, 2.5)),
        *(("num_cycles", v) for v in (0, 1.5)),
        *(("ramp", v) for v in (0.0, -0.5, 1.01, math.nan, "half")),
        ("start", -1.0),
        ("end", math.inf),
    ],
)
def test_options_of_the_cyclical_schedule(name, value):
    with pytest.raises(OptionError, match=f"{name} must be"):
        CyclicalAnnealing(**{"period": 10, "num_cycles": 2, name: value})


# The warning


def message(schedule, num_updates):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_unfinished(schedule, num_updates)
    assert len(caught) <= 1
    assert all(w.category is ScheduleWarning and w.filename == __file__ for w in caught)
    return str(caught[0].message) if caught else None


FINISHED = {
    "linear, well before": (LinearAnnealing(1000), 5000),
    "linear, just so": (LinearAnnealing(1000), 1000),
    "within 2 percent": (LinearAnnealing(1000), 990),
    "down to zero": (LinearAnnealing(1000, start=1.0, end=0.0), 1000),
    "with a delay": (CosineAnnealing(100, delay=900), 1000),
    "cycles, all of them": (CyclicalAnnealing(100, 4), 400),
    "cycles, on the last plateau": (CyclicalAnnealing(100, 4), 380),
    "a constant": (lambda step: 4.0, 1),
    "zero": (lambda step: 0.0, 1),
    "towards a limit": (lambda step: 1 - math.exp(-step / 100), 500),
    "a table that ends": ([0.0, 0.5, 1.0].__getitem__, 3),
    "a dict that ends": ({0: 0.0, 1: 1.0}.__getitem__, 2),
}

UNFINISHED = {
    "linear": (
        LinearAnnealing(1000),
        500,
        "at 0.499 in the last one, number 499, then stays near 1 only from update 981 on. "
        "Shorten the schedule or plan at least 982 updates",
    ),
    "a little short": (LinearAnnealing(1000), 970, "at 0.969 .* near 1"),
    "downwards": (LinearAnnealing(1000, start=1.0, end=0.0), 900, "at 0.101 .* near 0"),
    "not begun": (SigmoidAnnealing(10, delay=10**6), 1000, "at 0 in .* near 1"),
    "one update": (LinearAnnealing(10), 1, "at 0 in .* near 1"),
    "at the top with two cycles left": (CyclicalAnnealing(100, 4), 180, "at 1 in .* moves between 0.* and 1 .* near 1 only"),
    "short ramps": (CyclicalAnnealing(10**6, 4, ramp=0.03), 40_000, "at 1 in"),
    "in the last ramp": (CyclicalAnnealing(100, 4), 340, "at 0.78 in .* near 1 only from update 350 on.*at least 351"),
    "without an end": (
        lambda step: 1 + math.sin(step / 100),
        5000,
        "continues between .* and 2 without an end. Let it become constant",
    ),
    "a switch": (lambda step: 0.0 if step < 1000 else 1.0, 1000, "near 1 only from update 1000 on"),
    "a bump": (
        lambda step: 2.0 if 50 <= step < 60 else 1.0,
        50,
        "between 1 and 2 and stays near 1 only from update 60 on.*at least 61",
    ),
    "a longer table": ([0.0, 0.5, 1.0].__getitem__, 2, "at 0.5 in .* near 1"),
    "an overflow far away": (lambda step: min(1.0, 1e-4 * 1.01**step), 500, "at 0.0143 in .* near 1"),
    "composed": (lambda step: 4 * LinearAnnealing(1000)(step), 500, "at 2 in .* near 4"),
}


@pytest.mark.parametrize("case", FINISHED)
def test_a_finished_schedule_gives_no_warning(case):
    assert message(*FINISHED[case]) is None


@pytest.mark.parametrize("case", UNFINISHED)
def test_an_unfinished_schedule_is_reported_with_where_it_stands_and_where_it_goes(case):
    schedule, num_updates, expected = UNFINISHED[case]
    text = message(schedule, num_updates)
    assert text is not None
    sentence = rf"within the {num_updates} planned updates: .*{expected}"
    assert re.search(sentence, text), text


def test_the_number_of_updates_that_the_warning_names_is_enough():
    schedule = LinearAnnealing(1000, delay=200)
    enough = int(re.search(r"at least (\d+) updates", message(schedule, 300))[1])
    assert message(schedule, enough) is None
    assert message(schedule, enough - 1) is not None


@pytest.mark.parametrize("num_updates", [0, -5, 10.0, None])
def test_the_plan_must_be_a_number_of_updates(num_updates):
    with pytest.raises(OptionError, match="num_updates"):
        warn_if_unfinished(LinearAnnealing(10), num_updates)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_a_schedule_must_give_weights(value):
    with pytest.raises(OptionError, match="finite numbers >= 0.*step 5"):
        warn_if_unfinished(lambda step: value if step == 5 else 1.0, 5)


def test_a_number_is_no_schedule():
    with pytest.raises(OptionError, match="callable step -> float, got 4.0"):
        warn_if_unfinished(4.0, 10)
