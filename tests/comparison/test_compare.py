"""`compare`: differences and errors against closed forms, what it claims, refuses and says."""

import json
import math
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import pyro
import pytest
import torch
from pair_helpers import (
    F64,
    SIGMAS,
    exact_pair,
    guide_of,
    linear_gaussian,
    make_evidence,
    make_gaps,
    model_of,
    one_line,
    posterior_moments,
    quiet,
    scaled_family,
)
from pyro import distributions as dist

import pyro_vae as pv
from pyro_vae.errors import ComparisonError, OptionError, UnreliableEvidenceWarning
from pyro_vae.exact import LinearGaussian

NAN, INF = math.nan, math.inf


def noise(size, seed=0, scale=1.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def shifted(mean, size=100, seed=0, **fields):
    """Differences with a standard deviation of one from `plain(size)`, and this mean."""
    values = noise(size, seed)
    return make_evidence(plain(size) + (values - values.mean()) / values.std() + mean, **{"std_error": 0.01, **fields})


def plain(size=100):
    return -100 + noise(size, seed=99, scale=10.0)


def base(size=100, **fields):
    return make_evidence(plain(size), **{"std_error": 0.01, **fields})


# Closed forms


def two_models(num_data):
    """Data from the first; the second has other weights, bias and noise."""
    one, x = linear_gaussian(num_data=num_data)
    two = LinearGaussian(one.weight * 1.15, one.bias + 0.1, one.variance * 1.1)
    return one, two, x


def moments_of_difference(one, two):
    """Mean and variance of log p_1(x) - log p_2(x) for x from the first: of a quadratic form in normals."""
    c1, c2 = (m.weight @ m.weight.T + m.variance * torch.eye(len(m.bias), dtype=F64) for m in (one, two))
    p1, p2 = torch.linalg.inv(c1), torch.linalg.inv(c2)
    shift = one.bias - two.bias  # x = b_1 + u, u ~ N(0, C_1): d = u'(P_2 - P_1)u / 2 + shift'P_2 u + constant
    a, b = (p2 - p1) / 2, p2 @ shift
    constant = 0.5 * shift @ p2 @ shift + 0.5 * (torch.logdet(c2) - torch.logdet(c1))
    mean = torch.trace(a @ c1) + constant
    return float(mean), float(2 * torch.trace(a @ c1 @ a @ c1) + b @ c1 @ b)


def test_exact_records_of_two_linear_gaussian_models():
    """Differences to rounding; no Monte Carlo error. The sampling error is that of the sample to rounding."""
    one, two, x = two_models(num_data=400)
    records = {n: pv.ExactEvidence(*exact_pair(m), seed=0)(x) for n, m in (("one", one), ("two", two))}
    pair = pv.compare(records).pair("one", "two")
    truth = one.log_evidence(x) - two.log_evidence(x)
    assert pair.first == "one" and torch.allclose(pair.difference, truth, atol=1e-10)
    mean = pair.mean()
    assert float(mean.std_error) == 0.0
    assert float(mean.sampling_error) == pytest.approx(float(truth.std()) / 400**0.5, rel=1e-10)


def test_errors_of_a_sample_are_those_of_its_population():
    """The sampling error is within 4.5 of its own errors, sqrt((kurtosis - 1) / 4 N) or some 2%, that of the population,
    whose mean is within 4.5 of it. The values are those of the closed form, as those of exact records are to rounding."""
    one, two, x = two_models(num_data=4000)
    records = {n: make_evidence(m.log_evidence(x), 0.0, bound="exact") for n, m in (("one", one), ("two", two))}
    pair = pv.compare(records).pair("one", "two")
    mean, (population, variance) = pair.mean(), moments_of_difference(one, two)
    expected = math.sqrt(variance / 4000)
    assert float(mean.sampling_error) == pytest.approx(expected, rel=0.1)
    assert abs(float(mean.value) - population) < SIGMAS * expected and expected < 0.2 * population
    assert pair.told_apart and pair.p_value < 1e-6


def widened(moments, factor):
    def family(x):
        loc, root = moments(x)
        return dist.MultivariateNormal(loc, scale_tril=factor * root)

    return family


def test_monte_carlo_errors_of_two_linear_gaussian_models():
    """A guide with c times the posterior's spread: var(w) / p(x)^2 = (c^2 / sqrt(2 c^2 - 1))^D - 1 for weights of D latents.

    The error of K weights is the root of that over K, and of the difference the root of the sum of squares over N.
    """
    one, two, x = two_models(num_data=200)
    particles, records, variance = 2000, {}, 0.0
    for seed, (name, lm, factor) in enumerate((("one", one, 1.3), ("two", two, 1.5))):
        guide = guide_of(widened(posterior_moments(lm), factor))
        records[name] = pv.ImportanceSampling(model_of(lm), guide, num_particles=particles, seed=seed)(x)
        variance += factor**4 / (2 * factor**2 - 1) - 1  # D = 2
    pair = pv.compare(records).pair("one", "two")
    expected = math.sqrt(variance / particles / 200)
    mean = pair.mean()
    assert float(mean.std_error) == pytest.approx(expected, rel=0.05)
    truth = (one.log_evidence(x) - two.log_evidence(x)) * (1 if pair.first == "one" else -1)
    z = (pair.difference - truth) / pair.std_error
    assert float(z.abs().max()) < SIGMAS and 0.85 < float(z.std()) < 1.15
    assert abs(float(mean.value - truth.mean())) < SIGMAS * expected and expected < 0.01
    assert float(mean.sampling_error) == pytest.approx(float(truth.std()) / 200**0.5, rel=0.1)


def test_linear_vaes_of_two_sizes():
    """The package's own models in float32, on data of their own: differences are those of `exact()`."""
    torch.manual_seed(0)
    vaes = {"small": pv.LinearVAE(5, 1, scale=0.7), "large": pv.LinearVAE(5, 3, scale=0.7)}
    x = torch.randn(300, 5)
    records = {name: pv.ExactEvidence(vae.model, vae.guide, seed=0)(x) for name, vae in vaes.items()}
    comparison = pv.compare(records)
    truth = vaes["small"].exact().log_evidence(x) - vaes["large"].exact().log_evidence(x)
    assert torch.allclose(comparison.difference("small", "large").float(), truth, atol=1e-4)
    assert torch.equal(comparison.difference("small", "large"), -comparison.difference("large", "small"))
    error = comparison.pair("small", "large").mean().sampling_error
    assert float(error) == pytest.approx(float(truth.std()) / 300**0.5, rel=1e-4)


def test_where_the_elbo_prefers_the_worse_model():
    """The first model is that of the data, its guide far too wide; the second is worse and its guide is exact. The gap of a
    diagonal guide with c times the marginal spreads has a closed form, so both orders are known."""
    one, x = linear_gaussian(num_data=400)
    two = LinearGaussian(one.weight * 1.3, one.bias, one.variance * 1.3)
    wide, exact = guide_of(scaled_family(one, 2.0)), exact_pair(two)[1]
    records = {
        "plain": pv.ExactEvidence(model_of(one), wide, seed=0)(x),
        "rich": pv.InferenceGaps(model_of(two), exact, num_particles=200, seed=0)(x),
    }
    comparison = pv.compare(records)
    assert comparison.ranking == ("plain", "rich") and comparison.elbo_ranking == ("rich", "plain")
    assert comparison.pairs[0].told_apart and comparison.elbo_pairs[0].told_apart
    loc, root = posterior_moments(one)(x)
    q = scaled_family(one, 2.0)(x)
    gap = torch.distributions.kl_divergence(
        dist.MultivariateNormal(q.mean, covariance_matrix=torch.diag_embed(q.variance)),
        dist.MultivariateNormal(loc, scale_tril=root),
    )
    truth = two.log_evidence(x) - (one.log_evidence(x) - gap)
    by_elbo = comparison.pair("rich", "plain", elbo=True)
    assert by_elbo.first == "rich"
    z = (float(by_elbo.mean().value) - float(truth.mean())) / float(by_elbo.mean().std_error)
    assert abs(z) < SIGMAS
    text = str(comparison)
    sentence = next(s for s in comparison.verdict().split(". ") if s.startswith("By ELBO"))
    assert "By ELBO 'rich' is ahead of 'plain' by" in sentence and "but by log p(x) behind by" in sentence
    assert f"{float(by_elbo.mean().value):.3f}" in sentence
    assert f"{float(comparison.pairs[0].mean().value):.3f}" in sentence
    found = float(re.search(r"([\d.]+) nats for 'plain'", sentence)[1])
    assert found == pytest.approx(float(gap.mean()), abs=SIGMAS * float(by_elbo.mean().std_error))
    assert "By ELBO 'rich' is ahead of 'plain'" in text


# Claims


def test_p_by_hand():
    """A mean of .5, standard deviation 1, N = 100: t = 5, and p that of t with 99 degrees of freedom."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not a dependency")
    pair = pv.compare({"a": base(std_error=0.0, bound="exact"), "b": shifted(0.5, std_error=0.0, bound="exact")}).pairs[0]
    assert pair.first == "b" and pair.told_apart
    assert float(pair.mean().value) == pytest.approx(0.5) and float(pair.mean().sampling_error) == pytest.approx(0.1)
    assert pair.p_value >= 2 * float(stats.t.sf(5.0, 99)) and pair.p_value < 1e-4
    low, high = pair.confidence_interval()
    assert (low, high) == (pytest.approx(0.5 - 1.98422 * 0.1, rel=1e-3), pytest.approx(0.5 + 1.98422 * 0.1, rel=1e-3))


def test_three_models_are_corrected_for_three_pairs():
    comparison = pv.compare({"a": base(), "b": shifted(0.26), "c": shifted(0.3, seed=5)})
    assert len(comparison.pairs) == 3
    for pair in comparison.pairs:
        alone = pv.compare({n: comparison.records[n] for n in (pair.first, pair.second)}).pairs[0]
        assert alone.p_value == pair.p_value == alone.corrected <= pair.corrected <= 3 * pair.p_value + 1e-12
    assert min(p.corrected for p in comparison.pairs) == pytest.approx(3 * min(p.p_value for p in comparison.pairs))
    assert comparison.ranking == ("c", "b", "a")
    assert comparison.verdict().startswith("By log p(x) 'c' is ahead")
    assert "cannot be told apart from 'b'" in comparison.verdict()


def test_the_best_of_all():
    comparison = pv.compare({"a": base(), "b": shifted(1.0), "c": shifted(2.0, seed=5)})
    assert comparison.verdict().startswith("By log p(x) 'c' is the best, told apart from all others.")


def test_these_data_and_others_are_two_questions():
    """The order on these data is known to .01 / sqrt(100) nats, and the population's is not."""
    comparison = pv.compare({"a": base(), "b": shifted(0.05)})
    pair = comparison.pairs[0]
    assert pair.claim == "cannot be told apart" and pair.certain_for_these_data
    assert "On these 100 data 'b' is ahead of 'a' by more than Monte Carlo error" in comparison.verdict()
    blunt = pv.compare({"a": base(std_error=1.0), "b": shifted(0.05, std_error=1.0)}).pairs[0]
    assert not blunt.certain_for_these_data


def test_the_bias_of_the_loser_counts_against_the_claim():
    """Half its squared error: log of a mean of weights is that much too low."""
    sharp, dull = {"std_error": 0.01}, {"std_error": 0.7}
    pair = pv.compare({"a": base(**dull), "b": shifted(0.3, **sharp)}).pairs[0]
    assert pair.first == "b" and pair.slack >= 0.7**2 / 2
    assert pair.claim == "cannot be told apart"
    assert pv.compare({"a": base(**sharp), "b": shifted(0.3, **dull)}).pairs[0].told_apart
    # what Pareto smoothing adds to the loser, too
    lifted = base(smoothed=plain() + 0.2)
    assert pv.compare({"a": lifted, "b": shifted(0.3)}).pairs[0].slack == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("bound", "loser", "claim"), [
    ("lower", True, "not to be trusted"),  # it may be too low
    ("lower", False, "told apart"),  # the winner may be too low, and is ahead all the same
    ("upper", True, "told apart"),
    ("upper", False, "not to be trusted"),
    ("consistent", True, "not to be trusted"),
    ("consistent", False, "not to be trusted"),
])  # fmt: skip
def test_doubts_matter_in_one_direction(bound, loser, claim):
    k = torch.where(torch.arange(100) < 20, 0.9, 0.0).to(F64)
    first, second = ({"bound": bound, "pareto_k": k} if side else {"bound": bound} for side in (loser, not loser))
    with quiet():
        pair = pv.compare({"a": base(**first), "b": shifted(1.0, **second)}).pairs[0]
    assert pair.first == "b" and pair.claim == claim
    assert int(pair.doubted.sum()) == 20 and bool(pair.mean().doubt) == (claim == "not to be trusted")
    assert ("at least" in one_line(pair)) == (claim == "told apart")


