"""The pieces of the posterior-side check: resampling in one pass, the trajectory, points that ran away."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, guide_of, linear_gaussian, model_of, scaled_family

from pyro_vae.kernel import Pair
from pyro_vae.proposals import GaussianProposal, LatentSpace, MixtureProposal
from pyro_vae.proposals.defensive import NUM_PRIOR, defensive_draws
from pyro_vae.proposals.posterior_side import NUM_STEPS, trajectory
from pyro_vae.proposals.resampling import Resampled


def in_blocks(u, log_weight, num_chosen, size):
    particles = Resampled(u[:size], num_chosen)
    for start in range(0, len(u), size):
        particles.add(u[start : start + size], log_weight[start : start + size])
    return particles


@pytest.mark.parametrize("size", [7, 100, 250])
def test_moments_of_blocks_are_those_of_all_particles(size):
    """Against the sums over all particles, far from zero; enough of them that the proposal's covariance hardly counts."""
    torch.manual_seed(0)
    u = 100 + torch.randn(250, 3, 2, dtype=F64) @ torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=F64)
    log_weight = torch.randn(250, 3, dtype=F64) - 1000
    found = in_blocks(u, log_weight, 4, size).gaussian()
    w = log_weight.softmax(0)
    loc = (w.unsqueeze(-1) * u).sum(0)

    def covariance(share):
        centred = u - (share.unsqueeze(-1) * u).sum(0)
        return torch.einsum("kb,kbi,kbj->bij", share, centred, centred)

    ess = (1 / w.square().sum(0)).reshape(-1, 1, 1)
    expected = torch.lerp(covariance(torch.full_like(w, 1 / 250)), covariance(w), ess / (ess + 7))
    torch.testing.assert_close(found.loc, loc, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found.tril @ found.tril.mT, expected, rtol=1e-6, atol=1e-9)


def test_particles_are_chosen_in_proportion_to_their_weights():
    """Counts over 4,000 data against 12 w, within five errors each; a count varies at most as a Poisson one."""
    torch.manual_seed(1)
    log_weight = torch.randn(30, 1, dtype=F64).expand(30, 4000)
    u = torch.arange(30.0, dtype=F64).reshape(30, 1, 1).expand(30, 4000, 1)
    chosen = in_blocks(u, log_weight, 12, 8).chosen.squeeze(-1)
    counts = torch.stack([(chosen == i).sum(0).to(F64).mean() for i in range(30)])
    expected = 12 * log_weight[:, 0].softmax(0)
    error = (expected / 4000).sqrt()
    assert float(((counts - expected) / error).abs().max()) < 5


def test_particles_without_weight_and_without_a_place_are_left_out():
    torch.manual_seed(2)
    u = torch.randn(200, 2, 3, dtype=F64)
    u[3, 0, 1], u[150, 0] = math.inf, math.nan
    log_weight = torch.zeros(200, 2, dtype=F64)
    log_weight[:100, 1] = -math.inf
    u[:100, 1] = 50.0
    particles = in_blocks(u, log_weight, 5, 100)
    found = particles.gaussian()
    assert bool(particles.chosen.isfinite().all() & found.loc.isfinite().all() & found.tril.isfinite().all())
    assert float(particles.chosen[:, 1].max()) < 50
    torch.testing.assert_close(found.loc[1], u[100:, 1].mean(0))


def test_without_any_weight_nothing_is_not_a_number():
    particles = in_blocks(torch.randn(100, 2, 3), torch.full((100, 2), -math.inf), 5, 50)
    assert bool(particles.chosen.isfinite().all())


def space_of(model, guide, x):
    """Within an open call, the unconstrained space of a pair."""
    pair = Pair(model, guide)
    context = pair.open((x,), {}, 0)
    call = context.__enter__()
    call.set_noise(0, 5)
    drawn = call.draw(1)
    space = LatentSpace(call, drawn, call.score(call.latent_values(drawn), 1))
    return context, space


