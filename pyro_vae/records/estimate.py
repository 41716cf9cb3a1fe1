"""A mean over data with its two errors, and the quantiles of intervals."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ArgumentError, OptionError, described
from ..options import flag, real_number, whole_number
from .result import Result

LEVEL = 0.95
MOST_DIGITS = 17  # smallest relative error of a number in double precision
MANY = 100_000  # degrees of freedom above which Student's t is normal to five digits


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Result):
    """A mean over data with its Monte Carlo error and its sampling error.

    :ivar value: the mean, 0-d tensor.
    :ivar std_error: **Monte Carlo** error: the variation of the value with the seed, *for these data*.
    :ivar sampling_error: **sampling** error: the variation of the mean over data drawn from a population. It includes the
        Monte Carlo noise. NaN for one datum.
    :ivar doubt: why the errors are not reliable, such as "12 of 60 data in doubt"; empty where they are.
    :ivar unit: unit of the value, "nats", or empty.

    Example::

        mean = pv.AdaptiveImportanceSampling(model, guide)(x).mean()
        mean.value, mean.std_error, mean.sampling_error, mean.confidence_interval()
    """

    value: Tensor
    std_error: Tensor
    sampling_error: Tensor
    doubt: str = field(default="", kw_only=True)
    unit: str = field(default="nats", kw_only=True)

    @classmethod
    def over_data(cls, values: Tensor, std_errors: Tensor, *, doubt: str = "", unit: str = "nats") -> "Estimate":
        """The mean of values with Monte Carlo errors, (B,) each, independent between data."""
        for name, value in (("values", values), ("std_errors", std_errors)):
            if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point() or not len(value):
                raise ArgumentError(f"expected {name} as floating-point numbers (B,), got {described(value)}: one per datum")
        if len(values) != len(std_errors):
            raise ArgumentError(f"expected as many errors as values, got {len(std_errors)} for {len(values)}: one per datum")
        check_unit(unit)
        num_data = values.shape[0]
        sampling = values.std() / math.sqrt(num_data) if num_data > 1 else torch.full_like(values[0], math.nan)
        return cls(values.mean(), std_errors.square().sum().sqrt() / num_data, sampling, doubt=doubt, unit=unit)

    def confidence_interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The Monte Carlo interval of the mean for these data."""
        half = normal_quantile(level) * float(self.std_error)
        return float(self.value) - half, float(self.value) + half

    def with_error(self, digits: int = 3, *, sampling: bool = False, unit: str = "") -> str:
        """The value with its Monte Carlo or its sampling error: "1.250 +- 0.003 nats"; without an error if in doubt."""
        check_unit(unit)
        digits, sampling = whole_number("digits", digits, lowest=0, highest=MOST_DIGITS), flag("sampling", sampling)
        if self.doubt:
            return f"{float(self.value):.{digits}f}{unit} (error not to be trusted)"
        error = self.sampling_error if sampling else self.std_error
        return f"{float(self.value):.{digits}f} +- {float(error):.{digits}f}{unit}"

    def _in_short(self) -> str:
        return str(self)

    def __str__(self) -> str:
        value = f"{float(self.value):.3f}{self.unit and f' {self.unit}'}"
        if self.doubt:
            return f"{value} (error not to be trusted: {self.doubt})"
        return f"{value} (Monte Carlo error {float(self.std_error):.3f}, sampling error {float(self.sampling_error):.3f})"


def check_unit(unit: str) -> None:
    if not isinstance(unit, str):
        raise OptionError(f"unit must be words such as 'nats', or empty, got {described(unit)}")


def difference(one: Estimate, other: Estimate) -> Estimate:
    """The difference of means over two independent sets of data; the squares of their errors add."""
    errors = zip((one.std_error, one.sampling_error), (other.std_error, other.sampling_error), strict=True)
    doubt = " and ".join(dict.fromkeys(side.doubt for side in (one, other) if side.doubt))
    return Estimate(one.value - other.value, *((a.square() + b.square()).sqrt() for a, b in errors), doubt=doubt)


def normal_quantile(level: float) -> float:
    """Two-sided quantile of the normal distribution: 1.96 for 0.95.

    :raises OptionError: for a level outside (0, 1), whose quantile would be infinite or NaN.
    """
    level = real_number("level", level, highest=1.0, ends="()")
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))


def student_quantile(level: float, df: int) -> float:
    """Two-sided quantile of Student's t, by Hill (1970, Algorithm 396); exact for one and two degrees of freedom."""
    level = real_number("level", level, highest=1.0, ends="()")
    tail = 1 - level
    if df == 1:
        return 1 / math.tan(tail * math.pi / 2)
    if df == 2:
        return math.sqrt(2 / (tail * (2 - tail)) - 2)
    a = 1 / (df - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * df
    y = (d * tail) ** (2 / df)
    if y > 0.05 + a:
        x = -normal_quantile(level)
        y = x * x
        if df < 5:
            c += 0.3 * (df - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = ((1 / (((df + 6) / (df * y) - 0.089 * d - 0.822) * (df + 2) * 3) + 0.5 / (df + 4)) * y - 1) * (df + 1) / (
            df + 2
        ) + 1 / y
    return math.sqrt(df * y)


def student_tail(t: float, df: int) -> float:
    """P(|T| > t) of Student's t for whole degrees of freedom: the finite sums of Abramowitz and Stegun (1964, 26.7.3-4)."""
    if df > MANY:
        return math.erfc(t / math.sqrt(2))
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= (k - 1) / k * cosine**2
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(1 - inside, 0.0)