def test_few_doubts_must_not_make_the_difference():
    """Four data of a hundred are in doubt: what is claimed must hold without them."""
    k = torch.where(torch.arange(100) < 4, 0.9, 0.0).to(F64)
    loser = base(pareto_k=k)
    assert pv.compare({"a": loser, "b": shifted(1.0)}).pairs[0].told_apart
    d = 0.02 * noise(100)
    d[:4] += 5.0
    pair = pv.compare({"a": loser, "b": make_evidence(plain() + d, 0.01)}).pairs[0]
    assert pair.claim == "cannot be told apart"


def test_a_warning_names_the_pairs_and_the_remedy():
    k = torch.full((100,), 0.9, dtype=F64)
    with pytest.warns(UnreliableEvidenceWarning, match="'b' - 'a'.*Raise num_particles") as caught:
        comparison = pv.compare({"a": base(pareto_k=k, method="importance sampling"), "b": shifted(1.0)})
    assert len(caught) == 1
    assert "not to be trusted: 100 of 100 data in doubt" in one_line(comparison)
    assert not bool(comparison.reliable.any()) and bool(comparison.doubts["tails"].all())


def test_too_few_particles_to_judge_are_a_doubt_about_all_data():
    with quiet():
        pair = pv.compare({"a": base(num_particles=50), "b": shifted(1.0)}).pairs[0]
    assert pair.claim == "not to be trusted"
    assert pv.compare({"a": base(), "b": shifted(1.0, num_particles=50)}).pairs[0].told_apart


