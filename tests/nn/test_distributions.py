"""Distributions of our own, against closed forms and against torch where torch is right."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from nn_helpers import F64
from torch.nn import functional as F

from pyro_vae.nn.distributions import FastBinomial, LogisticLevels, StableContinuousBernoulli, log_sinh_ratio

# --- discretised logistic ---


def levels(loc, scale, num_levels, dtype=F64):
    """log P of every level, (n, ...), with a batch of parameters."""
    fn = LogisticLevels(torch.tensor(loc, dtype=dtype), torch.tensor(scale, dtype=dtype), num_levels)
    values = torch.arange(num_levels, dtype=dtype).reshape(-1, *[1] * len(fn.batch_shape))
    return fn.log_prob(values)


def test_levels_are_differences_of_logistic_functions():
    for loc, scale, n in itertools.product((-3.0, 0.0, 2.2, 4.5, 20.0), (0.3, 1.0, 7.0), (2, 3, 8)):
        edges = torch.sigmoid((torch.arange(n - 1, dtype=F64) + 0.5 - loc) / scale)
        expected = torch.cat([edges, torch.ones(1, dtype=F64)]) - torch.cat([torch.zeros(1, dtype=F64), edges])
        torch.testing.assert_close(levels(loc, scale, n).exp(), expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_levels_sum_to_one_for_any_scale(dtype):
    for loc, scale in itertools.product((-1e4, 0.0, 127.3, 1e4), (1 / 32, 1.0, 50.0, 1e5)):
        total = levels(loc, scale, 256, dtype).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-12 if dtype == F64 else 2e-5)


def test_tails_are_right_in_float32():
    """Far out log P = (x - loc -+ 1/2) / scale + log(1 - exp(-1 / scale)); its slope by loc is 1 / scale."""
    loc = torch.tensor(-5000.0, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    log_prob = LogisticLevels(loc, scale, 256).log_prob(torch.tensor(100.0))
    expected = -(100 + 5000 - 0.5) / 2 + math.log(1 - math.exp(-0.5))
    assert float(log_prob.detach()) == pytest.approx(expected, rel=1e-6)
    slopes = torch.autograd.grad(log_prob, (loc, scale))
    by_scale = (5100 - 0.5) / 4 - (0.25 * math.exp(-0.5)) / (1 - math.exp(-0.5))
    torch.testing.assert_close(slopes, (torch.tensor(0.5), torch.tensor(by_scale)))


def test_gradients_are_those_of_the_formula():
    loc = torch.tensor([0.3, 2.0, 6.9], dtype=F64, requires_grad=True)
    scale = torch.tensor([0.2, 1.5, 30.0], dtype=F64, requires_grad=True)
    for x in range(8):
        value = torch.full((3,), float(x), dtype=F64)
        assert torch.autograd.gradcheck(lambda m, s, x=value: LogisticLevels(m, s, 8).log_prob(x), (loc, scale))


def test_integer_data_give_the_same_density():
    fn = LogisticLevels(torch.tensor(100.0), torch.tensor(9.0), 256)
    x = torch.tensor([0, 7, 200, 255])
    torch.testing.assert_close(fn.log_prob(x.byte()), fn.log_prob(x.float()))
    torch.testing.assert_close(fn.log_prob(x), fn.log_prob(x.float()))


def test_moments_of_many_levels():
    fn = LogisticLevels(torch.tensor([-20.0, 100.0, 254.0], dtype=F64), torch.tensor([3.0, 0.1, 40.0], dtype=F64), 256)
    values = torch.arange(256, dtype=F64).unsqueeze(-1)
    weights = fn.log_prob(values).exp()
    mean = (weights * values).sum(0)
    torch.testing.assert_close(fn.mean, mean)
    torch.testing.assert_close(fn.variance, (weights * (values - mean) ** 2).sum(0))


def test_draws_are_levels_that_occur_as_often_as_they_should():
    """Counts of 8 levels in 20,000 draws, within 4.5 binomial errors: false alarm 8 * 7e-6."""
    loc, scale = torch.tensor(2.2), torch.tensor(1.3)
    fn = LogisticLevels(loc, scale, 8)
    draws = fn.sample((20_000,))
    p = fn.log_prob(torch.arange(8.0)).exp()
    found = torch.stack([(draws == level).float().mean() for level in range(8)])
    assert float(found.sum()) == pytest.approx(1)
    error = (p * (1 - p) / 20_000).sqrt()
    assert float(error.max()) < 0.004, "blunt"
    assert bool(((found - p).abs() < 4.5 * error).all())


# --- continuous Bernoulli ---


def test_continuous_bernoulli_is_torchs_where_torch_is_right():
    logits = torch.cat([torch.linspace(-12, -0.05, 40), torch.linspace(0.05, 12, 40)]).to(F64)
    theirs = torch.distributions.ContinuousBernoulli(logits=logits)
    ours = StableContinuousBernoulli(logits)
    for x in (0.0, 0.3, 1.0):
        torch.testing.assert_close(ours.log_prob(torch.full_like(logits, x)), theirs.log_prob(torch.full_like(logits, x)))
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)


def test_the_normaliser_and_its_gradient_are_right_everywhere():
    """The derivative of log(sinh(h) / h) is coth(h) - 1/h; in float64 as truth for both precisions."""
    h = torch.cat([torch.zeros(1), torch.logspace(-8, 2, 400)]).to(F64)
    h = torch.cat([-h.flip(0), h])
    value = torch.where(h.abs() < 1e-3, h**2 / 6, h.abs() + torch.log((1 - torch.exp(-2 * h.abs())) / (2 * h.abs())))
    slope = torch.where(h.abs() < 1e-3, h / 3, 1 / torch.tanh(h) - 1 / h)
    for dtype, rtol, atol in ((F64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-5)):
        x = h.to(dtype).requires_grad_()
        found = log_sinh_ratio(x)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        torch.testing.assert_close(found.detach().to(F64), value, rtol=rtol, atol=atol)
        torch.testing.assert_close(gradient.to(F64), slope, rtol=1e-5, atol=atol)


def test_draws_are_reparameterised():
    """The quantile function: F(x(u)) = u, and its derivative by the logits is -(dF/dl) / density."""
    for logit in (-60.0, -3.0, -1e-4, 0.0, 1e-4, 2.0, 60.0):
        logits = torch.full((2000,), logit, dtype=F64, requires_grad=True)
        torch.manual_seed(1)
        x = StableContinuousBernoulli(logits).rsample()
        assert bool(((x >= 0) & (x <= 1)).all())
        torch.manual_seed(1)
        u = torch.rand(2000, dtype=F64)
        u = 1 - u if logit > 0 else u  # the upper half is mirrored
        cdf = x.detach() if abs(logit) < 1e-3 else torch.expm1(logit * x.detach()) / math.expm1(logit)
        torch.testing.assert_close(cdf, u, rtol=1e-3, atol=1e-4 if abs(logit) < 1e-3 else 1e-9)
        assert bool(torch.autograd.grad(x.sum(), logits)[0].isfinite().all())


# --- binomial ---


def test_binomial_is_pyros():
    logits = torch.randn(4, 5, 3, dtype=F64)
    x = torch.randint(0, 8, (5, 3))
    ours, theirs = FastBinomial(7, logits), dist.Binomial(7, logits=logits)
    expected = theirs.log_prob(x.to(F64))
    torch.testing.assert_close(ours.log_prob(x.to(F64)), expected)
    torch.testing.assert_close(ours.log_prob(x), expected)
    torch.testing.assert_close(ours.expand((2, 4, 5, 3)).log_prob(x), expected.expand(2, 4, 5, 3))
    torch.testing.assert_close(ours.mean, theirs.mean)
    one, first = FastBinomial(1, logits), x.clamp(max=1).to(F64).expand(4, 5, 3)
    torch.testing.assert_close(one.log_prob(first), -F.binary_cross_entropy_with_logits(logits, first, reduction="none"))
