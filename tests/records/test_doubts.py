"""One word for what may be wrong with a number: `doubts` and `reliable` of every record, what is printed, what is warned."""

import dataclasses
import functools
import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, guide_of, linear_gaussian, make_evidence, make_gaps, model_of, one_line, quiet, scaled_family

import pyro_vae as pv
from pyro_vae.errors import ConvergenceWarning, PrecisionWarning, UnreliableEvidenceWarning
from pyro_vae.records import doubts as table

METHODS = {
    table.GUIDE_ITSELF: "ImportanceSampling",
    table.FITTED_PROPOSALS: "AdaptiveImportanceSampling",
    table.ANNEALED_CHAINS: "AnnealedImportanceSampling",
    table.REVERSE_CHAINS: "AnnealedImportanceSampling",
    table.EXACT_VALUE: "ExactEvidence",
}


def first(count, num_data):
    return torch.arange(num_data) < count


def heavy(count, num_data):
    return torch.where(first(count, num_data), 0.9, 0.1).to(F64)


# What is in doubt


def test_doubts_are_the_tails_and_the_findings_of_the_checks():
    checks = {"precision": torch.tensor([False, True, False]), "search": torch.tensor([False, False, True])}
    evidence = make_evidence([-1.0, -2.0, -3.0], pareto_k=heavy(1, 3), checks=checks, unchecked={"posterior side": "off"})
    assert list(evidence.doubts) == ["tails", "precision", "search"]
    assert evidence.doubts["tails"].tolist() == [True, False, False]
    assert evidence.reliable.tolist() == [False, False, False]
    assert evidence.select(torch.tensor([0])).doubts["precision"].tolist() == [False]
    plain = json.loads(json.dumps(evidence.to_dict()))
    assert plain["doubts"]["search"] == [False, False, True] and plain["reliable"] == [False] * 3
    assert plain["unchecked"] == {"posterior side": "off"}


@pytest.mark.parametrize(("num_particles", "judged"), [(5, False), (99, False), (100, True)])
def test_tails_are_judged_from_a_hundred_weights_on(num_particles, judged):
    """At K = 5 "0 of 60 above threshold" was printed, where nothing had been judged."""
    k = torch.full((60,), 0.1 if judged else torch.nan, dtype=F64)
    evidence = make_evidence([-1.0] * 60, num_particles=num_particles, pareto_k=k)
    assert ("tails" in evidence.doubts) is judged and ("tails" in evidence.unchecked) is not judged
    assert ("doubts: tails 0 of 60" in one_line(evidence)) is judged
    assert ("tails not judged (K < 100)" in one_line(evidence)) is not judged
    assert bool(evidence.reliable.all())
    assert dataclasses.replace(evidence, bound="upper").unchecked == evidence.unchecked
    exact = make_evidence([-1.0], num_particles=1, bound="exact")
    assert "tails" not in exact.doubts and exact.unchecked == {} and "doubts" not in one_line(exact)


def test_few_weights_are_not_called_judged_by_an_estimator():
    lm, x = linear_gaussian(num_data=60)
    estimator = pv.ImportanceSampling(model_of(lm), guide_of(scaled_family(lm, 0.5)), num_particles=5, seed=0)
    evidence = estimator(x)
    assert "tails not judged (K < 100)" in one_line(evidence) and "tails 0 of 60" not in one_line(evidence)
    gaps = pv.InferenceGaps(model_of(lm), guide_of(scaled_family(lm, 1.0)), num_particles=50, seed=0)(x)
    assert "tails" not in gaps.doubts and "tails not judged (K < 100)" in one_line(gaps)


def test_gaps_add_their_own_doubts():
    checks = {"precision": first(1, 10)}
    gaps = make_gaps(1.0, 0.1, num_data=10, converged=~first(2, 10), checks=checks)
    assert list(gaps.doubts) == ["tails", "precision", "not converged", "below the ELBO"]
    assert gaps.doubts["not converged"].tolist() == [True] * 2 + [False] * 8
    assert gaps.reliable.tolist() == [False] * 2 + [True] * 8
    assert json.loads(json.dumps(gaps.to_dict()))["doubts"]["precision"] == [True] + [False] * 9


