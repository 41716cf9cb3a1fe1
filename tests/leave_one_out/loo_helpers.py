"""Models with closed-form leave-one-out densities, and guides for them."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import MultivariateNormal, Normal

NOISE = 0.5


def regression_data(num_data=60, dim=3, correlation=0.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_data, 1, generator=generator, dtype=dtype)
    own = torch.randn(num_data, dim, generator=generator, dtype=dtype)
    x = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    weights = torch.randn(dim, generator=generator, dtype=dtype)
    return x, x @ weights + NOISE * torch.randn(num_data, generator=generator, dtype=dtype)


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


def posterior_of(x, y):
    precision = torch.eye(x.shape[-1], dtype=x.dtype) + x.T @ x / NOISE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ x.T @ y / NOISE**2, covariance


def exact_guide(x, y=None):
    loc, covariance = posterior_of(x, y)
    pyro.sample("w", dist.MultivariateNormal(loc, covariance_matrix=covariance))


def mean_field_guide(x, y=None):
    """The optimum of AutoNormal: the posterior mean, and one over the diagonal of its precision."""
    loc, covariance = posterior_of(x, y)
    scale = torch.linalg.inv(covariance).diagonal().rsqrt()
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def exact_scores(x, y):
    """log p(y_n | y_-n, x), (N,)."""
    found = []
    for n in range(len(x)):
        others = torch.arange(len(x)) != n
        loc, covariance = posterior_of(x[others], y[others])
        variance = NOISE**2 + x[n] @ covariance @ x[n]
        found.append(Normal(x[n] @ loc, variance.sqrt()).log_prob(y[n]))
    return torch.stack(found)


def gaussian_scores(covariance, y, groups):
    """log p(y_g | y_-g) of blocks of a zero-mean Gaussian vector, from its covariance."""
    found, whole = [], MultivariateNormal(y.new_zeros(len(y)), covariance).log_prob(y)
    for g in groups.unique():
        kept = groups != g
        rest = MultivariateNormal(y.new_zeros(int(kept.sum())), covariance[kept][:, kept]).log_prob(y[kept])
        found.append(whole - rest)
    return torch.stack(found)
