"""Schedules of beta over training steps: callables `step -> float`, values finite and at least 0.

`schedule(step)` is the beta of update number `step`, counted from 0. Any such callable is a schedule, so schedules can be
combined by plain functions::

    warmup = LinearAnnealing(1000)
    lambda step: 4 * warmup(step)                    # up to 4
    lambda step: 0.0 if step < 200 else 1.0          # a switch
    lambda step: warmup(max(step - 500, 0)) ** 2     # later, and slower at first

A lambda cannot be pickled; a function defined in a module can.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ..errors import OptionError, ScheduleWarning
from ..options import is_real, plain_float, real_number, whole_number

__all__ = ["CosineAnnealing", "CyclicalAnnealing", "LinearAnnealing", "SigmoidAnnealing", "warn_if_unfinished"]

Schedule = Callable[[int], float]

WEIGHS = "beta weighs a KL divergence"
TOLERANCE = 0.02  # relative to the largest value: a schedule that changes less counts as constant
MOVES = 1e-6  # relative to the larger of two values: closer values count as equal
FAR = 10**9  # updates after the last one at which a schedule must be constant
STRIDE = 1.02  # ratio of successive distances at which it is evaluated on the way there


@dataclass(frozen=True)
class _Annealing:
    """From `start` to `end` in `num_steps` updates; subclasses define the curve."""

    num_steps: int
    _: KW_ONLY
    start: float = 0.0
    end: float = 1.0
    delay: int = 0

    def __post_init__(self) -> None:
        _keep(
            self,
            num_steps=whole_number("num_steps", self.num_steps),
            delay=whole_number("delay", self.delay, lowest=0),
            start=real_number("start", self.start, why=WEIGHS),
            end=real_number("end", self.end, why=WEIGHS),
        )

    def __call__(self, step: int) -> float:
        _check_step(step)
        done = min(max(step - self.delay, 0), self.num_steps) / self.num_steps
        return _between(self.start, self.end, self._curve(done))

    def _curve(self, done: float) -> float:
        """The curve: 0 at `done` = 0 and 1 at `done` = 1, both exactly."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearAnnealing(_Annealing):
    """Linear schedule: beta(t) = start + (end - start) t, with t = (step - delay) / num_steps clipped to [0, 1].

    Exactly `start` up to update number `delay`, exactly `end` from update number `delay + num_steps` on.

    :param num_steps: updates from `start` to `end`, at least 1.
    :param start: initial beta, finite and at least 0.
    :param end: final beta, finite and at least 0; it may be less than `start`.
    :param delay: updates before beta changes, at least 0.
    :raises OptionError: if one of them is out of range.

    Warm-up of the KL term: Bowman et al. (2016), "Generating Sentences from a Continuous Space",
    https://arxiv.org/abs/1511.06349; Sønderby et al. (2016), "Ladder Variational Autoencoders",
    https://arxiv.org/abs/1602.02282.

    Example::

        warmup = pv.LinearAnnealing(1000)
        [warmup(step) for step in (0, 250, 1000, 5000)]     # [0.0, 0.25, 1.0, 1.0]
        objective = pv.BetaTrace_ELBO(beta=lambda step: 4 * warmup(step))
    """

    def _curve(self, done: float) -> float:
        return done


@dataclass(frozen=True)
class SigmoidAnnealing(_Annealing):
    """Sigmoid schedule: the logistic curve, rescaled so that its ends are exactly `start` and `end`.

    beta(t) = start + (end - start) (s(t) - s(0)) / (s(1) - s(0)) with s(t) = 1 / (1 + exp(-steepness (t - 1/2))) and
    t = (step - delay) / num_steps clipped to [0, 1].

    :param num_steps: updates from `start` to `end`, at least 1.
    :param start: initial beta, finite and at least 0.
    :param end: final beta, finite and at least 0; it may be less than `start`.
    :param delay: updates before beta changes, at least 0.
    :param steepness: above 0. Near 0 the curve is a straight line, at 100 it is nearly a step in the middle.
    :raises OptionError: if one of them is out of range.

    Bowman et al. (2016), "Generating Sentences from a Continuous Space", https://arxiv.org/abs/1511.06349.

    Example::

        pv.SigmoidAnnealing(1000)(500)      # 0.5
    """

    _: KW_ONLY
    steepness: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        steepness = real_number("steepness", self.steepness, ends="(]", why="10 is the usual one")
        if not steepness / 4 > 0:  # a tiny steepness underflows
            raise OptionError(f"steepness must be a finite number above 0, got {self.steepness!r}: 10 is the usual one")
        _keep(self, steepness=steepness)

    def _curve(self, done: float) -> float:
        # the formula above, by s(t) = (1 + tanh(steepness (t - 1/2) / 2)) / 2
        return 0.5 + 0.5 * math.tanh(self.steepness * (2 * done - 1) / 4) / math.tanh(self.steepness / 4)


