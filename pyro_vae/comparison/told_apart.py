"""Whether a mean of paired differences is above zero: Student's t, corrected for skewness and for how many are asked."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..records import student_tail


def p_value_of(differences: Tensor, std_errors: Tensor, slack: float) -> float:
    """Two-sided p that the population's mean of (N,) differences is at most `slack`, given that their mean is above it.

    Student's t, and for differences that are skewed that of Hall (1992, "On the Removal of Skewness by Transformation",
    Journal of the Royal Statistical Society B 54, 221-228), with n data and the skewness g::

        h = sqrt(n) (T + g T^2 / 3 + g^2 T^3 / 27 + g / (6 n)),   T = t / sqrt(n)

    The smaller of the two counts. A sample shows less skewness than its population has, so g is moved by its standard
    error, sqrt(6 / n), to the side where h is smaller. The error behind t is the larger of sampling and Monte Carlo error:
    the first contains the second, but not where few data happen to lie close together.
    """
    n = len(differences)
    if n < 2:
        return 1.0
    mean, spread = float(differences.mean()), float(differences.std())
    error = max(spread / math.sqrt(n), monte_carlo(std_errors))
    if mean <= slack:
        return 1.0
    if error == 0.0:
        return 0.0  # the same difference for all data, known exactly
    t = (mean - slack) / error
    scaled, g = t / math.sqrt(n), skewness(differences) - math.sqrt(6 / n)
    corrected = math.sqrt(n) * (scaled + g * scaled**2 / 3 + g**2 * scaled**3 / 27 + g / (6 * n))
    return student_tail(max(min(t, corrected), 0.0), n - 1)


def monte_carlo(std_errors: Tensor) -> float:
    """The Monte Carlo error of the mean of (N,); zero where it is not known (NaN), as the spread then has to say it."""
    return float(std_errors.nan_to_num(nan=0.0).square().sum().sqrt()) / len(std_errors)


def skewness(values: Tensor) -> float:
    """Of (N,) values, without the bias that a normal sample has; 0 for fewer than three, and where all are equal."""
    n = len(values)
    centred = values - values.mean()
    variance = float(centred.square().mean())
    if n < 3 or variance == 0.0:
        return 0.0
    return float(centred.pow(3).mean()) / variance**1.5 * math.sqrt(n * (n - 1)) / (n - 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """p corrected for their number, by Holm (1979): all claims below a level are right but for that chance."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min((len(order) - rank) * p_values[i], 1.0))
        corrected[i] = largest
    return corrected
