"""Test of whether a mean of paired differences is above zero: Student's t, corrected for skewness and for several pairs."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..records import student_tail


def p_value_of(differences: Tensor, std_errors: Tensor, slack: float) -> float:
    """Two-sided p-value of the hypothesis that the population's mean of (N,) differences is at most `slack`.

    The mean of the sample is above `slack`. The test is Student's t, and for skewed differences that of Hall (1992, "On the
    Removal of Skewness by Transformation", Journal of the Royal Statistical Society B 54, 221-228), with n data and the
    skewness g::

        h = sqrt(n) (T + g T^2 / 3 + g^2 T^3 / 27 + g / (6 n)),   T = t / sqrt(n)

    The smaller of the two is used. A sample has less skewness than its population, so g is changed by its standard error,
    sqrt(6 / n), in the direction that makes h smaller. The error in t is the larger of sampling and Monte Carlo error. The
    first should include the second, but may not where few data happen to be close together.
    """
    n = len(differences)
    if n < 2:
        return 1.0
    mean, spread = float(differences.mean()), float(differences.std())
    error = max(spread / math.sqrt(n), monte_carlo(std_errors))
    if mean <= slack:
        return 1.0
    if error == 0.0:
        return 0.0  # the same, exactly known difference for all data
    t = (mean - slack) / error
    scaled, g = t / math.sqrt(n), skewness(differences) - math.sqrt(6 / n)
    corrected = math.sqrt(n) * (scaled + g * scaled**2 / 3 + g**2 * scaled**3 / 27 + g / (6 * n))
    return student_tail(max(min(t, corrected), 0.0), n - 1)


def monte_carlo(std_errors: Tensor) -> float:
    """The Monte Carlo error of the mean of (N,); an unknown error (NaN) counts as zero, so that only the spread is used."""
    return float(std_errors.nan_to_num(nan=0.0).square().sum().sqrt()) / len(std_errors)


def skewness(values: Tensor) -> float:
    """Skewness of (N,) values, without the bias of a normal sample; 0 for fewer than three, and where all are equal."""
    n = len(values)
    centred = values - values.mean()
    variance = float(centred.square().mean())
    if n < 3 or variance == 0.0:
        return 0.0
    return float(centred.pow(3).mean()) / variance**1.5 * math.sqrt(n * (n - 1)) / (n - 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm (1979): the level then bounds the chance of any false claim."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(order) - rank) * p_values[i], 1.0))
        corrected[i] = largest
    return corrected
