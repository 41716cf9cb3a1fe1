"""`AnnealedImportanceSampling` and its transitions against closed forms and quadrature.

Per-datum comparisons fail by chance with 7e-6 per number (4.5 standard errors), means of replicates with 6e-5 (4 standard
errors); both bound the error as well.
"""

import json
import math
import pickle
from typing import get_args

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import (
    F64,
    assert_near,
    diagonal_family,
    exact_family,
    guide_of,
    linear_gaussian,
    model_of,
    one_line,
    quiet,
)
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv
from pyro_vae.errors import InvalidDataError, LocalFitError, NonFiniteError, OptionError
from pyro_vae.evidence import AnnealedImportanceSampling, ExactEvidence, State, annealing, fitted
from pyro_vae.evidence.annealing import Schedule
from pyro_vae.evidence.hmc import ChosenPart, transition
from pyro_vae.evidence.paths import Start
from pyro_vae.kernel import calls
from pyro_vae.proposals import GaussianProposal, MixtureProposal

STARTS, SCHEDULES = get_args(Start), get_args(Schedule)

PARALLEL = {"enumerate": "parallel"}

# Few chains of few steps, which say that they are few; test_barrier.py is about that.
pytestmark = pytest.mark.filterwarnings(
    "ignore:the log-weights of .* vary too much:pyro_vae.errors.UnreliableEvidenceWarning"
)


def ais(model, guide, **options):
    return AnnealedImportanceSampling(model, guide, **{"seed": 0, "num_steps": 20, "progress": False, **options})


def standard(x, dim):
    return dist.Normal(x.new_zeros(dim), 1.0).to_event(1)


def crude(dim, loc=0.3, scale=0.8):
    """A guide that ignores the data."""
    return guide_of(lambda x: dist.Normal(x.new_full((len(x), dim), loc), scale).to_event(1))


def assert_unbiased(ratio, largest_error, sigmas=4):
    """E ratio = 1 over replicates; `sigmas` 4 is a false alarm of 6e-5."""
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < largest_error, f"blunt: {error:.4g}"
    assert abs(float(ratio.mean()) - 1) < sigmas * error, f"{float(ratio.mean()):.5f} +- {error:.5f}"


# The transition


def gamma_ends():
    """log Gamma(a, b) at both ends: skewed, and every temperature between them is a log Gamma as well."""
    (a0, b0), (a1, b1) = (2.0, 1.0), (5.0, 8.0)

    def evaluate(u):
        v = u[..., 0]
        return State(u, a0 * v - b0 * v.exp(), a1 * v - b1 * v.exp(), a0 - b0 * u.exp(), a1 - b1 * u.exp())

    def at(t):
        return dist.Gamma(torch.lerp(torch.full_like(t, a0), torch.full_like(t, a1), t), b0 + (b1 - b0) * t)

    return evaluate, at


def fixed_gaussian(loc, scale, num_data):
    return GaussianProposal(torch.full((num_data, 1), loc, dtype=F64), torch.full((num_data, 1, 1), scale, dtype=F64))


@pytest.mark.parametrize("num_leapfrog", [1, 3])
@pytest.mark.parametrize("reference", [(-0.5, 0.6), (1.0, 0.3), (0.0, 3.0)])
def test_a_transition_leaves_a_skewed_density_alone(num_leapfrog, reference):
    """Exact draws stay exact draws, for step sizes good and bad: 9 step sizes and temperatures, 3 moments each."""
    evaluate, at = gamma_ends()
    t, h = torch.cartesian_prod(*(torch.tensor(v, dtype=F64) for v in ((0, 0.4, 1), (0.2, 0.9, 1.5)))).T
    target = at(t)
    num_chains = 10_000
    state = evaluate(target.sample((num_chains,)).log().unsqueeze(-1))
    start = state.u.clone()
    for _ in range(3):
        state, acceptance = transition(state, evaluate, t, fixed_gaussian(*reference, len(t)), h, num_leapfrog)
    u, a, b = state.u[..., 0], target.concentration, target.rate
    moved = (state.u != start).double().mean((0, 2))
    assert float(moved.max()) > 0.3, moved  # the worst steps hardly ever move, which is no excuse for a drift
    assert bool(((acceptance >= 0) & (acceptance <= 1)).all())
    for values, truth in (
        (u, a.digamma() - b.log()),
        ((u - a.digamma() + b.log()).square(), torch.polygamma(1, a)),
        (u.exp(), a / b),
    ):
        assert_near(values.mean(0), truth, values.std(0) / math.sqrt(num_chains), 0.05)


