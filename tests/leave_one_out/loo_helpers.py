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
    # (N,), or (S, N) from S draws in (S, 1, D): a product of matrices, which has no array of (S, N, D)
    mean = x @ w if w.ndim == 1 else (x @ w.mT).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


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
    """log p(y_g | y_-g) of blocks of a zero-mean Gaussian vector, from its covariance. Many covariances give a row each."""
    found, whole = [], MultivariateNormal(y.new_zeros(len(y)), covariance).log_prob(y)
    for g in groups.unique():
        kept = groups != g
        rest = MultivariateNormal(y.new_zeros(int(kept.sum())), covariance[..., kept, :][..., kept]).log_prob(y[kept])
        found.append(whole - rest)
    return torch.stack(found, -1)


# Groups with replicates: mu ~ N(0, 3^2), theta_j ~ N(mu, tau^2), y_ij ~ N(theta_j, 1). A datum is a group.
SPREAD, REPLICATES = 3.0, 4


def groups_data(num_groups=8, tau=1.5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    theta = 1.0 + tau * torch.randn(num_groups, generator=generator, dtype=dtype)
    return theta + torch.randn(REPLICATES, num_groups, generator=generator, dtype=dtype)


def known_spread(y):
    """(replicates, groups); tau = 1.5."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), SPREAD))
    with pyro.plate("groups", y.shape[1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 1.5))
        with pyro.plate("replicates", len(y), dim=-2):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def unknown_spread(y):
    """log tau ~ N(0, 1)."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), SPREAD))
    tau = pyro.sample("tau", dist.LogNormal(y.new_tensor(0.0), 1.0))
    with pyro.plate("groups", y.shape[1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("replicates", len(y), dim=-2):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def groups_guide(y):
    """theta given mu; by hand and not exact."""
    mu = pyro.sample("mu", dist.Normal(y.mean(), 0.7))
    with pyro.plate("groups", y.shape[1], dim=-1):
        pyro.sample("theta", dist.Normal(0.9 * y.mean(0) + 0.1 * mu, 0.6))


def groups_guide_with_tau(y):
    mu = pyro.sample("mu", dist.Normal(y.mean(), 0.9))
    pyro.sample("tau", dist.LogNormal(y.mean(0).std().log(), 0.4))
    with pyro.plate("groups", y.shape[1], dim=-1):
        pyro.sample("theta", dist.Normal(0.9 * y.mean(0) + 0.1 * mu, 0.6))


def groups_covariance(num_groups, tau, dtype=torch.float64):
    """Of y, group by group: REPLICATES numbers each. `tau` is a number, or (T, 1, 1) for T covariances."""
    same = torch.kron(torch.eye(num_groups, dtype=dtype), torch.ones(REPLICATES, REPLICATES, dtype=dtype))
    return SPREAD**2 + tau**2 * same + torch.eye(num_groups * REPLICATES, dtype=dtype)


def group_scores(y, log_tau=None):
    """log p(y_j | y_-j) of each group: tau = 1.5, or integrated over a grid of log tau ~ N(0, 1)."""
    number = y.shape[1]
    flat, groups = y.T.reshape(-1), torch.arange(number).repeat_interleave(REPLICATES)
    if log_tau is None:
        return gaussian_scores(groups_covariance(number, 1.5), flat, groups)
    covariance = groups_covariance(number, log_tau.exp().reshape(-1, 1, 1))
    log_all = MultivariateNormal(flat.new_zeros(len(flat)), covariance).log_prob(flat)
    whole = (Normal(0.0, 1.0).log_prob(log_tau) + log_all).unsqueeze(-1)
    return whole.logsumexp(0) - (whole - gaussian_scores(covariance, flat, groups)).logsumexp(0)