def test_rounding_is_a_doubt_in_both_directions():
    rounded = {"checks": {"precision": torch.arange(100) < 20}}
    for first, second in ((rounded, {}), ({}, rounded)):
        with quiet():
            comparison = pv.compare({"a": base(**first), "b": shifted(1.0, **second)})
        assert comparison.pairs[0].claim == comparison.elbo_pairs[0].claim == "not to be trusted"


def test_the_same_model_in_two_precisions_cannot_be_told_apart():
    """All data may share what sums in float32 lose, so its spread does not tell."""
    exact = base(std_error=0.0, bound="exact")
    single = replace(exact, log_evidence=(exact.log_evidence + 2e-5).float(), elbo=exact.elbo.float())
    assert pv.compare({"a": exact, "b": single}).pairs[0].claim == "cannot be told apart"


def test_equal_numbers():
    comparison = pv.compare({"a": base(), "b": base()})
    assert comparison.pairs[0].claim == "cannot be told apart" and comparison.pairs[0].p_value == 1.0
    assert not comparison.pairs[0].few_decide


def test_a_constant_difference_without_error_is_told_apart():
    exact = {"std_error": 0.0, "bound": "exact"}
    pair = pv.compare({"a": base(**exact), "b": make_evidence(plain() + 1, **exact)}).pairs[0]
    assert pair.told_apart and float(pair.mean().sampling_error) < 1e-10


