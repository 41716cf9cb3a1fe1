"""Log-gamma functions and deviances without cancellation, which loses digits in float32.

Loader's form of a density: log n! is Stirling's formula plus a small rest, and the large terms that then cancel are combined
to a deviance. C. Loader, 2000, "Fast and Accurate Computation of Binomial Probabilities"; R computes densities in this way
too.
"""

import math

import torch
from torch import Tensor

HALF_LOG_2PI = math.log(2 * math.pi) / 2
# Above 8, and below 0.1, the series are accurate to rounding in float64. In float32 their first three terms are enough.
SERIES_FROM, STIRLING_SERIES = 8, (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
NEAR, ATANH_SERIES = 0.1, tuple(1 / n for n in range(3, 17, 2))


def stirling_rest(x: Tensor) -> Tensor:
    """log Gamma(x + 1) - [(x + 1/2) log x - x + log(2 pi) / 2] for x > 0: about 1 / (12 x)."""
    is_large = x >= SERIES_FROM
    inverse = 1 / torch.where(is_large, x, SERIES_FROM)
    small = torch.where(is_large, torch.ones_like(x), x)
    direct = torch.lgamma(small + 1) - (small + 0.5) * small.log() + small - HALF_LOG_2PI
    return torch.where(is_large, inverse * polynomial(inverse.square(), STIRLING_SERIES), direct)


def deviance(x: Tensor, excess: Tensor, log_ratio: Tensor) -> Tensor:
    """x log(x / m) - (x - m), not negative, for x, m > 0; near x = m it is a series in (x - m) / (x + m).

    :param excess: x - m, which the caller can compute without cancellation.
    :param log_ratio: log(x / m), used where x and m are far apart.
    """
    ratio = excess / (2 * x - excess)
    series = 2 * x * atanh_rest(ratio) + excess * ratio
    return torch.where(ratio.abs() < NEAR, series, x * log_ratio - excess)


def atanh_rest(x: Tensor) -> Tensor:
    """atanh(x) - x for |x| < 0.1."""
    square = x.square()
    return x * square * polynomial(square, ATANH_SERIES)


def polynomial(x: Tensor, series: tuple[float, ...]) -> Tensor:
    """The sum of series[n] x^n; only the first three terms in lower precision than float64."""
    *others, before, last = series if x.dtype == torch.float64 else series[:3]
    total = last * x + before
    for coefficient in reversed(others):
        total = total * x + coefficient
    return total
