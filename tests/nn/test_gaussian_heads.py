"""Gaussian heads as encoders: divergence to the prior, full covariance, where scales come from."""

import itertools

import pyro
import pytest
import torch
from nn_helpers import F64
from torch.distributions import kl_divergence

import pyro_vae.nn as nn
from pyro_vae.errors import ArgumentError


def test_the_divergence_to_the_prior_is_analytic():
    prior = nn.StandardNormal(3).double()
    loc, below = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    q = nn.Normal()(torch.cat([loc, below], -1))
    scale = q.base_dist.scale
    expected = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).sum(-1)
    torch.testing.assert_close(kl_divergence(q, prior()), expected)
    q = nn.Normal(0.5)(loc)
    torch.testing.assert_close(kl_divergence(q, prior()), (0.5 * (loc**2 + 0.25 - 1) - torch.tensor(0.5).log()).sum(-1))
    q = nn.MultivariateNormal()(torch.randn(5, 9, dtype=F64))
    standard = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64))
    torch.testing.assert_close(kl_divergence(q, prior()), kl_divergence(q, standard))
    other = torch.distributions.Normal(torch.randn(5, 3, dtype=F64), torch.rand(5, 3, dtype=F64) + 0.1)
    full = torch.distributions.MultivariateNormal(other.loc, torch.diag_embed(other.variance))
    diagonal = torch.distributions.Independent(other, 1)
    torch.testing.assert_close(kl_divergence(q, diagonal), kl_divergence(q, full))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, torch.distributions.Independent(torch.distributions.Laplace(other.loc, other.scale), 1))


def test_full_covariance():
    """Parameters in the documented order, density against torch's with the covariance written out."""
    head = nn.MultivariateNormal()
    raw = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0, -1.0, 0.5, -0.25, 0.75], dtype=F64)
    q = head(raw)
    diagonal = torch.log2(1 + 2 ** raw[3:6]) + 1e-4
    root = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [-0.25, 0.75, 0.0]], dtype=F64) + diagonal.diag()
    torch.testing.assert_close(q.scale_tril, root)
    expected = torch.distributions.MultivariateNormal(raw[:3], root @ root.T)
    z = torch.randn(6, 3, dtype=F64)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z))
    assert q.expand((4,)).log_prob(z[:4]).shape == (4,)
    assert type(q.expand((4,))) is type(q)
    assert head.support.check(z).all()


def test_full_covariance_under_vmap_in_both_precisions_and_far_out():
    head = nn.MultivariateNormal()
    raw = torch.randn(4, 5, 9)
    z = head(raw).sample()
    assert z.dtype == torch.float32
    expected = head(raw).log_prob(z)
    with pyro.validation_enabled(False):
        torch.testing.assert_close(torch.vmap(lambda r, z: head(r).log_prob(z))(raw, z), expected)
    for signs in itertools.product((-50.0, 50.0), repeat=5):
        raw = torch.tensor(signs, requires_grad=True)
        log_prob = head(raw).log_prob(torch.zeros(2))
        (gradient,) = torch.autograd.grad(log_prob, raw)
        assert bool(gradient.isfinite().all()), (signs, gradient)


def test_full_covariance_refuses_a_width_that_fits_no_dimension():
    with pytest.raises(ArgumentError, match=r"D \(D \+ 3\) / 2.*\(5, 8\)"):
        nn.MultivariateNormal()(torch.zeros(5, 8))
    with pytest.raises(ArgumentError, match="MultivariateNormal"):
        nn.MultivariateNormal()(torch.zeros(5, 0))


def test_the_scale_starts_as_exp_of_half_would_and_has_no_way_to_zero_or_infinity():
    scale = nn.Normal()(torch.tensor([0.0, 0.0], dtype=F64)).base_dist.scale
    assert float(scale) == pytest.approx(1 + 1e-4)
    raw = torch.zeros(2, dtype=F64, requires_grad=True)
    nn.Normal()(raw).base_dist.scale.sum().backward()
    assert raw.grad.tolist() == [0, 0.5]
    far = nn.Normal()(torch.tensor([[0.0, -1e30], [0.0, 1e15]])).base_dist.scale
    torch.testing.assert_close(far, torch.tensor([[1e-4], [1e15]]))
