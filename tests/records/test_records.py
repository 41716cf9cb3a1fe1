"""The records: their errors, intervals, sentences and plain form, from numbers whose answers are known."""

import copy
import csv
import dataclasses
import json
import math
import pickle

import pytest
import torch
from pair_helpers import F64, make_evidence, make_gaps, one_line

import pyro_vae as pv
from pyro_vae.evidence import evidence as evidence_module
from pyro_vae.records import normal_quantile, student_quantile
from pyro_vae.training import TrainingHistory

INF, NAN = math.inf, math.nan


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# Estimate


def test_the_two_errors_of_a_mean():
    """Monte Carlo: sqrt(sum s^2) / N. Sampling: sd of the values / sqrt(N)."""
    estimate = pv.Estimate.over_data(tensor(1.0, 2.0, 6.0), tensor(0.3, 0.4, 1.2))
    assert float(estimate.value) == pytest.approx(3.0)
    assert float(estimate.std_error) == pytest.approx(1.3 / 3)
    assert float(estimate.sampling_error) == pytest.approx(math.sqrt(7.0) / math.sqrt(3))
    low, high = estimate.confidence_interval(0.95)
    assert low == pytest.approx(3 - 1.959964 * 1.3 / 3, rel=1e-6)
    assert high == pytest.approx(3 + 1.959964 * 1.3 / 3, rel=1e-6)


def test_one_datum_has_no_sampling_error():
    estimate = pv.Estimate.over_data(tensor(1.0), tensor(0.5))
    assert float(estimate.std_error) == 0.5
    assert math.isnan(float(estimate.sampling_error))


def test_both_errors_are_labelled_in_print():
    text = str(pv.Estimate.over_data(tensor(1.0, 2.0), tensor(0.3, 0.4)))
    assert "1.500 nats" in text
    assert "Monte Carlo error 0.250" in text
    assert "sampling error 0.500" in text


@pytest.mark.parametrize(
    ("level", "df", "value"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 4, 2.77645),
        (0.95, 9, 2.26216),
        (0.95, 99, 1.98422),
        (0.99, 4, 4.60409),
        (0.9, 30, 1.69726),
        (0.5, 6, 0.717558),
    ],
)
def test_student_quantile_against_tables(level, df, value):
    assert student_quantile(level, df) == pytest.approx(value, rel=2e-4)


def test_student_quantile_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not a dependency")
    for df in (*range(1, 30), 50, 98, 99, 1000):
        for level in (0.5, 0.8, 0.9, 0.95, 0.99, 0.999):
            expected = float(stats.t.ppf(0.5 + level / 2, df))
            assert student_quantile(level, df) == pytest.approx(expected, rel=1e-3), (df, level)


@pytest.mark.parametrize(("level", "value"), [(0.95, 1.959964), (0.99, 2.575829), (0.6826895, 1.0)])
def test_normal_quantile(level, value):
    assert normal_quantile(level) == pytest.approx(value, rel=1e-6)


# Evidence


def test_intervals_widen_the_upper_end_with_the_tail_index():
    evidence = make_evidence(
        [-10.0, -10.0, -10.0, -10.0, -10.0, -10.0],
        0.1,
        pareto_k=tensor(-0.3, 0.0, 0.5, 0.999, INF, NAN),
        smoothed=tensor(-10.0, -9.9, -9.8, -10.2, -10.0, -10.0),
    )
    low, high = evidence.confidence_interval(0.95)
    z = 1.959964 * 0.1
    assert torch.allclose(low, tensor(*[-10 - z] * 6), atol=1e-6)
    expected = tensor(-10 + z, -9.9 + z, -9.8 + 2 * z, -10 + 20 * z, -10 + 20 * z, -10 + z)
    assert torch.allclose(high, expected, atol=1e-5)


def test_below_a_hundred_particles_intervals_are_students():
    evidence = make_evidence([-10.0], 0.1, num_particles=5, pareto_k=tensor(NAN))
    low, high = evidence.confidence_interval(0.95)
    assert float(low) == pytest.approx(-10 - 0.277645, rel=1e-4)
    assert float(high) == pytest.approx(-10 + 0.277645, rel=1e-4)
    at_99 = make_evidence([-10.0], 0.1, num_particles=99).confidence_interval(0.95)[1]
    at_100 = make_evidence([-10.0], 0.1, num_particles=100).confidence_interval(0.95)[1]
    assert float(at_99) == pytest.approx(-10 + 0.198447, rel=1e-3)
    assert float(at_100) == pytest.approx(-10 + 0.195996, rel=1e-3)


