"""Counts in float32 and float64: against scipy, exact sums, torch where torch is right, and closed forms of gradients."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from nn_helpers import F64, FALSE_ALARM, SIGMAS
from scipy import special, stats

from pyro_vae.float64 import InFloat64
from pyro_vae.nn.count_distributions import (
    StableNegativeBinomial,
    StablePoisson,
    ZeroInflated,
)
from pyro_vae.nn.stirling import deviance, stirling_rest

THETAS = (1e-4, 1e-2, 0.7, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7)
MEANS = (1e-3, 1.0, 30.0, 1e3, 1e5, 1e6)


def genes(mean, theta, num_genes=2000, seed=0, dtype=torch.float32):
    """A datum of 2,000 counts of the model, their log-means and theta, all exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    log_mean = (mean * (0.1 + 2 * torch.rand(num_genes, generator=generator))).log()
    theta = torch.full((num_genes,), theta)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = StableNegativeBinomial(log_mean, theta).sample()
    return x.to(dtype), log_mean.to(dtype), theta.to(dtype)


# --- the requirement: float32 against float64 ---


@pytest.mark.parametrize("theta", THETAS)
def test_log_p_of_2000_genes_in_float32_is_within_a_hundredth_of_a_nat(theta):
    for mean, seed in itertools.product(MEANS, range(3)):
        x, log_mean, r = genes(mean, theta, seed=seed)
        rough = StableNegativeBinomial(log_mean, r).log_prob(x).sum()
        fine = StableNegativeBinomial(log_mean.to(F64), r.to(F64)).log_prob(x.to(F64)).sum()
        assert rough.dtype == torch.float32
        assert abs(float(rough) - float(fine)) < 0.01, (mean, seed)


def test_poisson_in_float32_is_within_a_hundredth_of_a_nat():
    for mean, seed in itertools.product(MEANS, range(3)):
        _, log_mean, _ = genes(mean, 1.0, seed=seed)
        torch.manual_seed(seed)
        x = StablePoisson(log_mean).sample()
        rough, fine = StablePoisson(log_mean).log_prob(x).sum(), StablePoisson(log_mean.to(F64)).log_prob(x.to(F64)).sum()
        assert abs(float(rough) - float(fine)) < 0.01, (mean, seed)


def test_torchs_are_not():
    """The reason for these classes. If a release of torch passes here, they can go."""
    x, log_mean, theta = genes(1.0, 1e6)
    fine = StableNegativeBinomial(log_mean.to(F64), theta.to(F64)).log_prob(x.to(F64)).sum()
    theirs = dist.NegativeBinomial(theta, logits=log_mean - theta.log()).log_prob(x).sum()
    assert abs(float(theirs) - float(fine)) > 100
    _, log_mean, _ = genes(1e6, 1.0)
    x = log_mean.exp().round()
    fine, theirs = StablePoisson(log_mean.to(F64)).log_prob(x.to(F64)).sum(), dist.Poisson(log_mean.exp()).log_prob(x).sum()
    assert abs(float(theirs) - float(fine)) > 1


def test_far_from_the_data_float32_is_right_to_a_few_roundings():
    for theta, mean, factor in itertools.product(THETAS, MEANS, (1e-6, 0.3, 3.0, 1e4)):
        x, log_mean, r = genes(mean, theta)
        off = (log_mean.exp() * factor).log()
        rough = StableNegativeBinomial(off, r).log_prob(x)
        fine = StableNegativeBinomial(off.to(F64), r.to(F64)).log_prob(x.to(F64))
        torch.testing.assert_close(rough.to(F64), fine, rtol=5e-5, atol=2e-5)


# --- float64 against others ---


