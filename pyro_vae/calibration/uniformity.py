"""A test of uniformity: a band for the distribution function with a known, small probability of leaving it.

The function is tested at the points 1/100 to 99/100. At each point the count of N uniform numbers below it is binomial, and
the band contains all counts above a tail probability, the same for all points. This tail probability is the largest at which
the whole path stays inside the band with the required probability. The latter is computed exactly: the counts are those of a
Poisson process given its total, whose steps are independent, so one convolution per point gives the probability of all paths
inside so far. Simultaneous bands: Säilynoja, Bürkner and Vehtari, 2022, https://doi.org/10.1007/s11222-022-10090-6; the
convolutions: Moscovich and Nadler, 2017, https://doi.org/10.1016/j.spl.2016.11.027.
"""

import functools
import math

import torch
from torch import Tensor

POINTS = 100
GRID = torch.arange(1, POINTS, dtype=torch.float64) / POINTS
HALVINGS = 16  # halvings of the interval that contains the tail probability, on a logarithmic scale


def counts_below(numbers: Tensor) -> Tensor:
    """The number of (N,) numbers below each point of the grid, (99,)."""
    return torch.searchsorted(numbers.double().cpu().sort().values, GRID)


def is_outside(numbers: Tensor, false_alarm: float) -> bool:
    """Whether (N,) numbers leave the band; for N uniform numbers the probability is at most `false_alarm`."""
    low, high = band(len(numbers), false_alarm)
    counts = counts_below(numbers)
    return bool(((counts < low) | (counts > high)).any())


@functools.lru_cache(maxsize=256)
def band(num_data: int, false_alarm: float) -> tuple[Tensor, Tensor]:
    """The smallest and the largest count below each point, (99,) each, for N uniform numbers."""
    counts, tails = binomial_tails(num_data)

    def limits(level: float) -> tuple[Tensor, Tensor]:
        below = (tails <= level).sum(1, keepdim=True).clamp(max=tails.shape[1] - 1)
        low = counts.gather(1, below).squeeze(1)
        return low, num_data - low.flip(0)  # a count below 1 - z is N minus one below z

    # By Bonferroni, the first level is small enough; at the second, the path leaves the band too often.
    least, most = false_alarm / (2 * (POINTS - 1)), false_alarm / 2
    if probability_inside(num_data, *limits(most)) >= 1 - false_alarm:  # few data have few possible paths
        return limits(most)
    for _ in range(HALVINGS):
        middle = math.sqrt(least * most)
        if probability_inside(num_data, *limits(middle)) >= 1 - false_alarm:
            least = middle
        else:
            most = middle
    return limits(least)


def binomial_tails(num_data: int) -> tuple[Tensor, Tensor]:
    """Counts within twelve standard deviations, and the probability of as many or fewer, (99, counts) each."""
    reach = 6 * math.isqrt(num_data) + 12
    counts = (num_data * GRID).floor().unsqueeze(1) + torch.arange(-reach, reach + 1, dtype=torch.float64)
    possible = (counts >= 0) & (counts <= num_data)
    k, total = counts.clamp(0, num_data), torch.tensor(float(num_data), dtype=torch.float64)
    z = GRID.unsqueeze(1)
    log_ways = torch.lgamma(total + 1) - torch.lgamma(k + 1) - torch.lgamma(total - k + 1)
    log_prob = log_ways + k * z.log() + (total - k) * torch.log1p(-z)
    tails = torch.where(possible, log_prob.exp(), 0.0).cumsum(1)
    return counts.clamp(0, num_data).long(), tails


def probability_inside(num_data: int, low: Tensor, high: Tensor) -> float:
    """The probability that the counts of N uniform numbers below the points, (99,), are all from `low` to `high`."""
    step = num_data / POINTS
    jumps = torch.arange(num_data + 1, dtype=torch.float64)
    poisson = (jumps * math.log(step) - step - torch.lgamma(jumps + 1)).exp()
    mass, first = torch.ones(1, dtype=torch.float64), 0  # probabilities of the counts from `first` on
    for bottom, top in zip([*low.tolist(), num_data], [*high.tolist(), num_data], strict=True):
        steps = poisson[: top - first + 1]
        size = len(mass) + len(steps)
        sums = torch.fft.irfft(torch.fft.rfft(mass, size) * torch.fft.rfft(steps, size), size)
        mass, first = sums[bottom - first : top - first + 1].clamp(min=0), bottom
    total = math.exp(num_data * math.log(num_data) - num_data - math.lgamma(num_data + 1))
    return float(mass) / total