@dataclass(frozen=True)
class CosineAnnealing(_Annealing):
    """Cosine schedule: beta(t) = start + (end - start) (1 - cos(pi t)) / 2, with t = (step - delay) / num_steps.

    t is clipped to [0, 1]. The curve is flat at both ends.

    :param num_steps: updates from `start` to `end`, at least 1.
    :param start: initial beta, finite and at least 0.
    :param end: final beta, finite and at least 0; it may be less than `start`.
    :param delay: updates before beta changes, at least 0.
    :raises OptionError: if one of them is out of range.

    The curve is that of Loshchilov & Hutter (2017), "SGDR: Stochastic Gradient Descent with Warm Restarts",
    https://arxiv.org/abs/1608.03983, one half-period without restarts.

    Example::

        pv.CosineAnnealing(1000, start=1.0, end=0.1)(1000)      # 0.1
    """

    def _curve(self, done: float) -> float:
        return 0.5 - 0.5 * math.cos(math.pi * done)


@dataclass(frozen=True)
class CyclicalAnnealing:
    """Cyclical schedule of a linear ramp and a plateau: beta(t) = start + (end - start) min(t / ramp, 1).

    t = (step mod period) / period is the position within the cycle. Every cycle begins at `start`. From update number
    `period * num_cycles` on, beta is `end`.

    :param period: updates of one cycle, at least 2.
    :param num_cycles: how many, at least 1.
    :param ramp: the share of a cycle in which beta changes, in (0, 1]; with 1 there is no plateau.
    :param start: beta at the beginning of a cycle, finite and at least 0.
    :param end: beta on the plateau and after the last cycle, finite and at least 0.
    :raises OptionError: if one of them is out of range.

    Fu et al. (2019), "Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing",
    https://arxiv.org/abs/1903.10145 (M cycles, proportion R = ramp).

    Example::

        cycles = pv.CyclicalAnnealing(1000, 4)
        [cycles(step) for step in (0, 250, 500, 999, 1000, 4000)]     # [0.0, 0.5, 1.0, 1.0, 0.0, 1.0]
    """

    period: int
    num_cycles: int
    _: KW_ONLY
    ramp: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _keep(
            self,
            period=whole_number("period", self.period, lowest=2),
            num_cycles=whole_number("num_cycles", self.num_cycles),
            ramp=real_number("ramp", self.ramp, highest=1.0, ends="(]", why="it is a share of the cycle, usually 0.5"),
            start=real_number("start", self.start, why=WEIGHS),
            end=real_number("end", self.end, why=WEIGHS),
        )

    def __call__(self, step: int) -> float:
        _check_step(step)
        if step >= self.period * self.num_cycles:
            return float(self.end)
        return _between(self.start, self.end, min(step % self.period / self.period / self.ramp, 1.0))


def warn_if_unfinished(schedule: Schedule, num_updates: int) -> None:
    """Warn if a schedule would still change after the last planned update.

    It is unfinished if its value at the last update, number `num_updates - 1`, and its value at some later update differ by
    more than 2 % of the largest value. Later updates are tested up to a billion updates away, at distances that grow by 2 %.
    This finds a warm-up that is cut short, and a cycle that has not begun. The schedule is only called, so any callable will
    do. A table that ends (`LookupError`) is tested up to its end.

    :param schedule: a callable `step -> float`.
    :param num_updates: planned number of updates, counted from the first one of the schedule; at least 1.
    :raises OptionError: if the schedule is not callable, returns anything but finite numbers of at least 0, or if
        `num_updates` is out of range.

    Example::

        pv.schedules.warn_if_unfinished(pv.LinearAnnealing(1000), 500)     # ScheduleWarning: ... is at 0.499 ...
    """
    if (message := unfinished(schedule, num_updates)) is not None:
        warnings.warn(ScheduleWarning(message), stacklevel=2)


