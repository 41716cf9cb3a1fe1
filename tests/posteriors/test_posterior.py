"""Draws from the posterior by resampling."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import (
    F64,
    assert_near,
    exact_pair,
    guide_of,
    linear_gaussian,
    model_of,
    one_line,
    posterior_moments,
    scaled_family,
)
from pyro.infer import Predictive

import pyro_vae as pv
from pyro_vae.posteriors.resampling import resampled


def test_draws_have_the_moments_of_the_posterior():
    """A guide that is shifted by one standard deviation and too narrow."""
    lm, x = linear_gaussian()
    loc, root = posterior_moments(lm)(x)
    sample = pv.posterior(
        model_of(lm), guide_of(scaled_family(lm, 0.5, 1.0)), x, num_samples=4000, num_particles=8000, means=True, seed=0
    )
    covariance, z = root @ root.T, sample.latents["z"]
    assert z.shape == (4000, 6, 2) and sample.means["x"].shape == (4000, 6, 4)
    error = (2 * covariance.diagonal() / 4000).sqrt().expand(6, 2)  # ESS is above half of K
    assert_near(z.mean(0).flatten(), loc.flatten(), error.flatten(), 0.02)
    centred = z - z.mean(0)
    assert torch.allclose(torch.einsum("sbi,sbj->bij", centred, centred) / 4000, covariance.expand(6, 2, 2), atol=0.02)
    assert torch.allclose(sample.means["x"], z @ lm.weight.T + lm.bias)
    assert int(sample.num_distinct.min()) > 3000 and bool(sample.reliable.all())
    # Not in the order of the draws: the first tenth is as good as any other.
    assert_near(z[:400].mean(0).flatten(), loc.flatten(), (error * math.sqrt(10)).flatten(), 0.06)
    correlation = torch.corrcoef(z[:, :, 0].T) - torch.eye(6, dtype=F64)
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(4000)


def test_resampling_is_systematic():
    """A draw of weight w comes S w times, rounded down or up."""
    lm, x = linear_gaussian(num_data=3)
    weights = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=F64) ** 4
    weights[7] = 0.0
    weights = weights / weights.sum(0)
    with pv.AdaptiveImportanceSampling(*exact_pair(lm), seed=0)._pair.open((x,), {}, 0) as call:
        index = resampled(call, weights, 40)
    for b in range(3):
        times = torch.bincount(index[:, b], minlength=50)
        assert bool((times >= (40 * weights[:, b]).floor()).all()) and bool((times <= (40 * weights[:, b]).ceil()).all())
        assert int(times[7]) == 0 and int(times.sum()) == 40


def test_few_effective_draws_repeat_and_this_is_said():
    lm, x = linear_gaussian()
    sample = pv.posterior(*exact_pair(lm), x, num_samples=300, num_particles=100, seed=0)
    assert int(sample.num_distinct.max()) <= 100
    distinct = [len(sample.latents["z"][:, b].unique(dim=0)) for b in range(6)]
    assert sample.num_distinct.tolist() == distinct
    assert "distinct draws" in one_line(sample) and "ESS of the weights" in one_line(sample)


def test_pyro_predicts_downstream_sites_at_the_draws():
    """The shapes are those of `Predictive(posterior_samples=)`, in sequence and in parallel."""
    lm, x = linear_gaussian()

    def downstream(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1e-6))

    sample = pv.posterior(*exact_pair(lm), x, num_samples=50, num_particles=200, seed=0)
    for parallel in (False, True):
        predicted = Predictive(downstream, posterior_samples=sample.latents, parallel=parallel)(x)["y"]
        assert predicted.shape == (50, 6)
        assert torch.allclose(predicted, sample.latents["z"].sum(-1), atol=1e-4)


def test_seeds_and_nothing_left_behind():
    lm, x = linear_gaussian()
    pair = model_of(lm), guide_of(scaled_family(lm, 0.8))
    state = torch.get_rng_state()
    first, again = (pv.posterior(*pair, x, num_particles=200, seed=3).latents["z"] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, pv.posterior(*pair, x, num_particles=200, seed=4).latents["z"])
    torch.manual_seed(0)
    unseeded = pv.posterior(*pair, x, num_particles=200).latents["z"]
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert torch.equal(pv.posterior(*pair, x, num_particles=200).latents["z"], unseeded)


def test_the_record_is_pickled_and_plain():
    lm, x = linear_gaussian()
    sample = pv.posterior(*exact_pair(lm), x[:1], num_samples=5, num_particles=100, seed=0)
    again = pickle.loads(pickle.dumps(sample))
    assert torch.equal(again.latents["z"], sample.latents["z"]) and len(sample) == 1 and sample.num_samples == 5
    plain = sample.to_dict()
    assert plain["latents"]["z"] == sample.latents["z"].tolist() and plain["reliable"] == [True]
    assert sample.means == {} and set(sample.doubts) == set(sample.evidence.doubts)


@pytest.mark.parametrize("option", ["num_samples", "num_particles"])
def test_numbers_of_draws_are_checked(option):
    lm, x = linear_gaussian()
    with pytest.raises(pv.errors.OptionError, match=f"{option} must be a whole number of at least 1"):
        pv.posterior(*exact_pair(lm), x, **{option: 0})
