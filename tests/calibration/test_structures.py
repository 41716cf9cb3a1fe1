"""Programs of every kind: what counts, what is left out, what is refused, and that nothing is left behind."""

import json
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibration_helpers import calibrated, spoiled_pair
from pair_helpers import F64, one_line
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_vae as pv
from pyro_vae.errors import (
    ArgumentError,
    MaskError,
    OptionError,
    StructureError,
    SubsamplingError,
    UnreliableEvidenceWarning,
)

X = torch.zeros(300, dtype=F64)


def normal(mean, variance):
    return dist.Normal(mean, variance**0.5)


def test_a_seed_fixes_all_and_leaves_no_trace():
    model, guide, _ = spoiled_pair()
    template = torch.full((50, 4), 7.0, dtype=F64)
    state = torch.get_rng_state()
    first, again, other = (pv.GuideCalibration(model, guide, seed=seed)(template) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and bool((template == 7).all())
    assert torch.equal(first.ranks, again.ranks) and torch.equal(first.at_latents, again.at_latents)
    assert not torch.equal(first.ranks, other.ranks)
    pyro.set_rng_seed(0)
    free, next_one = (pv.GuideCalibration(model, guide)(template).ranks for _ in range(2))
    assert not torch.equal(free, next_one)
    assert len(pyro.get_param_store()) == 0 and not first.ranks.requires_grad


def test_passes_over_the_same_batch_simulate_other_data():
    model, guide, _ = spoiled_pair(factor=0.7)
    batch = torch.zeros(100, 4, dtype=F64)
    record = pv.evaluate(pv.GuideCalibration(model, guide, seed=0), [batch] * 10, progress=False)
    assert len(record) == 1000 and len(record.elbo.unique()) == 1000 and not record.passed
    again = pv.evaluate(pv.GuideCalibration(model, guide), [batch] * 10, progress=False, seed=0)
    assert again.ranks.shape == record.ranks.shape


def test_a_few_draws_and_data_do_not_fail():
    for num_data, num_particles in ((1, 1), (1, 100), (5, 1), (3, 250)):
        record, _ = calibrated(num_data, 0, num_particles=num_particles)
        assert record.ranks.shape == (num_data, 3) and bool(((record.ranks > 0) & (record.ranks < 1)).all())
        assert record.passed and "No fault" in one_line(record)
        assert abs(float(record.symmetric_gap.value)) < 1e-9
    with pytest.raises(OptionError, match="num_particles"):
        calibrated(5, 0, num_particles=0)


def test_more_draws_than_a_noise_block_extend_the_same_draws():
    short, long = (calibrated(40, 0, num_particles=n)[0] for n in (100, 250))
    assert torch.equal(short.elbo, long.elbo) and torch.equal(short.stretch, long.stretch)
    assert float((short.ranks - long.ranks).abs().max()) < 0.3 and not torch.equal(short.ranks, long.ranks)


def test_float32_stays_float32():
    model, guide, lm = spoiled_pair()

    def single(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ lm.weight.float().T, 1.0).to_event(1), obs=x)

    def its_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tanh(x[:, :2]), 1.0).to_event(1))

    record = pv.GuideCalibration(single, its_guide, seed=0)(torch.zeros(200, 4))
    assert record.elbo.dtype == torch.float32 and record.ranks.dtype == F64


def two_sites(flip=False):
    """z1 ~ N(0, 1), z2 given z1 of two numbers, x of both: an exact guide, drawing in the model's order or the other."""
    covariance = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.25, 0.25], [0.5, 0.25, 1.25]], dtype=F64)
    noise = 0.5
    gain = covariance @ torch.linalg.inv(covariance + noise * torch.eye(3, dtype=F64))
    posterior = covariance - gain @ covariance

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(x.new_zeros(()), 1.0))
            second = pyro.sample("second", dist.Normal(0.5 * first.unsqueeze(-1).expand(*first.shape, 2), 1.0).to_event(1))
            both = torch.cat([first.unsqueeze(-1), second], -1)
            pyro.sample("x", dist.Normal(both, noise**0.5).to_event(1), obs=x)

    def guide(x):
        mean = x @ gain.T
        head, rest = posterior[0, 0], posterior[1:, 1:]
        with pyro.plate("data", len(x)):
            if flip:
                second = pyro.sample("second", dist.MultivariateNormal(mean[..., 1:], rest))
                weights = posterior[:1, 1:] @ torch.linalg.inv(rest)
                loc = mean[..., 0] + ((second - mean[..., 1:]) * weights[0]).sum(-1)
                pyro.sample("first", normal(loc, float(head - weights @ posterior[1:, 0])))
            else:
                first = pyro.sample("first", normal(mean[..., 0], float(head)))
                weights = posterior[1:, 0] / head
                loc = mean[..., 1:] + (first - mean[..., 0]).unsqueeze(-1) * weights
                pyro.sample("second", dist.MultivariateNormal(loc, rest - torch.outer(weights, posterior[0, 1:])))

    return model, guide


