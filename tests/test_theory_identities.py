"""The identities that open docs/theory.md, each against quadrature on a grid or an independent closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Beta, Binomial, Categorical, Laplace, Normal, kl_divergence

import pyro_vae as pv

F64 = torch.float64
GRID = torch.linspace(-24.0, 24.0, 16_001, dtype=F64)
STEP = float(GRID[1] - GRID[0])


def numbers(*values):
    return torch.tensor(values, dtype=F64)


def integral(values):
    """Of a function that is zero at both ends of the grid."""
    return values.sum() * STEP


# Bayes' theorem


def test_updating_by_one_datum_after_the_other_is_updating_by_both():
    """Beta(2, 3), two counts of 10: posterior and evidence against those of the conjugate family."""
    theta = torch.linspace(0.0, 1.0, 20_001, dtype=F64)[1:-1]
    step = float(theta[1] - theta[0])
    belief, evidences = Beta(numbers(2.0), numbers(3.0)).log_prob(theta).exp(), []
    for count in (7.0, 4.0):
        likelihood = Binomial(10, theta).log_prob(numbers(count)).exp()
        evidences.append((belief * likelihood).sum() * step)
        belief = belief * likelihood / evidences[-1]
    torch.testing.assert_close(belief, Beta(numbers(13.0), numbers(12.0)).log_prob(theta).exp())

    def log_beta(a, b):
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    evidence = math.comb(10, 7) * math.comb(10, 4) * math.exp(log_beta(13, 12) - log_beta(2, 3))
    assert float(evidences[0] * evidences[1]) == pytest.approx(evidence, rel=1e-6)


# The Kullback-Leibler divergence


def test_a_logarithm_lies_below_its_tangent():
    t = torch.logspace(-6, 6, 1201, dtype=F64)
    assert bool((t.log() <= t - 1).all())
    assert bool((t.log() < t - 1)[(t - 1).abs() > 1e-9].all())


def test_a_kl_is_not_negative_and_zero_only_between_equals():
    """Sums over eight values, a third of them impossible under q; the tangent bounds each by the mass that q leaves out."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        p = torch.rand(8, generator=generator, dtype=F64)
        q = torch.rand(8, generator=generator, dtype=F64) * (torch.rand(8, generator=generator) > 1 / 3)
        q[0] += 0.1
        p, q = p / p.sum(), q / q.sum()
        kl = torch.special.xlogy(q, q / p).sum()
        assert kl > 1 - p[q > 0].sum()
        assert kl > 1e-3
        assert abs(float(kl - kl_divergence(Categorical(q), Categorical(p)))) < 1e-12
        assert float(torch.special.xlogy(p, p / p).sum()) == 0


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (Normal(numbers(1.2), numbers(0.4)), Normal(numbers(0.0), numbers(1.0))),
        (Laplace(numbers(0.5), numbers(0.3)), Normal(numbers(0.0), numbers(1.0))),
    ],
)
def test_a_kl_is_an_integral(q, p):
    log_q, log_p = q.log_prob(GRID), p.log_prob(GRID)
    assert float(integral(log_q.exp() * (log_q - log_p))) == pytest.approx(float(kl_divergence(q, p)), rel=1e-4)


def kl_to_the_prior(mu, sigma):
    """Per dimension, to N(0, 1)."""
    return 0.5 * (mu.square() + sigma.square() - sigma.square().log() - 1)


def test_the_kl_of_a_gaussian_to_the_prior_is_its_formula():
    """By quadrature of each dimension, and as the objectives report it for three dimensions."""
    mu, sigma = numbers(1.5, 0.0, -0.2), numbers(0.3, 1.0, 2.0)
    for m, s, kl in zip(mu, sigma, kl_to_the_prior(mu, sigma), strict=True):
        log_q, log_p = Normal(m, s).log_prob(GRID), Normal(0 * m, 1 + 0 * m).log_prob(GRID)
        assert float(integral(log_q.exp() * (log_q - log_p))) == pytest.approx(float(kl), abs=1e-9)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mu.expand(len(x), 3), sigma).to_event(1))

    objective = pv.BetaTraceMeanField_ELBO()
    objective.loss(model, guide, torch.zeros(5, dtype=F64))
    assert float(objective.terms.per_datum().kl_sum) == pytest.approx(float(kl_to_the_prior(mu, sigma).sum()))


def test_what_the_terms_of_the_gaussian_kl_pull_on():
    """Derivatives of the KL by quadrature: mu, and sigma - 1 / sigma. They vanish at the prior alone."""
    for m, s in ((1.5, 0.3), (-0.7, 2.5), (0.0, 1.0)):
        mu, sigma = (numbers(value).requires_grad_() for value in (m, s))
        log_q, log_p = Normal(mu, sigma).log_prob(GRID), Normal(numbers(0.0), numbers(1.0)).log_prob(GRID)
        by_mu, by_sigma = torch.autograd.grad(integral(log_q.exp() * (log_q - log_p)), (mu, sigma))
        assert float(by_mu) == pytest.approx(m, abs=1e-6)
        assert float(by_sigma) == pytest.approx(s - 1 / s, abs=1e-6)