@pytest.mark.parametrize("step_size", [0.3, 1.2, 1.5])
def test_detailed_balance(step_size):
    """As many chains go from bin i to bin j as back, (n_ij - n_ji)^2 / (n_ij + n_ji): a chi-square of 10; 1e-7 at 53."""
    evaluate, at = gamma_ends()
    t, h = torch.tensor([0.4], dtype=F64), torch.tensor([step_size], dtype=F64)
    draws = at(t).sample((200_000,)).log()
    edges = draws[:, 0].quantile(torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=F64), interpolation="nearest")
    state = evaluate(draws.unsqueeze(-1))
    moved, _ = transition(state, evaluate, t, fixed_gaussian(0.5, 0.5, 1), h, 2)
    here, there = (torch.bucketize(s.u.flatten(), edges) for s in (state, moved))
    counts = torch.zeros(25, dtype=F64).index_add(0, 5 * here + there, torch.ones(len(here), dtype=F64)).reshape(5, 5)
    assert float(counts.sum() - counts.trace()) > 10_000  # bins are left, or there is nothing to balance
    pairs = torch.triu_indices(5, 5, 1)
    forth, back = counts[pairs[0], pairs[1]], counts[pairs[1], pairs[0]]
    assert float(((forth - back).square() / (forth + back).clamp(min=1)).sum()) < 53


def test_a_gaussian_that_the_reference_fits_is_followed_exactly():
    loc, scale = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([[[2.0, 0.0], [0.7, 0.1]]], dtype=F64)
    reference = GaussianProposal(loc, scale)

    def evaluate(u):
        gradient = -torch.cholesky_solve((u - loc).unsqueeze(-1), scale).squeeze(-1)
        return State(u, reference.log_prob(u), reference.log_prob(u), gradient, gradient)

    state = evaluate(reference.coloured(torch.randn(1, 2, 50, dtype=F64)))
    moved, acceptance = transition(state, evaluate, torch.ones(1, dtype=F64), reference, torch.full((1,), 1.5, dtype=F64), 3)
    assert (acceptance - 1).abs().max() < 1e-10
    assert bool((moved.u != state.u).all())


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("where", ["density", "gradient"])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_proposals_that_are_not_numbers_are_rejected(value, where, t):
    def evaluate(u):
        bad = u[..., 0] > 0.5
        joint, gradient = -0.5 * u[..., 0].square(), -u
        if where == "density":
            joint = torch.where(bad, torch.full_like(joint, value), joint)
        else:
            gradient = torch.where(bad.unsqueeze(-1), torch.full_like(gradient, value), gradient)
        return State(u, -0.5 * u[..., 0].square(), joint, -u, gradient)

    state = evaluate(torch.rand(5000, 1, 1, dtype=F64) - 0.6)
    temperature, h = torch.tensor([t], dtype=F64), torch.tensor([1.2], dtype=F64)
    for _ in range(3):
        state, acceptance = transition(state, evaluate, temperature, fixed_gaussian(0.1, 1.1, 1), h, 2)
    assert bool(state.u.isfinite().all())
    assert bool(acceptance.isfinite().all())
    assert float(acceptance.mean()) > 0.2
    if t:
        assert float(state.u.max()) <= 0.5


def two_parts():
    """A mixture of two overlapping Gaussians of unlike widths, for each of the data."""
    shares = torch.tensor([[0.3, 0.7]], dtype=F64).expand(9, 2)
    parts = fixed_gaussian(-1.0, 0.4, 9), fixed_gaussian(0.5, 0.8, 9)
    return MixtureProposal(parts, shares, torch.zeros(9, dtype=torch.bool)).as_fitted()


@pytest.mark.parametrize("num_leapfrog", [1, 3])
def test_a_transition_around_a_part_leaves_a_skewed_density_alone(num_leapfrog):
    """As above, the part drawn anew for each chain by where it is: 27 numbers."""
    evaluate, at = gamma_ends()
    t, h = torch.cartesian_prod(*(torch.tensor(v, dtype=F64) for v in ((0, 0.4, 1), (0.2, 0.9, 1.5)))).T
    target, num_chains = at(t), 10_000
    state = evaluate(target.sample((num_chains,)).log().unsqueeze(-1))
    start, labels = state.u.clone(), []
    for _ in range(5):
        reference = ChosenPart.at(two_parts(), state.u)
        labels.append(reference.label)
        state, _ = transition(state, evaluate, t, reference, h, num_leapfrog)
    assert 0.02 < float(torch.stack(labels).double().mean()) < 0.98  # both parts were at work
    assert float((state.u != start).double().mean()) > 0.5
    u, a, b = state.u[..., 0], target.concentration, target.rate
    for values, truth in (
        (u, a.digamma() - b.log()),
        ((u - a.digamma() + b.log()).square(), torch.polygamma(1, a)),
        (u.exp(), a / b),
    ):
        assert_near(values.mean(0), truth, values.std(0) / math.sqrt(num_chains), 0.05)


