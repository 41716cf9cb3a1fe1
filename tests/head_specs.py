"""What the tests must know of each likelihood head: one entry for a new one, and all of them hold it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch

import pyro_vae.nn as nn

F64 = torch.float64


@dataclass
class Points:
    """Values of one number, shape (n,), and weights: sum(weights * f(values)) is the integral (or the sum) of f."""

    values: torch.Tensor
    weights: torch.Tensor


def on_the_line(fn, dtype):
    """The trapezoid rule on the real line, exact to rounding for analytic functions that die out as fast as a normal."""
    steps = torch.linspace(-12, 12, 481, dtype=dtype)
    scale = fn.base_dist.scale.detach()
    return Points(fn.base_dist.loc.detach() + scale * steps, scale * torch.full_like(steps, 24 / 480))


def on_the_unit_interval(fn, dtype):
    nodes, weights = (torch.from_numpy(a).to(dtype) for a in numpy.polynomial.legendre.leggauss(80))
    return Points((nodes + 1) / 2, weights / 2)


def whole_numbers(num_values):
    return lambda fn, dtype: Points(torch.arange(num_values, dtype=dtype), torch.ones(num_values, dtype=dtype))


EVERYWHERE_BAD = (torch.nan, torch.inf, -torch.inf)


def bad_counts(num_values):
    return (*EVERYWHERE_BAD, -1.0, 0.5, float(num_values), 1e-30, 1 + 1e-6)


@dataclass(frozen=True)
class HeadSpec:
    """One head.

    :param make: builds it for an `event_dim`.
    :param points: (distribution of one number, dtype) to all values of it, as a sum or a quadrature.
    :param innermost: the class of its distribution below masks and events.
    :param num_params: raw numbers for each number of the data.
    :param bad: values outside the support.
    :param edges: the smallest and the largest data that gradients must stand.
    """

    make: Callable[..., nn.Head]
    points: Callable[..., Points] = on_the_line
    innermost: str = "Normal"
    num_params: int = 1
    bad: tuple[float, ...] = EVERYWHERE_BAD
    edges: tuple[float, float] = (0.0, 100.0)
    has_mean: bool = True
    is_discrete: bool = False


def counts(make, num_values, innermost, **options):
    options = {"bad": bad_counts(num_values), "edges": (0.0, num_values - 1.0), "is_discrete": True, **options}
    return HeadSpec(make, whole_numbers(num_values), innermost, **options)


SPECS = {
    "Normal": HeadSpec(lambda d=1: nn.Normal(event_dim=d), num_params=2),
    "Normal-fixed": HeadSpec(lambda d=1: nn.Normal(0.3, event_dim=d)),
    "Normal-learned": HeadSpec(lambda d=1: nn.Normal("learned", event_dim=d)),
    "Normal-optimal": HeadSpec(lambda d=1: nn.Normal("optimal", event_dim=d)),
    "Bernoulli": counts(lambda d=1: nn.Bernoulli(event_dim=d), 2, "Bernoulli"),
    "ContinuousBernoulli": HeadSpec(
        lambda d=1: nn.ContinuousBernoulli(event_dim=d),
        on_the_unit_interval,
        "StableContinuousBernoulli",
        bad=(*EVERYWHERE_BAD, -0.01, 1.01),
        edges=(0.0, 1.0),
    ),
    "Binomial": counts(lambda d=1: nn.Binomial(5, event_dim=d), 6, "FastBinomial"),
    "Categorical": counts(lambda d=1: nn.Categorical(4, event_dim=d), 4, "Categorical", num_params=4, has_mean=False),
    "DiscretizedLogistic": counts(lambda d=1: nn.DiscretizedLogistic(6, event_dim=d), 6, "LogisticLevels", num_params=2),
}
