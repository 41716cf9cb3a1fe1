"""What a page may not say: errors of what is in doubt, a part larger than the whole, "ok" for a fault or a limit."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from pair_helpers import F64, guide_of, linear_gaussian, make_gaps, model_of, one_line, scaled_family
from report_helpers import diagnosed, in_batches, linear_pair
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import HiddenRandomnessError
from pyro_vae.records import Estimate
from pyro_vae.records import doubts as table
from pyro_vae.report.findings import SMALL, upper_end


@pytest.fixture(scope="module")
def page():
    _, model, guide, x = linear_pair("encoder", num_data=40)
    return diagnosed(model, guide, x, num_data=20)


def with_gaps(page, test, train=None, **fields):
    """The page with other gaps, and no trial on simulated data."""
    return dataclasses.replace(page, test=test, train=test if train is None else train, self_check=None, **fields)


def spread(gaps, by, seed=0):
    """All three levels of a datum are moved alike: gaps stay, and means over data have a sampling error."""
    noise = by * torch.randn(len(gaps), dtype=F64, generator=torch.Generator().manual_seed(seed))
    moved = {name: getattr(gaps, name) + noise for name in ("elbo", "optimal_elbo", "log_evidence")}
    evidence = dataclasses.replace(gaps.evidence, log_evidence=moved["log_evidence"], smoothed=moved["log_evidence"])
    return dataclasses.replace(gaps, **moved, evidence=evidence)


def finding(page, topic):
    return next(found for found in page.findings if found.topic == topic)


def written(page, tmp_path):
    """(HTML, rows of the JSON, rows of the CSV)."""
    page.to_html(tmp_path / "page.html")
    page.to_json(tmp_path / "page.json")
    page.to_csv(tmp_path / "page.csv")
    with open(tmp_path / "page.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    return text, json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["numbers"], rows


def test_information_at_its_ceiling_is_called_so(page, tmp_path):
    """ "[ok] mutual information 4.605 +- 0.000" of a hundred data is log 100: all that a hundred data can show."""
    assert "at its ceiling" not in finding(page, "latents").claim
    n = page.surgery.num_data
    limit = pv.Estimate(*torch.tensor([math.log(n), 0.0, 0.0], dtype=F64))
    full = dataclasses.replace(page, surgery=dataclasses.replace(page.surgery, mutual_information=limit))
    assert full.surgery.doubts.keys() == {"mutual_information"} and not full.surgery.reliable
    claim = finding(full, "latents").claim
    assert f"mutual information at its ceiling, log {n} = {math.log(n):.3f} nats" in claim
    assert "+-" not in claim
    text, *written_rows = written(full, tmp_path)
    for rows in written_rows:
        (row,) = [row for row in rows if row["name"] == "mutual information"]
        assert "log N" in row["doubt"]
    assert text.count("not to be trusted") == 2


@pytest.mark.parametrize(
    ("train", "test", "culprit", "state"),
    [
        ((0.2, 0.1, 20.0), (0.2, 0.1, 0.0), "overfitted model", "fault"),
        ((30.0, 0.1, 20.0), (30.0, 0.1, 0.0), "encoder", "fault"),  # there is more to gain in the encoder
        ((0.2, 0.1, 0.0), (0.2, 0.1, 20.0), "encoder", "fine"),  # better on test data
        ((0.2, 0.1, 1.0), (0.2, 0.1, 0.0), "encoder", "fine"),  # no more than chance
        ((0.01, 0.01, 20.0), (0.01, 0.01, 0.0), "overfitted model", "fault"),
    ],
)
def test_an_overfitted_model_is_a_fault_of_its_own(page, train, test, culprit, state):
    """The sampling error of the difference is 3 sqrt(2 / 50) = .6 nats; 1 nat is no more than chance."""
    of_train, of_test = (
        spread(dataclasses.replace(made, **levels), 3.0, seed)
        for seed, (amortization, approximation, level) in enumerate((train, test))
        for made in [make_gaps(amortization, approximation, std_error=0.001)]
        for levels in [{n: getattr(made, n) + level for n in ("elbo", "optimal_elbo", "log_evidence")}]
    )
    found = with_gaps(page, of_test, of_train)
    assert found.culprit == culprit, str(found)
    assert finding(found, "held-out").state == state
    assert ("The model is overfitted." in one_line(found)) is (state == "fault")
    if culprit == "overfitted model":
        assert "does not carry over to new data: log p(x) of test data is " in found.headline
        assert "regularised decoder" in found.advice


def test_log_evidence_in_doubt_is_no_proof_of_overfitting(page):
    """A log p(x) that is too low on test data looks like a model that does not carry over."""
    k = torch.full((50,), 0.9, dtype=F64)
    test = spread(make_gaps(0.2, 0.1, pareto_k=k), 3.0, 1)
    high = {n: getattr(test, n) + 20 for n in ("elbo", "optimal_elbo", "log_evidence")}
    train = spread(dataclasses.replace(make_gaps(0.2, 0.1), **high), 3.0, 2)
    assert finding(with_gaps(page, test, train), "held-out").state == "undecided"
    some = spread(make_gaps(0.2, 0.1, pareto_k=torch.where(torch.arange(50) < 10, k, 0.1)), 3.0, 1)
    found = finding(with_gaps(page, some, train), "held-out")
    assert found.state == "fault" and "of the 40 and 50 data whose log p(x) is not in doubt" in found.claim


def test_no_part_is_larger_than_the_whole(page):
    """ "the encoder: 79.19 of 79.10": the family's part is estimated as -.09."""
    found = with_gaps(page, make_gaps(79.19, -0.09, std_error=0.1))
    assert found.culprit == "encoder"
    assert "all of 79.10 +- 0.01 nats" in found.headline and "79.19" not in found.headline
    family = with_gaps(page, make_gaps(0.2, 2.0, std_error=0.001))
    assert "2.00 +- 0.00 of 2.20 +- 0.00 nats" in family.headline
    negative = dataclasses.replace(page.surgery, kl=pv.Estimate(*torch.tensor([0.5, 0.0, 0.1])))
    assert "all of the KL" in dataclasses.replace(negative, mutual_information=negative.kl).verdict()