# Two modes


def two_modes(x):
    """z ~ N(0, 2), x ~ N(z^2, 0.5)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 2.0).to_event(1))
        pyro.sample("x", dist.Normal(z.square(), 0.5).to_event(1), obs=x)


def beside_one(x):
    """A guide that knows one of the two modes."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.clamp(min=0.1).sqrt(), 0.2).to_event(1))


def two_modes_truth(x):
    """By sums over a grid: the narrowest peak, of width 0.03, is five steps wide, so that the sum is exact to rounding."""
    grid = torch.linspace(-12, 12, 4001, dtype=F64)
    log_joint = dist.Normal(0.0, 2.0).log_prob(grid) + dist.Normal(grid.square(), 0.5).log_prob(x)
    return log_joint.logsumexp(-1) + math.log(24 / 4000)


@pytest.mark.parametrize("num_steps", [1, 10])
@pytest.mark.parametrize("value", [0.4, 3.0])
def test_weights_from_a_mixture_are_unbiased(value, num_steps):
    """Modes that overlap, and modes that do not: E exp(log w) = p(x), one chain for each of 1,500 copies."""
    x = torch.full((1500, 1), value, dtype=F64)
    result = ais(two_modes, beside_one, num_steps=num_steps, num_chains=1)(x)
    assert_unbiased((result.log_evidence - two_modes_truth(x[:1])).exp(), 0.05)


def test_reverse_weights_to_a_mixture_are_unbiased():
    """E p(x) exp(-log w) = 1 over simulated pairs, one chain each."""
    sim = pv.simulate(two_modes, torch.zeros(1500, 1, dtype=F64), seed=3)
    x = sim.observed["x"]
    options = {"latents": sim.latents, "num_steps": 10, "num_chains": 1, "progress": False, "seed": 0}
    with quiet():
        upper = pv.BidirectionalMonteCarlo(two_modes, beside_one, **options)(x).upper
    assert_unbiased((two_modes_truth(x) - upper.log_evidence).exp(), 0.05)


def test_the_start_is_the_proposal_that_the_default_searches():
    """Its parts and shares bit for bit, its gradient by differences, and log p(x) of both modes."""
    x = torch.linspace(1, 9, 12, dtype=F64).unsqueeze(-1)
    estimator = ais(two_modes, beside_one, num_chains=50)
    adaptive_one = pv.AdaptiveImportanceSampling(two_modes, beside_one, seed=0)
    with estimator._pair.open((x,), {}, 0) as call, torch.no_grad():
        path = annealing.Annealing(call, estimator).path
        u = torch.linspace(-4, 4, 60, dtype=F64).reshape(5, 12, 1)
        state, above, below = (path.evaluate(v) for v in (u, u + 1e-5, u - 1e-5))
    with adaptive_one._pair.open((x,), {}, 0) as call, torch.no_grad():
        num_particles = estimator.num_steps * estimator.num_chains
        searched = fitted.fitted_log_weights(call, num_particles, None, "auto")[2]
    for mine, other in zip(path.fitted.components, searched.proposal.components, strict=True):
        assert torch.equal(mine.loc, other.loc) and torch.equal(mine.tril, other.tril)
    assert torch.equal(path.fitted.mixture_weights, searched.proposal.mixture_weights)
    assert bool(((path.fitted.mixture_weights > 0.3).sum(-1) == 2).all())
    difference = (above.log_start - below.log_start) / 2e-5
    assert torch.allclose(state.start_gradient[..., 0], difference, rtol=1e-4, atol=1e-4)
    result = estimator(x)
    assert_near(result.log_evidence, two_modes_truth(x), result.std_error, 0.05)
    assert not bool(result.checks["search"].any())


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_other_starts_say_that_they_do_not_search(start):
    lm, x = linear_gaussian(2, 4, num_data=3)
    result = ais(model_of(lm), crude(2), start=start)(x)
    assert result.unchecked["search"] == f"there is no search for modes with start='{start}'"
    assert "search" not in result.checks


# Linear-Gaussian


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_linear_gaussian(start, schedule):
    lm, x = linear_gaussian(2, 4, num_data=12)
    result = ais(model_of(lm), crude(2), num_steps=20, num_chains=300, start=start, schedule=schedule)(x)
    assert_near(result.log_evidence, lm.log_evidence(x), result.std_error, 0.15)
    assert result.bound == "lower"
    assert result.num_particles == 300
    assert result.acceptance.shape == (12,)
    assert bool(((result.acceptance > 0.3) & (result.acceptance <= 1)).all()), result.acceptance
    assert result.log_evidence.dtype == F64