def test_a_trajectory_keeps_the_energy_and_spreads_over_the_posterior():
    """In the metric of a standard normal posterior, from the middle: sd sin(0.7 x 3) after a turn of 2.1, but for the
    leapfrog's own error; 2,000 draws have an error of 1.6%."""
    lm, x = linear_gaussian(num_data=500)
    lm = type(lm)(torch.zeros_like(lm.weight), lm.bias, lm.variance)
    context, space = space_of(model_of(lm), guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1)), x)
    u = torch.zeros(4, 500, 2, dtype=F64)
    eye = torch.eye(2, dtype=F64).expand(500, 2, 2)
    points, gradients = trajectory(space, u, GaussianProposal(u[0], eye))
    assert points.shape == gradients.shape == (4 * (1 + NUM_STEPS), 500, 2)
    torch.testing.assert_close(gradients, -points)
    # Leapfrog on a unit oscillator of step h turns by arccos(1 - h^2 / 2) and has position amplitude 1 / sqrt(1 - h^2 / 4).
    turn = math.acos(1 - 0.7**2 / 2)
    for step in range(1, 1 + NUM_STEPS):
        expected = abs(math.sin(step * turn)) / math.sqrt(1 - 0.7**2 / 4)
        assert float(points[4 * step : 4 * step + 4].std()) == pytest.approx(expected, rel=0.08)
    context.__exit__(None, None, None)


def test_points_that_run_away_count_as_their_start():
    """A metric a hundred times too wide throws every point off."""
    lm, x = linear_gaussian(num_data=3)
    context, space = space_of(model_of(lm), guide_of(scaled_family(lm, 1.0)), x)
    u = torch.zeros(4, 3, 2, dtype=F64)
    points, gradients = trajectory(space, u, GaussianProposal(u[0], 1000 * torch.eye(2, dtype=F64).expand(3, 2, 2)))
    assert torch.equal(points, torch.zeros_like(points))
    assert torch.equal(gradients[:4], gradients[-4:])
    context.__exit__(None, None, None)


def test_a_weight_that_is_not_a_number_counts_as_zero():
    x = torch.zeros(2, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.factor("cut", torch.where(z[..., 0] > 0, z[..., 0].new_tensor(math.log(2.0)), z[..., 0].log()))

    context, space = space_of(model, guide_of(lambda x: dist.LogNormal(torch.zeros(len(x), 1), 1.0).to_event(1)), x)
    proposal = MixtureProposal.of(GaussianProposal(torch.zeros(2, 1), torch.ones(2, 1, 1)), student=True)
    log_weight = defensive_draws(space, proposal, 200, 0)[1]
    assert bool((log_weight == -math.inf).any()) and not bool(log_weight.isnan().any())
    context.__exit__(None, None, None)


def test_draws_of_the_prior_are_weighed_with_those_of_the_proposal():
    """A proposal far from everything. The mean of p(x) / truth over 1,000 data lies within five errors of one, as the share
    of the prior bounds the weights. And the weights are those of the mixture, draw by draw."""
    lm, x = linear_gaussian(num_data=1000)
    context, space = space_of(model_of(lm), guide_of(scaled_family(lm, 1.0)), x)
    eye = torch.eye(2, dtype=F64).expand(1000, 2, 2)
    proposal = MixtureProposal.of(GaussianProposal(torch.full((1000, 2), 30.0, dtype=F64), eye))
    u, log_weight = defensive_draws(space, proposal, 100, 0)
    assert u.shape == (100 + NUM_PRIOR, 1000, 2) and log_weight.shape == u.shape[:2]
    share = NUM_PRIOR / len(u)
    log_joint, log_prior = space.log_joint_and_prior(u)
    mixture = ((1 - share) * proposal.log_prob(u).exp() + share * log_prior.exp()).log()
    torch.testing.assert_close(log_weight, log_joint - mixture)
    ratio = (log_weight - lm.log_evidence(x)).exp().mean(0)
    error = float(ratio.std()) / 1000**0.5
    assert error < 0.05 and abs(float(ratio.mean()) - 1) < 5 * error
    context.__exit__(None, None, None)