@pytest.mark.parametrize("flip", [False, True])
def test_sites_of_different_shapes_in_another_order(flip):
    record = pv.GuideCalibration(*two_sites(flip), seed=0)(torch.zeros(1000, 3, dtype=F64))
    assert record.names == ("first", "second[0]", "second[1]", "log q(z | x)")
    assert record.passed and abs(float(record.symmetric_gap.value)) < 1e-9


@pytest.mark.parametrize("share", [1.0, 1.5])
def test_discrete_latents_by_random_ties(share):
    """A Bernoulli whose posterior is known: uniform ranks at random ties; a guide with other odds is seen."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(2 * c, 1.0), obs=x)

    def guide(x):
        logits = 2 * x - 2 + torch.log(torch.tensor(0.4 / 0.6, dtype=F64))
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=share * logits))

    x = torch.zeros(2000, dtype=F64)
    record = pv.GuideCalibration(model, guide, seed=0)(x)
    enumerated = pv.GuideCalibration(model, config_enumerate(guide), seed=0)(x)  # taken for one that draws
    for found in (record, enumerated):
        assert found.names == ("c", "log q(z | x)") and found.passed == (share == 1.0), str(found)
    assert (abs(float(record.symmetric_gap.value)) < 1e-9) == (share == 1.0)


def test_what_the_model_sums_out_has_no_rank():
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7], dtype=F64)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    def guide(x):
        """The posterior, a mixture: p(z | x) = sum_c p(c | x) N((x - c) / 2, 1/2)."""
        logits = torch.stack(
            [dist.Normal(float(c), 2**0.5).log_prob(x) + torch.tensor(p).log() for c, p in ((0, 0.3), (1, 0.7))]
        )
        means = torch.stack([x / 2, (x - 1) / 2], -1)
        with pyro.plate("data", len(x)):
            parts = dist.Normal(means, 0.5**0.5)
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits.T), parts))

    record = pv.GuideCalibration(model, guide, seed=0)(torch.zeros(1000, dtype=F64))
    assert record.names == ("z", "log q(z | x)") and record.left_out == ("c",) and record.passed, str(record)
    assert "without a rank: c" in one_line(record) and abs(float(record.symmetric_gap.value)) < 1e-6


def test_a_guide_that_enumerates_one_of_two_sites():
    """c is summed out of q(z | x); z given c is exact, so that log p(x, z) - log q(z | x) is log p(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.4)))
            z = pyro.sample("z", dist.Normal(2 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        logits = dist.Normal(2.0, 2**0.5).log_prob(x) - dist.Normal(0.0, 2**0.5).log_prob(x) + torch.tensor(0.4 / 0.6).log()
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal((x + 2 * c) / 2, 0.5**0.5))

    record = pv.GuideCalibration(model, guide, seed=0)(torch.zeros(1000, dtype=F64))
    assert record.names == ("z", "log q(z | x)") and record.left_out == ("c",) and record.passed, str(record)
    assert abs(float(record.symmetric_gap.value)) < 1e-6


def test_a_component_that_only_the_guide_draws_is_summed_out():
    """The posterior is a mixture; the guide draws a component of its own, then z given it."""

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.4)))
            z = pyro.sample("z", dist.Normal(2 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        logits = dist.Normal(2.0, 2**0.5).log_prob(x) - dist.Normal(0.0, 2**0.5).log_prob(x) + x.new_tensor(0.4 / 0.6).log()
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(logits=logits), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal((x + 2 * k) / 2, 0.5**0.5))

    record = pv.GuideCalibration(model, guide, seed=0)(torch.zeros(1000, dtype=F64))
    assert record.names == ("z", "log q(z | x)") and record.passed, str(record)
    assert abs(float(record.symmetric_gap.value)) < 1e-6


@pytest.mark.parametrize("inside", ["event", "plate"])
def test_holes_stay_holes(inside):
    """A third of the numbers are missing and NaN; the guide knows which."""
    hole = torch.arange(900).reshape(300, 3) % 3 == torch.arange(300).unsqueeze(1) % 3

    def model(x):
        seen = ~x.isnan()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            mean = z.unsqueeze(-1).expand(*z.shape, 3)
            if inside == "event":
                pyro.sample("x", dist.Normal(mean, 1.0).mask(seen).to_event(1), obs=x)
        if inside == "plate":
            with pyro.plate("numbers", 3, dim=-2), pyro.plate("data", len(x), dim=-1), pyro.poutine.mask(mask=seen.T):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        seen = ~x.isnan()
        precision = 1 + seen.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.nan_to_num().sum(-1) / precision, precision.rsqrt().to(x)))

    x = torch.zeros(300, 3, dtype=F64).masked_fill(hole, torch.nan)
    where = {} if inside == "event" else {"data": lambda drawn: (drawn["x"].T.masked_fill(hole, torch.nan),)}
    record = pv.GuideCalibration(model, guide, seed=0, datum_plate="data", **where)(x)
    assert record.passed and abs(float(record.symmetric_gap.value)) < 1e-6