@pytest.mark.parametrize("num_steps", [1, 3, 20])
@pytest.mark.parametrize(("start", "schedule"), [("fitted", "adaptive"), ("guide", "sigmoid"), ("prior", "linear")])
def test_weights_are_unbiased_for_any_number_of_steps(num_steps, start, schedule):
    """E exp(log w) = p(x): 1,500 replicates of one datum, one chain each."""
    lm, x = linear_gaussian(2, 4, num_data=1, variance=3.0)
    x = x.expand(1500, -1)
    result = ais(model_of(lm), crude(2, 0.0, 1.1), num_steps=num_steps, num_chains=1, start=start, schedule=schedule)(x)
    assert_unbiased((result.log_evidence - lm.log_evidence(x)).exp(), 0.05)
    assert bool(result.std_error.isnan().all())


@pytest.mark.parametrize(("num_steps", "num_chains"), [(1, 1), (5, 1), (5, 3)])
def test_weights_are_unbiased_where_half_of_the_chains_start_at_the_prior(num_steps, num_chains, monkeypatch):
    """The same for any number of chains. Without the log 2 in the density of the start it would be half of p(x)."""
    lm, x = linear_gaussian(2, 4, num_data=1, variance=3.0)
    x = x.expand(1500, -1)
    estimator = ais(model_of(lm), crude(2, 0.0, 1.1), num_steps=num_steps, num_chains=num_chains)
    monkeypatch.setattr(estimator, "estimate", lambda call: estimator.annealed(call, with_prior=True))
    assert_unbiased((estimator(x).log_evidence - lm.log_evidence(x)).exp(), 0.06)


@pytest.mark.parametrize("num_leapfrog", [1, 3])
def test_weights_are_unbiased_on_a_skewed_posterior(num_leapfrog):
    """E exp(log w) = p(x), with transitions that are rejected now and then."""
    model, guide, x, truth = gamma_poisson(torch.tensor([0.0, 0.0, 1.0]))
    x, truth = x.expand(1000, -1), truth.expand(1000)
    for start in STARTS:
        result = ais(model, guide, num_steps=6, num_chains=1, start=start, num_leapfrog=num_leapfrog)(x)
        assert_unbiased((result.log_evidence - truth).exp(), 0.05)
        assert float(result.acceptance.mean()) < 0.999


def test_one_step_from_the_guide_is_importance_sampling():
    """T = 1: log w = log p(x, z) - log q(z), whatever the transition does after it."""
    lm, x = linear_gaussian(2, 4, num_data=8, variance=3.0)
    guide = crude(2, 0.0, 1.1)
    result = ais(model_of(lm), guide, num_steps=1, num_chains=4000, start="guide")(x)
    plain = pv.ImportanceSampling(model_of(lm), guide, num_particles=4000, seed=1)(x)
    combined = (result.std_error.square() + plain.std_error.square()).sqrt()
    assert_near(result.log_evidence, plain.log_evidence, combined, 0.05)
    assert_near(result.ess / plain.ess, torch.ones(8, dtype=F64), torch.full((8,), 0.1, dtype=F64), 0.1)


@pytest.mark.parametrize("num_steps", [10, 100])
def test_exact_transitions_fall_short_by_the_thermodynamic_sum(num_steps, monkeypatch):
    """E log w = 1/T sum_(i<T) E_(i/T)[log p(x given z)] on the linear path from the prior (notes/references.md, 4.6)."""
    lm, x = linear_gaussian(2, 4, num_data=3, variance=1.0)
    monkeypatch.setattr(annealing, "transition", exact_transition(lm, x))
    estimator = ais(model_of(lm), crude(2), num_steps=num_steps, num_chains=2000, start="prior", schedule="linear")
    with estimator._pair.open((x,), {}, 0) as call, torch.no_grad():
        log_weight = annealing.Annealing(call, estimator).forward()[0]
    truth = sum(tempered_likelihood(lm, x, i / num_steps) for i in range(num_steps)) / num_steps
    assert_near(log_weight.mean(0), truth, log_weight.std(0) / math.sqrt(2000), 0.06)


def tempered(lm, x, t):
    """Mean (B, D) and covariance (D, D) of prior x likelihood^t."""
    precision = torch.eye(lm.weight.shape[1], dtype=F64) + t * lm.weight.T @ lm.weight / lm.variance
    covariance = torch.linalg.inv(precision)
    return t * (x - lm.bias) @ lm.weight / lm.variance @ covariance, covariance


def tempered_likelihood(lm, x, t):
    """E_t[log p(x given z)], (B,)."""
    mean, covariance = tempered(lm, x, t)
    residual = (x - lm.bias - mean @ lm.weight.T).square().sum(-1) + (lm.weight @ covariance @ lm.weight.T).trace()
    return -0.5 * residual / lm.variance - 0.5 * x.shape[-1] * (2 * math.pi * lm.variance).log()


