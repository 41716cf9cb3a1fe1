"""How many annealing steps are enough, from the barrier between start and posterior and the variance of the log-weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..records import Result, check_records, check_same, places, to_plain

ENOUGH = 0.5  # variance of log-weights: intervals from 16 chains cover 92%, and the effective sample size is 60% of them
TOO_FEW = 2.0  # the variance from which on they cover less than 85%
SHARE = 0.95  # share of the data for which the printed number of steps is enough


@dataclass(frozen=True, eq=False, repr=False)
class Barrier(Result):
    r"""The distance from the start of an annealing path to the posterior, and how many steps are enough for it. B data.

    The global barrier Lambda is the length of the path, in standard deviations of log p(x, u) - log s(u) along it::

        Lambda = integral from 0 to 1 of sd_t(log p(x, u) - log s(u)) dt

    Take T steps of equal length in that measure, and transitions that draw independently from each s^(1 - t) p(x, .)^t. For
    large T, log-weights then have the variance Lambda^2 / T, and the estimate from C chains has the error sqrt((exp(Lambda^2
    / T) - 1) / C). No schedule does better. Transitions that move slowly have a larger error, by a factor that does not
    depend on T once T is large. This factor is estimated from the variance that the log-weights had.

    References: Syed, Bouchard-Côté, Chern and Doucet (2024), "Optimised Annealed Sequential Monte Carlo Samplers",
    https://arxiv.org/abs/2408.12057.

    :ivar length: (B,) Lambda.
    :ivar variance: (B,) variance of the log-weights over the chains.
    :ivar num_steps: T, the steps that ran.

    Example::

        evidence = pv.AnnealedImportanceSampling(model, guide, num_steps=200, num_chains=16)(x)
        print(evidence.barrier)
    """

    _derived = ("enough", "too_few")

    length: Tensor
    variance: Tensor
    num_steps: int

    @property
    def enough(self) -> Tensor:
        """(B,) the steps at which the log-weights of a datum would have a variance of one half; never below 2 Lambda^2."""
        steps = torch.maximum(self.num_steps * self.variance, self.length.square())
        return steps.div_(ENOUGH).ceil_().clamp_(min=1)

    @property
    def too_few(self) -> Tensor:
        """(B,) whether the variance of the log-weights is above 2, where errors from so few steps are too small."""
        return self.variance > TOO_FEW

    @property
    def num_enough(self) -> int:
        """The steps that are enough for 95% of the data, to two digits."""
        number = quantile_in_place(self.enough, SHARE)
        unit = 10 ** max(math.floor(math.log10(number)) - 1, 0)
        return math.ceil(number / unit) * unit

    @classmethod
    def cat(cls, records: Sequence[Barrier]) -> Barrier:
        """Join the results of several batches in their order."""
        check_records(cls, records)
        check_same(records, ("num_steps",))
        parts = {name: torch.cat([getattr(record, name) for record in records]) for name in ("length", "variance")}
        return cls(**parts, num_steps=records[0].num_steps)

    def select(self, kept: Tensor) -> Barrier:
        """The result for some of the data."""
        kept = places(kept, len(self))
        return replace(self, length=self.length[kept], variance=self.variance[kept])

    def __len__(self) -> int:
        return len(self.length)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {**to_plain(self), "enough": self.enough.tolist()}

    def __str__(self) -> str:
        length = f"barrier of {float(self.length.median()):.1f} (median)"
        steps = "1 step is" if self.num_enough == 1 else f"{self.num_enough} steps are"
        return f"{length}: {steps} enough for 95% of the data, {self.num_steps} ran"


def quantile_in_place(values: Tensor, share: float) -> float:
    """`values.quantile(share)` in double precision. It reorders `values`, (B,), to avoid a copy."""
    place = share * (len(values) - 1)
    ends = [math.floor(place), math.ceil(place)]
    ordered = values.numpy(force=True)
    ordered.partition(ends)
    low, high = torch.from_numpy(ordered[ends]).double()
    return float(torch.lerp(low, high, place - ends[0]))
