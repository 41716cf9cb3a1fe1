"""The test behind "told apart": its parts against closed forms, and how often it claims something about equal models."""

import math

import pytest
import torch
from pair_helpers import F64, make_evidence

from pyro_vae.comparison.compare import all_pairs
from pyro_vae.comparison.sides import side_of_log_evidence
from pyro_vae.comparison.told_apart import holm, p_value_of, skewness
from pyro_vae.records import LEVEL, student_quantile, student_tail

REPLICATES = 1000


def test_the_tail_of_student_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not a dependency")
    for df in (1, 2, 3, 4, 9, 10, 99, 100, 1001, 10**6):
        for t in (0.0, 0.1, 1.0, 2.0, 5.0):
            assert student_tail(t, df) == pytest.approx(2 * float(stats.t.sf(t, df)), rel=1e-3), (df, t)


@pytest.mark.parametrize("df", [1, 2, 5, 30, 200])
def test_the_tail_is_the_inverse_of_the_quantile(df):
    assert student_tail(student_quantile(0.95, df), df) == pytest.approx(0.05, rel=3e-3)


def test_holm_by_hand():
    """.01 * 4, .03 * 2 lifted to .06 by .02 * 3, .04 * 1 lifted to it too."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.2]) == [0.2]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_skewness_by_hand():
    """0, 0, 3: moments 1, 2, 2, so 2 / 2^1.5 sqrt(6) / 1."""
    assert skewness(torch.tensor([0.0, 0.0, 3.0], dtype=F64)) == pytest.approx(math.sqrt(3))
    assert skewness(torch.tensor([1.0, 1.0, 1.0])) == 0.0
    assert skewness(torch.tensor([1.0, 5.0])) == 0.0


def test_p_is_never_below_that_of_student():
    generator = torch.Generator().manual_seed(0)
    stats = pytest.importorskip("scipy.stats", reason="scipy is not a dependency")
    for n in (2, 3, 5, 20, 200):
        for _ in range(20):
            d = torch.randn(n, generator=generator, dtype=F64).exp() - 0.5
            d = d if float(d.mean()) > 0 else -d
            plain = float(stats.ttest_1samp(d.numpy(), 0.0).pvalue)
            assert p_value_of(d, 0 * d, 0.0) >= plain - 1e-12


def test_slack_and_monte_carlo_error_count_against_a_claim():
    d = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.05, 0.95], dtype=F64)
    plain = p_value_of(d, 0 * d, 0.0)
    assert plain < 1e-3
    assert p_value_of(d, 0 * d, 0.9) > plain and p_value_of(d, 0 * d, 1.0) == 1.0
    # six errors of 3 are one of 3 / sqrt(6) for the mean, which is then 0.8 of them above zero
    assert p_value_of(d, 0 * d + 3.0, 0.0) > 0.4
    assert p_value_of(d, d * math.nan, 0.0) == plain  # not known: the spread says it


def test_what_no_test_can_tell():
    assert p_value_of(torch.tensor([3.0]), torch.tensor([0.1]), 0.0) == 1.0  # one datum
    assert p_value_of(torch.zeros(5), torch.zeros(5), 0.0) == 1.0  # the same numbers
    assert p_value_of(torch.full((5,), 2.0), torch.zeros(5), 0.0) == 0.0  # the same difference everywhere, without error


def draws(kind, generator, *shape):
    """Of mean zero and variance one."""
    normal = torch.randn(*shape, generator=generator, dtype=F64)
    if kind == "gaussian":
        return normal
    if kind == "exponential":
        return -torch.rand(*shape, generator=generator, dtype=F64).log() - 1
    return (normal.exp() - math.exp(0.5)) / math.sqrt(math.exp(2) - math.exp(1))


def false_claims(kind, num_models, num_data, monte_carlo, seed=0):
    """In how many of 1,000 comparisons of equal models any pair is told apart, by the part of `compare` about log p(x).

    All models have the same hard and easy data. Of two models the difference has the law of `kind`; of more each model adds
    draws of it. Values come with Monte Carlo noise of their stated error.
    """
    generator = torch.Generator().manual_seed(seed)
    claims = 0
    for _ in range(REPLICATES):
        shared = 5 * torch.randn(num_data, generator=generator, dtype=F64) - 100
        own = draws(kind, generator, num_models, num_data)
        if num_models == 2:
            own[0] = 0.0
        noise = monte_carlo * torch.randn(num_models, num_data, generator=generator, dtype=F64)
        records = {str(m): make_evidence(shared + own[m] + noise[m], monte_carlo) for m in range(num_models)}
        sides = [side_of_log_evidence(name, record, LEVEL) for name, record in records.items()]
        claims += any(pair.told_apart for pair in all_pairs(sides, LEVEL))
    return claims


# At a true rate of 5% more than 66 of 1,000 come in one of a hundred tests; the numbers themselves are at most 50.
@pytest.mark.slow
@pytest.mark.parametrize(("num_models", "num_data"), [(2, 20), (2, 100), (2, 1000), (4, 20)])
@pytest.mark.parametrize("kind", ["gaussian", "exponential", "log-normal"])
def test_equal_models_are_told_apart_at_most_5_times_in_a_hundred(kind, num_models, num_data):
    """`tests/benchmarks/comparison.py` has more of them."""
    claims = false_claims(kind, num_models, num_data, monte_carlo=0.1)
    print(f"{kind}, {num_models} models, {num_data} data: {claims} of {REPLICATES}")
    assert claims <= 50
    assert claims >= 5  # a test that never claims anything would pass too