def test_a_sandwich_and_a_self_check_join_the_doubts_of_their_parts():
    lower = make_evidence([-1.0] * 4, pareto_k=heavy(1, 4), checks={"search": first(2, 4)})
    upper = make_evidence([-0.9] * 4, pareto_k=heavy(0, 4), unchecked={"search": "reverse chains start at the latents"})
    sandwich = pv.Sandwich(lower, upper)
    assert sandwich.doubts["tails"].tolist() == [True, False, False, False]
    assert sandwich.doubts["search"].tolist() == [True, True, False, False]
    assert sandwich.reliable.tolist() == [False, False, True, True]
    estimate = make_evidence([-1.0] * 4, checks={"precision": ~first(3, 4)})
    check = pv.SelfCheckResult(estimate, sandwich)
    assert set(check.doubts) == {"tails", "search", "precision"}
    assert check.reliable.tolist() == [False, False, True, False]
    for record in (sandwich, check):
        assert json.loads(json.dumps(record.to_dict()))["reliable"] == record.reliable.tolist()
    assert "error not to be trusted: 2 of 4 data in doubt" in one_line(sandwich)


def test_batches_keep_their_doubts_and_what_was_not_checked():
    a = make_evidence([-1.0, -2.0], checks={"precision": torch.tensor([True, False])})
    b = make_evidence([-3.0], unchecked={"precision": "the program cannot be cast"})
    for parts, flags in (([a, b], [True, False, False]), ([b, a], [False, True, False])):
        joined = pv.Evidence.cat(parts)
        assert joined.doubts["precision"].tolist() == flags
        assert "precision 1 of 3 (not all checked: the program cannot be cast)" in one_line(joined)


def test_no_old_word_is_left():
    for record, names in ((pv.Evidence, ("unreliable", "doubtful")), (pv.Gaps, ("refuted", "unreliable"))):
        assert not [name for name in names if hasattr(record, name)]


# What is printed


@pytest.mark.parametrize(("count", "trusted"), [(0, True), (3, True), (4, False), (60, False)])
def test_a_mean_over_many_doubts_prints_no_bare_error(count, trusted):
    """Up to 5% of the data may be in doubt: 3 of 60."""
    evidence = make_evidence([-86.7] * 60, 0.1, pareto_k=heavy(count, 60))
    line = next(line for line in one_line(evidence).splitlines() if "log p(x)" in line)
    assert ("Monte Carlo error" in line) is trusted
    assert (f"-86.700 nats (error not to be trusted: {count} of 60 data in doubt)" in line) is not trusted
    assert f"tails {count} of 60" in one_line(evidence)
    gaps = str(make_gaps(1.0, 0.5, num_data=60, pareto_k=heavy(count, 60))).splitlines()
    for name, concerned in (("ELBO", False), ("log p(x)", True), ("  amortization", False), ("  inference", True)):
        line = next(line for line in gaps if line.startswith(name))
        assert (f"error not to be trusted: {count} of 60 data in doubt" in line) is (concerned and not trusted), line


def test_fits_that_have_not_converged_concern_the_numbers_of_the_optimum_alone():
    summary = make_gaps(1.0, 0.5, num_data=10, converged=~first(5, 10)).summary()
    doubted = {name for name, estimate in summary.items() if estimate.doubt}
    assert doubted == {"optimal_elbo", "amortization", "approximation"}


def test_an_exact_value_under_rounding_is_not_called_exact_without_a_word():
    for count in (1, 60):
        exact = make_evidence([-5.0] * 60, 0.0, bound="exact", method="exact", checks={"precision": first(count, 60)})
        line = next(line for line in one_line(exact).splitlines() if "log p(x)" in line)
        assert line.endswith("bound: exact, up to rounding") and "error 0" not in line
        assert f"error not to be trusted: {count} of 60 data in doubt" in line
        assert "Use float64" in one_line(exact)
    fine = make_evidence([-5.0] * 60, 0.0, bound="exact", method="exact", checks={"precision": first(0, 60)})
    assert "bound: exact\n" in one_line(fine) and "doubts: precision 0 of 60" in str(fine)


def test_what_was_not_checked_is_printed_with_its_reason():
    evidence = make_evidence([-5.0] * 60, pareto_k=heavy(3, 60), unchecked={"precision": "float64 already"})
    assert "doubts: tails 3 of 60, precision not checked (float64 already)" in one_line(evidence)


# What is warned about, and the remedy


