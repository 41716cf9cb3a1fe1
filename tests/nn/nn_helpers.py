"""What the tests of heads share: every head, data for each, and sums or quadratures over the values of one number."""

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn as torch_nn

import pyro_vae.nn as nn

F64 = torch.float64
# Two-sided tail beyond 4.5 standard errors; a test of N independent numbers fails N times as often.
SIGMAS, FALSE_ALARM = 4.5, 7e-6

# Every head by name; each is called with the event_dim.
HEADS: dict[str, Any] = {
    "Normal": lambda d=1: nn.Normal(event_dim=d),
    "Normal-fixed": lambda d=1: nn.Normal(0.3, event_dim=d),
    "Normal-learned": lambda d=1: nn.Normal("learned", event_dim=d),
    "Normal-optimal": lambda d=1: nn.Normal("optimal", event_dim=d),
    "Bernoulli": lambda d=1: nn.Bernoulli(event_dim=d),
    "ContinuousBernoulli": lambda d=1: nn.ContinuousBernoulli(event_dim=d),
    "Binomial": lambda d=1: nn.Binomial(5, event_dim=d),
    "Categorical": lambda d=1: nn.Categorical(4, event_dim=d),
    "DiscretizedLogistic": lambda d=1: nn.DiscretizedLogistic(6, event_dim=d),
}
NORMALS = [name for name in HEADS if name.startswith("Normal")]
COUNTS = {"Bernoulli": 2, "Binomial": 6, "Categorical": 4, "DiscretizedLogistic": 6}  # how many values, from 0 on
MEANS = [name for name in HEADS if name != "Categorical"]  # classes have no mean


@dataclass
class Points:
    """Values of one number, shape (n,), and weights: sum(weights * f(values)) is the integral (or the sum) of f."""

    values: torch.Tensor
    weights: torch.Tensor


def points(name, fn, dtype=F64):
    """All that one number of `fn`, event shape (1,) and no batch, can be."""
    if name in COUNTS:
        return Points(torch.arange(COUNTS[name], dtype=dtype), torch.ones(COUNTS[name], dtype=dtype))
    if name == "ContinuousBernoulli":
        nodes, weights = (torch.from_numpy(a).to(dtype) for a in numpy.polynomial.legendre.leggauss(80))
        return Points((nodes + 1) / 2, weights / 2)
    # The trapezoid rule on the real line is exact to rounding for analytic functions that die out as fast as a normal.
    steps = torch.linspace(-12, 12, 481, dtype=dtype)
    scale = fn.base_dist.scale.detach()
    return Points(fn.base_dist.loc.detach() + scale * steps, scale * torch.full_like(steps, 24 / 480))


def density(fn, where):
    """exp(log_prob) at each of the points, for an event of one number."""
    return fn.log_prob(where.values.unsqueeze(-1)).detach().exp()


def raw_numbers(head, seed=0, size=1, batch=(), spread=1.0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch, head.num_outputs(size))
    return spread * torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def in_eval_mode(name, event_dim=1, dtype=F64):
    return HEADS[name](event_dim).to(dtype).eval()


def simulated(head, num_data=60, size=6, seed=0):
    """Data (B, X) from the head behind a linear map of two standard normal latents."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, head.num_outputs(size), generator=generator)
    z = torch.randn(num_data, 2, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return head.eval()(4 * z @ weight).sample()


class Bias(torch_nn.Module):
    """A network whose output does not depend on its input: (..., anything) to (..., width)."""

    def __init__(self, width):
        super().__init__()
        self.raw = torch_nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return self.raw.expand(*x.shape[:-1], -1)