def test_one_particle_has_no_interval():
    low, high = make_evidence([-10.0], NAN, num_particles=1).confidence_interval()
    assert bool(low.isnan())
    assert bool(high.isnan())


def test_an_exact_value_has_an_interval_of_no_width():
    evidence = make_evidence([-10.0, -11.0], 0.0, bound="exact", pareto_k=tensor(NAN, NAN))
    low, high = evidence.confidence_interval()
    assert torch.equal(low, evidence.log_evidence)
    assert torch.equal(high, evidence.log_evidence)


def test_the_interval_of_the_mean():
    evidence = make_evidence([-10.0, -12.0], 0.1, pareto_k=tensor(0.5, 0.0), smoothed=tensor(-9.8, -12.0))
    low, high = evidence.mean_confidence_interval(0.95)
    z = 1.959964
    assert low == pytest.approx(-11 - z * 0.1 * math.sqrt(2) / 2, abs=1e-6)
    assert high == pytest.approx(-10.9 + z * math.hypot(0.2, 0.1) / 2, abs=1e-6)


@pytest.mark.parametrize(("num_particles", "threshold"), [(100, 0.5), (1000, 0.6667), (2200, 0.7), (100_000, 0.7)])
def test_tails_are_in_doubt_above_the_threshold_for_k(num_particles, threshold):
    k = tensor(threshold - 0.01, threshold + 0.01, -INF, INF, NAN)
    evidence = make_evidence([-10.0] * 5, num_particles=num_particles, pareto_k=k)
    assert evidence.doubts["tails"].tolist() == [False, True, False, True, False]
    assert evidence.reliable.tolist() == [True, False, True, False, True]


def test_cat_joins_in_order_and_averages_the_cost():
    parts = [make_evidence([-1.0, -2.0], 0.1, cost=10), make_evidence([-3.0], 0.2, cost=40)]
    joined = pv.Evidence.cat(parts)
    assert joined.log_evidence.tolist() == [-1.0, -2.0, -3.0]
    assert joined.std_error.tolist() == [0.1, 0.1, 0.2]
    assert joined.cost == 20
    assert len(joined) == 3
    assert joined.index is None
    indexed = [dataclasses.replace(p, index=torch.arange(len(p)) + 10 * i) for i, p in enumerate(parts)]
    assert pv.Evidence.cat(indexed).index.tolist() == [0, 1, 10]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_particles": 50}, "num_particles"),
        ({"bound": "upper"}, "bound"),
        ({"support_checked": False}, "support_checked"),
    ],
)
def test_cat_refuses_results_of_other_estimators(changes, name):
    first = make_evidence([-1.0])
    with pytest.raises(ValueError, match=name):
        pv.Evidence.cat([first, dataclasses.replace(first, **changes)])


@pytest.mark.parametrize("record", [pv.Evidence, pv.Gaps])
def test_cat_of_nothing_is_named(record):
    with pytest.raises(ValueError, match=r"at least one record.*loader"):
        record.cat([])


def records():
    return {
        "evidence": make_evidence([-1.0, -2.0], pareto_k=tensor(0.2, 0.9), stripped_scales={"x": 2.0}),
        "gaps": make_gaps(1.0, 0.1, num_data=2),
    }


@pytest.mark.parametrize("name", ["evidence", "gaps"])
def test_to_dict_is_json(name):
    record = records()[name]
    plain = json.loads(json.dumps(record.to_dict()))
    assert {field.name for field in dataclasses.fields(record)} <= plain.keys()
    assert plain["log_evidence"] == record.log_evidence.tolist()
    if name == "gaps":
        for gap in ("amortization", "approximation", "inference"):
            assert plain[gap] == getattr(record, gap).tolist()
        assert plain["evidence"]["cost"] == 1000
        assert plain["std_errors"]["contrast"] == [0.01, 0.01]
    else:
        assert plain["stripped_scales"] == {"x": 2.0}