@pytest.mark.parametrize("count", [2, 20])
def test_errors_in_doubt_are_not_printed(page, tmp_path, count):
    """Up to 5% of the data may be in doubt: 2 of 50."""
    k = torch.where(torch.arange(50) < count, 0.9, 0.1).to(F64)
    found = with_gaps(page, make_gaps(1.0, 0.1, pareto_k=k, method="fitted proposals"))
    printed = str(found)
    assert (printed.count("(in doubt)") == 6) is (count == 20)  # log p(x), approximation and inference gap, twice
    assert f"tails {count} of 50" in finding(found, "estimate").claim
    text, *written_rows = written(found, tmp_path)
    for rows in written_rows:
        (row,) = [row for row in rows if row["name"] == "inference gap" and row["data"] == "test"]
        assert row["doubt"] == ("20 of 50 data in doubt" if count == 20 else "")
    assert ("not to be trusted" in text) is (count == 20)


@pytest.mark.parametrize(("method", "name"), [(table.GUIDE_ITSELF, "Adaptive"), (table.FITTED_PROPOSALS, "Annealed")])
def test_the_advice_about_an_estimate_fits_what_ran(page, method, name):
    k = torch.full((50,), 0.9, dtype=F64)
    found = with_gaps(page, make_gaps(1.0, 0.1, pareto_k=k, method=method))
    assert found.culprit == "estimate" and f"{name}ImportanceSampling" in found.advice
    few = with_gaps(page, make_gaps(1.0, 0.1, num_particles=50, method=method))
    assert few.culprit == "estimate" and "at least 100 weights" in few.advice
    assert "tails not judged (K < 100)" in one_line(few)
    annealed = with_gaps(page, make_gaps(1.0, 0.1, pareto_k=k, method=table.ANNEALED_CHAINS))
    assert "Raise num_steps" in annealed.advice and "ImportanceSampling" not in annealed.advice


@pytest.mark.parametrize("side", ["model", "guide"])
def test_active_dropout_is_refused_by_every_number(side):
    """A page on a randomly thinned network says so nowhere; in eval mode everything runs."""
    lm, x = linear_gaussian(num_data=20)
    plain = {"model": model_of(lm), "guide": guide_of(scaled_family(lm, 1.0))}

    class Thinned(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            self.dropout(torch.ones(len(x)))
            return plain[side](x)

    thinned = Thinned()
    pair = {**plain, side: thinned}.values()
    batches, few = in_batches(x), {"num_particles": 100, "progress": False}
    numbers = {
        "evidence": lambda: pv.ImportanceSampling(*pair, num_particles=10)(x),
        "gaps": lambda: pv.InferenceGaps(*pair, num_particles=10)(x),
        "units": lambda: pv.ActiveUnits(*pair)(batches, progress=False),
        "surgery": lambda: pv.ELBOSurgery(*pair)(batches, progress=False),
        "diagnosis": lambda: pv.diagnose(*pair, train=batches, test=batches, **few),
    }
    for number in numbers.values():
        with pytest.raises(HiddenRandomnessError, match=r"dropout is active.*call \.eval\(\)"):
            number()
    thinned.eval()
    for name in ("evidence", "units", "surgery"):
        numbers[name]()


def test_a_mutual_information_below_zero_proves_no_blind_encoder():
    """From a few data it is noise: -.057 +- .053 leaves room for a tenth of a nat. Well measured, it does not."""
    few = Estimate(torch.tensor(-0.057), torch.tensor(0.053), torch.tensor(0.053))
    many = Estimate(torch.tensor(-0.001), torch.tensor(0.01), torch.tensor(0.01))
    assert upper_end(few) > SMALL > upper_end(many)
