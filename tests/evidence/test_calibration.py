"""Intervals cover as often as they say, by tail index of the weights; tests/benchmarks/evidence_calibration.py has more.

The evidence of both targets is 1. With 500 replicates a coverage of 90% is seen below 86% once in 700 runs, and the pooled
3,000 below 91.6% at 93% as rarely.
"""

import math

import pytest
import torch
from torch.distributions import Gamma, Normal

from pyro_vae.evidence import Evidence
from pyro_vae.ops import effective_sample_size, log_mean_exp, log_mean_exp_std_error, pareto_smooth

K, REPLICATES = 1000, 500


def weights(target, k):
    """Log-weights (K, B) of tail index k whose mean is 1: p over q at draws of q, p wider or heavier than q."""
    p, q = {
        "Gaussian": (Normal(0.0, 1.0), Normal(0.0, math.sqrt(1 - k))),
        "Gamma": (Gamma(3.0, 1 - k), Gamma(3.0, 1.0)),
    }[target]
    x = q.sample((K, REPLICATES))
    return (p.log_prob(x) - q.log_prob(x)).double()


def intervals(log_weight):
    smoothed, pareto_k = pareto_smooth(log_weight)
    none = torch.zeros_like(pareto_k)
    record = Evidence(
        log_evidence=log_mean_exp(log_weight, 0),
        std_error=log_mean_exp_std_error(log_weight),
        elbo=none,
        elbo_std_error=none,
        ess=effective_sample_size(log_weight),
        pareto_k=pareto_k,
        smoothed=log_mean_exp(smoothed, 0),
        bound="lower",
        num_particles=K,
        cost=K,
    )
    return record, record.confidence_interval(0.95)


def share(low, high):
    return float(((low <= 0) & (high >= 0)).double().mean())


def test_coverage_by_tail_index():
    found = {}
    for target in ("Gaussian", "Gamma"):
        for k in (0.25, 0.45, 0.65):
            record, (low, high) = intervals(weights(target, k))
            found[target, k] = share(low, high)
            assert float((high - low).median()) < 12 * float(
                record.std_error.median()
            )  # no interval covers by being endless
    print(found)
    assert min(found.values()) > 0.86, found
    assert sum(found.values()) / len(found) > 0.916, found


@pytest.mark.parametrize("target", ["Gaussian", "Gamma"])
def test_the_plain_interval_would_not_do(target):
    """So that the test above is known to be able to fail: v +- 1.96 s misses on the low side where the tail is heavy."""
    record, _ = intervals(weights(target, 0.65))
    half = 1.96 * record.std_error
    assert share(record.log_evidence - half, record.log_evidence + half) < 0.86