@pytest.mark.parametrize("name", ["evidence", "gaps"])
def test_records_are_frozen_and_can_be_copied(name):
    record = records()[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.log_evidence = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        del record.cost
    for other in (copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert str(other) == str(record)


def test_an_estimate_is_frozen():
    estimate = make_evidence([-1.0, -2.0]).mean()
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.value = None


def test_evidence_prints_both_errors_of_both_means_and_its_diagnostics():
    k = torch.where(torch.arange(40) < 2, 0.9, 0.2).to(F64)
    text = str(make_evidence([-1.0, -3.0] * 20, 0.3, pareto_k=k, stripped_scales={"x": 2.0}))
    assert text.count("Monte Carlo error") == text.count("sampling error") == 2
    for part in (
        "log p(x)",
        "-2.000",
        "ELBO",
        "-3.000",
        "K = 1000",
        "cost 1000",
        "bound: lower",
        "doubts: tails 2 of 40",
        "{'x': 2.0}",
    ):
        assert part in text, part


def test_a_score_is_not_called_evidence():
    text = str(make_evidence([-1.0, -3.0], support_checked=False))
    assert "score (not log p(x): values outside the support)" in text
    text = str(make_evidence([-1.0, -3.0]))
    assert "score" not in text


def test_the_elbo_of_the_record_is_untouched_by_the_mean():
    evidence = make_evidence([-1.0, -3.0], 0.3)
    estimate = evidence.mean()
    assert float(estimate.value) == -2.0
    assert float(estimate.std_error) == pytest.approx(0.3 / math.sqrt(2))
    assert float(estimate.sampling_error) == pytest.approx(1.0)


# Gaps


def test_gaps_add_up_and_have_their_signs():
    gaps = make_gaps(0.7, 0.2)
    assert torch.equal(gaps.amortization, gaps.optimal_elbo - gaps.elbo)
    assert torch.equal(gaps.approximation, gaps.log_evidence - gaps.optimal_elbo)
    assert torch.allclose(gaps.inference, gaps.amortization + gaps.approximation, atol=1e-12)
    summary = gaps.summary()
    assert float(summary["amortization"].value) == pytest.approx(0.7)
    assert float(summary["approximation"].value) == pytest.approx(0.2)
    assert float(summary["inference"].value) == pytest.approx(0.9)
    assert set(summary) == {
        "elbo",
        "optimal_elbo",
        "log_evidence",
        "amortization",
        "approximation",
        "inference",
    }


ENCODER = "The larger part of the gap is the encoder's (amortization)"
FAMILY = "The larger part of the gap is the family's (approximation)"
UNDECIDED = "interval does not show which part of the gap is larger"


def heavy(count):
    """Pareto k of 50 data, too high for some."""
    return torch.where(torch.arange(50) < count, 0.9, 0.1).to(F64)


@pytest.mark.parametrize(
    ("amortization", "approximation", "options", "sentence"),
    [
        (1.0, 0.1, {}, ENCODER),
        (0.1, 1.0, {}, FAMILY),
        (0.500, 0.501, {}, UNDECIDED),
        (1.0, 0.1, {"std_error": 5.0}, UNDECIDED),
        (0.1, 1.0, {"std_error": 5.0}, UNDECIDED),
        # log p(x) may be much higher than it was measured: the family's part could be the larger one
        (1.0, 0.1, {"std_error": 0.3, "pareto_k": torch.tensor(0.95, dtype=F64).expand(50)}, UNDECIDED),
        (0.1, 1.0, {"std_error": 0.3, "pareto_k": torch.tensor(0.95, dtype=F64).expand(50)}, FAMILY),
        (1.0, 0.1, {"smoothed": torch.tensor(-97.0, dtype=F64).expand(50)}, UNDECIDED),
        # fits that stopped early understate what the encoder leaves behind: that it is the larger part stands all the same
        (0.1, 1.0, {"converged": torch.arange(50) > 10}, "Not decided: 11 of 50 fits had not converged"),
        (1.0, 0.1, {"converged": torch.arange(50) > 10}, ENCODER),
        (1.0, 0.1, {"converged": torch.arange(50) > 0}, ENCODER),
        # heavy tails in some data: a claim about the others, if they are more than half
        (
            1.0,
            0.1,
            {"pareto_k": heavy(10)},
            f"{ENCODER}: encoder 1.000 +- 0.002, family 0.100 +- 0.002 nats (Monte Carlo "
            "error) for the 40 of 50 data whose log p(x) is known well.",
        ),
        (0.1, 1.0, {"pareto_k": heavy(10)}, f"{FAMILY}: "),
        (1.0, 0.1, {"pareto_k": heavy(30)}, "Not decided: the weights are not reliable enough for log p(x)"),
        (1.0, 0.1, {"pareto_k": heavy(50)}, "Not decided: the weights are not reliable enough for log p(x)"),
        (1.0, 0.1, {"std_error": NAN}, UNDECIDED),
        (0.1, 1.0, {"std_error": NAN}, UNDECIDED),
    ],
)
def test_the_verdict_claims_no_more_than_the_intervals(amortization, approximation, options, sentence):
    gaps = make_gaps(amortization, approximation, **options)
    verdict = gaps.verdict()
    assert sentence in verdict
    for other in {ENCODER, FAMILY, UNDECIDED}:
        assert other in sentence or other not in verdict
    assert verdict in one_line(gaps)
    assert verdict.count("nats") >= 1
    assert "\n" not in verdict


def test_a_claim_about_some_data_holds_for_all_of_them():
    """Half of the data are known, and their encoder is to blame; the others' family is, by more, whatever they lack."""
    known, unknown = make_gaps(1.0, 0.0), make_gaps(0.0, 10.0, pareto_k=heavy(50))
    assert known.larger_part() == "encoder"
    assert pv.Gaps.cat([known, unknown]).larger_part() == "family"
    one, others = make_gaps(0.0, 1.0, num_data=1), make_gaps(50.0, 10.0, num_data=50, pareto_k=heavy(50))
    assert pv.Gaps.cat([one, others]).larger_part() == "undecided"


def test_log_evidence_below_an_elbo_is_in_doubt():
    fine, low = make_gaps(1.0, 0.1), make_gaps(1.0, -3.0, num_data=10)
    assert bool(fine.reliable.all()) and fine.warnings() == []
    assert bool(low.doubts["below the ELBO"].all()) and low.larger_part() == "undecided"
    assert "below their ELBO" in low.verdict() and "is significantly below" in str(low.warnings()[-1])
    assert bool(make_gaps(0.0, -0.02, std_error=0.0).reliable.all())  # rounding and the skew of a mean
    assert pv.Gaps.cat([fine, make_gaps(1.0, -3.0, num_data=2)]).larger_part() == "encoder"  # 2 of 52


def test_no_winner_is_named_beside_evidence_in_doubt_without_saying_so():
    """All weights have a heavy tail: log p(x) is biased low, and the page says for how many."""
    gaps = make_gaps(1.0, 0.1, pareto_k=torch.tensor(0.9, dtype=F64).expand(50))
    assert "doubts: tails 50 of 50; none: not converged, below the ELBO" in one_line(gaps)


def test_gaps_print_a_table_with_both_errors():
    text = str(make_gaps(0.7, 0.2))
    header = text.splitlines()[0]
    assert "Monte Carlo" in header
    assert "sampling" in header
    assert "nats" in header
    for part in ("ELBO", "log p(x), lower bound", "amortization gap", "approximation gap", "inference gap"):
        assert part in text, part
    for part in (
        "doubts: none of 50 data (tails, not converged, below the ELBO)",
        "cost: 4000",
        "q*: the guide's family, fitted to each datum",
    ):
        assert part in text, part


def test_some_of_the_data():
    gaps = dataclasses.replace(make_gaps(1.0, 0.1, num_data=4), elbo=torch.arange(4, dtype=F64))
    for kept in (torch.tensor([False, True, False, True]), torch.tensor([1, 3])):
        some = gaps.select(kept)
        assert some.elbo.tolist() == [1.0, 3.0] and len(some) == len(some.evidence) == 2
        assert all(len(error) == 2 for error in some.std_errors.values())
        assert torch.equal(some.evidence.log_evidence, gaps.evidence.log_evidence[kept])
    curve = pv.KCurve((1, 2), torch.arange(8.0).reshape(2, 4), torch.zeros(2, 4))
    assert curve.select(torch.tensor([1, 3])).log_evidence.tolist() == [[1.0, 3.0], [5.0, 7.0]]


def test_gaps_cat():
    a, b = make_gaps(1.0, 0.1, num_data=2), make_gaps(0.5, 0.2, num_data=3)
    joined = pv.Gaps.cat([a, b])
    assert torch.equal(joined.amortization, torch.cat([a.amortization, b.amortization]))
    assert all(len(error) == 5 for error in joined.std_errors.values())
    assert len(joined) == len(joined.evidence) == 5
    assert joined.cost == 4000
    with pytest.raises(ValueError, match="family"):
        pv.Gaps.cat([a, dataclasses.replace(b, family="another")])


# TrainingHistory


def make_history(**changes):
    """Three steps, two sites; every number its own."""
    numbers = {
        "step": torch.arange(3),
        "loss": tensor(30.0, 20.5, 13.25),
        "elbo": tensor(-33.0, -24.0, -15.0),
        "distortion": tensor(28.0, 18.0, 11.0),
        "rate": tensor(5.0, 6.0, 4.0),
        "kl": {"z": tensor(4.0, 5.5, 3.75), "w, too": tensor(1.0, 0.5, 0.25)},
        "beta": tensor(0.0, 1 / 3, 0.5),
        "per_datum": True,
    }
    return TrainingHistory(**{**numbers, **changes})


def read_csv(path):
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return dict(zip(rows[0], ([float(v) for v in column] for column in zip(*rows[1:], strict=True)), strict=True))


def test_a_training_history_as_csv_keeps_every_digit(tmp_path):
    history = make_history()
    history.to_csv(tmp_path / "history.csv")
    table = read_csv(tmp_path / "history.csv")
    assert list(table) == ["step", "loss", "elbo", "distortion", "rate", "kl[z]", "kl[w, too]", "beta"]
    for name in ("step", "loss", "elbo", "distortion", "rate", "beta"):
        assert table[name] == getattr(history, name).tolist()
    assert table["kl[z]"] == [4.0, 5.5, 3.75] and table["kl[w, too]"] == [1.0, 0.5, 0.25]


def test_totals_have_other_names_in_csv(tmp_path):
    beta = {"z": tensor(0.0, 0.5, 1.0), "w, too": tensor(1.0, 1.0, 1.0)}
    make_history(per_datum=False, beta=beta).to_csv(str(tmp_path / "history.csv"))
    names = list(read_csv(tmp_path / "history.csv"))
    assert names[1:5] == ["loss_total", "elbo_total", "distortion_total", "rate_total"]
    assert names[5:] == ["kl_total[z]", "kl_total[w, too]", "beta[z]", "beta[w, too]"]


def test_a_broken_step_stays_in_csv_and_is_named_in_print(tmp_path):
    history = make_history(elbo=tensor(-33.0, NAN, -15.0), loss=tensor(30.0, 20.5, INF))
    history.to_csv(tmp_path / "history.csv")
    table = read_csv(tmp_path / "history.csv")
    assert math.isnan(table["elbo"][1]) and table["loss"][2] == INF
    assert history.not_finite.tolist() == [False, True, True]
    assert "2 of 3 steps have values that are not finite; the first is step 1" in one_line(history)
    assert "not finite" not in one_line(make_history())


def test_a_training_history_prints_first_last_and_mean():
    rows = {line[:44].strip(): line[44:].split() for line in str(make_history()).splitlines()}
    assert rows.pop("Training history of 3 steps, nats per datum") == ["first", "last", "mean", "of", "last", "3"]
    assert rows == {
        "ELBO": ["-33.000", "-15.000", "-24.000"],
        "distortion": ["28.000", "11.000", "19.000"],
        "rate": ["5.000", "4.000", "5.000"],
        "of z": ["4.000", "3.750", "4.417"],
        "of w, too": ["1.000", "0.250", "0.583"],
        "loss": ["30.000", "13.250", "21.250"],
        "beta": ["0.000", "0.500", "0.278"],
    }


def test_the_mean_in_print_is_that_of_the_last_hundred_steps():
    many = {n: torch.arange(250.0, dtype=F64) for n in ("step", "loss", "elbo", "distortion", "rate", "beta")}
    text = str(make_history(**many, kl={"z": many["rate"]}))
    assert "mean of last 100" in text and "199.500" in text and "of z" not in text


def test_totals_and_betas_of_sites_are_labelled_in_print():
    text = str(make_history(per_datum=False, beta={"z": tensor(0.0, 0.5, 1.0)}))
    assert "3 steps, nats, totals" in text and "beta of z" in text and "per datum" not in text


def test_an_empty_training_history(tmp_path):
    none = tensor()
    history = make_history(step=torch.arange(0), loss=none, elbo=none, distortion=none, rate=none, kl={}, beta={})
    assert len(history) == 0 and str(history) == "Training history without a step"
    history.to_csv(tmp_path / "history.csv")
    assert (tmp_path / "history.csv").read_text().splitlines() == ["step,loss,elbo,distortion,rate"]


def test_a_training_history_in_plain_form_and_pickled():
    for beta in (tensor(0.0, 0.5, 1.0), {"z": tensor(0.0, 0.5, 1.0)}):
        history = make_history(beta=beta)
        plain = json.loads(json.dumps(history.to_dict()))
        assert set(plain) == {f.name for f in dataclasses.fields(history)}
        assert plain["kl"] == {"z": [4.0, 5.5, 3.75], "w, too": [1.0, 0.5, 0.25]} and plain["step"] == [0, 1, 2]
        assert plain["beta"] in ([0.0, 0.5, 1.0], {"z": [0.0, 0.5, 1.0]})
        assert pickle.loads(pickle.dumps(history)).to_dict() == copy.deepcopy(history).to_dict() == plain
    with pytest.raises(dataclasses.FrozenInstanceError):
        history.elbo = None


def upper_bound(k, K=400):
    """An upper bound from chains, (B,) = (6,), whose weights have tail index k."""
    value = torch.linspace(-10.0, -9.0, 6)
    return pv.Evidence(
        log_evidence=value,
        std_error=torch.full((6,), 0.1),
        elbo=value - 1,
        elbo_std_error=torch.full((6,), 0.01),
        ess=torch.full((6,), 50.0),
        pareto_k=torch.full((6,), k),
        smoothed=value - 0.2,
        bound="upper",
        method="reverse chains",
        num_particles=K,
        cost=1.0,
        acceptance=torch.linspace(0.5, 0.9, 6),
    )


def test_the_low_end_of_an_upper_bound_is_widened_where_its_tail_is_heavy():
    """Minus the log of a mean of 1 / w: missed large terms leave it too high."""
    record = upper_bound(0.5)
    low, high = record.confidence_interval(0.95)
    torch.testing.assert_close(low, record.log_evidence - 0.2 - 1.96 * 0.1 / 0.5, rtol=0, atol=1e-4)
    torch.testing.assert_close(high, record.log_evidence + 1.96 * 0.1, rtol=0, atol=1e-4)
    low, high = record.mean_confidence_interval(0.95)
    assert low == pytest.approx(-9.5 - 0.2 - 1.96 * 0.1 / 0.5 / 6**0.5, abs=1e-4)
    assert high == pytest.approx(-9.5 + 1.96 * 0.1 / 6**0.5, abs=1e-4)


def test_chains_are_reported_as_chains():
    record = upper_bound(0.9)
    assert "acceptance of the chains 0.70, lowest 0.50" in one_line(record)
    (warning,) = record.warnings()
    assert "too high" in str(warning) and "Raise num_steps" in str(warning)
    joined = pv.Evidence.cat([record, record])
    assert len(joined.acceptance) == 12


def test_tails_are_judged_by_the_weights_of_each_datum(monkeypatch):
    """min(1 - 1 / log10 K, 0.7), a few data at a time."""
    monkeypatch.setattr(evidence_module, "MANY", 2)
    sizes = [100, 200, 1000, 10_000, 150]
    ends = [min(1 - 1 / math.log10(k), 0.7) for k in sizes]
    for shift, doubted in ((-1e-6, False), (1e-6, True)):
        record = make_evidence([-1.0] * 5, pareto_k=tensor(*ends) + shift, particles=torch.tensor(sizes))
        assert record.doubts["tails"].tolist() == [doubted] * 5
