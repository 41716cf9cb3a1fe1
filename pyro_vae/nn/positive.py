"""Heads for positive numbers: Gamma and log-normal."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .checked import Accepts
from .gaussian import softplus2
from .head import Head
from .inputs import Log
from .likelihoods import SCORE
from .parameters import PositiveParameter, exp_link
from .stirling import HALF_LOG_2PI, deviance, stirling_rest

SMALLEST_QUOTIENT = (
    # smallest x and mean for the first form; below it one of them may underflow, and differences of logarithms are used
    1e-30
)
SMALLEST_CONCENTRATION = 0.1  # at .1 one draw in 6,000 is below the smallest number of float32, at .01 two in five


class Gamma(Head):
    r"""Head for positive numbers: Gamma of mean m = exp(raw) + 1e-4 and variance m^2 / a, with concentration (shape) a::

        p(x) = (a / m)^a x^(a - 1) exp(-a x / m) / Gamma(a)

    a = 1 is the exponential distribution. For raw above 10 the mean grows linearly. In float32 the density is accurate for
    any a, unlike that of `torch.distributions.Gamma`.

    :param concentration: the source of a.

        `None`
            predicted by the network for each number: `num_params` is 2, and a = log2(1 + 2^raw) + 0.1.
        a float
            a fixed value.
        `"learned"`
            one for all numbers, exp of the parameter `concentration.log_value`.
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: for any other concentration.

    Call it with raw numbers (..., num_params * X), first those of the means. It returns a distribution with batch shape
    (...) and event shape (X,), in nats. Its `log_prob` raises `SupportError` for data of another event shape and, while
    Pyro's argument checks are on, for data that are not positive. The input of encoders should be log(x), which
    `input_layer()` computes.

    >>> fn = Gamma(4.0)(torch.zeros(2))
    >>> fn.mean, fn.variance
    (tensor([1.0001, 1.0001]), tensor([0.2501, 0.2501]))
    """

    def __init__(self, concentration: float | str | None = None, *, event_dim: int = 1) -> None:
        super().__init__(positive_numbers("Gamma"), event_dim=event_dim)
        self.concentration = PositiveParameter("concentration", concentration, link=concentration_of)
        self.num_params = 1 + self.concentration.num_params

    def input_layer(self) -> nn.Module:
        return Log()

    def forward(self, raw: Tensor) -> Any:
        mean, *concentration = self.chunks(raw)
        a = self.concentration(concentration, mean, self.event_dim)
        return self.checked(StableGamma(a, a / exp_link(mean), validate_args=False))


class LogNormal(Head):
    r"""Head for positive numbers whose logarithm is normal, N(loc, scale^2): errors are multiplicative.

    :param scale: the source of the scale of log(x).

        `None`
            predicted by the network for each number: `num_params` is 2, and scale = log2(1 + 2^raw) + 1e-4.
        a float
            a fixed value.
        `"learned"`
            one for all numbers, exp of the parameter `scale.log_value`.
    :param event_dim: 1 for vectors (X,), 3 for images (C, H, W).
    :raises OptionError: for any other scale.

    Call it with raw numbers (..., num_params * X), first those of loc. The density is that of x, including the factor 1 / x,
    not that of log(x), so log p(x) can be compared with that of a `Gamma`. Everything else is as in `Gamma`.

    >>> LogNormal(1.0)(torch.zeros(2)).log_prob(torch.tensor([1.0, 1.0]))
    tensor(-1.8379)
    """

    def __init__(self, scale: float | str | None = None, *, event_dim: int = 1) -> None:
        super().__init__(positive_numbers("LogNormal"), event_dim=event_dim)
        self.scale = PositiveParameter("scale", scale)
        self.num_params = 1 + self.scale.num_params

    def input_layer(self) -> nn.Module:
        return Log()

    def forward(self, raw: Tensor) -> Any:
        loc, *scale = self.chunks(raw)
        return self.checked(dist.LogNormal(loc, self.scale(scale, loc, self.event_dim), validate_args=False))


class StableGamma(dist.Gamma):
    """Pyro's Gamma, with terms of the density combined that cancel for a large concentration.

    In float32 the density of torch is wrong by 0.01 nats on average at a concentration of 1e4, and by 0.7 at 1e6.
    """

    support: Any = constraints.positive  # torch includes 0, where the density is 0 or infinite

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        a, expected = self.concentration, self.rate * value
        log_x = value.log()
        quotient = expected / a
        is_normal = quotient > SMALLEST_QUOTIENT
        log_quotient = torch.where(is_normal, quotient, torch.ones_like(quotient)).log()
        log_ratio = torch.where(is_normal, -log_quotient, a.log() - self.rate.log() - log_x)
        cost = deviance(a, a - expected, log_ratio)
        return a.log() / 2 - HALF_LOG_2PI - stirling_rest(a) - cost - log_x


def concentration_of(raw: Tensor) -> Tensor:
    return softplus2(raw) + SMALLEST_CONCENTRATION


def positive_numbers(head: str) -> Accepts:
    remedy = f"shift them (x + 1), move zeros into a separate column, use Normal for numbers of any sign, {SCORE}"
    return Accepts(head, constraints.positive, "positive numbers", remedy)
