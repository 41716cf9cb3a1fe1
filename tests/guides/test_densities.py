"""Densities of guides made from the model: they integrate to one over the support of each site, by quadrature."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv

X = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
FAMILIES = ["diagonal", "full", "flow"]
OPTIONS = [{"family": family, "conditioned": conditioned} for family in FAMILIES for conditioned in (False, True)]
# Distributions of one number, and where the quadrature goes.
SUPPORTS = {
    "real": (lambda: dist.Normal(0.0, 1.0), (-40.0, 40.0)),
    "positive": (lambda: dist.Gamma(2.0, 1.0), (0.0, None)),
    "interval": (lambda: dist.Uniform(-1.0, 2.0), (-1.0, 2.0)),
    "unit": (lambda: dist.Beta(2.0, 3.0), (0.0, 1.0)),
    "above": (lambda: dist.Pareto(1.5, 2.0), (1.5, None)),
    "mixture": (lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Beta(torch.ones(2), 2.0)), (0.0, 1.0)),
    "circle": (lambda: dist.VonMises(0.0, 1.0), (-torch.pi, torch.pi)),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def nodes(low, high, number=20_001):
    """Points and weights of the trapezium rule; a half line by the logarithm."""
    u = torch.linspace(-12.0, 12.0, number, dtype=torch.float64)
    step = u[1] - u[0]
    if high is None:
        return low + u.exp(), u.exp() * step
    if high - low > 20:
        return u * (high / 12), step.expand(number) * (high / 12)
    share = u.sigmoid()
    return low + (high - low) * share, (high - low) * share * (1 - share) * step


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("support", SUPPORTS)
def test_of_a_number_given_another(support, options):
    """The second of two sites, at a value of the first; the integral is one for every datum."""
    make, (low, high) = SUPPORTS[support]

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(x.new_zeros(()), 1.0))
            second = pyro.sample("second", make())
            pyro.sample("obs", dist.Normal(first + second, 1.0), obs=x[:, 0])

    guide = pv.AmortizedGuide(model, nn.Linear(1, 4).double(), (X,), **options).double()
    points, weights = nodes(low, high)
    for first in (-0.7, 1.1):
        values = {"first": torch.full((2,), first, dtype=torch.float64), "second": points.unsqueeze(-1).expand(-1, 2)}
        with torch.no_grad(), pyro.plate("points", len(points), dim=-2):
            trace = poutine.trace(poutine.condition(guide, values)).get_trace(X)
        log_q = trace.nodes["second"]["fn"].log_prob(values["second"])
        torch.testing.assert_close(log_q.exp().T @ weights, torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_of_a_point_of_a_simplex(options):
    """Three shares, by quadrature over the first two."""

    def model(x):
        with pyro.plate("data", len(x)):
            shares = pyro.sample("shares", dist.Dirichlet(x.new_ones(3)))
            pyro.sample("obs", dist.Normal(shares[..., 0], 1.0), obs=x[:, 0])

    guide = pv.AmortizedGuide(model, nn.Linear(1, 4).double(), (X,), **options).double()
    u = torch.linspace(-9.0, 9.0, 201, dtype=torch.float64)
    first, second = torch.meshgrid(u.sigmoid(), u.sigmoid(), indexing="ij")
    weights = (first * (1 - first)) * (second * (1 - second)) * (1 - first) * (u[1] - u[0]) ** 2
    values = torch.stack([first, second * (1 - first), (1 - second) * (1 - first)], -1).reshape(-1, 1, 3)
    with torch.no_grad():
        fn = poutine.trace(guide).get_trace(X).nodes["shares"]["fn"]
        # The density is over the first two shares.
        total = (fn.log_prob(values.expand(-1, 2, 3)).exp() * weights.reshape(-1, 1)).sum(0)
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), rtol=2e-3, atol=0)