@pytest.mark.parametrize("theta", THETAS)
def test_negative_binomial_is_scipys(theta):
    """In float64, to the rounding of scipy's log-gammas and of the probability that it takes."""
    for mean in MEANS:
        x, log_mean, r = genes(mean, theta, dtype=F64)
        x = torch.cat([x, torch.tensor([0.0, 1.0, 2.0, 15.0, 16.0, 1e6], dtype=F64)])
        log_mean, r = torch.cat([log_mean, log_mean[:6]]), torch.cat([r, r[:6]])
        expected = torch.from_numpy(stats.nbinom.logpmf(x.numpy(), r.numpy(), (r / (r + log_mean.exp())).numpy()))
        found = StableNegativeBinomial(log_mean, r).log_prob(x)
        rounding = 1e-15 * (x + r) * (x + r + 1).log() * (1 + theta / mean)
        assert bool(((found - expected).abs() <= 1e-9 + 1e-9 * expected.abs() + rounding).all()), mean


def test_negative_binomial_is_an_exact_sum_of_small_terms():
    """log Gamma(x + r) - log Gamma(r) - x log(r) = sum over j < x of log(1 + j / r), without cancellation for any r."""
    for theta, mean in itertools.product((0.1, 3.0, 1e3, 1e5, 1e7, 1e9), (1.0, 40.0, 3000.0)):
        x, log_mean, r = genes(mean, theta, num_genes=20, dtype=F64)
        rising = torch.stack([torch.log1p(torch.arange(int(n), dtype=F64) / r[0]).sum() for n in x])
        log_m = x * log_mean - (x + r) * torch.log1p(log_mean.exp() / r)
        expected = rising + log_m - torch.lgamma(x + 1)
        torch.testing.assert_close(StableNegativeBinomial(log_mean, r).log_prob(x), expected, rtol=1e-10, atol=1e-10)


def test_poisson_is_scipys_and_that_of_an_infinite_theta():
    for mean in MEANS:
        x, log_mean, _ = genes(mean, 5.0, dtype=F64)
        found = StablePoisson(log_mean).log_prob(x)
        torch.testing.assert_close(
            found, torch.from_numpy(stats.poisson.logpmf(x.numpy(), log_mean.exp().numpy())), rtol=1e-9, atol=1e-8
        )
        x = StablePoisson(log_mean).sample()
        limit = StableNegativeBinomial(log_mean, torch.tensor(1e16, dtype=F64)).log_prob(x)
        torch.testing.assert_close(limit, StablePoisson(log_mean).log_prob(x), rtol=1e-8, atol=1e-8)


def test_one_theta_per_gene_is_broadcast():
    log_mean, theta = torch.randn(4, 5, 3, dtype=F64), torch.tensor([0.5, 2.0, 1e5], dtype=F64)
    fn, x = StableNegativeBinomial(log_mean, theta), torch.randint(0, 9, (5, 3))
    theirs = dist.NegativeBinomial(theta, logits=log_mean - theta.log())
    torch.testing.assert_close(fn.log_prob(x), theirs.log_prob(x.to(F64)), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fn.expand((2, 4, 5, 3)).log_prob(x), fn.log_prob(x).expand(2, 4, 5, 3))
    torch.testing.assert_close(fn.mean, log_mean.exp())
    torch.testing.assert_close(fn.variance, theirs.variance)
    assert fn.sample((7,)).shape == (7, 4, 5, 3)
    assert fn.expand((2, 4, 5, 3)).sample().shape == (2, 4, 5, 3)


# --- their parts ---


def test_the_rest_of_stirlings_formula():
    x = torch.cat([torch.logspace(-6, 6, 500), torch.tensor([7.9999, 8.0, 8.0001])]).to(F64)
    expected = torch.from_numpy(special.gammaln(x.numpy() + 1)) - (x + 0.5) * x.log() + x - math.log(2 * math.pi) / 2
    rounding = 1e-15 * (1 + x * x.log().abs())  # of what is expected
    for dtype, share in ((F64, 0.0), (torch.float32, 2e-6)):
        found = stirling_rest(x.to(dtype)).to(F64)
        assert bool(((found - expected).abs() <= rounding + share * (1 + x.log().abs())).all())
    assert float(stirling_rest(torch.tensor(1e7, dtype=F64))) == pytest.approx(1 / 12e7, rel=1e-14)


