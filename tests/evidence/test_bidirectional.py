"""`BidirectionalMonteCarlo` and `Sandwich` against closed forms.

Means over replicates fail by chance with 6e-5 (4 standard errors) and bound the error as well.
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
    diagonal_family,
    guide_of,
    linear_gaussian,
    make_evidence,
    model_of,
    one_line,
    quiet,
    scaled_family,
)
from pyro import poutine

import pyro_vae as pv
from pyro_vae.errors import LatentsError, OptionError
from pyro_vae.evidence import Annealing, BidirectionalMonteCarlo, Sandwich, annealing
from pyro_vae.evidence import bidirectional_monte_carlo as bidirectional
from pyro_vae.evidence.annealing import Schedule
from pyro_vae.evidence.paths import Start
from pyro_vae.kernel import calls
from pyro_vae.noise import Noise
from pyro_vae.ops import pareto_smooth

STARTS, SCHEDULES = get_args(Start), get_args(Schedule)

PARALLEL = {"enumerate": "parallel"}


def bdmc(model, guide, sim, **options):
    return BidirectionalMonteCarlo(
        model, guide, latents=sim.latents, **{"seed": 0, "num_steps": 20, "progress": False, **options}
    )


def standard(x, dim):
    return dist.Normal(x.new_zeros(dim), 1.0).to_event(1)


def crude(dim, loc=0.3, scale=0.8):
    return guide_of(lambda x: dist.Normal(x.new_full((len(x), dim), loc), scale).to_event(1))


def simulated(dim=2, data_dim=4, num_data=12, variance=0.5, dtype=F64):
    """(oracle, model, simulation, its data)."""
    lm, x = linear_gaussian(dim, data_dim, num_data=num_data, variance=variance, dtype=dtype)
    model = model_of(lm)
    sim = pv.simulate(model, x, seed=0)
    return lm, model, sim, sim.observed["x"]


def assert_mean(values, truth, largest_error, sigmas=4):
    error = float(values.std()) / math.sqrt(len(values))
    assert error < largest_error, f"blunt: {error:.4g}"
    assert abs(float(values.mean()) - truth) < sigmas * error, f"{float(values.mean()):.5f} +- {error:.5f}, not {truth:.5f}"


def assert_brackets(sandwich, truth, largest_error, sigmas=4):
    """The mean over the data of each end lies on its side of the truth, its spread over data as the error."""
    for short in (truth - sandwich.lower.log_evidence, sandwich.upper.log_evidence - truth):
        error = float(short.std()) / math.sqrt(len(short))
        assert error < largest_error, f"blunt: {error:.4g}"
        assert float(short.mean()) > -sigmas * error


# Closed forms


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_ends_bracket_log_p(start, schedule):
    lm, model, sim, x = simulated(num_data=100)
    sandwich = bdmc(model, crude(2), sim, num_steps=10, start=start, schedule=schedule)(x)
    assert_brackets(sandwich, lm.log_evidence(x), 0.15)
    assert sandwich.lower.bound == "lower"
    assert sandwich.upper.bound == "upper"
    assert sandwich.width.shape == sandwich.upper.acceptance.shape == (100,)
    if start == "prior":
        assert float(sandwich.width.mean()) > 0.02  # ten steps from the prior leave a gap
    else:
        assert float(sandwich.width.mean()) < 0.6


def test_a_long_run_closes_the_gap():
    lm, model, sim, x = simulated(num_data=20)
    for start in STARTS:
        sandwich = bdmc(model, crude(2), sim, num_steps=80, num_chains=4, start=start)(x)
        assert (sandwich.lower.log_evidence - lm.log_evidence(x)).abs().mean() < 0.2
        assert (sandwich.upper.log_evidence - lm.log_evidence(x)).abs().mean() < 0.2


@pytest.mark.parametrize("num_steps", [1, 3, 20])
@pytest.mark.parametrize(("start", "schedule"), [("fitted", "adaptive"), ("guide", "sigmoid"), ("prior", "linear")])
def test_reverse_weights_are_unbiased_for_one_over_p(num_steps, start, schedule):
    """E exp(-log w) p(x) = 1 over simulated (x, z), for any number of steps: 1,500 pairs, one chain each.

    The fewer the steps, the nearer to the posterior must be the start, or 1/w has no variance to gate.
    """
    lm, model, sim, x = simulated(num_data=1500, variance={1: 30.0, 3: 10.0, 20: 3.0}[num_steps])
    guide = guide_of(scaled_family(lm, 0.85))
    sandwich = bdmc(model, guide, sim, num_steps=num_steps, num_chains=1, start=start, schedule=schedule)(x)
    assert_mean((lm.log_evidence(x) - sandwich.upper.log_evidence).exp(), 1.0, 0.08)


@pytest.mark.parametrize("num_steps", [10, 100])
def test_exact_transitions_give_the_jeffreys_divergence(num_steps, monkeypatch):
    """E[log w reverse - log w forward] T = KL(prior, posterior) + KL(posterior, prior), notes/references.md 4.6."""
    lm, model, sim, x = simulated(num_data=3, variance=1.0)

    def tempered(t):
        precision = torch.eye(2, dtype=F64) + t * lm.weight.T @ lm.weight / lm.variance
        covariance = torch.linalg.inv(precision)
        return t * (x - lm.bias) @ lm.weight / lm.variance @ covariance, covariance

    def exact_transition(state, evaluate, t, reference, step_size, num_leapfrog):
        mean, covariance = tempered(float(t[0]))
        noise = torch.randn_like(state.u) @ torch.linalg.cholesky(covariance).T
        return evaluate(mean + noise), torch.ones_like(state.log_joint)

    monkeypatch.setattr(annealing, "transition", exact_transition)
    estimator = bdmc(model, crude(2), sim, num_steps=num_steps, num_chains=4000, start="prior", schedule="linear")
    with estimator._pair.open((x,), {}, 0) as call, torch.no_grad():
        run = Annealing(call, estimator)
        forward = run.forward()[0]
        mean, covariance = tempered(1.0)  # a posterior draw per chain, which one simulation is not
        draws = mean + torch.randn(4000, 3, 2, dtype=F64) @ torch.linalg.cholesky(covariance).T
        reverse = run.reverse(draws, Noise.REVERSE)[0]
    mean, covariance = tempered(1.0)
    prior = dist.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    posterior = dist.MultivariateNormal(mean, covariance)
    divergence = torch.distributions.kl_divergence(prior, posterior) + torch.distributions.kl_divergence(posterior, prior)
    gap = (reverse.mean(0) - forward.mean(0)) * num_steps
    error = ((reverse.var(0) + forward.var(0)) / 4000).sqrt() * num_steps
    assert bool(((gap - divergence).abs() < 4.5 * error).all()), (gap, divergence, error)
    assert float(error.norm() / divergence.sum()) < 0.05
    assert abs(float((gap - divergence).sum())) < 4 * float(error.norm())


def test_reverse_chains_run_from_the_joint_to_the_start(monkeypatch):
    """Temperatures fall from 1 and each weight is read after its transition, at the temperature it leads down to."""
    _, model, sim, x = simulated(num_data=5)
    seen = []

    def shifting(state, evaluate, t, reference, step_size, num_leapfrog):
        seen.append((t, step_size, state.log_joint - state.log_start))
        return evaluate(state.u + 0.1), torch.ones_like(state.log_joint)

    estimator = bdmc(model, crude(2), sim, num_steps=8, num_chains=3, start="prior", schedule="sigmoid")
    with estimator._pair.open((x,), {}, 0) as call, torch.no_grad():
        run = Annealing(call, estimator)
        monkeypatch.setattr(annealing, "transition", shifting)
        u = torch.randn(3, 5, 2, dtype=F64)
        log_weight, _, first = run.reverse(u, Noise.REVERSE)
        last = run.path.evaluate(u + 0.8)
    assert torch.equal(first.u, u)
    assert torch.equal(torch.stack([t for t, _, _ in seen]), run.temperatures[1:].flip(0))
    assert torch.equal(torch.stack([h for _, h, _ in seen]), run.step_sizes[1:].flip(0))
    after = [ratio for _, _, ratio in seen[1:]] + [last.log_joint - last.log_start]
    steps = (run.temperatures[1:] - run.temperatures[:-1]).flip(0)
    assert torch.allclose(log_weight, sum(s * r for s, r in zip(steps, after, strict=True)), rtol=1e-10)


def test_forward_chains_weigh_before_they_move(monkeypatch):
    _, model, sim, x = simulated(num_data=5)
    seen = []

    def shifting(state, evaluate, t, reference, step_size, num_leapfrog):
        seen.append((t, state.log_joint - state.log_start))
        return evaluate(state.u + 0.1), torch.ones_like(state.log_joint)

    estimator = bdmc(model, crude(2), sim, num_steps=8, num_chains=3, start="prior", schedule="sigmoid")
    with estimator._pair.open((x,), {}, 0) as call, torch.no_grad():
        run = Annealing(call, estimator)
        monkeypatch.setattr(annealing, "transition", shifting)
        log_weight, _, _ = run.forward()
    assert torch.equal(torch.stack([t for t, _ in seen]), run.temperatures[1:])
    steps = run.temperatures[1:] - run.temperatures[:-1]
    assert torch.allclose(log_weight, sum(s * r for s, (_, r) in zip(steps, seen, strict=True)), rtol=1e-10)


def test_reverse_chains_from_the_prior_on_a_narrow_posterior():
    """Posterior a tenth as wide as the prior. The order of the steps is held by the test of the exact sequence, not here."""
    lm, model, sim, x = simulated(2, 6, num_data=300, variance=0.05)
    sandwich = bdmc(model, crude(2), sim, num_steps=60, num_chains=4, start="prior")(x)
    above = sandwich.upper.log_evidence - lm.log_evidence(x)
    below = lm.log_evidence(x) - sandwich.lower.log_evidence
    assert_brackets(sandwich, lm.log_evidence(x), 0.1)
    # Forward and reverse fall short alike (Grosse, Ghahramani and Adams, 2015): neither end does the other's work.
    assert float(above.mean()) < 3 * float(below.mean()) + 0.1
    assert float(above.mean()) < 0.5


def test_float32():
    lm, model, sim, x = simulated(num_data=40, dtype=torch.float32)
    for start in STARTS:
        sandwich = bdmc(model, crude(2), sim, num_steps=20, num_chains=8, start=start)(x)
        assert sandwich.width.dtype == torch.float32
        assert_brackets(sandwich, lm.log_evidence(x), 0.15)


# Structure


def gamma_poisson(num_data=100):
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.5))
            pyro.sample("x", dist.Poisson(rate.unsqueeze(-1)).expand([len(x), 3]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(1 + x.sum(-1), x.new_tensor(2.0)))

    sim = pv.simulate(model, torch.zeros(num_data, 3, dtype=F64), seed=0)
    x = sim.observed["x"]
    total = x.sum(-1)
    truth = 2 * math.log(1.5) + torch.lgamma(2 + total) - (2 + total) * math.log(4.5) - torch.lgamma(x + 1).sum(-1)
    return model, guide, sim, x, truth


def beta_binomial(num_data=100):
    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(x.new_tensor(1.7), 1.8))
            pyro.sample("x", dist.Binomial(10, p), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Beta(1 + 0.5 * x, 1 + 0.5 * (10 - x)))

    sim = pv.simulate(model, torch.zeros(num_data, dtype=F64), seed=0)
    x = sim.observed["x"]
    return model, guide, sim, x, dist.BetaBinomial(x.new_tensor(1.7), x.new_tensor(1.8), 10).log_prob(x)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", [gamma_poisson, beta_binomial])
def test_constrained_latents(case, start):
    model, guide, sim, x, truth = case()
    with quiet():
        sandwich = bdmc(model, guide, sim, start=start)(x)
    assert_brackets(sandwich, truth, 0.08)
    assert float(sandwich.width.mean()) < 0.3


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_latents_in_a_nested_plate(data_dim):
    inner_dim, num_data = -3 - data_dim, 20

    def plates():
        return pyro.plate("data", num_data, dim=data_dim), pyro.plate("steps", 3, dim=inner_dim)

    def model(x):
        data, steps = plates()
        with data, steps:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(1.3 * z, 0.6), obs=x)

    def guide(x):
        data, steps = plates()
        with data, steps:
            pyro.sample("z", dist.Normal(0.3 * x, 0.7))

    template = torch.zeros(num_data, 3, dtype=F64)
    sim = pv.simulate(model, template if data_dim == -2 else template.T, seed=0, datum_plate="data")
    x = sim.observed["x"]
    sandwich = bdmc(model, guide, sim, datum_plate="data")(x)
    truth = dist.Normal(0.0, math.hypot(1.3, 0.6)).log_prob(x).sum(1 if data_dim == -2 else 0)
    assert_brackets(sandwich, truth, 0.05)
    assert float(sandwich.width.mean()) < 0.1


def test_a_whole_call_as_one_datum():
    lm, x = linear_gaussian(num_data=4)
    model = model_of(lm)
    sim = pv.simulate(model, x, seed=0, datum_plate=None)
    sandwich = bdmc(model, guide_of(diagonal_family(lm)), sim, datum_plate=None, num_steps=60)(sim.observed["x"])
    truth = lm.log_evidence(sim.observed["x"]).sum()
    assert sandwich.width.shape == (1,)
    assert abs(float(sandwich.lower.log_evidence - truth)) < 0.3
    assert abs(float(sandwich.upper.log_evidence - truth)) < 0.3
    str(sandwich)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("side", ["model", "guide"])
def test_an_enumerated_site_beside_a_continuous_one(start, side):
    """`simulate` also returns the drawn values of what is enumerated here; they are not needed."""
    probs, locs = [0.2, 0.5, 0.3], [-1.0, 0.5, 2.0]

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_tensor(probs)), infer=PARALLEL if side == "model" else {})
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0.7 * z + x.new_tensor(locs)[c], 0.6), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 0.8))
            if side == "guide":
                pyro.sample("c", dist.Categorical(x.new_ones(3)), infer=PARALLEL)

    sim = pv.simulate(model, torch.zeros(100, dtype=F64), seed=0)
    x = sim.observed["x"]
    scale = math.hypot(0.7, 0.6)
    truth = torch.stack([math.log(p) + dist.Normal(m, scale).log_prob(x) for p, m in zip(probs, locs, strict=True)])
    with quiet():
        sandwich = bdmc(model, guide, sim, start=start)(x)
    assert_brackets(sandwich, truth.logsumexp(0), 0.1)


@pytest.mark.parametrize("start", STARTS)
def test_a_masked_latent_has_no_density_to_be_drawn_from(start):
    """A masked latent counts as standard normal; the simulated value of it, from N(3, 0.5), is not one."""
    lm, x = linear_gaussian(1, 3, num_data=2000, variance=3.0)
    nowhere = torch.zeros(len(x), dtype=torch.bool)

    def extra(x):
        with poutine.mask(mask=nowhere):
            pyro.sample("b", dist.Normal(x.new_full((len(x), 1), 3.0), 0.5).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", standard(x, 1))
            extra(x)
            pyro.sample("x", dist.Normal(a @ lm.weight.T + lm.bias, lm.variance.sqrt()).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x.new_zeros(len(x), 1), 1.1).to_event(1))
            extra(x)

    sim = pv.simulate(model, x, seed=0)
    x = sim.observed["x"]
    sandwich = bdmc(model, guide, sim, num_steps=8, num_chains=1, start=start, schedule="linear")(x)
    assert_mean((lm.log_evidence(x) - sandwich.upper.log_evidence).exp(), 1.0, 0.08)


# The upper record


def test_the_upper_record_speaks_of_the_reverse_weights():
    """From 100 chains on there is a tail index: that of 1 / w, whose heavy tail would push the *lower* end down."""
    _, model, sim, x = simulated(num_data=8)
    estimator = bdmc(model, crude(2), sim, num_steps=5, num_chains=150, start="prior")
    with quiet():
        sandwich = estimator(x)
    with estimator._pair.open((x,), {}, 0) as call, torch.no_grad():
        run = Annealing(call, estimator)
        u, _ = run.space.pack({"z": sim.latents["z"].unsqueeze(0)})
        reverse = run.reverse(u.expand(150, -1, -1), Noise.REVERSE)[0]
    assert torch.allclose(sandwich.upper.log_evidence, -(-reverse).logsumexp(0) + math.log(150))
    _, pareto_k = pareto_smooth(-reverse)
    assert torch.allclose(sandwich.upper.pareto_k, pareto_k)
    low, high = sandwich.upper.confidence_interval()
    value = sandwich.upper.log_evidence
    heavy = pareto_k > 0.1
    assert bool(heavy.any())
    assert bool((value - low >= high - value - 1e-9)[heavy].all())


# Latents that are refused


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (lambda z: {}, "must hold the latent sites 'z', got"),
        (lambda z: {"y": z}, "must hold the latent sites 'z', got"),
        (lambda z: {"z": z, "y": z}, "must hold the latent sites 'z', got"),
        (lambda z: {"z": z[:5]}, r"must have shape \(12, 2\), got \(5, 2\)"),
        (lambda z: {"z": z[:, :1]}, r"must have shape \(12, 2\), got \(12, 1\)"),
        (lambda z: {"z": z.unsqueeze(0)}, r"must have shape \(12, 2\), got \(1, 12, 2\)"),
        (lambda z: {"z": z + torch.where(torch.arange(12) == 3, math.nan, 0.0).unsqueeze(-1)}, "1 of 12 data"),
        (lambda z: {"z": z.tolist()}, "latents"),
        (lambda z: {"z": z.numpy()}, "latents"),
        (lambda z: {"z": None}, "latents"),
        (lambda z: {"z": z.long()}, "latents"),
    ],
)
def test_latents_of_the_wrong_form_are_refused(latents, message):
    _, model, sim, x = simulated()
    with pytest.raises(LatentsError, match=message):
        BidirectionalMonteCarlo(model, crude(2), latents=latents(sim.latents["z"]), seed=0, num_steps=5)(x)


@pytest.mark.parametrize("latents", [None, torch.zeros(12, 2)])
def test_latents_must_be_a_mapping(latents):
    lm, _ = linear_gaussian()
    with pytest.raises((LatentsError, OptionError), match="latents"):
        BidirectionalMonteCarlo(model_of(lm), crude(2), latents=latents)


def test_latents_of_another_dtype_are_named_or_taken():
    lm, model, sim, x = simulated(dtype=torch.float32)
    double = {"z": sim.latents["z"].double()}
    try:
        sandwich = BidirectionalMonteCarlo(model, crude(2), latents=double, seed=0, num_steps=40)(x)
    except LatentsError:
        return
    assert (sandwich.upper.log_evidence - lm.log_evidence(x)).abs().max() < 1


@pytest.mark.parametrize("value", [-0.3, 1.7, math.inf])
def test_latents_outside_a_unit_interval_are_refused(value):
    """The inverse of a sigmoid clamps what it is given, so it cannot tell."""
    model, guide, sim, x, _ = beta_binomial(12)
    latents = {"p": torch.where(torch.arange(12) == 3, value, sim.latents["p"])}
    with pytest.raises(LatentsError, match="1 of 12 data lie outside the support"):
        BidirectionalMonteCarlo(model, guide, latents=latents, seed=0, num_steps=5)(x)


@pytest.mark.parametrize("value", [-1.0, 0.0, math.inf])
def test_latents_outside_a_half_line_are_refused(value):
    model, guide, sim, x, _ = gamma_poisson(12)
    latents = {"rate": torch.where(torch.arange(12) == 3, value, sim.latents["rate"])}
    with pytest.raises(LatentsError, match="1 of 12 data lie outside the support"):
        BidirectionalMonteCarlo(model, guide, latents=latents, seed=0, num_steps=5)(x)


def test_latents_off_a_simplex_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(x.new_tensor([2.0, 1.5, 3.0])))
            pyro.sample("x", dist.Multinomial(12, p, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Dirichlet(1 + 0.7 * x))

    sim = pv.simulate(model, torch.full((40, 3), 4.0, dtype=F64), seed=0)
    x = sim.observed["x"]
    truth = dist.DirichletMultinomial(x.new_tensor([2.0, 1.5, 3.0]), 12).log_prob(x)
    assert_brackets(bdmc(model, guide, sim, num_steps=40)(x), truth, 0.1)
    with pytest.raises(LatentsError, match="outside the support"):
        BidirectionalMonteCarlo(model, guide, latents={"p": 2 * sim.latents["p"]}, seed=0, num_steps=5)(x)


@pytest.mark.parametrize("start", STARTS)
def test_latents_that_did_not_produce_the_data_are_refused(start):
    lm, model, sim, x = simulated(num_data=60)
    means = lm.posterior(x).mean
    others = sim.latents["z"].roll(1, 0)
    for latents, word in ((means, "higher"), (others, "lower")):
        with pytest.raises(LatentsError, match=f"have a {word} log p.*did not produce these data"):
            BidirectionalMonteCarlo(
                model, crude(2), latents={"z": latents}, seed=0, num_steps=40, start=start, progress=False
            )(x)


@pytest.mark.parametrize(("start", "num_steps"), [("fitted", 1), ("fitted", 5), ("guide", 10), ("prior", 20)])
def test_true_latents_are_never_refused(start, num_steps):
    """The limit is 6 standard errors, and here are many data; chains not quite there must not count against them."""
    for dim, variance in ((1, 0.5), (2, 2.0)):
        _, model, sim, x = simulated(dim, 4, num_data=500, variance=variance)
        bdmc(model, crude(dim), sim, num_steps=num_steps, num_chains=4, start=start)(x)


def test_a_subsampled_plate_is_refused():
    """The latents would belong to some rows, and the call be about others."""

    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.8))

    x = torch.randn(8, dtype=F64)
    with pytest.raises(LatentsError, match="subsampled plate"):
        BidirectionalMonteCarlo(model, guide, latents={"z": x[:3]}, num_steps=2, num_chains=2)(x)
    estimate = pv.AnnealedImportanceSampling(model, guide, num_steps=2, num_chains=2, seed=0)(x)
    assert len(estimate) == 3 and estimate.index is not None  # which does not need to know the rows in advance


def test_true_latents_rank_evenly():
    """The score is standard normal over replicates where the chains are at the posterior: 60 of them, 5 data each."""
    scores = []
    for _ in range(60):
        given, reached = torch.rand(5), torch.rand(16, 5)
        share = (reached < given).double().mean(0)
        scores.append(float(share.mean() - 0.5) / math.sqrt((1 + 2 / 16) / 12 / 5))
    assert 0.6 < float(torch.tensor(scores).std()) < 1.4  # the formula; six of its deviations are the limit
    narrow = Sandwich(make_evidence([0.0] * 5), make_evidence([0.1] * 5))
    bidirectional.check_ranks(narrow, torch.rand(5), torch.rand(16, 5))
    lower, many = Sandwich(make_evidence([0.0] * 50), make_evidence([0.1] * 50)), torch.rand(16, 50)
    for given in (many.amax(0) + 1, many.amin(0) - 1):
        with pytest.raises(LatentsError, match="standard errors"):
            bidirectional.check_ranks(lower, given, many)
    wide = Sandwich(make_evidence([0.0] * 50), make_evidence([2.0] * 50))
    bidirectional.check_ranks(wide, many.amax(0) + 1, many)  # the chains may be anywhere


# The record


def test_sandwich_arithmetic():
    sandwich = Sandwich(make_evidence([-3.0, -4.0, -5.0]), make_evidence([-2.5, -3.9, -4.7], bound="upper"))
    assert torch.allclose(sandwich.width, torch.tensor([0.5, 0.1, 0.3], dtype=F64))
    width = sandwich.mean_width()
    assert abs(float(width.value) - 0.3) < 1e-12
    assert abs(float(width.std_error) - 0.2 / math.sqrt(3)) < 1e-12
    assert len(sandwich) == 3
    assert "0.3000 +- 0.1155 nats" in one_line(sandwich)
    assert "lower bound  -4.000" in str(sandwich)
    assert "upper bound  -3.700" in str(sandwich)


def test_sandwiches_join_and_travel():
    _, model, sim, x = simulated()
    first, second = (
        BidirectionalMonteCarlo(model, crude(2), latents={"z": sim.latents["z"][rows]}, seed=0, num_steps=5)(x[rows])
        for rows in (slice(0, 8), slice(8, 12))
    )
    whole = Sandwich.cat([first, second])
    assert len(whole) == 12
    assert torch.equal(whole.width, torch.cat([first.width, second.width]))
    plain = json.loads(json.dumps(whole.to_dict()))
    assert plain["upper"]["bound"] == "upper"
    assert len(plain["lower"]["log_evidence"]) == 12
    assert torch.equal(pickle.loads(pickle.dumps(whole)).width, whole.width)
    with pytest.raises(ValueError, match="differ in bound"):
        Sandwich.cat([first, Sandwich(second.upper, second.lower)])
    with pytest.raises(ValueError, match="at least one record"):
        Sandwich.cat([])


@pytest.mark.parametrize(("option", "value"), [("num_steps", 0), ("num_chains", 1.5), ("start", "z"), ("schedule", "")])
def test_options_are_checked(option, value):
    _, model, sim, _ = simulated()
    with pytest.raises(OptionError, match=f"{option} must be .*, got"):
        bdmc(model, crude(2), sim, **{option: value})


@pytest.mark.parametrize("start", STARTS)
def test_seeds_random_state_and_latents_are_kept(start):
    _, model, sim, x = simulated()
    state, z = torch.get_rng_state(), sim.latents["z"].clone()
    first, again, other = (bdmc(model, crude(2), sim, seed=s, start=start, num_steps=5)(x) for s in (1, 1, 2))
    assert torch.equal(first.width, again.width)
    assert not torch.equal(first.width, other.width)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sim.latents["z"], z)
    assert not first.width.requires_grad
    assert len(pyro.get_param_store()) == 0


def test_latents_that_carry_gradients_are_taken():
    _, model, sim, x = simulated()
    sim.latents["z"].requires_grad_()
    sandwich = bdmc(model, crude(2), sim, num_steps=5)(x)
    assert sim.latents["z"].grad is None
    assert not sandwich.width.requires_grad


@pytest.mark.parametrize("start", STARTS)
def test_chunk_size_changes_no_draw(start, monkeypatch):
    _, model, sim, x = simulated()
    results = []
    for size in (200, 2**40):
        monkeypatch.setattr(calls, "CHUNK_BYTES", {"cpu": size, "cuda": size})
        results.append(bdmc(model, crude(2), sim, num_steps=5, num_chains=7, start=start)(x))
    for result in results[:-1]:
        for end in ("lower", "upper"):
            for field in ("log_evidence", "ess", "acceptance"):
                ours, theirs = getattr(getattr(result, end), field), getattr(getattr(results[-1], end), field)
                assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9), (end, field)


def test_the_lower_end_is_the_annealed_estimate():
    """The same seed, settings and data: bidirectional adds the reverse chains and changes nothing else."""
    _, model, sim, x = simulated()
    sandwich = bdmc(model, crude(2), sim, num_steps=10)(x)
    alone = pv.AnnealedImportanceSampling(model, crude(2), seed=0, num_steps=10)(x)
    assert torch.equal(sandwich.lower.log_evidence, alone.log_evidence)
    assert sandwich.lower.cost == alone.cost