def test_one_datum_says_nothing_about_others():
    comparison = pv.compare({"a": make_evidence([-5.0], 0.01), "b": make_evidence([-3.0], 0.01)})
    pair = comparison.pairs[0]
    assert pair.claim == "cannot be told apart" and pair.certain_for_these_data
    assert math.isnan(pair.confidence_interval()[0]) and bool(pair.influence.isnan().all())
    assert "nan" in one_line(comparison)


@pytest.mark.parametrize("bad", [-INF, NAN])
def test_data_without_a_finite_number_are_left_out_and_in_doubt(bad):
    values = plain()
    values[3] = bad
    one = make_evidence(values, 0.01)
    pair = pv.compare({"a": one, "b": shifted(1.0)}).pairs[0]
    assert pair.told_apart and not bool(pair.known[3]) and math.isfinite(float(pair.mean().value))
    assert not pair.certain_for_these_data and bool(pair.influence[3].isnan())
    assert 3 not in pair.deciding
    values[:6] = bad
    with quiet():
        comparison = pv.compare({"a": make_evidence(values, 0.01), "b": shifted(1.0)})
    assert comparison.pairs[0].claim == "not to be trusted"
    assert json.dumps(comparison.to_dict()["pairs"])
    with quiet():
        nothing = pv.compare({"a": make_evidence(values * NAN, 0.01), "b": shifted(1.0)})
    assert nothing.pairs[0].claim == "not to be trusted" and "nan" in one_line(nothing)
    plt.close(nothing.plot().figure)


