"""The judge of the random programs is judged itself: closed forms, sums written out, and draws."""

import math
from itertools import product

import pytest
import torch
from torch.distributions import MultivariateNormal, NegativeBinomial, Normal, kl_divergence

from .case import DATUM_STEP, ELEMENT_STEP, F64, GuideSite, make_case
from .description import TABLE, Latent, Node, Observed, Program
from .fit import with_guide
from .generator import program_of_seed
from .oracle import boxes_of, contract, evidence
from .oracle_elbo import elbo_terms

SIGMAS = 5.0  # two-sided tail 6e-7 per number


def case_of(latents, observed, **options):
    return make_case(Program(latents=tuple(latents), observed=tuple(observed), **options))


def guided(case, *sites):
    case.guide = sites
    return case


def guide_site(case, name, centre, width, read=None, slope=0.0, middle=0.0):
    def column(value):
        return torch.as_tensor(value, dtype=F64).expand(case.num_data).unsqueeze(1)

    return GuideSite(name, "real", read, column(centre), column(width), column(slope), column(middle))


def elbo(case):
    terms = elbo_terms(case)
    return terms.of([1.0] * len(terms.factors))[0]


def test_a_tree_of_four_gaussians():
    """z0 to z1 (an event of two) and z2; z2 to z3; each seen: a joint Gaussian whose covariance is written out."""
    latents = [
        Latent("z0", "normal", shift=0.5, spread=1.4, varies=True),
        Latent("z1", "normal", "z0", place="event", slope=-0.6, spread=0.6),
        Latent("z2", "normal", "z0", slope=1.5, spread=0.4),
        Latent("z3", "normal", "z2", slope=0.3, shift=-0.7),
    ]
    observed = [
        Observed("x1", "normal", "z1", place="event", spread=0.4),
        Observed("x3", "normal", "z3", slope=1.5, spread=0.6),
    ]
    case = case_of(latents, observed, num_data=3, outlier=6.0)
    # In the basis of the noises of z0, z1[0], z1[1], z2, z3, x1[0], x1[1], x3.
    spreads = torch.tensor([1.4, 0.6, 0.6, 0.4, 1.0, 0.4, 0.4, 0.6], dtype=F64)
    rows = torch.zeros(3, 8, dtype=F64)
    rows[0, [0, 1, 5]] = torch.tensor([-0.6, 1, 1], dtype=F64)
    rows[1, [0, 2, 6]] = torch.tensor([-0.6, 1, 1], dtype=F64)
    rows[2, [0, 3, 4, 7]] = torch.tensor([1.5 * 0.3 * 1.5, 0.3 * 1.5, 1.5, 1], dtype=F64)
    top = 0.5 + DATUM_STEP * case.covariate
    mean = torch.stack([-0.6 * top, -0.6 * top + 2 * ELEMENT_STEP, 1.5 * (-0.7 + 0.3 * 1.5 * top)], 1)
    loadings = rows * spreads
    x = torch.cat([case.x["x1"], case.x["x3"]], 1)
    right = MultivariateNormal(mean, loadings @ loadings.mT).log_prob(x)
    truth, _ = evidence(case)
    assert torch.allclose(truth.value, right, atol=1e-8, rtol=0) and bool((truth.error < 1e-8).all())


def test_a_chain_of_discrete_latents_is_a_sum():
    latents = [Latent("s", "bernoulli", shift=-3.5), Latent("t", "categorical", "s", slope=1.5)]
    case = case_of(latents, [Observed("x", "normal", "t", spread=0.6), Observed("y", "bernoulli", "s")], num_data=4)
    rare, table = torch.tensor(-3.5, dtype=F64).sigmoid(), torch.tensor(TABLE, dtype=F64)
    total = torch.zeros(4, dtype=F64)
    for s, t in product(range(2), range(3)):
        location = 1.5 * table[s]
        of_t = torch.stack([torch.zeros_like(location), location, -0.5 * location]).softmax(0)[t]
        of_y = torch.where(case.x["y"][:, 0] == 1, table[s].sigmoid(), 1 - table[s].sigmoid())
        of_x = (-0.5 * ((case.x["x"][:, 0] - table[t]) / 0.6) ** 2).exp() / (0.6 * math.sqrt(2 * math.pi))
        total += (rare if s else 1 - rare) * of_t * of_y * of_x
    truth, _ = evidence(case)
    assert torch.allclose(truth.value, total.log(), atol=1e-12, rtol=0)


def test_conjugate_pairs():
    """A Gamma seen by a Poisson is a negative binomial; a Beta seen by a Bernoulli has the mean of the Beta."""
    case = case_of([Latent("z", "gamma", shift=1.0, spread=0.6)], [Observed("x", "poisson", "z")], num_data=4)
    shape, rate = 0.6**-2, 0.6**-2 * math.exp(-1.0)
    right = NegativeBinomial(torch.tensor(shape, dtype=F64), probs=torch.tensor(1 / (1 + rate), dtype=F64))
    assert torch.allclose(evidence(case)[0].value, right.log_prob(case.x["x"][:, 0]), atol=1e-8, rtol=0)
    case = case_of([Latent("z", "beta", shift=0.5, spread=1.4)], [Observed("x", "bernoulli", "z")], num_data=4)
    mean = torch.tensor(0.5, dtype=F64).sigmoid()
    right = torch.where(case.x["x"][:, 0] == 1, mean, 1 - mean).log()
    assert torch.allclose(evidence(case)[0].value, right, atol=1e-7, rtol=0)


