"""Mixtures of Gaussians and of multivariate t: densities against torch's, draws against their moments and their shares."""

import math

import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, guide_of, linear_gaussian, model_of

from pyro_vae.kernel import Pair
from pyro_vae.proposals import GaussianProposal, LatentSpace, MixtureProposal, proposal_log_weights


def random_part(num_data=4, dim=3, dtype=F64):
    root = torch.randn(num_data, dim, dim, dtype=dtype).tril(-1)
    return GaussianProposal(
        torch.randn(num_data, dim, dtype=dtype), root + torch.diag_embed(torch.rand(num_data, dim) + 0.5).to(dtype)
    )


def reference(part, student):
    """torch.distributions' own, one datum at a time where it has to be."""
    dim = part.loc.shape[-1]
    if not student:
        return dist.MultivariateNormal(part.loc, scale_tril=part.tril * (1 + 0.35 / math.sqrt(dim)))
    return dist.MultivariateStudentT(5.0 + dim, part.loc, part.tril * (1 + 0.15 / math.sqrt(dim)))


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("student", [False, True])
def test_density_of_one_part(dim, student):
    part = random_part(dim=dim)
    u = 3 * torch.randn(7, 4, dim, dtype=F64)
    proposal = MixtureProposal.of(part, student=student)
    assert torch.allclose(proposal.log_prob(u), reference(part, student).log_prob(u), atol=1e-10)


@pytest.mark.parametrize("student", [False, True])
def test_density_of_a_mixture(student):
    parts = tuple(random_part() for _ in range(3))
    shares = torch.rand(4, 3, dtype=F64)
    shares = shares / shares.sum(-1, keepdim=True)
    u = 3 * torch.randn(7, 4, 3, dtype=F64)
    proposal = MixtureProposal(parts, shares, torch.full((4,), student))
    terms = torch.stack([reference(part, student).log_prob(u) for part in parts], -1)
    assert torch.allclose(proposal.log_prob(u), (terms + shares.log()).logsumexp(-1), atol=1e-10)


def test_density_of_a_t_in_one_dimension_is_torchs():
    part = random_part(dim=1)
    u = 3 * torch.randn(7, 4, 1, dtype=F64)
    expected = torch.distributions.StudentT(6.0, part.loc[:, 0], 1.15 * part.tril[:, 0, 0]).log_prob(u[..., 0])
    assert torch.allclose(MixtureProposal.of(part, student=True).log_prob(u), expected, atol=1e-10)


def test_a_part_without_a_share_does_not_count():
    part, other = random_part(), random_part()
    shares = torch.tensor([[1.0, 0.0]], dtype=F64).expand(4, 2)
    both = MixtureProposal((part, other), shares, torch.zeros(4, dtype=torch.bool))
    u = torch.randn(5, 4, 3, dtype=F64)
    assert torch.equal(both.log_prob(u), MixtureProposal.of(part).log_prob(u))
    torch.manual_seed(0)
    drawn = both.draw(50)
    torch.manual_seed(0)
    assert torch.equal(drawn, MixtureProposal.of(part).draw(50))


def test_tails_are_chosen_per_datum():
    part = random_part()
    student = torch.tensor([True, False, True, False])
    mixed = MixtureProposal(components=(part,), mixture_weights=torch.ones(4, 1, dtype=F64), student=student)
    u = torch.randn(5, 4, 3, dtype=F64)
    expected = torch.where(student, reference(part, True).log_prob(u), reference(part, False).log_prob(u))
    assert torch.allclose(mixed.log_prob(u), expected, atol=1e-10)


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("dim", [1, 2])
def test_draws_have_the_density(student, dim):
    """E_r[f / r] = 1 for a narrower normal f: 100,000 draws, 4 standard errors (6e-5 per datum)."""
    torch.manual_seed(1)
    parts = (random_part(2, dim), random_part(2, dim))
    shares = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=F64)
    proposal = MixtureProposal(parts, shares, torch.full((2,), student))
    for part in parts:
        u = proposal.draw(100_000)
        ratio = (GaussianProposal(part.loc, 0.8 * part.tril).log_prob(u) - proposal.log_prob(u)).exp()
        error = ratio.std(0) / math.sqrt(len(u))
        assert bool((error < 0.02).all())
        assert bool(((ratio.mean(0) - 1).abs() < 4 * error).all())


