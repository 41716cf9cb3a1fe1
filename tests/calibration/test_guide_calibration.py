"""Ranks are uniform for the exact posterior and for nothing else; the symmetric gap is its closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibration_helpers import calibrated, symmetric_gap
from pair_helpers import F64

import pyro_vae as pv
from pyro_vae.calibration.uniformity import is_outside


def replicates(record, num_data):
    """A record of many data as many records of `num_data`: the data are independent of one another."""
    return [record.select(part) for part in torch.arange(len(record)).split(num_data)]


@pytest.mark.parametrize("latent_dim", [2, 10])
@pytest.mark.parametrize(("num_data", "number", "most"), [(100, 500, 15), (1000, 100, 6)])
def test_the_exact_posterior_is_called_faulty_as_often_as_stated(num_data, number, most, latent_dim):
    """1% of the replicates, over all rows of a replicate; more than so many by chance once in 10,000."""
    record, _ = calibrated(number * num_data // 20, 0, latent_dim, num_calls=20, num_particles=5)
    parts = replicates(record, num_data)
    faulty = sum(not part.passed for part in parts)
    assert len(parts) == number and faulty <= most, faulty
    alone = sum(any(is_outside(u, 0.05) for u in part.ranks.unbind(1)) for part in parts[:100])
    assert alone > 5 * latent_dim / 2  # the test is not blunt: bands of 5% are left about so often


def test_ranks_are_uniform():
    """20,000 ranks of each latent and of log q: inside their band at 1e-5."""
    record, _ = calibrated(20_000, 0, num_particles=20)
    assert record.ranks.shape == (20_000, 3)
    assert not any(is_outside(ranks, 1e-5) for ranks in record.ranks.unbind(1))


FAULTS = {
    "narrow": ({"factor": 0.7}, "too narrow", 1 / 0.7),
    "wide": ({"factor": 1.4}, "too wide", 1 / 1.4),
    "high": ({"shift": 0.3}, "too high", 0.3),
    "low": ({"shift": -0.3}, "too low", 0.3),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_guide_is_flagged_and_described(fault):
    """In each of 20 replicates with 1000 data: every latent, in these words and no others, sizes within 4.5 errors + .03."""
    options, words, size = FAULTS[fault]
    others = [w for _, w, _ in FAULTS.values() if w != words]
    whole, _ = calibrated(1000, 0, num_calls=20, **options)
    for number, record in enumerate(replicates(whole, 1000)):
        rows = {row.name: row for row in record.faulty}
        assert {"z[0]", "z[1]"} <= rows.keys() and not record.passed, number
        for name in ("z[0]", "z[1]"):
            said = rows[name].fault
            assert words in said and not any(w in said for w in others), (number, said)
            size_said, error = said.split(" +- ")[0].split()[-1], said.split(" +- ")[1].split()[0]
            assert float(error) < 0.1 and abs(float(size_said) - size) < 4.5 * float(error) + 0.03, (number, said)
        assert "of 2 latents" in record.verdict() and words in record.verdict()


def test_a_narrow_guide_covers_less_than_it_says():
    """P(|N(0, 1)| < .7 * 1.645) = .750: 4.5 errors of 4000 data."""
    record, _ = calibrated(4000, 0, factor=0.7)
    truth = math.erf(0.7 * 1.6449 / math.sqrt(2))
    for row in record.rows[:2]:
        assert abs(row.coverage(0.9) - truth) < 4.5 * math.sqrt(truth * (1 - truth) / 4000) + 0.005  # 100 draws
        low, high = row.expected_coverage(0.9, 0.95)
        assert low == pytest.approx(0.9 - 1.96 * math.sqrt(0.09 / 4000), abs=1e-4) and high > 0.9


def test_a_diagonal_guide_that_no_single_latent_gives_away_is_seen_together():
    """Right marginals, no correlation: a single latent is calibrated, log q(z | x) is not."""
    lm = pv.exact.LinearGaussian(torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64), torch.zeros(2, dtype=F64), 0.3)
    precision = torch.eye(2, dtype=F64) + lm.weight.T @ lm.weight / 0.3
    covariance = torch.linalg.inv(precision)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ lm.weight.T, 0.3**0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ (covariance @ lm.weight.T / 0.3).T, covariance.diagonal().sqrt()).to_event(1))

    record = pv.GuideCalibration(model, guide, seed=0)(torch.zeros(1000, 2, dtype=F64))
    assert [row.name for row in record.faulty] == ["log q(z | x)"]
    assert "each latent alone is" in record.verdict()


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (0.7, 0.0), (1.4, 0.2), (1.0, 0.3)])
def test_the_symmetric_gap_is_its_closed_form(factor, shift):
    """4.5 errors; for the exact guide to rounding."""
    record, lm = calibrated(4000, 1, factor=factor, shift=shift)
    truth, gap = symmetric_gap(lm, factor, shift), record.symmetric_gap
    assert float(gap.std_error) < 0.03 and not gap.doubt
    assert abs(float(gap.value) - truth) < 4.5 * float(gap.std_error) + 1e-10
    assert torch.equal(gap.std_error, gap.sampling_error)  # one population, the model's
    assert record.cost == 15  # ten draws of the guide, the latents, two simulations of two runs


@pytest.mark.parametrize(("factor", "shift"), [(0.7, 0.2), (1.4, 0.0), (1.0, 0.3)])
def test_intervals_of_the_symmetric_gap_cover_it(factor, shift):
    """At least 93% of 1000 replicates with 300 data: 2.9 binomial errors below the aim, so 6e-3 false alarms in all."""
    record, lm = calibrated(15_000, 2, factor=factor, shift=shift, num_calls=20, num_particles=3)
    truth = symmetric_gap(lm, factor, shift)
    intervals = [part.symmetric_gap.confidence_interval() for part in replicates(record, 300)]
    assert sum(low <= truth <= high for low, high in intervals) >= 930
    assert max(high - low for low, high in intervals) < truth + 0.1


def gamma_poisson(rate_of_guide=1.0):
    """A Gamma prior of 2 and 1, five counts: the posterior is a Gamma of 2 + their sum and 6."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Poisson(z.unsqueeze(-1).expand(z.shape + (5,))).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2 + x.sum(-1), 6.0 * rate_of_guide))

    return model, guide