def exact_transition(lm, x):
    """In place of `transition`: an independent draw of the tempered posterior."""

    def draw(state, evaluate, t, reference, step_size, num_leapfrog):
        mean, covariance = tempered(lm, x, float(t[0]))
        noise = torch.randn_like(state.u) @ torch.linalg.cholesky(covariance).T
        return evaluate(mean + noise), torch.ones_like(state.log_joint)

    return draw


def test_more_steps_give_smaller_errors():
    lm, x = linear_gaussian(3, 6, num_data=10, variance=0.1)
    with quiet():
        errors = [
            float(ais(model_of(lm), crude(3), num_steps=n, num_chains=200, start="prior")(x).std_error.mean())
            for n in (5, 20, 60)
        ]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_many_latents_are_bounded_from_below():
    lm, x = linear_gaussian(30, 40, num_data=6, variance=1.0)
    result = ais(model_of(lm), guide_of(diagonal_family(lm)), num_steps=40, num_chains=100)(x)
    assert_near(result.log_evidence, lm.log_evidence(x), result.std_error, 0.15)


@pytest.mark.parametrize("start", STARTS)
def test_float32(start):
    lm, x = linear_gaussian(2, 4, num_data=10, dtype=torch.float32)
    result = ais(model_of(lm), crude(2), num_chains=200, num_steps=20, start=start)(x)
    for field in ("log_evidence", "std_error", "elbo", "elbo_std_error", "ess", "pareto_k", "smoothed", "acceptance"):
        assert getattr(result, field).dtype == torch.float32, field
    assert_near(result.log_evidence, lm.log_evidence(x), result.std_error + 1e-5, 0.15)


# Not Gaussian


@pytest.mark.parametrize("start", STARTS)
def test_a_two_dimensional_decoder(start):
    model, x = decoder()
    truth = ExactEvidence(model, crude(2, 0.0, 1.0), seed=0)(x).log_evidence
    with quiet():
        result = ais(model, crude(2, 0.0, 1.0), num_steps=20, num_chains=300, start=start)(x)
    assert_near(result.log_evidence, truth, result.std_error, 0.15)


def decoder():
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(*s, generator=generator, dtype=F64) for s in ((2, 6), (6, 5)))

    def logits(z):
        return torch.tanh(z @ first) @ second

    x = dist.Bernoulli(logits=logits(torch.randn(10, 2, generator=generator, dtype=F64))).sample()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(x, 2))
            pyro.sample("x", dist.Bernoulli(logits=logits(z)).to_event(1), obs=x)

    return model, x


def gamma_poisson(x):
    a, b = 2.0, 1.5
    x = x.to(F64).reshape(-1, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(a), b))
            pyro.sample("x", dist.Poisson(rate.unsqueeze(-1)).expand([len(x), 3]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(1 + x.sum(-1), x.new_tensor(2.0)))

    total = x.sum(-1)
    truth = a * math.log(b) - math.lgamma(a) + torch.lgamma(a + total) - (a + total) * math.log(b + 3)
    return model, guide, x, truth - torch.lgamma(x + 1).sum(-1)


def beta_binomial():
    x = torch.tensor([0.0, 1.0, 5.0, 9.0, 10.0], dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(x.new_tensor(0.7), 1.8))
            pyro.sample("x", dist.Binomial(10, p), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Beta(1 + 0.5 * x, 1 + 0.5 * (10 - x)))

    return model, guide, x, dist.BetaBinomial(x.new_tensor(0.7), x.new_tensor(1.8), 10).log_prob(x)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", ["gamma", "beta"])
def test_constrained_latents(start, case):
    model, guide, x, truth = gamma_poisson(torch.arange(12.0)) if case == "gamma" else beta_binomial()
    with quiet():
        result = ais(model, guide, num_steps=40, num_chains=300, start=start)(x)
        exact = ExactEvidence(model, guide, seed=0)(x).log_evidence
    assert (exact - truth).abs().max() < 1e-5
    assert_near(result.log_evidence, truth, result.std_error, 0.15)


# Structure


@pytest.mark.parametrize("start", STARTS)
def test_two_latent_sites_of_unlike_shapes(start):
    lm, x = linear_gaussian(3, 5, num_data=10)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", standard(x, 2))
            z = torch.cat([a.unsqueeze(-1), b], -1)
            pyro.sample("x", dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):  # in the other order, too, and one conditional on the other
            b = pyro.sample("b", dist.Normal(x[:, :2] * 0.1, 0.7).to_event(1))
            pyro.sample("a", dist.Normal(x[:, 0] * 0.1 + 0.2 * b.sum(-1), 0.7))

    with quiet():  # 300 chains of 30 steps from the guide are on the edge of what Pareto k takes
        result = ais(model, guide, num_steps=30, num_chains=300, start=start)(x)
    assert_near(result.log_evidence, lm.log_evidence(x), result.std_error, 0.15)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("side", ["model", "guide"])
def test_an_enumerated_site_beside_a_continuous_one(start, side):
    probs, locs, w, s = [0.2, 0.5, 0.3], [-1.0, 0.5, 2.0], 0.7, 0.6
    x = 2 * torch.randn(8, dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_tensor(probs)), infer=PARALLEL if side == "model" else {})
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(w * z + x.new_tensor(locs)[c], s), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3 * x, 0.8))
            if side == "guide":
                logits = -((x - w * z).unsqueeze(-1) - x.new_tensor(locs)).square()
                pyro.sample("c", dist.Categorical(logits=logits), infer=PARALLEL)

    terms = [math.log(p) + dist.Normal(m, math.hypot(w, s)).log_prob(x) for p, m in zip(probs, locs, strict=True)]
    with quiet():
        result = ais(model, guide, num_steps=20, num_chains=300, start=start)(x)
    assert_near(result.log_evidence, torch.stack(terms).logsumexp(0), result.std_error, 0.15)