def test_masked_latents_do_not_count():
    """The second of two latents is missing in a third of the data; its guide is wrong, but only where it is masked."""

    def model(x, present):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.poutine.mask(mask=present):
                b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("y", dist.Normal(b, 1.0), obs=x[:, 1])
            pyro.sample("x", dist.Normal(a, 1.0), obs=x[:, 0])

    def guide(x, present):
        with pyro.plate("data", len(x)):
            pyro.sample("a", normal(x[:, 0] / 2, 0.5))
            with pyro.poutine.mask(mask=present):
                pyro.sample("b", normal(torch.where(present, x[:, 1] / 2, 100.0), 0.5))

    x = torch.zeros(300, 2, dtype=F64)
    present = torch.arange(300) % 3 > 0
    x[~present, 1] = torch.nan
    say_where = {"data": lambda drawn: (torch.stack([drawn["x"], drawn["y"].masked_fill(~present, torch.nan)], 1), present)}
    record = pv.GuideCalibration(model, guide, seed=0, **say_where)(x, present)
    assert record.passed and torch.equal(record.ranks[:, 1].isnan(), ~present)
    assert [row.num_data for row in record.rows] == [300, 200, 300]
    assert abs(float(record.symmetric_gap.value)) < 1e-9


def test_places_inside_an_event_and_plates_inside_a_datum():
    """Four places in a plate inside the datum, of which each datum has its own number."""
    lengths = torch.arange(200) % 4 + 1
    present = torch.arange(4).unsqueeze(1) < lengths

    def model(x):
        with pyro.plate("data", x.shape[1], dim=-1), pyro.plate("places", 4, dim=-2), pyro.poutine.mask(mask=present):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[1], dim=-1), pyro.plate("places", 4, dim=-2), pyro.poutine.mask(mask=present):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5 * (0.5 if wrong else 1)).to_event(1))

    wrong = False
    options = {"datum_plate": "data", "seed": 0}
    record = pv.GuideCalibration(model, guide, **options)(torch.zeros(4, 200, 2, dtype=F64))
    assert record.names[:8] == tuple(f"z[{u}]" for u in range(8)) and record.passed
    kept = present.T.repeat_interleave(2, dim=1)
    assert torch.equal(~record.ranks[:, :8].isnan(), kept)
    wrong = True
    spoiled = pv.GuideCalibration(model, guide, **options)(torch.zeros(4, 200, 2, dtype=F64))
    assert "too narrow" in spoiled.verdict() and float(spoiled.symmetric_gap.value) > 1


def test_the_missing_half_of_obs_mask():
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    def guide(x, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(seen, x / 2, 0.0), torch.where(seen, 0.5**0.5, 1.0)))

    seen = torch.arange(600) % 3 > 0
    record = pv.GuideCalibration(model, guide, seed=0)(torch.zeros(600, dtype=F64), seen)
    assert record.names == ("z", "log q(z | x)") and record.passed, str(record)
    assert abs(float(record.symmetric_gap.value)) < 1e-7