def test_unknown_errors_leave_the_spread():
    pair = pv.compare({"a": base(std_error=NAN), "b": shifted(1.0)}).pairs[0]
    assert math.isnan(float(pair.mean().std_error)) and pair.told_apart


# Which data decide


def test_few_data_that_decide_are_named():
    d = -0.05 + 0.01 * noise(100)
    d[[7, 40, 41]] = torch.tensor([3.0, 2.0, 5.0], dtype=F64)
    comparison = pv.compare({"a": base(), "b": make_evidence(plain() + d, 0.01)})
    pair = comparison.pairs[0]
    assert pair.first == "b" and pair.deciding == [41, 7] and pair.few_decide  # without them -.05 * 97 + 2 < 0
    assert float(d.sum() - 8) < 0 < float(d.sum() - 5)
    assert "2 of 100 data account for the lead of 'b' over 'a': without data [41, 7] there is none." in comparison.verdict()
    assert pair.claim == "cannot be told apart"


def test_influence_is_the_change_of_the_mean():
    pair = pv.compare({"a": base(20), "b": shifted(0.5, size=20)}).pairs[0]
    for n in range(20):
        left = torch.cat([pair.difference[:n], pair.difference[n + 1 :]]).mean()
        assert float(pair.influence[n]) == pytest.approx(float(pair.mean().value - left), abs=1e-12)
    assert not pair.few_decide


# Refusals


def with_fingerprint(record, fingerprint):
    return replace(record, fingerprint=torch.as_tensor(fingerprint))


def test_the_same_data():
    first, second = (with_fingerprint(r, torch.arange(100)) for r in (base(), shifted(1.0)))
    comparison = pv.compare({"a": first, "b": second})
    assert not comparison.remarks and "same data" not in comparison.unchecked


@pytest.mark.parametrize(("theirs", "said"), [
    (torch.arange(100).roll(1), "same data in different orders.*without shuffle=True"),
    (torch.arange(100).where(torch.arange(100) != 5, -1), r"different data: data \[5\] of 100 differ.*without shuffle=True"),
    (torch.arange(100) + 1000, "different data: all data differ"),
])  # fmt: skip
def test_other_data_are_refused(theirs, said):
    first, second = with_fingerprint(base(), torch.arange(100)), with_fingerprint(shifted(1.0), theirs)
    with pytest.raises(ComparisonError, match=said):
        pv.compare({"a": first, "b": second})
    assert "'b': no fingerprint" in pv.compare({"a": first, "b": replace(second, fingerprint=None)}).remarks[0]


def test_real_data_in_another_order_scale_or_number():
    one, two, x = two_models(num_data=20)
    records = [
        pv.ExactEvidence(*exact_pair(m), seed=0)(data) for m, data in ((one, x), (two, x), (two, x.flip(0)), (two, 2 * x))
    ]
    assert not pv.compare({"a": records[0], "b": records[1]}).remarks
    with pytest.raises(ComparisonError, match="different orders"):
        pv.compare({"a": records[0], "b": records[2]})
    with pytest.raises(ComparisonError, match="another scale are other data"):
        pv.compare({"a": records[0], "b": records[3]})
    with pytest.raises(ComparisonError, match=r"different numbers of data \('a': 20, 'b': 7\).*drop_last"):
        pv.compare({"a": records[0], "b": records[1].select(torch.arange(7))})