def unfinished(schedule: Schedule, num_updates: int, name: str = "the schedule") -> str | None:
    """The message of `warn_if_unfinished`, or `None` for a schedule that is finished."""
    if not callable(schedule):
        raise OptionError(f"a schedule is a callable step -> float, got {schedule!r}: a constant beta needs no schedule")
    num_updates = whole_number("num_updates", num_updates)
    last = num_updates - 1
    first_value, last_value = _value(schedule, 0), _value(schedule, last)
    later = list(_later_values(schedule, last))
    values = [value for _, value in later]
    tolerance = TOLERANCE * max(first_value, last_value, *values, 0.0)
    if all(abs(value - last_value) <= tolerance for value in values):
        return None
    final = values[-1]
    course = f"continues between {min(values):.3g} and {max(values):.3g} without an end"
    remedy = "Let it become constant, or plan without num_updates if that is meant"
    moving = [last, *(step for step, value in later if abs(value - final) > tolerance)][-1]
    if moving < last + FAR / 2:
        end = _first_constant(schedule, moving, next(step for step, _ in later if step > moving), final, tolerance)
        course = f"stays near {final:.3g} only from update {end} on"
        remedy = f"Shorten the schedule or plan at least {end + 1} updates"
        if min(values) < min(last_value, final) - tolerance or max(values) > max(last_value, final) + tolerance:
            course = f"moves between {min(values):.3g} and {max(values):.3g} and {course}"
    return (
        f"{name} is not finished within the {num_updates} planned updates: {schedule!r} is at {last_value:.3g} in the last "
        f"one, number {last}, then {course}. {remedy}"
    )


def still_moves(schedule: Schedule, step: int) -> bool:
    """Whether a later value differs from that of update number `step` by more than a millionth of the larger one.

    It tests the same updates as `warn_if_unfinished`, but with a much smaller tolerance: a warm-up changes until its last
    update.
    """
    value = _value(schedule, step)
    return any(abs(later - value) > MOVES * max(later, value) for _, later in _later_values(schedule, step))


def _first_constant(schedule: Schedule, moving: int, constant: int, final: float, tolerance: float) -> int:
    """Bisection between a step before the schedule is constant and one after."""
    while constant - moving > 1:
        middle = (moving + constant) // 2
        if abs(_value(schedule, middle) - final) > tolerance:
            moving = middle
        else:
            constant = middle
    return constant


def _later_values(schedule: Schedule, last: int) -> Iterator[tuple[int, float]]:
    distance = 1
    while distance <= FAR:
        try:
            yield last + distance, _value(schedule, last + distance)
        except (LookupError, ArithmeticError):  # a table that ends; an overflow as in 1.01**step
            return
        distance = max(distance + 1, math.ceil(distance * STRIDE))


def _value(schedule: Schedule, step: int) -> float:
    value = float(schedule(step))
    if not (math.isfinite(value) and value >= 0):
        raise OptionError(f"a schedule must give finite numbers >= 0, but {schedule!r} gives {value} for step {step}")
    return value


def _between(start: float, end: float, share: float) -> float:
    """Exactly `start` for 0 and exactly `end` for 1."""
    return (1 - share) * start + share * end


def _keep(schedule: Any, **values: float) -> None:
    """Store plain numbers in a frozen schedule."""
    for name, value in values.items():
        object.__setattr__(schedule, name, value)


def _check_step(step: Any) -> None:
    if not (is_real(step) and plain_float(step) >= 0):
        raise OptionError(
            f"a schedule must be called with a step >= 0, the number of the update counted from 0; got {step!r}"
        )
