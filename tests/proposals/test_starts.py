"""Draws of the prior that are moved uphill, and the points by which the search for modes is judged."""

import math

import pytest
import torch
from pair_helpers import F64

from pyro_vae.proposals import GaussianProposal, MixtureProposal, missed_modes
from pyro_vae.proposals.missed import Witnesses, exchanged, uphill, witnesses
from pyro_vae.proposals.starts import PRIOR_POWERS, climb, climbed_starts, spread

ZERO = torch.zeros(1, dtype=F64)
LIGHT = 0.05  # of p(x)
UPHILL = torch.ones(8, 2, dtype=F64)  # powers of the prior


class Density:
    """A latent space of `dim` latents whose log joint is arithmetic, and its prior too, if one is given."""

    index = None

    def __init__(self, log_joint, dim, chunk=3, log_prior=lambda u: torch.zeros_like(u[..., 0])):
        self.log_joint, self.dim, self.chunk, self.call = log_joint, dim, chunk, self
        self.log_prior = log_prior

    def log_joint_and_prior(self, u):
        return self.log_joint(u), self.log_prior(u)

    def chunks(self, size):
        return [(first, min(self.chunk, size - first)) for first in range(0, size, self.chunk)]


def gaussian(loc, scale=0.1):
    loc = torch.tensor(loc, dtype=F64)
    return GaussianProposal(loc, scale * torch.eye(loc.shape[-1], dtype=F64).expand(len(loc), -1, -1))


def corners(u):
    """Four modes at (+-3, +-3) of width 0.1 in both latents, each of mass 1/4."""
    return (-0.5 * ((u.abs() - 3) / 0.1).square() - math.log(0.1 * math.sqrt(2 * math.pi)) - math.log(2)).sum(-1)


def test_the_highest_draw_comes_first_and_the_others_are_far_from_each_other():
    u = torch.tensor([0.0, 0.1, 5.0, -4.0, 4.9, 9.0, 2.4], dtype=F64).reshape(-1, 1, 1)
    log_joint = torch.tensor([1.0, 3.0, 0.0, 0.0, 2.0, math.nan, -math.inf], dtype=F64).unsqueeze(-1)
    assert spread(u, log_joint, torch.ones(1, 1, dtype=F64)).flatten()[:3].tolist() == [0.1, 5.0, -4.0]


def test_distances_are_in_standard_deviations():
    u = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 1.0]], dtype=F64).unsqueeze(1)
    log_joint = torch.tensor([1.0, 0.0, 0.0], dtype=F64).unsqueeze(-1)
    assert spread(u, log_joint, torch.tensor([[100.0, 1.0]], dtype=F64))[1].flatten().tolist() == [0.0, 1.0]


def test_a_climb_reaches_a_mode_ten_standard_deviations_away():
    """Whatever the scale of the log joint: for the signs of its gradient only."""
    for steepness in (1e-4, 1.0, 1e6):
        space = Density(lambda u, s=steepness: -s * (u - 10).square().sum(-1), 1)
        u, log_joint = climb(space, torch.zeros(2, 3, 1, dtype=F64), torch.ones(3, 1, dtype=F64), UPHILL)
        assert bool(((u - 10).abs() < 1.5).all())
        assert torch.equal(log_joint, space.log_joint(u))


def test_a_climb_returns_the_highest_point_that_it_saw():
    """It runs off a cliff, where nothing is a number, and stays there."""
    seen = []

    def log_joint(u):
        seen.append(u.detach())
        return torch.where(u < 2.2, u, math.nan).sum(-1)

    u, highest = climb(Density(log_joint, 1), torch.zeros(1, 1, 1, dtype=F64), torch.ones(1, 1, dtype=F64), UPHILL[:, :1])
    assert len(seen) == len(UPHILL)
    assert float(u) == float(highest) == max(float(s) for s in seen if float(s) < 2.2)


def test_half_of_the_starts_reach_a_mode_in_the_tail_of_a_heavy_prior():
    """A prior and a likelihood of 3 degrees: a mode near 0, and one near 20, where x is likely.

    No start is beyond 8, where the density falls towards the centre.
    """
    prior = torch.distributions.StudentT(torch.tensor(3.0, dtype=F64))

    def log_prior(u):
        return prior.log_prob(u).sum(-1)

    def log_joint(u):
        return log_prior(u) + torch.distributions.StudentT(prior.df, 20.0, 1.3).log_prob(u).sum(-1)

    torch.manual_seed(0)
    u = (torch.rand(70, 40, 1, dtype=F64) - 0.5) * 16
    for density, at_both in ((Density(log_joint, 1, log_prior=log_prior), 1.0), (Density(log_joint, 1), 0.0)):
        ends, highest = climbed_starts(density, u, log_joint(u))
        near, far = (ends.abs() < 1).any(0), ((ends - 20).abs() < 1).any(0)
        assert torch.equal(highest, log_joint(ends))
        assert float((near & far).double().mean()) == at_both


