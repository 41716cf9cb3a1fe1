"""The search for further parts, and the choice by measured ESS, on densities written down as arithmetic."""

import math

import pytest
import torch
from pair_helpers import F64

from pyro_vae.proposals import GaussianProposal, MixtureProposal
from pyro_vae.proposals.gaussian import FitPoints
from pyro_vae.proposals.search import Pool, best_start, choose, outside_start, weights_of


def gaussian(loc, scale, num_data=3, dim=1):
    eye = torch.eye(dim, dtype=F64).expand(num_data, dim, dim)
    return GaussianProposal(torch.full((num_data, dim), loc, dtype=F64), scale * eye)


def pool_of(log_joint, *sources, size=400):
    """Points of all sources, under a prior N(0, 10^2) per dimension that none was drawn from."""
    pool = None
    for source in sources:
        u = source.coloured(torch.randn(*source.loc.shape, size, dtype=F64))
        points = FitPoints(u, log_joint(u), gaussian(0.0, 10.0, *source.loc.shape).log_prob(u), source)
        own = Pool(points.u, points.log_joint, points.log_prior, 0, ((points.source, len(points.u)),))
        pool = own if pool is None else pool.with_fit(points)
    return pool


def test_points_are_weighed_by_all_that_drew_them():
    """Mean weight = mass, for a normalised density that neither source covers alone."""
    torch.manual_seed(0)
    left, right = gaussian(0.0, 1.0), gaussian(6.0, 1.0)
    target = MixtureProposal(
        (gaussian(0.0, 0.6), gaussian(6.0, 0.6)), torch.full((3, 2), 0.5, dtype=F64), torch.zeros(3, dtype=bool)
    )
    pool = pool_of(target.log_prob, left, right, size=4000)
    weights = pool.log_weight().exp()
    error = weights.std(0) * math.sqrt(len(weights))
    assert bool((error < 0.02).all())
    assert bool(((weights.sum(0) - 1).abs() < 4 * error).all())


@pytest.mark.parametrize("student", [False, True])
def test_measured_second_moments_are_those_of_the_weights(student):
    """The pool's figure against the moment under draws of the proposal itself, within 5%."""
    torch.manual_seed(0)
    target, source = gaussian(0.3, 1.0), gaussian(0.0, 1.2)
    proposal = MixtureProposal.of(gaussian(0.0, 1.0), student=student)
    measured = pool_of(target.log_prob, source, size=200_000).log_second_moments([proposal])[0].exp()
    prior = gaussian(0.0, 10.0)
    u = torch.cat([proposal.draw(196_000), prior.coloured(torch.randn(3, 1, 4000, dtype=F64))])
    weights = (target.log_prob(u) - proposal.log_prob_with_prior(u, prior.log_prob(u), 0.02)).exp()
    assert torch.allclose(measured, weights.square().mean(0), rtol=0.05)


def test_the_choice_takes_a_second_part_where_it_helps():
    """The first datum has one mode, the others two."""
    torch.manual_seed(0)
    left, right = gaussian(0.0, 1.0), gaussian(8.0, 1.0)
    masses = torch.tensor([[1.0, 1e-30], [0.5, 0.5], [0.9, 0.1]], dtype=F64)

    def log_joint(u):
        return torch.logsumexp(torch.stack([left.log_prob(u), right.log_prob(u)], -1) + masses.log(), -1)

    one = MixtureProposal.of(left)
    two = one.with_component(right, torch.full((3, 2), 0.5, dtype=F64))
    chosen = choose(pool_of(log_joint, left, right), [one, two])
    expected = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]], dtype=F64)
    assert torch.equal(chosen.mixture_weights, expected)


def test_the_choice_takes_t_tails_where_they_help():
    torch.manual_seed(0)
    part, wide = gaussian(0.0, 1.0), gaussian(0.0, 3.0)
    heavy = torch.distributions.StudentT(torch.tensor(2.0, dtype=F64))
    light = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), 1.35)
    chosen = [
        choose(pool_of(lambda u, d=d: d.log_prob(u[..., 0]), wide, size=4000), [MixtureProposal.of(part)])
        for d in (heavy, light)
    ]
    assert bool(chosen[0].student.all()) and bool(chosen[0].heavy.all())
    assert not bool(chosen[1].student.any()) and not bool(chosen[1].heavy.any())


def test_a_start_is_sought_in_the_uncovered_mode():
    """Points at both modes and in the tail of the covered one, which is the higher of the two."""
    covered = MixtureProposal.of(gaussian(0.0, 0.1))
    u = torch.tensor([0.0, 0.1, 0.5, -0.3, 5.2, 4.0], dtype=F64).reshape(-1, 1, 1).expand(6, 3, 1)
    log_joint = torch.logaddexp(gaussian(0.0, 0.1).log_prob(u), gaussian(5.0, 0.1).log_prob(u) - 2)
    assert torch.equal(best_start(covered, u, log_joint), torch.full((3, 1), 5.2, dtype=F64))
    log_joint[4, 1] = math.nan  # a broken point is no start
    assert best_start(covered, u, log_joint)[1, 0] == 4.0


def test_shares_follow_the_masses():
    masses = torch.tensor([[0.0, math.log(3)], [0.0, -9.0], [-math.inf, 0.0], [-math.inf, -math.inf], [0.0, math.nan]])
    expected = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert torch.allclose(weights_of(masses), expected)


def test_the_second_start_is_outside_of_the_first_part():
    """The tail at 3.9 rises higher above the part, made wider, but lies within 1 + 3 standard deviations."""
    covered = MixtureProposal.of(gaussian(0.0, 1.0))
    u = torch.tensor([0.0, 3.9, 8.0, 30.0], dtype=F64).reshape(-1, 1, 1).expand(4, 3, 1)
    log_joint = torch.tensor([0.0, 20.0, -50.0, -60.0], dtype=F64).reshape(-1, 1).repeat(1, 3)
    assert torch.equal(outside_start(covered, u, log_joint), torch.full((3, 1), 8.0, dtype=F64))
    log_joint[2:, 1] = torch.tensor([math.nan, -math.inf])  # nothing usable is outside: the best one inside
    assert outside_start(covered, u, log_joint)[1, 0] == 3.9