# Calculus of variations


def two_humps():
    """log p(x, z) on the grid, of a model whose posterior is no Gaussian."""
    prior = Normal(numbers(0.0), numbers(1.0)).log_prob(GRID)
    return prior + Normal(GRID.square(), numbers(0.5)).log_prob(numbers(1.5))


def elbo_of(q, log_joint):
    return integral(q * (log_joint - q.clamp_min(1e-300).log()))


def test_among_all_densities_the_posterior_is_where_the_elbo_stands_still():
    """Its derivative in the direction h, of integral zero, is the integral of h (log p(x, z) - log q): zero there alone."""
    log_joint = two_humps()
    log_evidence = torch.logsumexp(log_joint, 0) + math.log(STEP)
    posterior = (log_joint - log_evidence).exp()
    elsewhere = Normal(numbers(0.5), numbers(0.8)).log_prob(GRID).exp()
    assert float(elbo_of(posterior, log_joint)) == pytest.approx(float(log_evidence), abs=1e-12)
    for wave in (1.0, 2.0, 3.0):
        for q in (posterior, elsewhere):
            h = (torch.sin(wave * GRID) + torch.cos(wave * GRID)) * q
            h = h - q * integral(h)
            slope = (elbo_of(q + 1e-4 * h, log_joint) - elbo_of(q - 1e-4 * h, log_joint)) / 2e-4
            formula = integral(h * (log_joint - q.clamp_min(1e-300).log()))
            assert float(slope) == pytest.approx(float(formula), abs=1e-6)
            assert (abs(float(formula)) < 1e-9) == (q is posterior)
        assert elbo_of(posterior + 0.3 * h / h.abs().max() * posterior.max(), log_joint) < log_evidence


# The best guide for one latent


@pytest.mark.parametrize(("w", "s", "x"), [(1.0, 1.0, 1.0), (2.0, 0.3, -1.5), (-0.5, 1.7, 4.0), (0.0, 0.6, 2.0)])
def test_the_best_gaussian_for_one_latent(w, s, x):
    """z ~ N(0, 1), x ~ N(w z, s^2): the ELBO as written out, where its derivatives vanish, and what the optimum is."""
    mean, variance = w * x / (w**2 + s**2), s**2 / (w**2 + s**2)

    def elbo(m, v):
        fit = -0.5 * math.log(2 * math.pi * s**2) - ((x - w * m) ** 2 + w**2 * v) / (2 * s**2)
        return fit - 0.5 * (m**2 + v - v.log() - 1)

    model = pv.exact.LinearGaussian(numbers(w).reshape(1, 1), numbers(0.0), numbers(s**2).squeeze())
    data = numbers(x).reshape(1, 1)
    for m, v in ((mean, variance), (mean + 0.4, variance), (mean, 2 * variance)):
        q = dist.Normal(numbers(m).reshape(1, 1), numbers(v).sqrt().reshape(1, 1)).to_event(1)
        assert float(elbo(numbers(m), numbers(v))) == pytest.approx(float(model.elbo(data, q)))
    best = [numbers(value).requires_grad_() for value in (mean, variance)]
    assert all(abs(float(slope)) < 1e-12 for slope in torch.autograd.grad(elbo(*best), best))
    assert elbo(*best).item() == pytest.approx(float(model.log_evidence(data)))
    exact = pv.exact.scalar_posterior(numbers(x), w, s)
    assert (float(exact.mean), float(exact.variance)) == (pytest.approx(mean), pytest.approx(variance))


@pytest.mark.parametrize(("w", "s", "x"), [(1.0, 1.0, 1.0), (2.0, 0.3, -1.5), (-0.5, 1.7, 4.0)])
def test_the_best_mean_is_weighted_by_precision_and_the_best_variance_has_shrunk(w, s, x):
    """The prior says 0 with precision 1, the datum says x / w with precision w^2 / s^2."""
    best = pv.exact.scalar_posterior(numbers(x), w, s)
    of_datum = w**2 / s**2
    assert float(best.mean) == pytest.approx((1 * 0 + of_datum * (x / w)) / (1 + of_datum))
    assert 1 / float(best.variance) == pytest.approx(1 + of_datum)


# Annealing of beta


def test_beta_rises_by_equal_steps_to_one_and_stays():
    schedule = pv.LinearAnnealing(8)
    assert [schedule(step) for step in range(20)] == [min(1.0, step / 8) for step in range(20)]