def test_the_deviance_is_that_of_its_formula_and_small_near_the_mean():
    x = torch.logspace(-2, 6, 60, dtype=F64).unsqueeze(-1)
    m = x * torch.tensor([1e-9, 0.3, 0.81, 0.83, 1 - 1e-6, 1, 1 + 1e-9, 1.2, 1.23, 40, 1e9], dtype=F64)
    found = deviance(x, x - m, (x / m).log())
    torch.testing.assert_close(found, x * (x / m).log() - (x - m), rtol=1e-9, atol=1e-9)
    near = 0.18 * x  # (x - m) / (x + m) = 0.099, the last place of the series
    fine = deviance(x, near, -torch.log1p(-near / x))
    rough = deviance(x.float(), near.float(), torch.full_like(x, torch.nan).float())
    torch.testing.assert_close(rough.to(F64), fine, rtol=5e-7, atol=0)
    assert float(deviance(x, 1e-6 * x, torch.full_like(x, torch.nan)).div(x).max()) == pytest.approx(0.5e-12, rel=1e-5)


# --- gradients ---


@pytest.mark.parametrize("theta", THETAS)
def test_gradients_are_their_closed_forms_in_both_precisions(theta):
    """By log m: theta (x - m) / (theta + m). By theta: a sum over j < x of 1 / (theta + j), without log-gammas."""
    for mean in (1e-3, 1.0, 30.0, 1e3, 1e5):
        x, log_mean, r = genes(mean, theta, num_genes=30, dtype=F64)
        m = log_mean.exp()
        by_mean = r * (x - m) / (r + m)
        rising = torch.stack([(1 / (r[0] + torch.arange(int(n), dtype=F64))).sum() for n in x])
        by_theta = rising - torch.log1p(m / r) + (m - x) / (r + m)
        size = (x + m + (x - m).square()) / (r * (r + m))  # to leading order, for large theta
        for dtype, rtol, share in ((F64, 1e-9, 1e-8), (torch.float32, 2e-5, 1e-5)):
            parameters = [log_mean.to(dtype).requires_grad_(), r.to(dtype).requires_grad_()]
            log_prob = StableNegativeBinomial(*parameters).log_prob(x.to(dtype))
            slopes = [slope.to(F64) for slope in torch.autograd.grad(log_prob.sum(), parameters)]
            torch.testing.assert_close(slopes[0], by_mean, rtol=rtol, atol=rtol * (1 + mean) / 10)
            assert bool(((slopes[1] - by_theta).abs() <= rtol * by_theta.abs() + share * size).all()), (mean, dtype)


def test_gradients_of_poisson_and_second_derivatives():
    log_mean = torch.linspace(-30, 14, 100, dtype=F64, requires_grad=True)
    for x in (0.0, 1.0, 7.0, 1e3, 1e6):
        log_prob = StablePoisson(log_mean).log_prob(torch.full((100,), x, dtype=F64))
        (slope,) = torch.autograd.grad(log_prob.sum(), log_mean, create_graph=True)
        torch.testing.assert_close(slope, x - log_mean.exp(), rtol=1e-8, atol=1e-8 * (1 + x))
        (curvature,) = torch.autograd.grad(slope.sum(), log_mean)
        torch.testing.assert_close(curvature, -log_mean.exp(), rtol=1e-6, atol=1e-6 * (1 + x))
    theta = torch.tensor([0.3, 9.0, 4e3], dtype=F64, requires_grad=True)
    start = torch.tensor([0.1, 2.0, 5.0], dtype=F64, requires_grad=True)
    for x in (0.0, 1.0, 40.0):
        value = torch.full((3,), x, dtype=F64)
        assert torch.autograd.gradgradcheck(lambda m, r, x=value: StableNegativeBinomial(m, r).log_prob(x), (start, theta))


