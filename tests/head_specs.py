"""What the tests must know of each likelihood head: one entry for a new one, and all of them hold it."""

import math
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


def on_both_sides(fn, dtype):
    """Gauss-Laguerre on each side of the peak of a Laplace density: exact for it times a polynomial on each side."""
    nodes, weights = (torch.from_numpy(a).to(F64) for a in numpy.polynomial.laguerre.laggauss(20))
    loc, scale = fn.base_dist.loc.detach(), fn.base_dist.scale.detach()
    steps, weights = nodes.to(dtype), (weights * nodes.exp()).to(dtype)
    return Points(torch.cat([loc - scale * steps, loc + scale * steps]), scale * torch.cat([weights, weights]))


def on_heavy_tails(fn, dtype):
    """The trapezoid rule in t, x = loc + scale sinh(t), where powers of x die out as exponentials."""
    steps = torch.linspace(-36, 36, 3601, dtype=dtype)
    loc, scale = fn.base_dist.loc.detach(), fn.base_dist.scale.detach()
    return Points(loc + scale * steps.sinh(), scale * steps.cosh() * (72 / 3600))


def on_logarithms(fn, dtype):
    """The trapezoid rule in log(x) for a log-normal density, which is normal there."""
    reach = 12 if dtype == torch.float32 else 30  # the square of x moves the peak; float32 has no larger x
    steps = torch.linspace(-reach, reach, 40 * reach + 1, dtype=dtype)
    loc, scale = fn.base_dist.loc.detach(), fn.base_dist.scale.detach()
    x = (loc + scale * steps).exp()
    return Points(x, x * scale / 20)


def on_positive_numbers(fn, dtype):
    """The trapezoid rule in log(x) for a Gamma density, x^a near zero; what is left of the first point is x / a there."""
    a, mean = (float(number.detach()) for number in (fn.base_dist.concentration, fn.base_dist.mean))
    left, right = min(40 / a + 12 / a**0.5, 80 / a**0.5 if a > 1 else 80), math.log(1 + 60 / a + 12 / a**0.5)
    step = min(0.02, 0.1 / a**0.5)
    logs = torch.arange(-left, right, step, dtype=F64)
    x = mean * logs.exp()
    weights = x * step
    weights[0] = x[0] / a + x[0] * step / 2
    return Points(x.to(dtype), weights.to(dtype))


EXACT_UP_TO = 100_000


def all_counts(fn, dtype):
    """All counts up to a number, and beyond it the integral of the density from there less 1/2: Simpson's rule in log(x).

    The slope of the density there over 24 is the first term by which the two differ (Euler and Maclaurin).
    """
    counts = torch.arange(EXACT_UP_TO + 1, dtype=F64)
    of_counts = torch.ones_like(counts)
    of_counts[-2:] = torch.tensor([1 - 1 / 24, 1 / 24])
    below = fn.base_dist.counts if hasattr(fn.base_dist, "counts") else fn.base_dist
    mean, theta = float(below.mean.detach()), float(getattr(below, "theta", torch.tensor(1e9)).detach())
    end = math.log(EXACT_UP_TO + 50 * mean + 1000 * mean / theta)
    logs = torch.linspace(math.log(EXACT_UP_TO - 0.5), end, 100_001, dtype=F64)
    x, step = logs.exp(), float(logs[1] - logs[0])
    simpson = torch.tensor([2.0, 4.0], dtype=F64).repeat(50_001)[:-1]
    simpson[[0, -1]] = 1
    weights = x * simpson * step / 3
    return Points(torch.cat([counts, x]).to(dtype), torch.cat([of_counts, weights]).to(dtype))


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
    :param spreads: of raw numbers, for which quadrature has points to sum over.
    :param seen_as: a function of draws whose moments are finite and few outliers decide.
    :param spread_of_data: of raw numbers from which a VAE can learn.
    """

    make: Callable[..., nn.Head]
    points: Callable[..., Points] = on_the_line
    innermost: str = "Normal"
    num_params: int = 1
    bad: tuple[float, ...] = EVERYWHERE_BAD
    edges: tuple[float, float] = (0.0, 100.0)
    has_mean: bool = True
    is_discrete: bool = False
    spreads: tuple[float, ...] = (0.0, 1.0, 5.0, 25.0)
    seen_as: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    spread_of_data: float = 4.0


def counts(make, num_values, innermost, **options):
    options = {"bad": bad_counts(num_values), "edges": (0.0, num_values - 1.0), "is_discrete": True, **options}
    return HeadSpec(make, whole_numbers(num_values), innermost, **options)


def unbounded(make, innermost, **options):
    """Counts without a largest one."""
    options = {"bad": (*EVERYWHERE_BAD, -1.0, 0.5, 1e-30, 1 + 1e-6), "is_discrete": True, "spread_of_data": 1.0, **options}
    return HeadSpec(make, all_counts, innermost, **options)


def positive(make, points, innermost, **options):
    return HeadSpec(make, points, innermost, bad=(*EVERYWHERE_BAD, 0.0, -1.0), edges=(1e-3, 100.0), **options)


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
    "DiscretizedLogisticMixture": counts(
        lambda d=1: nn.DiscretizedLogisticMixture(6, num_components=2, event_dim=d), 6, "LevelsMixture", num_params=6
    ),
    "Poisson": unbounded(lambda d=1: nn.Poisson(event_dim=d), "StablePoisson"),
    "NegativeBinomial": unbounded(lambda d=1: nn.NegativeBinomial(event_dim=d), "StableNegativeBinomial", num_params=2),
    "NegativeBinomial-fixed": unbounded(lambda d=1: nn.NegativeBinomial(1e5, event_dim=d), "StableNegativeBinomial"),
    "NegativeBinomial-learned": unbounded(lambda d=1: nn.NegativeBinomial("learned", event_dim=d), "StableNegativeBinomial"),
    "ZeroInflatedPoisson": unbounded(lambda d=1: nn.ZeroInflatedPoisson(event_dim=d), "ZeroInflated", num_params=2),
    "ZeroInflatedNegativeBinomial": unbounded(
        lambda d=1: nn.ZeroInflatedNegativeBinomial(event_dim=d), "ZeroInflated", num_params=3
    ),
    "Laplace": HeadSpec(lambda d=1: nn.Laplace(event_dim=d), on_both_sides, "Laplace", num_params=2),
    "Laplace-fixed": HeadSpec(lambda d=1: nn.Laplace(0.3, event_dim=d), on_both_sides, "Laplace"),
    "StudentT": HeadSpec(
        lambda d=1: nn.StudentT(event_dim=d), on_heavy_tails, "StableStudentT", num_params=2, seen_as=torch.atan
    ),
    "StudentT-fixed": HeadSpec(
        lambda d=1: nn.StudentT(7.0, "learned", event_dim=d), on_heavy_tails, "StableStudentT", seen_as=torch.atan
    ),
    "Gamma": positive(lambda d=1: nn.Gamma(event_dim=d), on_positive_numbers, "StableGamma", num_params=2),
    "Gamma-fixed": positive(lambda d=1: nn.Gamma(3e4, event_dim=d), on_positive_numbers, "StableGamma"),
    "LogNormal": positive(
        lambda d=1: nn.LogNormal(event_dim=d),
        on_logarithms,
        "LogNormal",
        num_params=2,
        spreads=(0.0, 1.0, 2.0),
        seen_as=torch.log,
        spread_of_data=1.0,
    ),
}
