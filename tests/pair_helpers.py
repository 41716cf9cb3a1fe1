"""What the tests of the estimators share: linear-Gaussian pairs, whose log p(x) is known, and quiet calls."""

import math
import warnings
from contextlib import contextmanager
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_vae.errors import ConvergenceWarning, UnreliableEvidenceWarning
from pyro_vae.evidence import Evidence
from pyro_vae.exact import LinearGaussian
from pyro_vae.gaps import Gaps

F64 = torch.float64
DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


def one_line(record):
    """What a record prints, without the places where its sentences are wrapped."""
    return " ".join(str(record).split())


# Two-sided tail beyond 4.5 standard errors; a test of N independent numbers fails N times as often.
SIGMAS, FALSE_ALARM = 4.5, 7e-6


def linear_gaussian(latent_dim=2, data_dim=4, num_data=6, variance=0.5, dtype=F64, seed=0):
    """A model with correlated posterior and data drawn from it."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    lm = LinearGaussian(randn(data_dim, latent_dim), randn(data_dim), torch.tensor(variance, dtype=dtype))
    x = randn(num_data, latent_dim) @ lm.weight.T + lm.bias + math.sqrt(variance) * randn(num_data, data_dim)
    return lm, x


def model_of(lm, plate=None):
    """z ~ N(0, I), x ~ N(W z + b, s^2 I); `plate` maps the data to the plate."""
    dim = lm.weight.shape[1]

    def model(x):
        with pyro.plate("data", len(x)) if plate is None else plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(1), obs=x)

    return model


def guide_of(family, plate=None):
    """z ~ family(x)."""

    def guide(x):
        with pyro.plate("data", len(x)) if plate is None else plate(x):
            pyro.sample("z", family(x))

    return guide


def posterior_moments(lm):
    """A function of x that returns mean (B, D) and Cholesky factor (D, D) of the posterior.

    Unlike `lm.posterior` it reads no value of a tensor, for which the kernel would loop over particles.
    """
    dim = lm.weight.shape[1]
    precision = torch.eye(dim, dtype=F64) + (lm.weight.T @ lm.weight / lm.variance).to(F64)
    covariance = torch.linalg.inv(precision)
    gain = (covariance @ (lm.weight.T / lm.variance).to(F64)).to(lm.weight.dtype)
    root = torch.linalg.cholesky(covariance).to(lm.weight.dtype)

    def moments(x):
        return (x - lm.bias) @ gain.T, root

    return moments


def exact_family(lm):
    return shifted_family(lm, lambda x: 0.0)


def scaled_family(lm, factor, shift=0.0):
    """Independent normals with the marginal standard deviations of the posterior times `factor`."""
    moments = posterior_moments(lm)
    stddev = moments(lm.bias)[1].square().sum(-1).sqrt()

    def family(x):
        return dist.Normal(moments(x)[0] + shift * stddev, factor * stddev).to_event(1)

    return family


def shifted_family(lm, shift):
    """The exact posterior, its mean moved by `shift(x)`, (B, D)."""
    moments = posterior_moments(lm)

    def family(x):
        loc, root = moments(x)
        return dist.MultivariateNormal(loc + shift(x), scale_tril=root)

    return family


def exact_pair(lm):
    return model_of(lm), guide_of(exact_family(lm))


def diagonal_family(lm, mean_shift=0.0, factor=1.0):
    """The best diagonal Gaussian, moved and stretched."""
    moments = posterior_moments(lm)
    scale = lm.optimal_diagonal(lm.bias).base_dist.scale

    def family(x):
        return dist.Normal(moments(x)[0] + mean_shift, factor * scale).to_event(1)

    return family


def assert_near(estimate, truth, std_error, largest_error, sigmas=SIGMAS):
    """Per element within `sigmas` standard errors, which are small enough to notice a wrong number."""
    assert estimate.shape == truth.shape == std_error.shape, (estimate.shape, truth.shape, std_error.shape)
    assert bool(estimate.isfinite().all()), estimate
    assert float(std_error.max()) <= largest_error, f"blunt: {float(std_error.max()):.4g} > {largest_error}"
    # A standard error of zero (an exact proposal) leaves rounding.
    z = (estimate - truth).abs() / (std_error + 1e-10)
    worst = int(z.argmax())
    found = f"{float(estimate[worst]):.5f} +- {float(std_error[worst]):.5f}, truth {float(truth[worst]):.5f}"
    assert float(z.max()) <= sigmas, f"off by {float(z.max()):.2f} standard errors: datum {worst} is {found}"


@contextmanager
def quiet():
    """Evidence and convergence warnings are expected here and are not what the test is about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEvidenceWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def make_evidence(log_evidence, std_error=0.1, num_particles=1000, **fields):
    """A record from plain numbers."""
    log_evidence = torch.as_tensor(log_evidence, dtype=F64)

    def full(value):
        return torch.as_tensor(value, dtype=F64).expand(log_evidence.shape).clone()

    defaults = {
        "std_error": full(std_error),
        "elbo": log_evidence - 1,
        "elbo_std_error": full(0.2),
        "ess": full(500.0),
        "pareto_k": full(0.0),
        "smoothed": log_evidence.clone(),
        "bound": "lower",
        "num_particles": num_particles,
        "cost": 1000,
    }
    return Evidence(log_evidence=log_evidence, **{**defaults, **fields})


def make_gaps(amortization, approximation, std_error=0.01, num_data=50, converged=None, **evidence_fields):
    """A record whose gaps are the same for all data."""
    elbo = torch.full((num_data,), -100.0, dtype=F64)
    optimal = elbo + amortization
    evidence = make_evidence(optimal + approximation, std_error, **evidence_fields)
    names = ("elbo", "optimal_elbo", "log_evidence", "amortization", "approximation", "inference", "contrast")
    return Gaps(
        elbo=elbo,
        optimal_elbo=optimal,
        log_evidence=evidence.log_evidence,
        std_errors={name: torch.full((num_data,), std_error, dtype=F64) for name in names},
        converged=torch.ones(num_data, dtype=torch.bool) if converged is None else converged,
        evidence=evidence,
        family="the guide's family, fitted to each datum (z: loc, scale)",
        num_particles=500,
        cost=4000,
    )