def test_prior_sites_have_no_rank_and_no_part_in_the_gap():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x / 2, 0.5))

    record = pv.GuideCalibration(model, guide, prior_sites=["w"], seed=0)(X)
    assert record.names == ("z", "log q(z | x)") and record.left_out == ("w",) and record.passed
    assert abs(float(record.symmetric_gap.value)) < 1e-9


def test_what_a_model_conditions_on_stays():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + 10 * y, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal((x - 10 * y) / 2, 0.5))

    y = torch.arange(300, dtype=F64) % 7
    for record in (pv.GuideCalibration(model, guide, seed=0)(X, y), pv.GuideCalibration(model, guide, seed=0)(X, y=y)):
        assert record.passed and abs(float(record.symmetric_gap.value)) < 1e-9


def regression(scale=1.0):
    """Weights shared by all data of a call, with the exact posterior or a narrower one."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    def guide(x, y):
        precision = torch.eye(2, dtype=F64) + 4 * x.T @ x
        covariance = torch.linalg.inv(precision)
        pyro.sample("w", dist.MultivariateNormal(covariance @ (4 * x.T @ y), scale**2 * covariance))

    return model, guide


def test_a_whole_call_as_one_datum_by_many_calls():
    x = torch.randn(10, 2, dtype=F64)
    batches = [(x, torch.zeros(10, dtype=F64))] * 300
    for scale, passed in ((1.0, True), (0.5, False)):
        estimator = pv.GuideCalibration(*regression(scale), datum_plate=None, seed=0)
        record = pv.evaluate(estimator, batches, args=tuple, progress=False)
        assert len(record) == 300 and record.names[:2] == ("w[0]", "w[1]") and record.passed == passed, str(record)


def test_latents_outside_the_data_that_are_given():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        pyro.sample("scale", dist.Delta(x.new_tensor(2.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x / 5, 0.8))

    record = pv.GuideCalibration(model, guide, seed=0)(torch.zeros(1000, dtype=F64))
    assert record.given == ("scale",) and record.passed and "given: scale" in one_line(record)
    assert abs(float(record.symmetric_gap.value)) < 1e-9


def test_a_plate_that_takes_a_part_of_the_data():
    """A batch that stands for more data is calibrated; a model that cuts its batch out of all data is refused by name."""

    def model(x):
        with pyro.plate("data", 60_000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 60_000, subsample_size=len(x)):
            pyro.sample("z", normal(x / 2, 0.5))

    record = pv.GuideCalibration(model, guide, seed=0)(X)
    assert record.passed and abs(float(record.symmetric_gap.value)) < 1e-9

    def cutting(x):
        with pyro.plate("data", len(x), subsample_size=20) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def its_guide(x):
        with pyro.plate("data", len(x), subsample_size=20) as index:
            pyro.sample("z", normal(x[index] / 2, 0.5))

    with pytest.raises(SubsamplingError, match="pass only the batch"):
        pv.GuideCalibration(cutting, its_guide, seed=0)(torch.arange(100, dtype=F64))


@pytest.mark.parametrize("reads", ["teacher forcing", "mask"])
def test_a_model_that_reads_its_observations_is_refused(reads):
    """Latents drawn before the data are then no posterior draws, and ranks of them would accuse a right guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if reads == "mask":
                with pyro.poutine.mask(mask=x > 0):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            else:
                pyro.sample("x", dist.Normal(z + 0.5 * x.roll(1, 0), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(StructureError, match="reads its observations elsewhere"):
        pv.GuideCalibration(model, guide, seed=0)(X)


def test_rescaled_data_need_to_be_said():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x / 10)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x / 20, 0.5))

    with pytest.raises(ArgumentError, match="data=lambda"):
        pv.GuideCalibration(model, guide, seed=0)(X + 1)
    record = pv.GuideCalibration(model, guide, seed=0, data=lambda drawn: (10 * drawn["x"],))(X + 1)
    assert record.passed and abs(float(record.symmetric_gap.value)) < 1e-9