def test_records_of_ones_own_are_compared_with_a_remark():
    comparison = pv.compare({"a": base(), "b": shifted(1.0)})
    assert "no fingerprint, so it was not checked that the data are the same" in one_line(comparison)
    assert comparison.unchecked["same data"]


def test_a_third_record_is_checked_where_the_first_has_no_fingerprint():
    second, third = with_fingerprint(base(), torch.arange(100)), with_fingerprint(base(), torch.arange(100) + 1)
    with pytest.raises(ComparisonError, match="'b' and 'c'"):
        pv.compare({"a": base(), "b": second, "c": third})


def test_subsamples_without_a_fingerprint():
    first, second = replace(base(), index=torch.arange(100)), replace(shifted(1.0), index=torch.arange(100) + 1)
    with pytest.raises(ComparisonError, match="give both estimators the same seed="):
        pv.compare({"a": first, "b": second})


@pytest.mark.parametrize(("records", "said"), [
    ([1, 2], "dict of two or more records by name, got list"),
    ({"a": make_evidence([-1.0])}, "got 1 record"),
    ({"a": make_evidence([-1.0]), 3: make_evidence([-1.0])}, "got Evidence under 3"),
    ({"a": make_evidence([-1.0]), "b": -1.0}, "got float under 'b'.*of a Sandwich its lower"),
    ({"a": make_evidence([]), "b": make_evidence([])}, "hold no data"),
])  # fmt: skip
def test_what_is_no_mapping_of_records(records, said):
    with pytest.raises(ComparisonError, match=said):
        pv.compare(records)


@pytest.mark.parametrize("level", [0.0, 1.0, -1, "high", NAN])
def test_levels(level):
    with pytest.raises(OptionError, match="level must be a finite number in"):
        pv.compare({"a": base(), "b": base()}, level=level)
    assert pv.compare({"a": base(), "b": shifted(0.25)}, level=0.9).pairs[0].told_apart


