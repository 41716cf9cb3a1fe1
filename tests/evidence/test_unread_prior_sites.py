"""The missing half that `obs_mask` draws from the prior is no part of log p(x) where nothing reads it."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import LocalFitError, StructureError

F64 = torch.float64
X = torch.randn(5, dtype=F64, generator=torch.Generator().manual_seed(0))
KEPT = torch.tensor([True, True, False, True, True])


def with_holes(x, read=False):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        whole = pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=KEPT)
        if read:
            pyro.sample("y", dist.Normal(whole, 1.0), obs=x + 1)


def guide(x, read=False):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.4 * x * KEPT, 0.8))


TRUTH = torch.where(KEPT, dist.Normal(X.new_zeros(()), 2**0.5).log_prob(X), 0.0)


def test_exact_fitted_and_annealed_evidence():
    exact = pv.ExactEvidence(with_holes, guide, seed=0)(X)
    torch.testing.assert_close(exact.log_evidence, TRUTH, rtol=0, atol=1e-9)
    for found in (
        pv.AdaptiveImportanceSampling(with_holes, guide, num_particles=2000, seed=0)(X),
        pv.AnnealedImportanceSampling(with_holes, guide, num_steps=100, seed=0, progress=False)(X),
        pv.ImportanceSampling(with_holes, guide, num_particles=4000, seed=0)(X),
    ):
        assert ((found.log_evidence - TRUTH).abs() < 5 * found.std_error + 1e-3).all()
        assert bool((found.std_error < 0.05).all())
    assert "posterior side" not in found.unchecked
    assert pv.SelfCheck(with_holes, guide, num_steps=50, seed=0)(X.repeat(1)).passed


def test_one_that_is_read_is_refused_in_chains_and_sums():
    for estimator in (pv.ExactEvidence, pv.AnnealedImportanceSampling):
        with pytest.raises(LocalFitError, match="'x_unobserved' would be drawn from the prior"):
            estimator(with_holes, guide, seed=0)(X, True)


@pytest.mark.parametrize("seed", range(4))
def test_a_rare_site_that_is_read_is_seen_for_any_seed(seed):
    """Two draws of a rare class are alike: what reads it is known by provenance, not by luck."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            w = pyro.sample("w", dist.Bernoulli(x.new_full((len(x),), 0.01)))
            pyro.sample("x", dist.Normal(z + 8 * w, 1.0), obs=x)

    with pytest.raises(LocalFitError, match="'w' would be drawn from the prior"):
        pv.ExactEvidence(model, guide, prior_sites=["w"], seed=seed)(X)


@pytest.mark.parametrize("family", [dist.RelaxedOneHotCategorical, dist.RelaxedBernoulli])
def test_relaxed_distributions_in_gaps_and_their_straight_through_kind(family):
    """The temperature is part of the family. A kind that rounds its draws is refused; the message names the other."""
    weight = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    temperature = torch.tensor(2.0, dtype=F64)
    single = family is dist.RelaxedBernoulli

    def pair(family):
        def latent(logits):
            fn = family(temperature, logits=logits)
            return fn.to_event(1) if single else fn

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", latent(x.new_zeros(len(x), 3)))
                pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", latent(0.3 * x[:, :3]))

        return model, guide

    x = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(2))
    gaps = pv.InferenceGaps(*pair(family), num_particles=1000, seed=0)(x)
    assert (gaps.amortization > 0).all() and (gaps.optimal_elbo < gaps.log_evidence + 0.05).all()
    found = pv.ImportanceSampling(*pair(family), num_particles=20_000, seed=0)(x)
    error = 5 * (found.std_error**2 + gaps.std_errors["log_evidence"] ** 2).sqrt()
    assert ((found.log_evidence - gaps.log_evidence).abs() < error).all() and bool((error < 0.3).all())
    rounded = getattr(dist, f"{family.__name__}StraightThrough")
    with pytest.raises(StructureError, match=f"Evaluate with {family.__name__} on both sides"):
        pv.ImportanceSampling(*pair(rounded), num_particles=10)(x)
