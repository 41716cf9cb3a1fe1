"""Angles have no ends: exact, fitted and annealed estimates against sums over the circle."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
from pyro_vae.errors import LocalFitError, SiteMismatchError
from pyro_vae.proposals.circle import log_window, some_turn, wrapped

pytestmark = pytest.mark.filterwarnings("ignore::pyro_vae.errors.UnreliableEvidenceWarning")  # doubts are no errors here
F64 = torch.float64
STEP = 2 * math.pi / 4000
CIRCLE = (torch.arange(4000, dtype=F64) + 0.5) * STEP - math.pi
X = torch.tensor([0.9, -0.4, -1.3], dtype=F64)


def cosine_model(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("angle", dist.VonMises(x.new_zeros(len(x)), 0.5))
        pyro.sample("x", dist.Normal(a.cos(), 0.3), obs=x)


def cosine_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("angle", dist.VonMises(x.new_zeros(len(x)), 1.0))


def cosine_truth(x):
    log_joint = dist.VonMises(0.0, 0.5).log_prob(CIRCLE) + dist.Normal(CIRCLE.cos(), 0.3).log_prob(x[:, None])
    return log_joint.logsumexp(-1) + math.log(STEP)


def test_the_window_is_a_partition_and_turns_follow_it():
    u, centre = torch.tensor([0.3, 3.0, -2.9], dtype=F64), torch.tensor([0.0, 2.0, -3.1], dtype=F64)
    turns = 2 * math.pi * torch.arange(-6, 7, dtype=F64)
    weights = log_window(u.unsqueeze(-1) + turns, centre.unsqueeze(-1)).exp()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=F64))
    torch.manual_seed(0)
    drawn = some_turn(u.expand(4000, 3), centre)
    torch.testing.assert_close(wrapped(drawn), wrapped(u).expand(4000, 3), rtol=0, atol=1e-9)
    assert (drawn.mean(0) - (weights * (u.unsqueeze(-1) + turns)).sum(-1)).abs().max() < 5 * 3.5 / 4000**0.5


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_one_angle(dtype):
    x = X.to(dtype)
    truth = cosine_truth(X)
    exact = pv.ExactEvidence(cosine_model, cosine_guide, seed=0)(x).log_evidence
    assert (exact - truth).abs().max() < (1e-6 if dtype == F64 else 1e-4)
    found = pv.AdaptiveImportanceSampling(cosine_model, cosine_guide, num_particles=2000, seed=0)(x)
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error + 1e-3).all() and (found.std_error < 0.04).all()
    found = pv.AnnealedImportanceSampling(cosine_model, cosine_guide, num_chains=50, seed=0, progress=False)(x)
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error + 1e-3).all() and (found.std_error < 0.1).all()
    gaps = pv.InferenceGaps(cosine_model, cosine_guide, seed=0)(x)
    assert "reparameterised" in gaps.unsplit
    assert ((gaps.log_evidence - truth).abs() < 5 * gaps.std_errors["log_evidence"] + 1e-3).all()


def test_a_narrow_posterior_where_the_circle_closes():
    """Half of it lies just below pi and half just above minus pi."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.VonMises(x.new_zeros(len(x)), 0.1))
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.VonMises(a + 0.2 * z, 30.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.VonMises(x, 10.0))
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.1))

    x = torch.tensor([3.1, -3.12, 0.4], dtype=F64)
    z = torch.linspace(-8, 8, 401, dtype=F64)
    log_joint = (
        dist.VonMises(0.0, 0.1).log_prob(CIRCLE)[:, None]
        + dist.Normal(0.0, 1.0).log_prob(z)
        + dist.VonMises(CIRCLE[:, None] + 0.2 * z, 30.0).log_prob(x[:, None, None])
    )
    truth = log_joint.flatten(1).logsumexp(-1) + math.log(STEP * 0.04)
    found = pv.AdaptiveImportanceSampling(model, guide, num_particles=1000, seed=0)(x)
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error + 1e-3).all() and (found.std_error < 0.03).all()
    assert bool(found.reliable.all())
    torch.testing.assert_close(pv.ExactEvidence(model, guide, seed=0)(x).log_evidence, truth, rtol=0, atol=1e-5)


