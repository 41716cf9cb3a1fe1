"""A gradient that is not finite where log p is raises by name in fits, chains and proposals, and is never taken for zero."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, assert_near, quiet

import pyro_vae as pv
from pyro_vae.errors import NonFiniteError

X = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=F64)
MASK = torch.tensor([True, True, False, True])
PLAIN = {"leading": lambda z: z, "vmap": lambda z: z.reshape(X.shape), "loop": lambda z: z if z.sum().item() < 1e9 else z}


def where_outside(z):
    """log 0 behind torch.where: at the data that are hidden the value is 0, and its gradient 0 times infinity."""
    return torch.where(MASK, torch.log(torch.where(MASK, z.exp(), 0.0 * z)), torch.zeros_like(z))


def where_inside(z):
    return torch.where(MASK, torch.log(torch.where(MASK, z.exp(), 1.0 + 0.0 * z)), torch.zeros_like(z))


def norm_at_zero(z):
    """|0| as a norm of one number that is the same for every z."""
    return z + torch.sqrt(torch.where(MASK, z, 0.0 * z).square()) - torch.where(MASK, z, 0.0 * z).abs()


def norm_above_zero(z):
    return z + torch.sqrt(torch.where(MASK, z, 0.0 * z).square() + 1e-12) - torch.where(MASK, z, 0.0 * z).abs()


def nan_data(z):
    """Arithmetic with data that are NaN, left out by hand."""
    hidden = torch.where(MASK, X, torch.full_like(X, torch.nan))
    return torch.where(MASK, z * hidden, torch.zeros_like(z)) / torch.where(MASK, X, 1.0)


def number_data(z):
    hidden = torch.where(MASK, X, 0.0)
    return torch.where(MASK, z * hidden, torch.zeros_like(z)) / torch.where(MASK, X, 1.0)


BROKEN = {"log": where_outside, "norm": norm_at_zero, "nan": nan_data}
MENDED = {"log": where_inside, "norm": norm_above_zero, "nan": number_data}


def pair(f, execution="leading"):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(f(PLAIN[execution](z)), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))

    return model, guide


def curve(model, guide):
    estimator = pv.RateDistortion(model, guide, num_steps=40, num_chains=4, seed=0)
    return lambda x: estimator([x], args=lambda batch: (batch,), progress=False)


ESTIMATORS = {
    "adaptive": lambda *p: pv.AdaptiveImportanceSampling(*p, num_particles=400, seed=0),
    "annealed": lambda *p: pv.AnnealedImportanceSampling(*p, num_steps=20, num_chains=4, progress=False, seed=0),
    "from the guide": lambda *p: pv.AnnealedImportanceSampling(
        *p, num_steps=20, num_chains=4, start="guide", progress=False, seed=0
    ),
    "gaps": lambda *p: pv.InferenceGaps(*p, num_particles=200, seed=0),
    "importance gaps": lambda *p: pv.InferenceGaps(
        *p, num_particles=200, evidence=lambda *q, **o: pv.ImportanceSampling(*q, **o), seed=0
    ),
    "curve": curve,
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_gradient_that_is_not_finite_raises_where_log_p_is_finite(kind, estimator):
    with quiet(), pytest.raises(NonFiniteError, match=r"data \[2\] is finite, but its gradient.*torch\.where"):
        ESTIMATORS[estimator](*pair(BROKEN[kind]))(X)


@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_it_raises_in_every_execution(execution):
    with quiet(), pytest.raises(NonFiniteError, match=r"data \[2\] is finite, but its gradient"):
        ESTIMATORS["adaptive"](*pair(where_outside, execution))(X)


@pytest.mark.parametrize("kind", MENDED)
def test_the_remedy_gives_the_right_value(kind):
    """Hidden data have x ~ N(0, .5^2), the others log p(x) = N(0, 1 + .5^2), within 4.5 errors of at most .05."""
    f = MENDED[kind]
    hidden = dist.Normal(0.0, 0.5 if kind != "norm" else 1.25**0.5)
    truth = torch.where(MASK, dist.Normal(0.0, 1.25**0.5).log_prob(X), hidden.log_prob(X))
    with quiet():
        evidence = ESTIMATORS["adaptive"](*pair(f))(X)
        ESTIMATORS["annealed"](*pair(f))(X)
        ESTIMATORS["gaps"](*pair(f))(X)
    assert_near(evidence.log_evidence, truth, evidence.std_error + 1e-4, largest_error=0.05)


@pytest.mark.parametrize("kind", BROKEN)
def test_importance_sampling_needs_no_gradient(kind):
    evidence = pv.ImportanceSampling(*pair(BROKEN[kind]), num_particles=5000, seed=0)(X)
    hidden = dist.Normal(0.0, 0.5 if kind != "norm" else 1.25**0.5)
    truth = torch.where(MASK, dist.Normal(0.0, 1.25**0.5).log_prob(X), hidden.log_prob(X))
    assert_near(evidence.log_evidence, truth, evidence.std_error + 1e-6, largest_error=0.05)


def test_a_gradient_of_nothing_is_not_judged():
    """Outside of the support log p is minus infinity, and its gradient may be anything: weights of zero, as before."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            root = torch.where(z < 1.5, z, torch.full_like(z, torch.inf))  # log p = -inf beyond 1.5
            pyro.sample("x", dist.Normal(root, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.5))

    with quiet():
        evidence = pv.AdaptiveImportanceSampling(model, guide, num_particles=4000, seed=0)(X[[0, 1, 3]])
        pv.AnnealedImportanceSampling(model, guide, num_steps=50, num_chains=8, progress=False, seed=0)(X[[0, 1, 3]])
    grid = torch.linspace(-8, 1.5, 200_001, dtype=F64)[:, None]
    x = X[[0, 1, 3]]
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid, 0.5).log_prob(x)
    truth = torch.trapezoid(log_joint.exp(), dx=9.5 / 200_000, dim=0).log()
    assert_near(evidence.log_evidence, truth, evidence.std_error + 1e-4, largest_error=0.1)
