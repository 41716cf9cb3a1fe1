"""Rank statistics with errors that are valid for any continuous distribution; ties count half."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import LEVEL, normal_quantile


@dataclass(frozen=True, eq=False)
class Statistic:
    """An estimate about a population of data, with its error.

    :ivar value: 0-d tensor.
    :ivar sampling_error: its error over draws of data, and of noise, from a population, 0-d.
    """

    value: Tensor
    sampling_error: Tensor

    @classmethod
    def mean_of(cls, values: Tensor) -> "Statistic":
        """The mean of independent values, (N,); the error of a single one is NaN."""
        spread = values.std() if len(values) > 1 else torch.full_like(values[0], math.nan)
        return cls(values.mean(), spread / math.sqrt(len(values)))

    def confidence_interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The interval of the population's value."""
        half = normal_quantile(level) * float(self.sampling_error)
        return float(self.value) - half, float(self.value) + half

    def __str__(self) -> str:
        return f"{float(self.value):.3f} (sampling error {float(self.sampling_error):.3f})"


def mean_above(points: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """The mean over all N `values` of their `weights` where they are above each of the points, half where equal."""
    ordered, order = values.sort()
    points = points.contiguous()  # a view would be warned about
    sums = torch.cat([weights.new_zeros(1), weights[order].cumsum(0)])
    below, up_to = (torch.searchsorted(ordered, points, right=right) for right in (False, True))
    return (sums[-1] - (sums[below] + sums[up_to]) / 2) / len(values)


def probability_below(first: Tensor, second: Tensor) -> Statistic:
    r"""P(first < second) + P(first = second) / 2 for two draws, from N values each: U / N^2 of Mann and Whitney (1947).

    The variance of U / N^2 without bias, from the shares of `second` above each of `first`, w_i, and of `first` below each
    of `second`, v_i (DeLong, DeLong and Clarke-Pearson, 1988, https://doi.org/10.2307/2531595)::

        var(w + v) / N - s / N^2,   s = sum_ij (h_ij - w_i - v_j + U / N^2)^2 / (N - 1)^2,   h_ij = 1, 1/2 or 0

    It is valid also where values i of both are dependent (by a common label), by their covariance. At complete separation it
    would be zero, which N values cannot show, so the error is at least 1 / (2 N), about what the score interval of Newcombe
    (2006, https://doi.org/10.1002/sim.2324) has there at one standard error.
    """
    size = len(first)
    first, second = first.contiguous(), second.contiguous()
    one = torch.ones_like(second)
    wins = mean_above(first, second, one)
    losses = 1 - mean_above(second, first, one)
    value = wins.mean()
    if size < 2:
        return Statistic(value, value * math.nan)
    ordered = second.sort().values
    ties = (torch.searchsorted(ordered, first, right=True) - torch.searchsorted(ordered, first)).sum().to(value)
    squares = size**2 * value - ties / 4  # a tie is 1/2 in h and 1/4 in its square
    rest = (squares - size * (wins.square().sum() + losses.square().sum()) + size**2 * value**2) / (size - 1) ** 2
    variance = (wins + losses).var() / size - rest / size**2
    return Statistic(value, variance.clamp(min=1 / (2 * size) ** 2).sqrt())


def rank_correlation(first: Tensor, second: Tensor) -> Statistic:
    r"""Spearman's rank correlation of N pairs, midranks at ties.

    Its error is the spread of the influence of each pair, without assumptions about the joint distribution. It is multiplied
    by sqrt((N - 1) / (N - 3)) for small samples, and is at least that of 1 / (2 N). In simulations it is right with 50 pairs
    or more and too small below 20. NaN for N < 4, and where one side is constant or has NaN.
    """
    size = len(first)
    if size < 4 or bool((first.isnan() | second.isnan()).any()):
        return Statistic(*first.new_full((2,), math.nan))
    one = torch.ones_like(first)
    u, v = (0.5 - mean_above(side, side, one) for side in (first, second))  # centred ranks over N
    scale = (u.square().mean() * v.square().mean()).sqrt()
    value = (u * v).mean() / scale
    joint = u * v + mean_above(first, first, v) + mean_above(second, second, u)
    own = [(w * w + 2 * mean_above(side, side, w)) / w.square().mean() for side, w in ((first, u), (second, v))]
    influence = joint / scale - value / 2 * (own[0] + own[1])
    error = (influence.std() / math.sqrt(size)).clamp(min=1 / (2 * size)) * math.sqrt((size - 1) / (size - 3))
    return Statistic(value, error)