def test_what_is_hidden_counts_nothing_and_takes_along_what_reads_it():
    latents = [Latent("z", "normal"), Latent("w", "normal", "z", mask="both")]
    case = case_of(latents, [Observed("x", "normal", "z"), Observed("y", "normal", "w")], num_data=4, seed=2)
    kept = case.masks["w"][:, 0]
    assert torch.equal(case.masks["y"][:, 0], kept) and 0 < int(kept.sum()) < 4
    x, y = case.x["x"][:, 0], case.x["y"][:, 0]
    both = MultivariateNormal(torch.zeros(2, dtype=F64), torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=F64))
    right = torch.where(kept, both.log_prob(torch.stack([x, y], 1)), Normal(0 * x, 2**0.5).log_prob(x))
    assert torch.allclose(evidence(case)[0].value, right, atol=1e-8, rtol=0)


def test_an_elbo_in_closed_form():
    case = case_of([Latent("z", "normal", spread=1.4)], [Observed("x", "normal", "z", slope=1.5, spread=0.6)])
    case = guided(case, guide_site(case, "z", 0.4, 0.8))
    x = case.x["x"][:, 0]
    fit = Normal(1.5 * 0.4, 0.6).log_prob(x) - (1.5 * 0.8 / 0.6) ** 2 / 2
    right = fit - kl_divergence(Normal(torch.tensor(0.4), 0.8), Normal(torch.tensor(0.0), 1.4))
    assert torch.allclose(elbo(case).value, right.double(), atol=1e-6, rtol=0)


def test_the_posterior_from_the_bottom_up_has_no_gap():
    """Of two Gaussians, drawn in the reversed order: the KLs of the sites apart are no formulas, their sum is exact."""
    case = case_of([Latent("z", "normal"), Latent("w", "normal", "z")], [Observed("x", "normal", "w")])
    x = case.x["x"][:, 0]
    sites = (
        guide_site(case, "w", 2 * x / 3, (2 / 3) ** 0.5),
        guide_site(case, "z", 0.0, 0.5**0.5, read="w", slope=0.5),
    )
    case = guided(case, *sites)
    assert torch.allclose(elbo(case).value, Normal(0, 3**0.5).log_prob(x), atol=1e-8, rtol=0)
    assert torch.allclose(elbo(case).value, evidence(case)[0].value, atol=1e-8, rtol=0)


def test_a_site_that_the_model_enumerates_is_summed_inside_the_logarithm():
    latents = [Latent("z", "normal"), Latent("s", "bernoulli", "z", slope=0.0, shift=0.5, enumerated="model")]
    case = case_of(latents, [Observed("x", "normal", "s", spread=0.6), Observed("y", "normal", "z")])
    case = guided(case, guide_site(case, "z", 0.3, 0.7))
    x, y = case.x["x"][:, 0], case.x["y"][:, 0]
    p, table = torch.tensor(0.5, dtype=F64).sigmoid(), torch.tensor(TABLE, dtype=F64)
    mixture = (1 - p) * Normal(table[0], 0.6).log_prob(x).exp() + p * Normal(table[1], 0.6).log_prob(x).exp()
    q = Normal(torch.tensor(0.3, dtype=F64), 0.7)
    right = mixture.log() + Normal(0 * y + 0.3, 1.0).log_prob(y) - 0.7**2 / 2 - kl_divergence(q, Normal(0 * y, 1.0))
    assert torch.allclose(elbo(case).value, right, atol=1e-7, rtol=0)


@pytest.mark.parametrize("seed", range(24))
def test_grids_agree_with_draws_of_the_guide(seed):
    """Every E_q of a random program against 2,000 draws; about 10 numbers per program and datum."""
    case = make_case(program_of_seed(seed))
    truth, posterior = evidence(case)
    terms = elbo_terms(with_guide(case, posterior))
    known = terms.error < 1e-3
    errors = SIGMAS * terms.draws.std(-1) / terms.draws.shape[-1] ** 0.5
    # Heavy tails of single terms: a looser gate than for Gaussian means.
    off = ((terms.draws.mean(-1) - terms.mean).abs() > 1.5 * errors + 1e-3) & known
    assert not bool(off.any())
    bound = terms.mean.sum(0) - truth.value
    assert bool((bound < 1e-3 + truth.error + terms.error.sum(0)).all())  # an ELBO is a lower bound


def test_two_shifted_grids_know_when_they_are_too_coarse():
    case = case_of([Latent("z", "normal", spread=1.4)], [Observed("x", "normal", "z", spread=0.4)], num_data=1)
    boxes = boxes_of(case)
    right = evidence(case)[0].value
    coarse = [contract(case, boxes, 4, offset).log_evidence for offset in (0.5, 0.0)]
    error = (coarse[0] - coarse[1]).abs()
    assert float(error) > 1e-3 and float((coarse[0] - right).abs()) < 2 * float(error)
    assert Node("z", 0) in boxes


def test_mass_beyond_what_a_grid_can_hold_is_an_error():
    """Of a Beta with a concentration of .05 a fifth of the mass is nearer to one than exp(-30)."""
    case = case_of([Latent("z", "beta", shift=3.4, spread=1.4)], [Observed("x", "bernoulli", "z")], num_data=1)
    assert float(evidence(case)[0].error) > 0.01
