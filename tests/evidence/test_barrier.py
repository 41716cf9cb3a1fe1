"""The barrier is its integral, log-weights vary as it says, and the record says how many steps are enough."""

import json

import pytest
import torch
from pair_helpers import F64, guide_of, linear_gaussian, make_evidence, model_of, one_line, scaled_family

import pyro_vae as pv
from pyro_vae.errors import UnreliableEvidenceWarning
from pyro_vae.evidence.barrier import quantile_in_place

QUIET = {"progress": False, "start": "prior"}


def pair(latent_dim=2):
    lm, x = linear_gaussian(latent_dim, latent_dim + 2, variance=0.05)
    return lm, x, model_of(lm), guide_of(scaled_family(lm, 0.5, 0.5))


def exact_barrier(lm, x):
    """From the prior log p(x, z) - log p(z) = -z'Az/2 + b'z + const; s^(1 - t) p^t is N(V b t, V) with V = (1 + t A)^-1.

    Its variance there is tr((A V)^2) / 2 + g'V g with g = b - A V b t; integrated over t on a fine grid.
    """
    curvature = lm.weight.T @ lm.weight / lm.variance
    slope = (x - lm.bias) @ lm.weight / lm.variance
    t = torch.linspace(0, 1, 20_001, dtype=F64).reshape(-1, 1, 1)
    covariance = torch.linalg.inv(torch.eye(len(curvature), dtype=F64) + t * curvature)
    quadratic = 0.5 * (curvature @ covariance).matrix_power(2).diagonal(dim1=-2, dim2=-1).sum(-1)
    gradient = slope.T - curvature @ covariance @ slope.T * t  # (T, D, B)
    variance = quadratic.unsqueeze(1) + (gradient * (covariance @ gradient)).sum(1)
    return torch.trapezoid(variance.sqrt(), t.flatten(), dim=0)


def test_the_barrier_is_its_integral_and_does_not_grow_with_the_steps():
    """300 chains and 100 or 300 steps: the error of a standard deviation from 300 is 4%, averaged over the path."""
    lm, x, model, guide = pair()
    truth = exact_barrier(lm, x)
    for num_steps in (100, 300):
        evidence = pv.AnnealedImportanceSampling(model, guide, num_steps=num_steps, num_chains=300, seed=0, **QUIET)(x)
        assert float((evidence.barrier.length / truth - 1).abs().max()) < 0.04
        assert evidence.barrier.num_steps == num_steps


def test_a_run_predicts_the_variance_of_longer_ones():
    """T times the variance stays: within a quarter on average, from 60 to 400 steps, and it is not below the barrier's."""
    lm, x, model, guide = pair()
    runs = {
        steps: pv.AnnealedImportanceSampling(model, guide, num_steps=steps, num_chains=300, seed=0, **QUIET)(x).barrier
        for steps in (60, 400)
    }
    per_step = {steps: float((steps * barrier.variance).mean()) for steps, barrier in runs.items()}
    assert 0.8 < per_step[60] / per_step[400] < 1.25 * 1.2  # a little more while steps are few
    limit = float(exact_barrier(lm, x).square().mean())
    assert limit < per_step[400] < 2 * limit  # schedule and transitions are not ideal, and not far from it


def test_enough_steps_are_enough():
    """At the number that a short run asks for, the variance of the log-weights is near one half, and errors are right."""
    lm, x, model, guide = pair(4)
    short = pv.AnnealedImportanceSampling(model, guide, num_steps=60, num_chains=30, seed=1, **QUIET)
    with pytest.warns(UnreliableEvidenceWarning, match=r"Raise num_steps to \d+ and num_chains"):
        evidence = short(x)
    number = evidence.barrier.num_enough
    assert number > 120 and bool(evidence.doubts["steps"].any()) and f"{number} steps are enough" in one_line(evidence)
    assert f"num_steps to {number}" in one_line(evidence)
    enough = pv.AnnealedImportanceSampling(model, guide, num_steps=number, num_chains=100, seed=2, **QUIET)(x)
    assert float(enough.barrier.variance.median()) < 0.5 and "steps" not in enough.doubts  # of 100 chains tails are judged
    off = (enough.log_evidence - lm.log_evidence(x)).abs() / enough.std_error
    assert float(off.max()) < 4.5 and float(enough.std_error.max()) < 0.15


def test_a_start_at_the_posterior_needs_one_step():
    lm, x, model, guide = pair()
    evidence = pv.AnnealedImportanceSampling(model, guide, num_steps=5, num_chains=8, seed=0, progress=False)(x)
    assert float(evidence.barrier.length.max()) < 0.1 and evidence.barrier.num_enough == 1
    assert "barrier of 0.0 (median): 1 step is enough" in one_line(evidence) and not bool(evidence.doubts["steps"].any())


def test_one_chain_has_no_spread():
    _, x, model, guide = pair()
    evidence = pv.AnnealedImportanceSampling(model, guide, num_steps=5, num_chains=1, seed=0, **QUIET)(x)
    assert evidence.barrier is None and evidence.unchecked["steps"] == "one chain has no spread"


def test_records_keep_it():
    lm, x, model, guide = pair()
    estimator = pv.AnnealedImportanceSampling(model, guide, num_steps=100, num_chains=16, seed=0, **QUIET)
    whole = pv.evaluate(estimator, list(x.split(3)), progress=False)
    assert len(whole.barrier) == 6 and torch.equal(whole.select(torch.arange(2)).barrier.length, whole.barrier.length[:2])
    written = json.loads(json.dumps(whole.to_dict()))["barrier"]
    assert written["num_steps"] == 100 and len(written["enough"]) == 6
    with pytest.raises(ValueError, match="num_steps"):
        pv.Barrier.cat([whole.barrier, pv.Barrier(whole.barrier.length, whole.barrier.variance, 7)])
    assert pv.Evidence.cat([whole, whole]).barrier.num_steps == 100
    assert make_evidence([0.0, 1.0]).barrier is None


def test_the_sandwich_says_it_too():
    _, x, model, guide = pair()
    simulation = pv.simulate(model, x, seed=0)
    sandwich = pv.BidirectionalMonteCarlo(
        model, guide, latents=simulation.latents, num_steps=50, num_chains=8, seed=0, progress=False
    )(simulation.observed["x"])
    assert len(sandwich.lower.barrier) == 6 and sandwich.upper.barrier is None
    assert "enough for 95% of the data, 50 ran" in one_line(sandwich)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["single", "double"])
def test_the_quantile_is_that_of_torch(dtype):
    """Bit for bit: it is there because that of torch copies the data four times and refuses more than 16 million of them."""
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 3, 20, 21, 100, 1001):
        values = (4 + 2 * torch.randn(number, generator=generator, dtype=dtype)).exp()
        for share in (0.05, 0.5, 0.95):
            assert quantile_in_place(values.clone(), share) == float(values.double().quantile(share))
