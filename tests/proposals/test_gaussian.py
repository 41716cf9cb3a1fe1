"""The fitted proposal: its density, its Newton steps on targets with known answers, its weights."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, guide_of, linear_gaussian, model_of

from pyro_vae.kernel import Pair
from pyro_vae.proposals import (
    GaussianProposal,
    LatentSpace,
    MixtureProposal,
    fit_with_points,
    num_gradients_for,
    proposal_log_weights,
)
from pyro_vae.proposals.gaussian import newton_step
from pyro_vae.proposals.gradients import finite_rows


def random_proposal(num_data=4, dim=3):
    root = torch.randn(num_data, dim, dim, dtype=F64).tril(-1) + torch.diag_embed(0.5 + torch.rand(num_data, dim, dtype=F64))
    return GaussianProposal(torch.randn(num_data, dim, dtype=F64), root)


def test_density_is_the_multivariate_normals():
    proposal = random_proposal()
    u = torch.randn(7, 4, 3, dtype=F64)
    expected = dist.MultivariateNormal(proposal.loc, scale_tril=proposal.tril).log_prob(u)
    assert torch.allclose(proposal.log_prob(u), expected, atol=1e-10)


def test_whitening_and_colouring_are_inverse():
    proposal = random_proposal()
    noise = torch.randn(4, 3, 7, dtype=F64)
    assert torch.allclose(proposal.whitened(proposal.coloured(noise)), noise, atol=1e-10)


def test_gaussian_steps_move_towards_a_gaussian_target():
    """Gradients of N(m, S) from 200 points: one step reaches m, a few reach S up to the ridge."""
    torch.manual_seed(0)
    target = random_proposal()
    precision = torch.cholesky_inverse(target.tril)
    scale = torch.ones(4, 3, dtype=F64)
    proposal = GaussianProposal(torch.zeros(4, 3, dtype=F64), torch.diag_embed(scale))
    for _ in range(12):
        u = proposal.coloured(torch.randn(4, 3, 200, dtype=F64))
        gradient = -torch.einsum("bij,kbj->kbi", precision, u - target.loc)
        proposal = newton_step(proposal, u, gradient, torch.ones(200, dtype=F64), scale)
    assert torch.allclose(proposal.loc, target.loc, atol=0.02)
    fitted, exact = (p.tril @ p.tril.mT for p in (proposal, target))
    assert torch.allclose(fitted, exact, rtol=0.05, atol=0.05)
    assert bool((proposal.tril.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert torch.equal(proposal.tril, proposal.tril.tril())


def test_broken_gradients_are_ignored():
    """A datum whose gradients are all NaN stays where it is; the others do not notice."""
    torch.manual_seed(0)
    scale = torch.ones(2, 2, dtype=F64)
    proposal = GaussianProposal(torch.zeros(2, 2, dtype=F64), torch.diag_embed(scale))
    u = proposal.coloured(torch.randn(2, 2, 50, dtype=F64))
    gradient = -4 * (u - 1)
    weights = torch.ones(50, dtype=F64)
    alone = newton_step(proposal, u, gradient, weights, scale)
    gradient[:, 1] = math.nan
    both = newton_step(proposal, u, gradient, weights, scale)
    assert torch.allclose(both.loc[0], alone.loc[0], atol=1e-10)
    assert torch.allclose(both.tril[0], alone.tril[0], atol=1e-10)
    assert bool(both.loc.isfinite().all())
    assert bool(both.tril.isfinite().all())
    gradient[:10, 0] = math.inf
    some = newton_step(proposal, u, gradient, weights, scale)
    assert bool(some.loc.isfinite().all())
    assert (some.loc[0] - 1).abs().max() < 0.3


@pytest.mark.parametrize(
    ("num_particles", "dim", "expected"),
    [(500, 50, 175), (500, 2, 50), (10, 2, 26), (10_000, 50, 290), (500, 100, 320), (1, 1, 23)],
)
def test_default_number_of_gradients(num_particles, dim, expected):
    """max(20 + 3 D, min(0.35 K, 40 + 5 D)), as documented."""
    assert num_gradients_for(num_particles, dim) == expected


def fit(dim, start_loc, start_scale, num_gradients, num_data=20, num_particles=0):
    lm, x = linear_gaussian(dim, dim + 3, num_data=num_data)
    guide = guide_of(lambda x: dist.Normal(x.new_zeros(len(x), dim), 1.0).to_event(1))
    posterior = lm.posterior(x)
    with torch.no_grad(), Pair(model_of(lm), guide).open((x,), {}, 0) as call:
        call.set_noise(1, 0)
        drawn = call.draw(2)
        space = LatentSpace(call, drawn, call.score(call.latent_values(drawn), 2))
        loc = posterior.mean + start_loc * posterior.stddev
        proposal, _ = fit_with_points(space, loc, start_scale * posterior.stddev, num_gradients)
        weights = proposal_log_weights(space, MixtureProposal.of(proposal), num_particles) if num_particles else None
    target = dist.MultivariateNormal(posterior.mean, scale_tril=posterior.scale_tril)
    fitted = dist.MultivariateNormal(proposal.loc, scale_tril=proposal.tril)
    return torch.distributions.kl_divergence(fitted, target), weights, lm.log_evidence(x)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize(("start_loc", "start_scale"), [(0.0, 1.0), (2.0, 0.5), (-5.0, 0.1), (1.0, 4.0)])
def test_the_fit_finds_a_gaussian_posterior(dim, start_loc, start_scale):
    divergence, _, _ = fit(dim, start_loc, start_scale, num_gradients=40 + 5 * dim)
    assert divergence.median() < 0.1
    assert divergence.max() < 0.5


def test_the_fit_of_fifty_latents():
    divergence, _, _ = fit(50, 0.5, 0.7, num_gradients=290, num_data=5)
    assert divergence.max() < 2.0


@pytest.mark.parametrize("num_particles", [1, 2, 7, 50, 51, 333])
def test_there_are_as_many_weights_as_asked_for(num_particles):
    _, weights, truth = fit(2, 0.0, 1.0, num_gradients=20, num_particles=num_particles)
    assert weights.shape == (num_particles, len(truth))
    assert bool(weights.isfinite().all())


def test_weights_are_bounded_by_the_prior_share():
    """w = p(x, z) / mixture <= max likelihood / share of the prior, however bad the fit."""
    num_particles = 1000
    lm, x = linear_gaussian(2, 4)
    guide = guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
    with torch.no_grad(), Pair(model_of(lm), guide).open((x,), {}, 0) as call:
        call.set_noise(1, 0)
        drawn = call.draw(2)
        space = LatentSpace(call, drawn, call.score(call.latent_values(drawn), 2))
        shape = torch.eye(2, dtype=F64).expand(len(x), 2, 2)
        bad = GaussianProposal(torch.full((len(x), 2), 3.0, dtype=F64), 0.05 * shape)
        weights = proposal_log_weights(space, MixtureProposal.of(bad), num_particles)
    most = torch.distributions.Normal(lm.bias, lm.variance.sqrt()).log_prob(lm.bias).sum() - math.log(0.02)
    assert bool((weights <= most + 1e-9).all())
    # unbiased still: the prior's share alone carries the estimate (5 errors of the raw mean)
    ratio = (weights - lm.log_evidence(x)).exp()
    error = ratio[-20:].std(0) * 20 / num_particles / math.sqrt(20)
    assert bool(((ratio.mean(0) - 1).abs() < 5 * error + 0.5).all())


def test_one_datum_does_not_move_another():
    """The first of two data is fitted alike, wherever the second one lies."""
    lm, x = linear_gaussian(2, 4, num_data=2)
    far = x.clone()
    far[1] = 1e4

    def run(x):
        guide = guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
        with torch.no_grad(), Pair(model_of(lm), guide).open((x,), {}, 0) as call:
            call.set_noise(1, 0)
            drawn = call.draw(2)
            space = LatentSpace(call, drawn, call.score(call.latent_values(drawn), 2))
            start = torch.zeros(len(x), 2, dtype=F64)
            return fit_with_points(space, start, torch.ones_like(start), 50)[0]

    near, beside_far = run(x), run(far)
    assert torch.allclose(near.loc[0], beside_far.loc[0], atol=1e-9)
    assert torch.allclose(near.tril[0], beside_far.tril[0], atol=1e-9)


def test_a_fit_through_a_constrained_latent():
    """Gamma-Poisson in log space: the mode of log p(x, u) is at log((a + x) / (b + 1))."""
    x = torch.tensor([20.0, 50.0, 100.0], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 0.1))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(x.log(), 0.5))

    with torch.no_grad(), Pair(model, guide).open((x,), {}, 0) as call:
        call.set_noise(1, 0)
        drawn = call.draw(2)
        space = LatentSpace(call, drawn, call.score(call.latent_values(drawn), 2))
        proposal, _ = fit_with_points(space, x.log().unsqueeze(-1), torch.full((3, 1), 0.5, dtype=F64), 60)
    mode = ((2 + x) / 1.1).log()
    assert torch.allclose(proposal.loc[:, 0], mode, atol=0.05)
    assert torch.allclose(proposal.tril[:, 0, 0], (2 + x).rsqrt(), rtol=0.25)


def test_points_that_overflow_cost_their_own_datum_alone():
    """The eigenvalues of a matrix with an infinity do not converge, and would raise for the whole batch."""
    torch.manual_seed(0)
    proposal = random_proposal()
    scale, weights = torch.ones(4, 3, dtype=F64), torch.ones(50, dtype=F64)
    u = proposal.coloured(torch.randn(4, 3, 50, dtype=F64))
    expected = newton_step(proposal, u, -u, weights, scale)
    far = u.clone()
    far[0, 2] = torch.inf
    found = newton_step(proposal, far, -far, weights, scale)
    others = torch.tensor([0, 1, 3])
    assert torch.allclose(found.loc[others], expected.loc[others])
    assert torch.equal(found.loc[2], proposal.loc[2])
    assert torch.equal(found.tril[2], proposal.tril[2])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_finite_rows_are_those_whose_numbers_are_all_finite(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor(
        [[largest, largest], [0.0, 1e-30], [math.nan, 0.0], [1.0, math.inf], [-math.inf, math.inf]], dtype=dtype
    )
    assert finite_rows(x.requires_grad_()).tolist() == [True, True, False, False, False]
    assert finite_rows(torch.zeros(3, 0)).tolist() == [True] * 3