@pytest.mark.parametrize("start", STARTS)
def test_masked_data(start):
    """Without their observation the posterior is the prior, and log p is 0."""
    lm, x = linear_gaussian(num_data=9)
    seen = torch.arange(9) % 3 != 0

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(x, 2))
            likelihood = dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(1)
            pyro.sample("x", likelihood.mask(seen), obs=x)

    result = ais(model, crude(2), num_steps=20, num_chains=200, start=start)(x)
    truth = torch.where(seen, lm.log_evidence(x), torch.zeros(9, dtype=F64))
    # A datum without an observation has weights of one, from the prior.
    assert_near(result.log_evidence, truth, result.std_error, 0.15)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("loc", [30.0])
def test_a_masked_latent_beside_one_that_counts(start, loc):
    """The guide draws the masked one far from the standard normal that stands for it; p(x) does not know of it."""
    lm, x = linear_gaussian(1, 3, num_data=1)
    x = x.expand(4000, -1)
    nowhere = torch.zeros(len(x), dtype=torch.bool)

    def extra(x):
        with poutine.mask(mask=nowhere):
            pyro.sample("b", dist.Normal(x.new_full((len(x), 1), loc), 0.1).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", standard(x, 1))
            extra(x)
            pyro.sample("x", dist.Normal(a @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x.new_full((len(x), 1), 0.3), 0.8).to_event(1))
            extra(x)

    result = ais(model, guide, num_steps=8, num_chains=1, start=start, schedule="linear")(x)
    assert_unbiased((result.log_evidence - lm.log_evidence(x)).exp(), 0.05)


def test_a_subsampled_plate():
    lm, x = linear_gaussian(num_data=30)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=8) as rows:
            z = pyro.sample("z", standard(x, 2))
            likelihood = dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt())
            pyro.sample("x", likelihood.to_event(1), obs=x[rows])

    family = diagonal_family(lm)

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=8) as rows:
            pyro.sample("z", family(x[rows]))

    for start in STARTS:
        with quiet():  # weights that hardly vary have a tail index by chance
            result = ais(model, guide, num_steps=20, num_chains=200, start=start)(x)
        assert len(result) == 8
        assert_near(result.log_evidence, lm.log_evidence(x)[result.index], result.std_error, 0.15)


