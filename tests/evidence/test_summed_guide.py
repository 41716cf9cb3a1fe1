"""Latents that the guide draws given a class that it enumerates, as in semi-supervised VAEs: q(z|x) is a mixture."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, quiet
from pyro.infer import config_enumerate

import pyro_vae as pv
from pyro_vae.kernel import Pair
from pyro_vae.noise import Noise

MEANS = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], dtype=F64)
PRIOR, Q = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.3, 0.4, 0.3], dtype=F64)
X = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
SLOPE, SCALE = 0.7, 0.6


def model(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PRIOR))
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + MEANS[y], 0.5).to_event(1), obs=x)


@config_enumerate
def guide(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(Q.expand(len(x), 3)))
        pyro.sample("z", dist.Normal(SLOPE * (x - MEANS[y]), SCALE).to_event(1))


def truth():
    by_class = dist.Normal(MEANS[:, None], 1.25**0.5).log_prob(X).sum(-1)
    return (by_class + PRIOR.log()[:, None]).logsumexp(0)


def elbo():
    """Over the classes by their sum, over z by the moments of Gaussians."""
    mean, variance = SLOPE * (X - MEANS[:, None]), torch.tensor(SCALE**2, dtype=F64)
    log_prior = -0.5 * (math.log(2 * math.pi) + mean**2 + variance)
    log_likelihood = -0.5 * (math.log(2 * math.pi * 0.25) + ((X - mean - MEANS[:, None]) ** 2 + variance) / 0.25)
    entropy = 0.5 * ((2 * math.pi * variance).log() + 1)
    inner = (log_prior + log_likelihood + entropy).sum(-1)
    return (Q[:, None] * (inner + (PRIOR / Q).log()[:, None])).sum(0)


def assert_near(evidence, largest):
    assert evidence.std_error.max() < largest
    assert ((evidence.log_evidence - truth()).abs() < 5 * evidence.std_error + 1e-9).all()


def test_fitted_proposals_sum_the_class_out():
    with quiet():
        fitted = pv.AdaptiveImportanceSampling(model, guide, num_particles=2000, seed=0)(X)
    assert_near(fitted, 0.03)
    exact = pv.ExactEvidence(model, guide, seed=0)(X)
    torch.testing.assert_close(exact.log_evidence, truth(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["fitted", "guide", "prior"])
def test_chains_start_from_the_mixture_of_the_guide(start):
    with quiet():
        found = pv.AnnealedImportanceSampling(
            model, guide, num_steps=40, num_chains=200, start=start, seed=0, progress=False
        )(X)
    assert_near(found, 0.05)


def test_log_q_at_given_values_is_that_of_the_mixture():
    with torch.no_grad(), Pair(model, guide).open((X,), {}, 0) as call:
        call.set_noise(Noise.GUIDE, 0)
        drawn = call.draw_latents(5)
        values = call.latent_values(drawn)
        assert values.keys() == {"z"} and values["z"].shape == (5, 4, 2)
        found = call.log_guide(values, 5, None)
        by_class = dist.Normal(SLOPE * (X - MEANS[:, None, None]), SCALE).log_prob(values["z"]).sum(-1)
        torch.testing.assert_close(found, (by_class + Q.log()[:, None, None]).logsumexp(0))


def test_the_gaps_have_the_elbo_of_the_guide_with_its_class_summed():
    """E log q(y) counts in L[q], not log of the mixture, which would be a tighter bound."""
    with quiet():
        gaps = pv.InferenceGaps(model, guide, num_particles=1000, seed=0)(X)
    assert gaps.std_errors["elbo"].max() < 0.1
    assert ((gaps.elbo - elbo()).abs() < 5 * gaps.std_errors["elbo"]).all()
    assert ((gaps.log_evidence - truth()).abs() < 5 * gaps.std_errors["log_evidence"]).all()
    # z is freed for each datum, q(y|x) is not: the best z given each class is the posterior's
    best = (Q[:, None] * (dist.Normal(MEANS[:, None], 1.25**0.5).log_prob(X).sum(-1) + (PRIOR / Q).log()[:, None])).sum(0)
    assert (gaps.optimal_elbo < best + 5 * gaps.std_errors["optimal_elbo"]).all()
    assert (gaps.amortization > -5 * gaps.std_errors["amortization"]).all() and gaps.held == ("y",)
    assert "(z: " in gaps.family and gaps.larger_part() != "family"


def test_float32_and_a_labelled_row():
    """A class that is known for some data: the guide's distribution of it is a point."""
    known = torch.tensor([0, -1, 2, -1])
    labels = torch.nn.functional.one_hot(known.clamp(min=0), 3).float()

    def posterior(x):
        return dist.Categorical(torch.where(known[:, None] < 0, Q.float(), labels))

    def labelled(x):
        with pyro.plate("data", len(x)):
            probs = torch.where(
                known[:, None] < 0, PRIOR.float(), torch.nn.functional.one_hot(known.clamp(min=0), 3).float()
            )
            y = pyro.sample("y", dist.Categorical(probs))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + MEANS.float()[y], 0.5).to_event(1), obs=x)

    @config_enumerate
    def q(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", posterior(x))
            pyro.sample("z", dist.Normal(SLOPE * (x - MEANS.float()[y]), SCALE).to_event(1))

    by_class = dist.Normal(MEANS[:, None], 1.25**0.5).log_prob(X).sum(-1)
    right = torch.where(known < 0, truth(), by_class.gather(0, known.clamp(min=0)[None])[0])
    with quiet():
        found = pv.AdaptiveImportanceSampling(labelled, q, num_particles=2000, seed=0)(X.float())
    assert found.log_evidence.dtype == torch.float32
    assert ((found.log_evidence - right).abs() < 5 * found.std_error + 1e-4).all()
