"""Laplace, Student's t, Gamma and log-normal heads: against scipy, in float32 against float64, options, what they learn."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from nn_helpers import F64
from scipy import stats

import pyro_vae.nn as nn
from pyro_vae.errors import ArgumentError, OptionError
from pyro_vae.float64 import InFloat64
from pyro_vae.nn.heavy_tails import StableStudentT
from pyro_vae.nn.parameters import PositiveParameter, exp_link, log_link
from pyro_vae.nn.positive import StableGamma

X = torch.cat([torch.logspace(-8, 6, 200), torch.tensor([1.0])]).to(F64)


def by_scipy(logpdf):
    return torch.from_numpy(logpdf)


# --- densities of our own ---


def test_student_t_is_scipys():
    x = torch.cat([-X, torch.zeros(1, dtype=F64), X])
    for df, loc, scale in itertools.product((0.3, 1.0, 2.5, 30.0, 1e4), (0.0, -3.0), (0.01, 7.0)):
        found = StableStudentT(*(torch.tensor(number, dtype=F64) for number in (df, loc, scale))).log_prob(x)
        torch.testing.assert_close(found, by_scipy(stats.t.logpdf(x.numpy(), df, loc, scale)), rtol=1e-9, atol=1e-9)


def test_student_t_of_many_degrees_of_freedom_is_normal_in_both_precisions():
    """The difference of the log-densities is (d^4 - 2 d^2 - 1) / (4 df) to leading order, d = (x - loc) / scale."""
    x = torch.linspace(-5, 5, 101, dtype=F64)
    for df, (dtype, rounding) in itertools.product((1e3, 1e5, 1e7, 1e12), ((F64, 1e-12), (torch.float32, 4e-6))):
        fn = StableStudentT(*(torch.tensor(number, dtype=dtype) for number in (df, 0.5, 2.0)))
        d = (x - 0.5) / 2
        expected = -(d**2) / 2 - math.log(2 * math.sqrt(2 * math.pi)) + (d**4 - 2 * d**2 - 1) / (4 * df)
        assert float((fn.log_prob(x.to(dtype)).to(F64) - expected).abs().max()) < rounding + 100 / df**2
    theirs = dist.StudentT(torch.tensor(1e6), 0.5, 2.0).log_prob(torch.tensor(0.5))
    assert abs(float(theirs) - float(dist.Normal(0.5, 2.0).log_prob(torch.tensor(0.5)))) > 0.05  # the reason for ours


def test_moments_of_student_t_are_those_of_torch():
    df = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 9.0], dtype=F64)
    ours, theirs = StableStudentT(df, *torch.tensor([0.3, 2.0], dtype=F64)), dist.StudentT(df, 0.3, 2.0)
    torch.testing.assert_close(ours.mean, theirs.mean.to(F64), equal_nan=True)
    torch.testing.assert_close(ours.variance, theirs.variance, equal_nan=True)
    torch.manual_seed(0)
    assert ours.rsample((3,)).shape == (3, 6)


def test_gamma_is_scipys_and_right_in_float32():
    for a, mean in itertools.product((0.1, 0.9, 3.0, 50.0, 1e3), (1e-3, 1.0, 40.0)):
        fn = StableGamma(torch.tensor(a, dtype=F64), torch.tensor(a / mean, dtype=F64))
        expected = by_scipy(stats.gamma.logpdf(X.numpy(), a, scale=mean / a))
        torch.testing.assert_close(fn.log_prob(X), expected, rtol=1e-8, atol=1e-8)
    for a, mean in itertools.product((0.1, 3.0, 1e2, 1e4, 1e6, 1e8), (1e-3, 1.0, 1e5)):
        rough = StableGamma(torch.tensor(a), torch.tensor(a / mean))
        fine = StableGamma(rough.concentration.to(F64), rough.rate.to(F64))
        torch.manual_seed(0)
        x = rough.sample((2000,))
        error = (rough.log_prob(x).to(F64) - fine.log_prob(x.to(F64))).abs()
        assert float(error.max()) < 1e-6 * math.sqrt(a) + 3e-5, (a, mean)  # x itself is known to 6e-8 sqrt(a) of its spread
    theirs = dist.Gamma(torch.tensor(1e6), 1e6 / 3)  # the reason for ours
    x = theirs.sample((2000,))
    fine = StableGamma(theirs.concentration.to(F64), theirs.rate.to(F64)).log_prob(x.to(F64))
    assert abs(float((theirs.log_prob(x) - fine).mean())) > 0.1


def test_gradients_of_gamma_and_student_t():
    a, rate = torch.tensor([0.2, 5.0, 3e3], dtype=F64, requires_grad=True), torch.ones(3, dtype=F64, requires_grad=True)
    x = torch.tensor([1e-3, 5.1, 2.9e3], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *p: StableGamma(p[0], p[1]).log_prob(p[2]), (a, rate, x))
    assert torch.autograd.gradcheck(lambda *p: StableStudentT(*p).log_prob(torch.zeros(3, dtype=F64)), (a, x, rate))


def test_they_run_in_float64_without_a_change():
    a, x = torch.tensor([3.0, 1e6]), torch.tensor([0.5, 1.0])
    for make in (lambda t: StableGamma(t, t), lambda t: StableStudentT(t, torch.zeros(()).to(t), torch.ones(()).to(t))):
        with InFloat64() as mode:
            found = make(a).log_prob(x)
        assert found.dtype == F64
        assert not mode.lowered
        torch.testing.assert_close(found, make(a.to(F64)).log_prob(x.to(F64)), rtol=0, atol=0)


# --- heads ---


def test_parameters_come_from_the_raw_numbers_as_the_docstrings_say():
    raw = torch.tensor([0.3, -2.0], dtype=F64)
    scale = math.log2(1 + 2**-2.0) + 1e-4
    x = torch.tensor([1.7], dtype=F64)
    cases = {
        nn.Laplace(): stats.laplace.logpdf(1.7, 0.3, scale),
        nn.StudentT(df=5.0): stats.t.logpdf(1.7, 5, 0.3, scale),
        nn.StudentT(): stats.t.logpdf(1.7, 3, 0.3, scale),
        nn.LogNormal(): stats.lognorm.logpdf(1.7, scale, scale=math.exp(0.3)),
        nn.Gamma(): stats.gamma.logpdf(1.7, scale + 0.1 - 1e-4, scale=(math.exp(0.3) + 1e-4) / (scale + 0.1 - 1e-4)),
    }
    for head, expected in cases.items():
        assert float(head.double()(raw).log_prob(x).detach()) == pytest.approx(expected), head
    one = raw[:1]
    cases = {
        nn.Laplace(0.7): stats.laplace.logpdf(1.7, 0.3, 0.7),
        nn.Laplace("learned"): stats.laplace.logpdf(1.7, 0.3, 1.0),
        nn.StudentT(5, 0.7): stats.t.logpdf(1.7, 5, 0.3, 0.7),
        nn.LogNormal(0.7): stats.lognorm.logpdf(1.7, 0.7, scale=math.exp(0.3)),
        nn.Gamma(4): stats.gamma.logpdf(1.7, 4, scale=(math.exp(0.3) + 1e-4) / 4),
    }
    for head, expected in cases.items():
        assert head.num_outputs(7) == 7
        assert float(head.double()(one).log_prob(x).detach()) == pytest.approx(expected), head


def test_what_is_learned_is_a_parameter_that_gets_a_gradient():
    heads = [nn.Laplace("learned"), nn.StudentT("learned", "learned"), nn.Gamma("learned"), nn.LogNormal("learned")]
    names = [["scale.log_value"], ["df.log_value", "scale.log_value"], ["concentration.log_value"], ["scale.log_value"]]
    for head, expected in zip(heads, names, strict=True):
        assert [name for name, _ in head.named_parameters()] == expected
        head(torch.zeros(4, 3)).log_prob(torch.full((4, 3), 2.0)).sum().backward()
        assert all(p.grad is not None and p.grad != 0 for p in head.parameters())


def test_the_log_link_is_exp_and_then_a_straight_line():
    raw = torch.tensor([-200.0, -3.0, 0.0, 9.9, 10.0, 11.0, 1e4], dtype=F64, requires_grad=True)
    mean = log_link(raw).exp()
    top = math.exp(10)
    expected = torch.tensor([math.exp(-200), math.exp(-3), 1, math.exp(9.9), top, 2 * top, top * (1 + 1e4 - 10)], dtype=F64)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(mean.sum(), raw)
    torch.testing.assert_close(slope, expected.clamp(max=top), rtol=1e-12, atol=0)
    torch.testing.assert_close(exp_link(raw), expected + 1e-4)
    assert log_link(torch.tensor([-300.0])).tolist() == [-300]  # no mean underflows


def test_options_that_do_not_fit_are_named():
    for bad in (0, -1.0, math.nan, math.inf, "fixed", True, [1.0]):
        for make, name in (
            (nn.Laplace, "scale"),
            (nn.StudentT, "df"),
            (lambda v: nn.StudentT(4.0, v), "scale"),
            (nn.Gamma, "concentration"),
            (nn.LogNormal, "scale"),
            (nn.NegativeBinomial, "theta"),
            (nn.ZeroInflatedNegativeBinomial, "theta"),
        ):
            with pytest.raises(OptionError, match=rf"{name} must be None, a positive number or 'learned', got"):
                make(bad)
    with pytest.raises(OptionError, match="df must be a positive number or 'learned', got None"):
        nn.StudentT(None)
    with pytest.raises(OptionError, match='a shape is for a theta that is learned, but theta is None: pass theta="learned"'):
        nn.NegativeBinomial(theta_shape=(3,))
    with pytest.raises(OptionError, match="each number of theta_shape must be a whole number"):
        nn.NegativeBinomial("learned", theta_shape=(0,))


def test_a_learned_shape_must_fit_the_event():
    option = PositiveParameter("theta", "learned", shape=(3,))
    for event, fits in (((3,), True), ((2,), False), ((1,), False), ((5, 3), True), ((3, 1), False)):
        like = torch.zeros(7, *event)
        if fits:
            assert option((), like, len(event)).shape == (3,)
        else:
            with pytest.raises(ArgumentError, match=r"learned theta has shape \(3,\), which does not fit events"):
                option((), like, len(event))
    assert PositiveParameter("theta", "learned", shape=(2, 1, 1))((), torch.zeros(7, 2, 4, 4), 3).shape == (2, 1, 1)
    with pytest.raises(ArgumentError, match=r"shape \(2, 1, 1\)"):
        PositiveParameter("theta", "learned", shape=(2, 1, 1))((), torch.zeros(7, 2), 1)