def test_powers_of_the_prior_end_with_the_posterior():
    assert PRIOR_POWERS[-2:] == (1.0, 1.0) and sorted(PRIOR_POWERS) == list(PRIOR_POWERS)


def test_starts_end_in_several_modes():
    torch.manual_seed(0)
    u = torch.randn(70, 20, 2, dtype=F64) * 2
    ends, _ = climbed_starts(Density(corners, 2), u, corners(u))
    assert ends.shape == (4, 20, 2)
    assert float(((ends.abs() - 3).abs() < 1).double().mean()) > 0.9
    assert float((ends[0].sign() != ends[1].sign()).any(-1).double().mean()) > 0.9


def test_an_exchange_takes_one_latent_from_elsewhere_and_the_others_follow():
    """Correlation 0.8: where the first latent goes from 0 to 10, the mean of the second goes to 8."""
    tril = torch.linalg.cholesky(torch.tensor([[[1.0, 0.8], [0.8, 1.0]]], dtype=F64))
    part = GaussianProposal(torch.zeros(1, 2, dtype=F64), tril)
    donors = torch.tensor([[[2.0, 1.0]], [[10.0, 2.9]], [[20.0, 0.0]]], dtype=F64)
    moved = exchanged(part, donors)
    assert torch.allclose(moved[0, 0], torch.tensor([10.0, 8.0], dtype=F64))  # from the first donor that is far
    assert torch.equal(moved[1, 0], torch.zeros(2, dtype=F64))  # no donor is


def found_from(parts, ends, proposal):
    u = torch.tensor(ends, dtype=F64).unsqueeze(1)
    return witnesses(Density(corners, 2), parts, u, corners(u), proposal, u[:0])


def test_a_mode_that_follows_by_exchange_is_missed():
    """The proposal holds three of the four corners and no start ended in the last one."""
    three = [gaussian([c]) for c in ([3.0, 3.0], [-3.0, 3.0], [3.0, -3.0])]
    shares, light = torch.full((1, 3), 1 / 3, dtype=F64), torch.zeros(1, dtype=torch.bool)
    held = torch.tensor([math.log(0.75)], dtype=F64)
    proposal = MixtureProposal(tuple(three), shares, light)
    found = found_from(three, [[3.0, 3.0], [3.0, -3.0]], proposal)
    assert bool(missed_modes(found, proposal, held, LIGHT, 500).all())
    # Two of four, of which one exchange leads to the others.
    two = [three[0], gaussian([[-3.0, -3.0]])]
    shares = torch.full((1, 2), 0.5, dtype=F64)
    proposal = MixtureProposal(tuple(two), shares, light)
    found = found_from(two, [[3.0, 3.0]], proposal)
    assert bool(missed_modes(found, proposal, torch.log(held.new_tensor([0.5])), LIGHT, 500).all())


def test_a_mode_that_only_a_draw_of_the_prior_points_to_is_missed():
    """Both starts ended on the one corner that the proposal holds; a donor is elsewhere in its second latent."""
    one = gaussian([[3.0, 3.0]])
    proposal = MixtureProposal.of(one)
    held = torch.tensor([math.log(0.25)], dtype=F64)
    ends = torch.tensor([[[3.0, 3.0]], [[3.1, 2.9]]], dtype=F64)
    for donors, missed in ((ends[:0], False), (torch.tensor([[[2.0, -2.5]]], dtype=F64), True)):
        found = witnesses(Density(corners, 2), [one], ends, corners(ends), proposal, donors)
        assert bool(missed_modes(found, proposal, held, LIGHT, 500).all()) == missed