def test_masked_angles_in_an_event():
    """Two angles of which the first datum has one: the hidden one is no part of log p(x)."""
    kept = torch.tensor([[True, False], [True, True]])
    x = torch.tensor([[0.9, 0.0], [-0.4, 0.7]], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("angle", dist.VonMises(x.new_zeros(2), 0.5).expand([len(x), 2]).mask(kept).to_event(1))
            pyro.sample("x", dist.VonMises(a, 4.0).mask(kept).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("angle", dist.VonMises(x.new_zeros(2), 1.0).expand([len(x), 2]).mask(kept).to_event(1))

    log_joint = dist.VonMises(0.0, 0.5).log_prob(CIRCLE) + dist.VonMises(CIRCLE, 4.0).log_prob(x.unsqueeze(-1))
    truth = ((log_joint.logsumexp(-1) + math.log(STEP)) * kept).sum(-1)
    found = pv.AdaptiveImportanceSampling(model, guide, num_particles=3000, seed=0)(x)
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error + 1e-3).all() and (found.std_error < 0.03).all()
    torch.testing.assert_close(pv.ExactEvidence(model, guide, seed=0)(x).log_evidence, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("aim", [0.0, 1.5, math.pi])
def test_where_the_guide_points_does_not_matter(aim):
    """The turns of an angle are counted from the posterior, not from the guide. Mean of ten runs at 4.5 of its errors.

    The ten runs are ten copies of each datum in one call: chains of different data share no draw.
    """
    x = torch.tensor([0.4, -1.0], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.VonMises(x.new_zeros(len(x)), 3.0))
            pyro.sample("x", dist.VonMises(a, 2.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.VonMises(x.new_full((len(x),), aim), 8.0))

    log_joint = dist.VonMises(0.0, 3.0).log_prob(CIRCLE) + dist.VonMises(CIRCLE, 2.0).log_prob(x.unsqueeze(-1))
    truth = log_joint.logsumexp(-1) + math.log(STEP)
    exact = pv.ExactEvidence(model, guide, seed=0)(x).log_evidence
    torch.testing.assert_close(exact, truth, rtol=0, atol=1e-7)
    runs = pv.AnnealedImportanceSampling(model, guide, num_steps=100, num_chains=50, seed=0, progress=False)(x.repeat(10))
    off = runs.log_evidence.reshape(10, 2).mean(0) - truth
    error = runs.std_error.reshape(10, 2).mean(0) / 10**0.5
    assert (off.abs() < 4.5 * error + 5e-4).all() and (error < 2e-3).all()


def test_angles_in_wrappers():
    """A mixture of angles is one; a transformed angle has a space that nobody knows."""
    x = torch.tensor([0.4, -1.0], dtype=F64)
    parts = dist.VonMises(torch.tensor([-2.0, 1.0], dtype=F64), 4.0)
    prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6], dtype=F64)), parts)
    twice = dist.TransformedDistribution(
        dist.VonMises(torch.zeros((), dtype=F64), 3.0), [dist.transforms.AffineTransform(0.0, 2.0)]
    )

    def model_of(prior):
        def model(x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", prior)
                pyro.sample("x", dist.Normal(a.cos(), 0.5), obs=x)

        return model

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.VonMises(x.new_zeros(len(x)), 0.5))

    log_joint = prior.log_prob(CIRCLE) + dist.Normal(CIRCLE.cos(), 0.5).log_prob(x.unsqueeze(-1))
    truth = log_joint.logsumexp(-1) + math.log(STEP)
    torch.testing.assert_close(pv.ExactEvidence(model_of(prior), guide, seed=0)(x).log_evidence, truth, rtol=0, atol=1e-6)
    found = pv.AdaptiveImportanceSampling(model_of(prior), guide, num_particles=3000, seed=0)(x)
    assert ((found.log_evidence - truth).abs() < 5 * found.std_error + 1e-3)[found.reliable].all()
    with pytest.raises(LocalFitError, match="a transformed angle"):
        pv.AdaptiveImportanceSampling(model_of(twice), guide, seed=0)(x)


def test_a_guide_on_the_line_is_refused():
    def line(x):
        with pyro.plate("data", len(x)):
            pyro.sample("angle", dist.Normal(x.new_zeros(len(x)), 1.0))

    auto = AutoNormal(cosine_model)
    auto(X)
    for guide in (line, auto):
        with pytest.raises(SiteMismatchError, match="draw it from a VonMises"):
            pv.ImportanceSampling(cosine_model, guide, num_particles=10)(X)