def test_a_constrained_latent_of_known_posterior():
    """500 replicates of 100 data, of which 1% are called faulty, see above; log p(x, z) - log q is log p(x) exactly."""
    estimator = pv.GuideCalibration(*gamma_poisson(), num_particles=20, seed=0)
    record = pv.evaluate(estimator, [torch.zeros(5000, 5, dtype=F64)] * 10, progress=False)
    assert abs(float(record.symmetric_gap.value)) < 1e-10
    assert sum(not part.passed for part in replicates(record, 100)) <= 15
    wrong = pv.GuideCalibration(*gamma_poisson(1.25), seed=0)(torch.zeros(1000, 5, dtype=F64))
    assert "too low" in wrong.verdict()
    # KL between Gammas of the same shape a and rates b, c: a (log b - log c + c / b - 1); both ways a (b/c + c/b - 2).
    shape = 2 + 10.0  # in expectation
    truth = shape * (1.25 + 0.8 - 2)
    assert abs(float(wrong.symmetric_gap.value) - truth) < 4.5 * float(wrong.symmetric_gap.std_error) < 0.3


def test_a_guide_that_ignores_data_is_seen_by_the_gap_alone_and_said_to_be_wrong():
    """The prior has uniform ranks. Its symmetric gap is KL both ways of N(x / 2, 1 / 2) and N(0, 1), one nat on average.

    KL(p to q) = log(2) / 2 - 1/4 + x^2 / 8 and KL(q to p) = 1/2 - log(2) / 2 + x^2 / 4, with E x^2 = 2 in sum 1/4 + 3/4.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1e-6 * x, 1.0))  # looks at x, so as not to be called blind

    record = pv.GuideCalibration(model, guide, seed=0)(torch.zeros(2000))
    assert not record.faulty and "The symmetric gap shows a fault" in record.verdict()
    assert abs(float(record.symmetric_gap.value) - 1.0) < 5 * float(record.symmetric_gap.std_error) < 0.5


def test_few_data_are_said_to_show_little():
    for num_data, little in ((1, True), (99, True), (100, False)):
        record, _ = calibrated(num_data, seed=0)
        assert ("large faults only" in record.verdict()) == (little and record.passed)