# --- other values, draws, more zeros ---


def test_integer_data_and_what_is_no_count():
    fn = StableNegativeBinomial(torch.tensor(2.0), torch.tensor(3.0), validate_args=False)
    x = torch.tensor([0, 3, 200])
    for dtype in (torch.uint8, torch.int32, torch.long):
        torch.testing.assert_close(fn.log_prob(x.to(dtype)), fn.log_prob(x.float()))
    for bad in (torch.tensor(torch.nan), torch.tensor(-1.0)):  # with checks off: no finite number for what has no density
        assert not fn.log_prob(bad).isfinite()
        assert not StablePoisson(torch.tensor(1.0), validate_args=False).log_prob(bad).isfinite()
    for make in (
        lambda v: StablePoisson(torch.tensor(1.0), validate_args=v),
        lambda v: ZeroInflated(fn, torch.zeros(()), v),
    ):
        with pytest.raises(ValueError, match="support"):
            make(True).log_prob(torch.tensor(0.5))


def test_draws_have_the_right_mean_and_variance():
    """20,000 draws of each: mean and mean square deviation within 4.5 of their errors, 30 numbers: false alarm 30 * 7e-6."""
    for theta, mean in itertools.product((0.7, 30.0, 1e7), (0.2, 50.0, 1e5)):
        counts = StableNegativeBinomial(torch.tensor(mean).log(), torch.tensor(theta))
        for fn in (counts, ZeroInflated(counts, torch.tensor(-0.5))):
            torch.manual_seed(3)
            draws = fn.sample((20_000,)).to(F64)
            squares = (draws - float(fn.mean)).square()
            for found, truth in ((draws, fn.mean), (squares, fn.variance)):
                error = float(found.std()) / 20_000**0.5
                assert error < 0.05 * float(truth), "blunt"
                assert abs(float(found.mean()) - float(truth)) < SIGMAS * error, (theta, mean, FALSE_ALARM)


def test_more_zeros():
    gate = torch.tensor([-40.0, -1.0, 0.0, 3.0, 200.0], dtype=F64)
    counts = StablePoisson(torch.full((5,), 0.3, dtype=F64))
    fn, p = ZeroInflated(counts, gate), torch.sigmoid(gate)
    torch.testing.assert_close(fn.log_prob(torch.zeros(5, dtype=F64)), (p + (1 - p) * counts.log_prob_of_zero.exp()).log())
    x = torch.full((5,), 2.0, dtype=F64)
    torch.testing.assert_close(fn.log_prob(x)[:4], ((1 - p) * counts.log_prob(x).exp()).log()[:4])
    assert float(fn.log_prob(x)[4]) == pytest.approx(-200 + float(counts.log_prob(x)[4]))
    before = fn.log_prob(x)
    assert fn.mean.shape == fn.variance.shape == (5,)
    torch.testing.assert_close(fn.log_prob(x), before)  # Pyro's (1.9.2) changes here


def test_they_run_in_float64_without_a_change():
    x, log_mean, theta = genes(100.0, 1e5)
    fine = StableNegativeBinomial(log_mean.to(F64), theta.to(F64)).log_prob(x.to(F64))
    with InFloat64() as mode:
        found = StableNegativeBinomial(log_mean, theta).log_prob(x)
    assert found.dtype == F64
    assert not mode.lowered
    torch.testing.assert_close(found, fine, rtol=0, atol=0)
    assert log_mean.dtype == torch.float32


def test_under_vmap():
    log_mean, theta = torch.randn(4, 6), torch.rand(6) * 1e5
    x = torch.randint(0, 5, (6,)).float()
    expected = StableNegativeBinomial(log_mean, theta).log_prob(x)
    found = torch.vmap(lambda m: StableNegativeBinomial(m, theta, validate_args=False).log_prob(x))(log_mean)
    torch.testing.assert_close(found, expected)
