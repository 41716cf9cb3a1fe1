"""The rate-distortion curve of the linear-Gaussian model, against sums over eigenvalues, quadrature and its own slope."""

import math

import pytest
import torch
from pair_helpers import F64, linear_gaussian
from torch.distributions import MultivariateNormal

from pyro_vae.exact import LinearGaussian

BETAS = torch.tensor([math.inf, 8.0, 2.0, 1.0, 0.5, 0.1], dtype=F64)


def test_the_prior_has_no_rate_and_the_prior_s_distortion():
    lm, x = linear_gaussian()
    curve = lm.rate_distortion(x, BETAS)
    prior = MultivariateNormal(torch.zeros(len(x), 2, dtype=F64), torch.eye(2, dtype=F64))
    assert float(curve.rate[0]) == pytest.approx(0.0, abs=1e-14)
    assert torch.allclose(curve.distortion[0], lm.distortion(x, prior).mean(), atol=1e-12)


def test_at_beta_one_it_is_the_posterior():
    lm, x = linear_gaussian()
    curve = lm.rate_distortion(x, BETAS)
    assert torch.allclose(-(curve.rate + curve.distortion)[3], lm.log_evidence(x).mean(), atol=1e-12)


def test_one_latent_by_quadrature():
    """q ~ N(z; 0, 1) p(x given z)^(1 / beta), normalised on a grid."""
    lm, x = linear_gaussian(latent_dim=1, data_dim=3, num_data=2)
    z = torch.linspace(-12, 12, 200_001, dtype=F64)
    mean = z[:, None, None] * lm.weight[:, 0] + lm.bias
    log_likelihood = torch.distributions.Normal(mean, lm.variance.sqrt()).log_prob(x).sum(-1)  # (grid, B)
    log_prior = -0.5 * (z**2 + math.log(2 * math.pi))[:, None]
    curve = lm.rate_distortion(x, BETAS)
    for i, beta in enumerate(BETAS):
        log_q = log_prior + log_likelihood / beta
        log_q = log_q - log_q.logsumexp(0) - math.log(float(z[1] - z[0]))
        weights = log_q.softmax(0)
        assert torch.allclose(curve.rate[i], (weights * (log_q - log_prior)).sum(0).mean(), atol=1e-8)
        assert torch.allclose(curve.distortion[i], -(weights * log_likelihood).sum(0).mean(), atol=1e-8)


def test_the_slope_is_minus_beta():
    """By automatic differentiation along beta, and by chords, whose slope lies between those of their ends."""
    lm, x = linear_gaussian(latent_dim=3, data_dim=5)
    beta = BETAS[1:].clone().requires_grad_()
    curve = lm.rate_distortion(x, beta)
    # Every point depends on its own beta alone.
    d, r = (torch.autograd.grad(value.sum(), beta, retain_graph=True)[0] for value in (curve.distortion, curve.rate))
    assert torch.allclose(d / r, -BETAS[1:], rtol=1e-8)
    assert bool((r < 0).all() and (d > 0).all())
    chords = (curve.distortion.diff() / curve.rate.diff()).detach()
    assert bool((chords >= -BETAS[1:-1]).all() and (chords <= -BETAS[2:]).all())


def test_no_encoder_lies_below():
    """R + D / beta of other Gaussians is larger at every beta."""
    lm, x = linear_gaussian()
    curve = lm.rate_distortion(x, BETAS)
    least = curve.rate + curve.distortion / BETAS
    for beta in (0.3, 1.0, 3.0):
        q = lm.beta_posterior(x, beta)
        for other in (
            q,
            MultivariateNormal(q.mean + 0.3, q.covariance_matrix),
            MultivariateNormal(q.mean, 2 * q.covariance_matrix),
        ):
            sums = lm.rate(other).mean() + lm.distortion(x, other).mean() / BETAS
            assert bool((sums >= least - 1e-12).all())


def test_the_model_of_the_best_beta_elbo():
    """Rate and distortion by the eigenvalues, slope -beta over models too, and no other weights do better."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(200, 5, generator=generator, dtype=F64) * torch.tensor([3.0, 2.0, 1.2, 0.5, 0.3], dtype=F64)
    x = x - x.mean(0)
    spectrum = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)
    s2 = 0.2
    points = []
    for beta in (0.25, 1.0, 4.0, 4.001, 60.0):
        lm = LinearGaussian.fit_beta(x, 3, s2, beta)
        assert float(lm.variance) == s2
        used = spectrum > beta * s2
        used[3:] = False
        rate = 0.5 * (spectrum[used] / (beta * s2)).log().sum()
        distortion = 0.5 * (5 * math.log(2 * math.pi * s2) + int(used.sum()) * beta + (spectrum[~used] / s2).sum())
        curve = lm.rate_distortion(x, torch.tensor([beta], dtype=F64))
        assert torch.allclose(curve.rate[0], rate, atol=1e-10) and torch.allclose(curve.distortion[0], distortion, atol=1e-9)
        points.append((rate, distortion))
        for scale in (0.95, 1.05):
            other = LinearGaussian(scale * lm.weight, lm.bias, lm.variance)
            q = other.beta_posterior(x, beta)
            worse = (beta * other.rate(q) + other.distortion(x, q)).mean()
            assert float(worse) > float(beta * rate + distortion) - 1e-12
    assert float(points[-1][0]) == 0.0  # beta so large that nothing is used
    (r0, d0), (r1, d1) = points[2:4]
    assert float((d1 - d0) / (r1 - r0)) == pytest.approx(-4.0, rel=1e-3)


def test_float32_and_errors():
    lm, x = linear_gaussian(dtype=torch.float32)
    curve = lm.rate_distortion(x, torch.tensor([2.0, 1.0]))
    assert curve.rate.dtype == curve.distortion.dtype == torch.float32
    for beta in (torch.tensor(1.0), torch.tensor([1.0, 0.0]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="beta"):
            lm.rate_distortion(x, beta)
