"""Numbers that were wrong in silence once, each against quadrature or a closed form."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, guide_of, linear_gaussian, make_evidence, model_of, quiet
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import SiteMismatchError
from pyro_vae.kernel import Pair

X = torch.tensor([0.7, 1.5, 3.0], dtype=F64)


def pair(prior, likelihood, guide):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", prior)), obs=x)

    def amortized(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", guide(x))

    return model, amortized


def quadrature(prior, log_likelihood, low, high):
    """Midpoint rule over (low, high), where the likelihood is handed z of shape (N, 1)."""
    edges = torch.linspace(low, high, 400_001, dtype=F64)
    z = ((edges[1:] + edges[:-1]) / 2).unsqueeze(-1)
    return (prior.log_prob(z) + log_likelihood(z)).logsumexp(0) + math.log((high - low) / 400_000)


def assert_covered(estimator, truth, largest_error=0.1):
    with quiet():
        evidence = estimator(X)
    low, high = evidence.confidence_interval(0.9999)
    assert bool(((low <= truth) & (truth <= high)).all()), (evidence.log_evidence, truth)
    assert float(evidence.std_error.max()) < largest_error


@pytest.mark.parametrize("estimator", [pv.ImportanceSampling, pv.AdaptiveImportanceSampling])
def test_a_shifted_exponential_has_no_density_below_its_shift(estimator):
    normal, exponential = dist.Normal(X.new_zeros(()), 1.0), dist.Exponential(X.new_ones(()))

    def shifted(z):
        return dist.TransformedDistribution(exponential, [dist.transforms.AffineTransform(z, 1.0)])

    programs = pair(normal, shifted, lambda x: dist.Normal(x.new_zeros(len(x)), 1.0))
    truth = quadrature(normal, lambda z: torch.where(z < X, z - X, -torch.inf), -12, 12)
    assert_covered(estimator(*programs, num_particles=2000, seed=0), truth)


@pytest.mark.parametrize("estimator", [pv.ImportanceSampling, pv.AdaptiveImportanceSampling])
def test_a_pareto_has_no_density_below_its_scale(estimator):
    prior = dist.LogNormal(X.new_zeros(()), 0.5)
    programs = pair(prior, lambda z: dist.Pareto(z, 2.0), lambda x: dist.LogNormal(x.new_zeros(len(x)), 0.5))
    truth = quadrature(prior, lambda z: torch.where(z < X, math.log(2) + 2 * z.log() - 3 * X.log(), -torch.inf), 0, 12)
    assert_covered(estimator(*programs, num_particles=2000, seed=0), truth)


def test_a_guide_that_draws_beyond_the_prior_gets_weights_of_zero_there():
    prior = dist.Exponential(X.new_ones(()))
    programs = pair(prior, lambda z: dist.Normal(z, 1.0), lambda x: dist.Normal(x - 0.3, 1.0))
    truth = quadrature(prior, lambda z: dist.Normal(z, 1.0).log_prob(X), 0, 30)
    assert_covered(pv.ImportanceSampling(*programs, num_particles=2000, seed=0), truth)


def test_a_guide_that_cannot_draw_what_the_prior_can_is_refused():
    prior = dist.Normal(X.new_zeros(()), 1.0)
    programs = pair(prior, lambda z: dist.Normal(z, 1.0), lambda x: dist.HalfNormal(torch.ones_like(x)))
    with pytest.raises(SiteMismatchError, match="'z'.*HalfNormal against Normal.*too low"):
        pv.ImportanceSampling(*programs, num_particles=10, seed=0)(X)


def test_angles_are_fitted_around_the_circle():
    prior = dist.VonMises(X.new_zeros(()), 0.3)
    programs = pair(prior, lambda z: dist.Normal(z.cos(), 1.0), lambda x: dist.VonMises(torch.zeros_like(x), 0.3))
    truth = quadrature(prior, lambda z: dist.Normal(z.cos(), 1.0).log_prob(X), -math.pi, math.pi)
    assert_covered(pv.AdaptiveImportanceSampling(*programs, num_particles=2000, seed=0), truth, largest_error=0.1)


def test_a_mixture_prior_is_fitted():
    mixture = dist.MixtureSameFamily(
        dist.Categorical(X.new_ones(2)), dist.Normal(torch.tensor([-2.0, 2.0], dtype=F64), X.new_tensor(0.5))
    )
    programs = pair(mixture, lambda z: dist.Normal(z, 1.0), lambda x: dist.Normal(x / 2, 1.0))
    truth = quadrature(mixture, lambda z: dist.Normal(z, 1.0).log_prob(X), -12, 12)
    assert_covered(pv.AdaptiveImportanceSampling(*programs, num_particles=2000, seed=0), truth, largest_error=0.5)


class Gated(nn.Module):
    """Agrees with a leading particle axis as long as the gate is closed."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            h = z @ self.weight
            pyro.sample("x", dist.Normal(h + 5 * self.gate * h.softmax(dim=1), 0.5).to_event(1), obs=x)


def test_what_was_checked_before_training_is_checked_again_after_it():
    model, guide = Gated(), guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
    x = torch.randn(5, 4)
    with quiet():
        old = pv.ImportanceSampling(model, guide, num_particles=100, seed=0)
        old(x)
        with torch.no_grad():
            model.gate.fill_(1.0)
        fresh = pv.ImportanceSampling(model, guide, num_particles=100, seed=0)
        assert torch.equal(old(x).log_evidence, fresh(x).log_evidence)


def test_one_datum_far_out_does_not_loosen_the_check_of_the_others():
    weight = torch.randn(3, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((3 * z @ weight).softmax(dim=1), 0.05).to_event(1), obs=x)

    x = torch.rand(6, 4)
    x[2] += 1e5
    guide = guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1))
    with Pair(model, guide).open((x,), {}, 0) as call:
        assert call.model.execution != "leading"


def test_weights_that_spread_are_not_called_exact_for_their_size():
    """float32 near -1e5: a thousand rounding errors are twelve nats."""
    log_weights = (-0.9 * torch.rand(500, 4).log()).float() - 1e5
    assert bool((pv.ops.pareto_smooth(log_weights)[1] > 0.3).all())


def test_few_weights_decide_no_verdict_for_the_encoder():
    lm, x = linear_gaussian(3, 6, num_data=20)
    few = functools.partial(pv.ImportanceSampling, num_particles=50, seed=1)
    family = guide_of(lambda x: dist.Normal(lm.posterior(x).loc + 1.0, 0.5).to_event(1))
    with quiet():
        gaps = pv.InferenceGaps(model_of(lm), family, evidence=few, num_particles=200, seed=0)(x)
    assert float(gaps.amortization.mean()) > float(gaps.approximation.mean()) + 1
    assert gaps.larger_part() == "undecided"
    assert gaps.verdict().startswith("Not decided: log p(x) of")  # with so few weights it is even below the ELBO of q*
    kept = gaps.select(~gaps.doubts["below the ELBO"])
    assert kept.verdict().startswith("Not decided: the tails of the weights were not judged, K < 100")


def test_the_interval_of_a_mean_over_few_particles_uses_students_t():
    low, high = make_evidence([1.0], std_error=0.1, num_particles=3).mean_confidence_interval(0.95)
    assert (high - low) / 2 == pytest.approx(4.3027 * 0.1, rel=1e-3)