@pytest.mark.parametrize("start", STARTS)
def test_a_whole_call_as_one_datum(start):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(15, 3, generator=generator, dtype=F64)
    y = torch.randn(15, generator=generator, dtype=F64)

    def model(inputs, y):
        w = pyro.sample("w", dist.Normal(inputs.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((inputs * w.unsqueeze(-2)).sum(-1), 0.5), obs=y)

    def guide(inputs, y):
        pyro.sample("w", dist.Normal(inputs.new_full((3,), 0.2), 0.4).to_event(1))

    covariance = inputs @ inputs.T + 0.25 * torch.eye(15, dtype=F64)
    truth = dist.MultivariateNormal(torch.zeros(15, dtype=F64), covariance).log_prob(y).reshape(1)
    result = ais(model, guide, datum_plate=None, num_steps=30, num_chains=300, start=start)(inputs, y)
    assert_near(result.log_evidence, truth, result.std_error, 0.15)


@pytest.mark.parametrize("start", STARTS)
def test_an_autoguide_is_right_or_refused(start):
    lm, x = linear_gaussian(num_data=8)
    model = model_of(lm)
    guide = AutoNormal(model, init_scale=0.5)
    guide(x)
    estimator = ais(model, guide, num_steps=30, num_chains=200, start=start)
    if start == "guide":
        with pytest.raises(LocalFitError, match="start"):  # log q has no density to score; not the model's fault
            estimator(x)
        return
    result = estimator(x)
    assert_near(result.log_evidence, lm.log_evidence(x), result.std_error, 0.15)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("schedule", ["adaptive", "linear"])
def test_a_density_that_ends_abruptly(start, schedule):
    """x uniform on [0, z], z ~ Gamma(2, 1): p(x) = exp(-x). Some chains have weight zero; that is no error.

    From a Gaussian or Gamma start every step is valid importance sampling, so replicates are unbiased.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Uniform(x.new_zeros(()), z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2 + x, x.new_tensor(1.0)))

    x = torch.tensor([0.3, 1.0, 2.0], dtype=F64)
    with quiet():
        result = ais(model, guide, num_chains=3000, start=start, schedule=schedule, check_support=False)(x)
    assert_near(result.log_evidence, -x, result.std_error, 0.15)


# Small and odd calls


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1])
def test_one_datum_and_one_chain(start, schedule, num_steps):
    lm, x = linear_gaussian(1, 2, num_data=1, variance=2.0)
    result = ais(model_of(lm), crude(1), num_steps=num_steps, num_chains=1, start=start, schedule=schedule)(x)
    assert bool(result.log_evidence.isfinite())
    assert bool(result.std_error.isnan())
    assert bool((result.ess == 1).all())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 100])
def test_temperatures_rise_from_zero_to_one(schedule, num_steps):
    lm, x = linear_gaussian(num_data=5)
    estimator = ais(model_of(lm), crude(2), num_steps=num_steps, schedule=schedule, start="prior")
    with estimator._pair.open((x,), {}, 0) as call, torch.no_grad():
        run = annealing.Annealing(call, estimator)
    t = run.temperatures
    assert t.shape == run.step_sizes.shape == (num_steps + 1, 5)
    assert bool((t[0] == 0).all())
    assert (t[-1] - 1).abs().max() < 1e-12
    assert bool((t[1:] > t[:-1]).all())
    assert bool((run.step_sizes > 0).all())


def test_an_exact_start_has_weights_without_variance():
    """The fit of a Gaussian posterior is exact: nothing is left to anneal, whatever the schedule."""
    lm, x = linear_gaussian(num_data=5)
    for schedule in SCHEDULES:
        result = ais(model_of(lm), guide_of(exact_family(lm)), start="guide", schedule=schedule)(x)
        assert (result.log_evidence - lm.log_evidence(x)).abs().max() < 1e-9
        assert float(result.acceptance.min()) > 0.3


# Options, refusals, and nothing left behind


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_steps", 0),
        ("num_steps", 2.5),
        ("num_chains", 0),
        ("num_chains", True),
        ("num_leapfrog", 0),
        ("num_leapfrog", "3"),
        ("start", "posterior"),
        ("start", None),
        ("schedule", "cosine"),
        ("schedule", ["linear"]),
    ],
)
def test_options_are_checked(option, value):
    lm, _ = linear_gaussian()
    with pytest.raises(OptionError, match=f"{option} must be .*, got"):
        ais(model_of(lm), crude(2), **{option: value})


def test_discrete_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(x.sigmoid()))

    x = torch.randn(5, dtype=F64)
    with pytest.raises(LocalFitError, match="'c' is discrete"):
        ais(model, guide)(x)
    with pytest.raises(LocalFitError, match="summed out.*ImportanceSampling"):
        ais(model, pyro.infer.config_enumerate(guide))(x)


def test_prior_sites_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            z = pyro.sample("z", standard(x, 1))
            pyro.sample("x", dist.Normal(a.unsqueeze(-1) + z, 1.0).to_event(1), obs=x)

    with pytest.raises(LocalFitError, match="'a' would be drawn from the prior anew"):
        ais(model, crude(1), prior_sites=["a"])(torch.zeros(3, 1, dtype=F64))


def test_bad_data_are_refused():
    lm, x = linear_gaussian()
    x = x.clone()
    x[1, 0] = math.nan
    with pytest.raises(InvalidDataError):
        ais(model_of(lm), crude(2))(x)


@pytest.mark.parametrize("start", STARTS)
def test_nan_in_the_model_is_named_with_its_rows(start):
    lm, x = linear_gaussian(num_data=6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(x, 2))
            loc = z @ lm.weight.T + torch.where(torch.arange(6).unsqueeze(-1) == 4, math.nan, 0.0)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    with pytest.raises(NonFiniteError, match=r"data \[4\] are NaN or infinite"):
        ais(model, crude(2), start=start)(x)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("chunk", [1, 2**40])
def test_cost_is_the_number_of_decoder_evaluations(start, chunk, monkeypatch):
    lm, x = linear_gaussian()
    rows = [0]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(x, 2))
            rows[0] += z.shape[:-1].numel() * (3 if z.requires_grad else 1)
            pyro.sample("x", dist.Normal(z @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(1), obs=x)

    estimator = ais(model, crude(2), num_steps=5, num_chains=3, num_leapfrog=2, start=start)
    estimator(x)  # the first call also looks at the structure
    monkeypatch.setattr(calls, "CHUNK_BYTES", {"cpu": chunk, "cuda": chunk})
    rows[0] = 0
    result = estimator(x)
    assert result.cost == rows[0] / len(x)
    assert result.cost >= 3 * 3 * (5 * 2 + 1)


@pytest.mark.parametrize("start", STARTS)
def test_chunk_size_changes_no_draw(start, monkeypatch):
    lm, x = linear_gaussian()
    results = []
    for size in (200, 2**40):
        monkeypatch.setattr(calls, "CHUNK_BYTES", {"cpu": size, "cuda": size})
        results.append(ais(model_of(lm), crude(2), num_steps=5, num_chains=7, start=start)(x))
    for result in results[:-1]:
        for field in ("log_evidence", "elbo", "ess", "acceptance"):
            assert torch.allclose(getattr(result, field), getattr(results[-1], field), rtol=1e-9, atol=1e-9), field


@pytest.mark.parametrize("start", STARTS)
def test_seeds_and_random_state(start):
    lm, x = linear_gaussian()
    state = torch.get_rng_state()
    first, again, other = (ais(model_of(lm), crude(2), seed=seed, start=start, num_steps=5)(x) for seed in (1, 1, 2))
    assert torch.equal(first.log_evidence, again.log_evidence)
    assert not torch.equal(first.log_evidence, other.log_evidence)
    assert torch.equal(torch.get_rng_state(), state)
    unseeded = [ais(model_of(lm), crude(2), seed=None, start=start, num_steps=5)(x).log_evidence for _ in range(2)]
    assert not torch.equal(*unseeded)


@pytest.mark.parametrize("start", STARTS)
def test_nothing_is_left_behind(start):
    lm, x = linear_gaussian()
    layer = torch.nn.Linear(2, 4).double().train()
    encoder = torch.nn.Linear(4, 2).double().train()
    pyro.param("mine", torch.zeros(2))

    def model(x):
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(x, 2))
            pyro.sample("x", dist.Normal(layer(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.7).to_event(1))

    result = ais(model, guide, start=start, num_steps=5)(x)
    assert list(pyro.get_param_store()) == ["mine"]
    assert layer.training
    assert encoder.training
    assert all(p.grad is None and p.requires_grad for m in (layer, encoder) for p in m.parameters())
    assert not result.log_evidence.requires_grad
    assert not result.acceptance.requires_grad
    assert torch.is_grad_enabled()


def test_records_join_print_and_travel():
    lm, x = linear_gaussian()
    estimator = ais(model_of(lm), crude(2), num_steps=5)
    whole = pv.Evidence.cat([estimator(x[:4]), estimator(x[4:])])
    assert whole.acceptance.shape == (6,)
    assert "bound: lower" in one_line(whole)
    assert len(json.loads(json.dumps(whole.to_dict()))["acceptance"]) == 6
    assert torch.equal(pickle.loads(pickle.dumps(whole)).acceptance, whole.acceptance)


def test_a_visitor_that_resamples_makes_it_sequential_monte_carlo():
    """From the prior in a few steps, resampled at every third: E p^ = p(x) over 3,000 copies, and other chains than without.

    What the visitor keeps of the log-weights stays as it was shown.
    """
    lm, x = linear_gaussian(num_data=1)
    x = x.expand(3000, -1)
    estimator = ais(model_of(lm), crude(2), start="prior", num_steps=9, num_chains=4)
    seen = []

    def resample(step, state, log_weight):
        seen.append((log_weight, log_weight.clone()))
        if step % 3:
            return None
        chosen = dist.Categorical(logits=log_weight.T).sample((len(log_weight),))  # (C, B)
        rows = torch.arange(chosen.shape[1])
        kept = State(*(field[chosen, rows] for field in vars(state).values()))
        return kept, pv.ops.log_mean_exp(log_weight, 0).expand(len(log_weight), -1)

    with estimator._pair.open((x,), {}, 0) as call, torch.no_grad():
        run = annealing.Annealing(call, estimator)
        log_weight = run.forward(resample)[0]
        plain = run.forward()[0]
    assert len(seen) == 10 and all(torch.equal(shown, before) for shown, before in seen)
    assert not torch.allclose(log_weight.logsumexp(0), plain.logsumexp(0))
    assert bool((log_weight == log_weight[:1]).all())  # the last step resampled, so that all chains count alike
    assert_unbiased((log_weight[0] - lm.log_evidence(x)).exp(), 0.05)