def test_a_mask_that_moves_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.5)))
            with pyro.poutine.mask(mask=a > 0):
                b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(torch.where(a > 0, b, 0.0), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.5)))
            with pyro.poutine.mask(mask=a > 0):
                pyro.sample("b", normal(x / 2, 0.5))

    with pytest.raises(MaskError):
        pv.GuideCalibration(model, guide, seed=0)(X)


def test_a_guide_that_does_not_look_at_the_data_is_called_that():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    record = pv.GuideCalibration(model, guide, seed=0)(torch.randn(100, 2, dtype=F64))
    assert record.blind and not record.passed and "does not depend on the data" in record.verdict()
    # The prior is no posterior: its rank of z is uniform all the same, for the data are averaged over.
    assert not record.faulty and float(record.symmetric_gap.value) > 0.5


def test_an_autoguide_has_ranks_and_no_gap():
    def model(x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    guide = AutoMultivariateNormal(model)
    x = torch.randn(10, 2, dtype=F64)
    guide(x)
    record = pv.GuideCalibration(model, guide, datum_plate=None, seed=0)(x)
    assert record.symmetric_gap is None and "log q is not known" in record.unchecked["symmetric gap"]
    assert record.names == ("w[0]", "w[1]") and record.blind and "no symmetric gap" in one_line(record)


def test_a_guide_that_misses_draws_has_an_infinite_gap():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x.sigmoid().unsqueeze(-1).expand(*x.shape, 2) * 0.1, 0.7).to_event(1))

    with pytest.warns(pv.errors.UnreliableEvidenceWarning, match="gives no density to the latents of"):
        record = pv.GuideCalibration(model, guide, seed=0)(X)
    assert float(record.symmetric_gap.value) == float("inf") and "not to be trusted" in one_line(record)
    assert not record.passed


def test_heavy_tails_of_the_gap_are_doubted():
    """A Cauchy posterior under a Gaussian guide: KL(p to q) is infinite, and no average shows it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.001 * x, 2.0))

    with pytest.warns(pv.errors.UnreliableEvidenceWarning, match="Pareto k"):
        record = pv.GuideCalibration(model, guide, seed=0)(torch.zeros(1000, dtype=F64))
    assert "symmetric gap" in record.doubts and record.symmetric_gap.doubt


def test_records_join_select_and_are_written():
    record, _ = calibrated(200, 0, factor=0.5)
    half = record.select(torch.arange(200) < 100)
    joined = pv.Calibration.cat([half, record.select(torch.arange(100, 200))])
    assert torch.equal(joined.ranks, record.ranks) and str(joined) == str(record)
    assert json.loads(json.dumps(record.to_dict()))["passed"] is False
    assert str(pickle.loads(pickle.dumps(record))) == str(record)
    with pytest.raises(ValueError, match="num_particles"):
        pv.Calibration.cat([record, calibrated(10, 0, num_particles=7)[0]])


def test_many_latents_are_cut_when_printed():
    record, _ = calibrated(100, 0, latent_dim=30)
    assert "and 11 more without a fault" in one_line(record)


def test_an_elbo_of_minus_infinity_is_in_doubt_also_without_a_gap():
    """log q is not known at the latents of this guide, so there is no symmetric gap whose doubt would say it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1e-160), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(noise))

    with pytest.warns(UnreliableEvidenceWarning, match="the ELBO is in doubt: it is infinite for 4 of 4 data, where draws"):
        record = pv.GuideCalibration(model, guide, num_particles=4, seed=0)(torch.zeros(4, dtype=F64))
    assert record.at_latents is None
    assert bool((record.elbo == -math.inf).all()) and "in doubt" in one_line(record)


def test_where_floats_are_too_coarse_there_is_no_gap():
    """Draws at 1e9 of scale one are one float32, and the symmetric gap came out as -.35 with an error of .004."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.full((len(x),), 1e9), 1.0))
            pyro.sample("x", dist.Normal(z - 1e9, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1e9 + 0.8 * x, 0.6))

    with pytest.warns(
        UnreliableEvidenceWarning, match="floats are too coarse to distinguish draws of the guide from one another"
    ):
        record = pv.GuideCalibration(model, guide, num_particles=20, seed=0)(torch.zeros(200))
    assert record.symmetric_gap is None and "to float64" in record.unchecked["symmetric gap"]