@pytest.mark.parametrize(
    ("num_particles", "std_error", "missed"), [(100, 0.01, True), (10_000, 0.01, False), (100, 0.2, False)]
)
def test_a_mode_that_few_draws_reach_is_missed_unless_there_are_many(num_particles, std_error, missed):
    """Four nats too low, a proposal gives a mode of a third of p(x) 0.6 of 100 draws. A large error covers it."""
    part = gaussian([[3.0, 3.0]])
    proposal = MixtureProposal.of(part)
    u = torch.tensor([[[-3.0, 3.0]]], dtype=F64)
    log_joint = proposal.log_prob(u) + 4.0
    found = Witnesses(u, log_joint, torch.full((1, 1), math.log(0.33), dtype=F64))
    error = torch.full((1,), std_error, dtype=F64)
    assert bool(missed_modes(found, proposal, torch.zeros(1, dtype=F64), LIGHT + 3 * error, num_particles).any()) == missed


def test_nothing_is_missed_where_all_modes_are_held():
    four = [gaussian([c]) for c in ([3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0])]
    shares, light = torch.full((1, 4), 0.25, dtype=F64), torch.zeros(1, dtype=torch.bool)
    proposal = MixtureProposal(tuple(four), shares, light)
    found = found_from(four, [[3.0, 3.05], [-3.1, -3.0]], proposal)
    assert not bool(missed_modes(found, proposal, torch.zeros(1, dtype=F64), LIGHT, 500).any())


def test_a_mode_that_holds_next_to_nothing_is_not_missed():
    part = gaussian([[3.0, 3.0]])

    def log_joint(u):
        return corners(u) + math.log(4) + torch.where((u > 0).all(-1), 0.0, -6.0)

    ends = torch.tensor([[[-3.0, 3.0]]], dtype=F64)
    found = witnesses(Density(log_joint, 2), [part], ends, log_joint(ends), MixtureProposal.of(part), ends[:0])
    assert not bool(missed_modes(found, MixtureProposal.of(part), ZERO, LIGHT, 500).any())


def test_a_mode_whose_place_depends_on_the_other_latents_is_missed():
    """z1 in {-3, 3}, and z2 in {0, 6} + z1: an exchange of z1 alone lands three standard deviations beside the mode."""

    def log_joint(u):
        first = torch.logsumexp(torch.stack([-0.5 * (u[..., 0] - c) ** 2 for c in (-3.0, 3.0)], -1), -1)
        second = [-0.5 * ((u[..., 1] - u[..., 0] - c) / 0.5) ** 2 for c in (0.0, 6.0)]
        return first + torch.logsumexp(torch.stack(second, -1), -1) - math.log(4 * 2 * math.pi * 0.5)

    tril = torch.tensor([[[1.0, 0.0], [1.0, 0.5]]], dtype=F64)
    two = [GaussianProposal(torch.tensor([loc], dtype=F64), tril) for loc in ([-3.0, -3.0], [3.0, 9.0])]
    proposal = MixtureProposal(tuple(two), torch.full((1, 2), 0.5, dtype=F64), torch.zeros(1, dtype=torch.bool))
    u = torch.tensor([[[-3.0, -3.0]], [[3.0, 9.0]]], dtype=F64)
    found = witnesses(Density(log_joint, 2), two, u, log_joint(u), proposal, u[:0])
    held = torch.tensor([math.log(0.5)], dtype=F64)
    assert bool(missed_modes(found, proposal, held, LIGHT, 500).all())
    end, value = uphill(Density(log_joint, 2), torch.tensor([[[3.0, 1.5]]], dtype=F64), tril.unsqueeze(0))
    assert torch.allclose(end, torch.tensor([[[3.0, 3.0]]], dtype=F64), atol=1e-3)  # a Gaussian mode, in one step
    assert torch.allclose(value, log_joint(end))


def test_points_that_are_not_numbers_are_no_witnesses():
    part = gaussian([[3.0, 3.0]])
    ends = torch.tensor([[[math.nan, 3.0]], [[-3.0, 3.0]]], dtype=F64)
    found = witnesses(
        Density(lambda u: u.sum(-1) * math.nan, 2),
        [part],
        ends,
        ends[..., 0] * math.nan,
        MixtureProposal.of(part),
        ends[:0],
    )
    assert not bool(missed_modes(found, MixtureProposal.of(part), ZERO, LIGHT, 500).any())


def test_a_point_whose_gradient_overflows_stays():
    """The length of 1e30 per coordinate is no float32: a step of NaN would reach the model, which draws what is imputed."""

    def log_joint(u):
        return -1e30 * u.sum(-1)

    start = torch.tensor([[[3.0, 1.5]]])
    end, _ = uphill(Density(log_joint, 2), start, 1e10 * torch.eye(2).unsqueeze(0))
    assert torch.equal(end, start)
