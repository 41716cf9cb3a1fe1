"""The record of the paired differences of two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..records import FEW, Estimate, Result, normal_quantile, page, student_quantile, to_plain
from .sides import Side
from .told_apart import monte_carlo, p_value_of

Claim = Literal["told apart", "cannot be told apart", "not to be trusted"]


@dataclass(frozen=True, eq=False, repr=False)
class PairedDifference(Result):
    """Differences per datum of two models, the one with the higher mean first. N data; nats.

    :ivar first: the model that is ahead on these data.
    :ivar second: the other one.
    :ivar difference: (N,) `first` minus `second`; NaN or infinite where one of them is.
    :ivar std_error: (N,) Monte Carlo errors; those of two models are assumed independent.
    :ivar slack: nats of the mean difference that may come from the bias of the bounds or from rounding, and are subtracted
        in the test.
    :ivar doubted: (N,) true where one of the two numbers is in doubt.
    :ivar unsafe: (N,) true where the doubt may favour `first`: its number may be too high, or that of `second` too low.
    :ivar p_value: two-sided p-value of the hypothesis that the models are equal in the population, with every doubt in
        favour of `second`.
    :ivar corrected: the p-value corrected for the number of pairs by Holm (1979).
    :ivar level: level of claims and intervals.

    Example::

        records = {name: pv.AdaptiveImportanceSampling(vae.model, vae.guide)(x) for name, vae in models.items()}
        pair = pv.compare(records).pairs[0]
        pair.mean, pair.confidence_interval(), pair.claim
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
        """(N,) true where both numbers are finite; means are over these data."""
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
        """The claim about the population of the data, at `level`.

        "told apart": `first` is better. "not to be trusted": more than 5% of the data are in doubt. Otherwise "cannot be
        told apart".
        """
        if self.corrected <= 1 - self.level and not too_many(self.unsafe | ~self.known):
            return "told apart"
        return "not to be trusted" if too_many(self.doubted | ~self.known) else "cannot be told apart"

    @property
    def told_apart(self) -> bool:
        """Whether the claim is that `first` is better."""
        return self.claim == "told apart"

    def confidence_interval(self) -> tuple[float, float]:
        """Interval of the mean difference in the population, by Student's t.

        It is not corrected for the number of pairs or for bias.
        """
        mean = self.mean()
        num_known = int(self.known.sum())
        if num_known < 2:
            return math.nan, math.nan
        error = max(float(mean.sampling_error), monte_carlo(self.std_error[self.known]))
        half = student_quantile(self.level, num_known - 1) * error
        return float(mean.value) - half, float(mean.value) + half

    @property
    def certain_for_these_data(self) -> bool:
        """Whether the order on these data is certain, given Monte Carlo error, doubts and bias; not about other data."""
        mean = self.mean()
        margin = normal_quantile(self.level) * monte_carlo(self.std_error[self.known]) + self.slack
        return float(mean.value) > margin and not bool((self.unsafe | ~self.known).any())

    @property
    def influence(self) -> Tensor:
        """(N,) the fall of the mean if this datum is left out; NaN where not `known`, and for one datum."""
        nan = torch.full_like(self.difference, math.nan)
        others = int(self.known.sum()) - 1
        return ((self.difference - self.mean().value) / others).where(self.known, nan) if others > 0 else nan

    @property
    def deciding(self) -> list[int]:
        """The data that favour `first` most, as many as must be left out for a mean of zero or less."""
        gains = self.difference.where(self.known, torch.full_like(self.difference, -math.inf))
        order = gains.argsort(descending=True, stable=True)[: int(self.known.sum())]
        left = float(self.difference[self.known].sum()) - self.difference[order].cumsum(0)
        return order[: int((left > 0).sum()) + 1].tolist() if len(order) else []

    @property
    def few_decide(self) -> bool:
        """Whether at most 5% of the data, or one datum, account for the difference."""
        return 0 < len(self.deciding) <= max(FEW * len(self), 1) and float(self.mean().value) > 0

    def to_dict(self) -> dict[str, Any]:
        """Every field, and the claim, as plain Python, for JSON."""
        return {
            **to_plain(self),
            "mean": to_plain(self.mean()),
            "confidence_interval": list(self.confidence_interval()),
            "claim": self.claim,
            "certain_for_these_data": self.certain_for_these_data,
            "deciding": self.deciding,
            "few_decide": self.few_decide,
        }

    def __str__(self) -> str:
        return page([self._in_short()])

    def _in_short(self) -> str:
        mean, unit = self.mean(), "nats per datum"
        ahead = f"'{self.first}' is ahead of '{self.second}' by"
        if mean.doubt:
            return f"{ahead} {float(mean.value):.3f} {unit}, which is not to be trusted ({mean.doubt})"
        smaller = bool(self.doubted.any()) and not bool((self.unsafe | ~self.known).any())  # counting all doubts
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
    """The paired difference of two sides, with the one that is ahead first; p not yet corrected.

    If up to 5% of the data have a doubt that may favour the first, the claim must also hold without them.
    """
    known = one.values.isfinite() & other.values.isfinite()
    ahead = float((one.values - other.values)[known].sum()) >= 0
    first, second = (one, other) if ahead else (other, one)
    difference = first.values - second.values
    std_error = (first.std_errors.square() + second.std_errors.square()).sqrt()
    unsafe, slack = first.too_high | second.too_low, first.drop + second.lift
    samples = [known, known & ~unsafe] if bool(unsafe.any()) else [known]
    p_values = [p_value_of(difference[kept], std_error[kept], slack) for kept in samples]
    if bool(((first.values == -math.inf) & (second.values > -math.inf)).any()):
        p_values.append(1.0)  # its mean is -inf, unless the infinite value is an error of the estimate
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