@pytest.mark.parametrize("reason", table.TABLE)
@pytest.mark.parametrize("method", METHODS)
def test_no_remedy_is_what_just_ran(reason, method):
    remedy = table.remedy_for(reason, method)
    names = {word.strip(".,()") for word in remedy.split()}
    assert METHODS[method] not in names, remedy
    assert remedy[0].isupper() and not remedy.endswith(".")


@pytest.mark.parametrize("reason", table.TABLE)
def test_every_doubt_has_a_warning_of_its_class(reason):
    categories = {"precision": PrecisionWarning, "not converged": ConvergenceWarning}
    (warning,) = table.warnings_about({reason: first(9, 60)}, "fitted proposals", off="low", threshold="0.67")
    assert type(warning) is categories.get(reason, UnreliableEvidenceWarning)
    assert "9 of 60 data" in str(warning) and str(warning).endswith(table.remedy_for(reason, "fitted proposals"))
    assert table.warnings_about({reason: first(0, 60)}, "fitted proposals") == []


def test_flags_that_good_guides_have_too_warn_where_there_are_more_than_chance_explains():
    """3% of data with a good guide are flagged from the posterior's side: 4 of 60 may be chance, 6 are not."""
    for count, warned in ((0, False), (4, False), (6, True)):
        found = table.warnings_about({"posterior side": first(count, 60)}, "importance sampling", off="low")
        assert bool(found) is warned
        assert bool(table.warnings_about({"search": first(count, 60)}, "importance sampling", off="low")) is (count > 0)


def test_gaps_warn_once_for_each_doubt():
    gaps = make_gaps(1.0, -3.0, num_data=10, converged=~first(2, 10), pareto_k=heavy(1, 10), method="fitted proposals")
    assert [type(w) for w in gaps.warnings()] == [UnreliableEvidenceWarning, ConvergenceWarning, UnreliableEvidenceWarning]
    assert "AnnealedImportanceSampling" in str(gaps.warnings()[0])
    assert all("AdaptiveImportanceSampling" not in one_line(w) for w in gaps.warnings())


def test_estimators_say_what_ran():
    lm, x = linear_gaussian(num_data=3)
    model, guide = model_of(lm), guide_of(scaled_family(lm, 1.0))
    sim = pv.simulate(model, x, seed=0)
    few = {"num_steps": 5, "num_chains": 4, "progress": False}
    with quiet():
        sandwich = pv.BidirectionalMonteCarlo(model, guide, latents=sim.latents, **few)(sim.observed["x"])
        records = {
            table.GUIDE_ITSELF: pv.ImportanceSampling(model, guide, num_particles=100)(x),
            table.FITTED_PROPOSALS: pv.AdaptiveImportanceSampling(model, guide, num_particles=100)(x),
            table.ANNEALED_CHAINS: pv.AnnealedImportanceSampling(model, guide, **few)(x),
            table.REVERSE_CHAINS: sandwich.upper,
            table.EXACT_VALUE: pv.ExactEvidence(model, guide)(x),
        }
        gaps = pv.InferenceGaps(model, guide, num_particles=100)(x)
    assert [record.method for record in records.values()] == list(records)
    assert sandwich.lower.method == "annealed chains" and gaps.evidence.method == "fitted proposals"


def test_the_remedies_for_tails_do_mend_them():
    """A guide far too narrow: fitted proposals. A posterior with Cauchy tails under a fitted Gaussian: more particles."""
    lm, x = linear_gaussian(num_data=30)
    narrow = model_of(lm), guide_of(scaled_family(lm, 0.2))
    gaussian = functools.partial(pv.AdaptiveImportanceSampling, proposal="gaussian")
    for poor, better, pair, data, name in (
        (pv.ImportanceSampling, pv.AdaptiveImportanceSampling, narrow, x, "AdaptiveImportanceSampling"),
        (gaussian, functools.partial(gaussian, num_particles=20_000), *cauchy_pair(), "num_particles"),
    ):
        with pytest.warns(UnreliableEvidenceWarning, match=name):
            before = poor(*pair, seed=0)(data)
        with quiet():
            after = better(*pair, seed=0)(data)
        assert int(after.doubts["tails"].sum()) < int(before.doubts["tails"].sum()) / 5


def cauchy_pair():
    """(Model, guide) and data."""
    x = torch.linspace(2.0, 4.0, 40, dtype=F64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(x.new_tensor(1.0), 0.0, 0.05))
            pyro.sample("x", dist.StudentT(x.new_tensor(1.0), z, 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.3))

    return (model, guide), x
