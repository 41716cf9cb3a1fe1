"""Models of many structures for which a guide is made, and an example of their data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv

LOADINGS = torch.tensor([[1.0, 0.5], [-0.5, 1.0]])


def gamma_poisson(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("obs", dist.Poisson(rate.unsqueeze(-1).expand(*rate.shape, 5)).to_event(1), obs=x)


def dirichlet(x):
    with pyro.plate("data", len(x)):
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(4)))
        pyro.sample("obs", dist.Multinomial(20, shares, validate_args=False), obs=x)


def two_layers(x):
    """Linear and Gaussian, so that log p(x) is known."""
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        below = pyro.sample("below", dist.Normal(top @ LOADINGS.to(x), 0.5).to_event(1))
        pyro.sample("obs", dist.Normal(below, 0.5).to_event(1), obs=x)


def two_layers_log_p(x):
    covariance = LOADINGS.T @ LOADINGS + 0.5 * torch.eye(2)
    return torch.distributions.MultivariateNormal(torch.zeros(2), covariance).log_prob(x)


def eight_schools(x):
    """x (B, 8): every datum is a set of eight schools."""
    with pyro.plate("data", len(x), dim=-2):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 5.0))
        spread = pyro.sample("spread", dist.HalfNormal(x.new_full((), 3.0)))
        with pyro.plate("schools", 8, dim=-1):
            effect = pyro.sample("effect", dist.Normal(mean, spread))
            pyro.sample("obs", dist.Normal(effect, 2.0), obs=x)


def places_left(x):
    """The inner plate lies left of the plate of the data: x (B, 3)."""
    with pyro.plate("data", len(x), dim=-1):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("places", 3, dim=-2):
            pair = pyro.sample("pair", dist.Normal(level.unsqueeze(-1).expand(*level.shape, 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(pair.sum(-1), 0.5), obs=x.T)


def matrices(x):
    with pyro.plate("data", len(x)):
        matrix = pyro.sample("matrix", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("obs", dist.Normal(matrix.sum(-1), 0.5).to_event(1), obs=x)


def walk(x):
    """A sequence: x (B, 4), a site for each step."""
    with pyro.plate("data", len(x)):
        z = x.new_zeros(())
        for t in range(x.shape[-1]):
            z = pyro.sample(f"z.{t}", dist.Normal(0.9 * z, 0.5))
            pyro.sample(f"x.{t}", dist.Normal(z, 0.5), obs=x[:, t])


def mixture(x):
    """A class, which the model enumerates, and a number that depends on it."""
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(2.0 * kind.to(x.dtype) - 1.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 0.5), obs=x[:, 0])


def angles(x):
    with pyro.plate("data", len(x)):
        angle = pyro.sample("angle", dist.VonMises(0.5, 1.0))
        pyro.sample("obs", dist.Normal(torch.stack([angle.cos(), angle.sin()], -1), 0.5).to_event(1), obs=x)


def bounded(x):
    with pyro.plate("data", len(x)):
        place = pyro.sample("place", dist.Uniform(-1.0, 2.0))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        pyro.sample("obs", dist.Normal(place * share, 0.5), obs=x[:, 0])


@dataclass(frozen=True)
class Case:
    model: Callable[..., Any]
    x: torch.Tensor

    def guide(self, width: int = 8, **options: Any) -> pv.AmortizedGuide:
        return pv.AmortizedGuide(self.model, pv.nn.MLP(self.x.shape[-1], width, hidden=(width,)), (self.x,), **options)


def template(width: int) -> torch.Tensor:
    return torch.linspace(-1.0, 2.0, 5 * width).reshape(5, width)


CASES = {
    "Gamma-Poisson": Case(gamma_poisson, template(5).abs().round()),
    "Dirichlet": Case(dirichlet, torch.tensor([[5.0, 5.0, 5.0, 5.0], [20.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 14.0]])),
    "two layers": Case(two_layers, template(2)),
    "eight schools": Case(eight_schools, template(8)),
    "places left": Case(places_left, template(3)),
    "matrices": Case(matrices, template(2)),
    "walk": Case(walk, template(4)),
    "mixture": Case(mixture, template(1)),
    "angles": Case(angles, template(2)),
    "bounded": Case(bounded, template(1)),
}
