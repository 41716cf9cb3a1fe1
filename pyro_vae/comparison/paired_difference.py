"""The record of the paired differences of two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..records import FEW, Estimate, Result, normal_quantile, student_quantile, to_plain
from .sides import Side
from .told_apart import monte_carlo, p_value_of

Claim = Literal["told apart", "cannot be told apart", "not to be trusted"]


@dataclass(frozen=True, eq=False, repr=False)
class PairedDifference(Result):
    """Differences per datum of two models, the one with the higher mean first. N data; nats.

    :ivar first: the model that is ahead on these data.
    :ivar second: the other one.
    :ivar difference: (N,) first minus second; NaN or infinite where one of them is.
    :ivar std_error: (N,) Monte Carlo errors; those of two models are taken for independent.
    :ivar slack: nats of the mean that may be bias of the bounds, or rounding, and do not count for `first`.
    :ivar doubted: (N,) true where one of the two numbers is in doubt.
    :ivar unsafe: (N,) true where the doubt may be what puts `first` ahead: it may be too high, or `second` too low.
    :ivar p_value: that other data of the population would turn the order, with every doubt in favour of `second`; two-sided.
    :ivar corrected: the same, corrected for the number of pairs by Holm (1979).
    :ivar level: of claims and intervals.
    """

    _derived = ("known", "influence")

    first: str
    second: str
    difference: Tensor
    std_error: Tensor
    slack: float
    doubted: Tensor
    unsafe: Tensor
    p_value: float
    corrected: float
    level: float

    def __len__(self) -> int:
        return len(self.difference)

    @property
    def known(self) -> Tensor:
        """(N,) true where both numbers are finite: means are over these."""
        return self.difference.isfinite()

    def mean(self) -> Estimate:
        """The mean difference, with its Monte Carlo error (these data) and its sampling error (other data, paired)."""
        known, doubted = self.known, self.doubted | ~self.known
        if not bool(known.any()):
            nan = torch.tensor(math.nan, dtype=self.difference.dtype)
            return Estimate(nan, nan, nan, doubt="no datum with finite numbers")
        doubt = f"{int(doubted.sum())} of {len(self)} data in doubt" if self.claim == "not to be trusted" else ""
        return Estimate.over_data(self.difference[known], self.std_error[known], doubt=doubt)

    @property
    def claim(self) -> Claim:
        """What may be said of the population the data come from, at `level`.

        "told apart": `first` is better. "not to be trusted": numbers are in doubt of more than 5% of the data.
        """
        if self.corrected <= 1 - self.level and not too_many(self.unsafe | ~self.known):
            return "told apart"
        return "not to be trusted" if too_many(self.doubted | ~self.known) else "cannot be told apart"

    @property
    def told_apart(self) -> bool:
        """Whether the claim is that `first` is better."""
        return self.claim == "told apart"

    def confidence_interval(self) -> tuple[float, float]:
        """Of the population's mean difference, by Student's t; not corrected for the number of pairs, nor for bias."""
        mean = self.mean()
        num_known = int(self.known.sum())
        if num_known < 2:
            return math.nan, math.nan
        error = max(float(mean.sampling_error), monte_carlo(self.std_error[self.known]))
        half = student_quantile(self.level, num_known - 1) * error
        return float(mean.value) - half, float(mean.value) + half

    @property
    def certain_for_these_data(self) -> bool:
        """Whether the order on these very data is beyond Monte Carlo error, doubts and bias; says nothing about others."""
        mean = self.mean()
        margin = normal_quantile(self.level) * monte_carlo(self.std_error[self.known]) + self.slack
        return float(mean.value) > margin and not bool((self.unsafe | ~self.known).any())

    @property
    def influence(self) -> Tensor:
        """(N,) by how much the mean falls when this datum is left out; NaN where not `known`, and for one datum."""
        nan = torch.full_like(self.difference, math.nan)
        others = int(self.known.sum()) - 1
        return ((self.difference - self.mean().value) / others).where(self.known, nan) if others > 0 else nan

    @property
    def deciding(self) -> list[int]:
        """The data that favour `first` most, as many as it takes for the others to have a mean of zero or less."""
        gains = self.difference.where(self.known, torch.full_like(self.difference, -math.inf))
        order = gains.argsort(descending=True, stable=True)[: int(self.known.sum())]
        left = float(self.difference[self.known].sum()) - self.difference[order].cumsum(0)
        return order[: int((left > 0).sum()) + 1].tolist() if len(order) else []

    @property
    def few_decide(self) -> bool:
        """Whether at most 5% of the data, or one, make up the difference."""
        return 0 < len(self.deciding) <= max(FEW * len(self), 1) and float(self.mean().value) > 0

    def to_dict(self) -> dict[str, Any]:
        """Every field, and what is claimed, as plain Python, for JSON."""
        return {
            **to_plain(self),
            "mean": to_plain(self.mean()),
            "confidence_interval": list(self.confidence_interval()),
            "claim": self.claim,
            "certain_for_these_data": self.certain_for_these_data,
            "deciding": self.deciding,
            "few_decide": self.few_decide,
        }

    def _in_short(self) -> str:
        return str(self)

    def __str__(self) -> str:
        mean, unit = self.mean(), "nats per datum"
        ahead = f"'{self.first}' is ahead of '{self.second}' by"
        if mean.doubt:
            return f"{ahead} {float(mean.value):.3f} {unit}, which is not to be trusted ({mean.doubt})"
        smaller = bool(self.doubted.any()) and not bool((self.unsafe | ~self.known).any())  # by all doubts there are
        least = " at least" if smaller else ""
        return (
            f"{ahead}{least} {float(mean.value):.3f} +- {float(mean.sampling_error):.3f} {unit} (sampling error): the two "
            f"{'are told apart' if self.told_apart else 'cannot be told apart'} ({shown_p(self.corrected)})"
        )


def too_many(doubted: Tensor) -> bool:
    return int(doubted.sum()) > FEW * len(doubted)


def shown_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def paired(one: Side, other: Side, level: float) -> PairedDifference:
    """Two sides, whichever is ahead first; p not yet corrected.

    Where up to 5% of the data may owe their difference to a doubt, the claim must hold without them too.
    """
    known = one.values.isfinite() & other.values.isfinite()
    ahead = float((one.values - other.values)[known].sum()) >= 0
    first, second = (one, other) if ahead else (other, one)
    difference = first.values - second.values
    std_error = (first.std_errors.square() + second.std_errors.square()).sqrt()
    unsafe, slack = first.too_high | second.too_low, first.drop + second.lift
    p_values = [p_value_of(difference[kept], std_error[kept], slack) for kept in (known, known & ~unsafe)]
    if bool(((first.values == -math.inf) & (second.values > -math.inf)).any()):
        p_values.append(1.0)  # its mean is -inf, unless that is an error of the estimate
    return PairedDifference(
        first=first.name,
        second=second.name,
        difference=difference,
        std_error=std_error,
        slack=slack,
        doubted=first.too_low | first.too_high | second.too_low | second.too_high,
        unsafe=unsafe,
        p_value=max(p_values),
        corrected=max(p_values),
        level=level,
    )