@pytest.mark.parametrize("num_particles", [1, 7, 100])
def test_systematic_shares(num_particles):
    """Each part gets its share of K up to one draw, and exactly so on average: 4,000 data, 4 standard errors."""
    torch.manual_seed(0)
    num_data = 4000
    eye = torch.ones(num_data, 1, 1, dtype=F64) * 1e-6
    parts = tuple(GaussianProposal(torch.full((num_data, 1), float(i), dtype=F64), eye) for i in range(3))
    shares = torch.tensor([[0.2, 0.5, 0.3]], dtype=F64).expand(num_data, 3)
    drawn = MixtureProposal(parts, shares, torch.zeros(num_data, dtype=torch.bool)).draw(num_particles)
    which = drawn[..., 0].round()
    for i in range(3):
        counts = (which == i).double().sum(0)
        expected = num_particles * shares[0, i]
        assert bool(((counts - expected).abs() < 1 + 1e-9).all())
        assert abs(float(counts.mean() - expected)) < 4 * 0.5 / math.sqrt(num_data)


def test_dtype_is_kept():
    part = random_part(dtype=torch.float32)
    shares = torch.full((4, 2), 0.5)
    proposal = MixtureProposal((part, part), shares, torch.tensor([True, False, True, False]))
    u = proposal.draw(9)
    assert u.dtype == proposal.log_prob(u).dtype == torch.float32
    assert u.shape == (9, 4, 3)


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("num_particles", [1, 2, 100])
def test_weights_of_any_mixture_are_unbiased(student, num_particles):
    """A poor mixture of three parts on 6,000 copies of a datum: E[w] = p(x), 4 standard errors (6e-5)."""
    lm, x = linear_gaussian(2, 4, num_data=1)
    x = x.expand(6000, -1)
    posterior = lm.posterior(x)
    with (
        torch.no_grad(),
        Pair(model_of(lm), guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))).open(
            (x,), {}, 0
        ) as call,
    ):
        call.set_noise(1, 0)
        drawn = call.draw(2)
        space = LatentSpace(call, drawn, call.score(call.latent_values(drawn), 2))
        root = posterior.scale_tril.expand(6000, 2, 2)
        parts = tuple(
            GaussianProposal(posterior.mean + shift, root * f) for shift, f in ((0.5, 1.0), (-0.7, 1.3), (0.0, 1.0))
        )
        shares = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64).expand(6000, 3)
        weights = proposal_log_weights(space, MixtureProposal(parts, shares, torch.full((6000,), student)), num_particles)
    ratio = (weights - lm.log_evidence(x)).exp().mean(0)
    error = float(ratio.std()) / math.sqrt(6000)
    assert weights.shape == (num_particles, 6000)
    assert error < 0.03
    assert abs(float(ratio.mean()) - 1) < 4 * error


def test_the_parts_as_they_were_fitted():
    """Without widening, and without tails where the posterior has none: what chains start from."""
    parts = tuple(random_part() for _ in range(2))
    shares = torch.tensor([[0.3, 0.7]], dtype=F64).expand(4, 2)
    student, heavy = torch.ones(4, dtype=torch.bool), torch.tensor([False, True, False, True])
    assert torch.equal(MixtureProposal(parts, shares, ~student, heavy).as_fitted().student, heavy)
    assert torch.equal(MixtureProposal(parts, shares, student, heavy).select(torch.tensor([1, 2])).heavy, heavy[1:3])
    bare = MixtureProposal(parts, shares, student).as_fitted()
    u = torch.randn(5, 4, 3, dtype=F64)
    terms = torch.stack([dist.MultivariateNormal(p.loc, scale_tril=p.tril).log_prob(u) for p in parts], -1)
    assert torch.allclose(bare.log_prob(u), (terms + shares.log()).logsumexp(-1), atol=1e-10)
    drawn = bare.draw(20_000)
    mean = 0.3 * parts[0].loc + 0.7 * parts[1].loc
    assert (drawn.mean(0) - mean).abs().max() < 4.5 * float(drawn.std(0).max()) / math.sqrt(20_000)