def test_probabilities_and_densities_are_not_compared():
    x = torch.bernoulli(torch.full((30, 6), 0.4), generator=torch.Generator().manual_seed(0))

    def model(likelihood):
        def program(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("x", likelihood(z.unsqueeze(-1)).expand(z.shape + (6,)).to_event(1), obs=x)

        return program

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    mass = model(lambda z: dist.Bernoulli(logits=z))
    density = model(lambda z: dist.ContinuousBernoulli(logits=z))
    with quiet():
        records = {
            n: pv.ImportanceSampling(m, guide, num_particles=100, seed=0)(x) for n, m in (("m", mass), ("d", density))
        }
    with pytest.raises(ComparisonError, match="not of one kind \\('m': probability, 'd': density\\)"):
        pv.compare(records)
    assert len(pv.compare({"m": records["m"], "own": replace(records["m"], measure="")}).pairs) == 1


def test_scores_are_compared_with_scores_alone():
    score = {"support_checked": False}
    with pytest.raises(ComparisonError, match="'b' hold scores of values outside the support"):
        pv.compare({"a": base(), "b": shifted(1.0, **score)})
    comparison = pv.compare({"a": base(**score), "b": shifted(1.0, **score)})
    assert "not log p(x)" in " ".join(comparison.remarks) and "score" in str(comparison).splitlines()[1]


def test_what_is_given_is_said():
    comparison = pv.compare({"a": base(given=("w",)), "b": shifted(1.0)})
    assert "Given: 'a' 'w'." in comparison.remarks


# The record


def test_gaps_and_evidence_mix():
    gaps = make_gaps(1.0, 0.5, num_data=50)
    other = make_evidence(gaps.log_evidence + noise(50) - 3, 0.01)
    comparison = pv.compare({"gaps": gaps, "evidence": other})
    pair = comparison.elbo_pairs[0]
    expected = math.sqrt(0.01**2 + 0.2**2) if "gaps" in (pair.first, pair.second) else NAN
    assert float(pair.std_error[0]) == pytest.approx(expected)
    assert comparison.pairs[0].first == "gaps"


def test_fits_that_did_not_converge_are_no_doubt_about_log_p():
    converged = torch.zeros(50, dtype=torch.bool)
    gaps = make_gaps(1.0, 0.5, num_data=50, converged=converged)
    comparison = pv.compare({"gaps": gaps, "other": make_evidence(gaps.log_evidence + noise(50) + 3, 0.01)})
    assert comparison.pairs[0].told_apart and "not converged" not in comparison.doubts


def test_it_prints_on_a_page_and_becomes_json():
    comparison = pv.compare({f"model {i}": shifted(0.2 * i, seed=i) for i in range(8)})
    text = str(comparison)
    assert len(text.splitlines()) < 60 and max(len(line) for line in text.splitlines()) <= 125
    assert "and 21 more pairs of the other models" in text
    assert len(json.loads(json.dumps(comparison.to_dict()))["pairs"]) == 28
    assert comparison.verdict() in comparison.to_dict()["verdict"]


def test_unknown_names():
    comparison = pv.compare({"a": base(), "b": shifted(1.0)})
    with pytest.raises(KeyError, match="no pair of 'a' and 'c'"):
        comparison.difference("a", "c")


def test_nothing_of_the_records_changes_and_no_noise_is_drawn():
    first, second = base(), shifted(1.0)
    before, state = first.to_dict(), torch.get_rng_state()
    pv.compare({"a": first, "b": second})
    assert first.to_dict() == before and torch.equal(torch.get_rng_state(), state)


def test_the_picture_has_both_intervals_of_each_pair():
    comparison = pv.compare({"a": base(std_error=0.5, elbo=plain() - 1), "b": shifted(0.9, elbo=plain() - 2)})
    fig, ax = plt.subplots()
    assert comparison.plot(ax) is ax is pv.plots.plot_comparison(comparison, ax)
    pair = comparison.pairs[0]
    thin, thick, mark = ax.lines[:3]
    assert list(thin.get_xdata()) == pytest.approx(list(pair.confidence_interval()))
    half = 1.959964 * float(pair.mean().std_error)
    assert list(thick.get_xdata()) == pytest.approx([0.9 - half, 0.9 + half])
    assert float(mark.get_xdata()[0]) == pytest.approx(0.9)
    elbo = ax.lines[5]  # of 'a' - 'b' by its own order, drawn as 'b' - 'a'
    assert float(elbo.get_xdata()[0]) == pytest.approx(-1.0)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b - a"]
    assert "nats" in ax.get_xlabel()
    plt.close(fig)


def test_a_pair_in_doubt_is_drawn_without_intervals():
    k = torch.full((100,), 0.9, dtype=F64)
    with quiet():
        ax = pv.compare({"a": base(pareto_k=k), "b": shifted(1.0)}).plot()
    assert ax.lines[0].get_marker() == "x"
    plt.close(ax.figure)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_model_that_gives_a_datum_no_density_is_not_told_apart_as_the_better_one(count):
    """Its mean is -inf, however far it is ahead on all other data. Where both have none, nothing is lost."""
    values = shifted(1.0).log_evidence.clone()
    values[:count] = -INF
    pair = pv.compare({"a": make_evidence(values, 0.01), "b": base()}).pairs[0]
    assert pair.first == "a" and not pair.told_apart and pair.corrected == 1.0
    other = plain()
    other[:count] = -INF
    assert pv.compare({"a": make_evidence(values, 0.01), "b": make_evidence(other, 0.01)}).pairs[0].told_apart


def test_a_difference_in_doubt_is_said_to_be_so_once():
    with quiet():
        comparison = pv.compare({"a": base(), "b": shifted(-1.0, pareto_k=torch.full((100,), 2.0))})
    said = comparison.verdict()
    assert "By ELBO" in said and "nats (not to be trusted)" in said and "trusted) (not" not in said


def test_the_labels_of_the_plot_lie_inside_the_figure():
    ax = pv.compare({"large network": base(), "small network": shifted(1.0)}).plot()
    ax.figure.canvas.draw()
    box = ax.xaxis.label.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= ax.figure.bbox.x1
    plt.close(ax.figure)
