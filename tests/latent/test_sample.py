"""`AggregatedPosterior` against closed forms: whose draws they are, which means are known, what belongs to which datum."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, assert_near, diagonal_family, exact_family, guide_of, linear_gaussian, model_of, one_line
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import (
    ArgumentError,
    EmptyBatchError,
    InvalidDataError,
    NonFiniteError,
    StructureError,
)
from pyro_vae.latent import LatentSample


def sample_of(model, guide, x, batch_size=None, labels=None, **options):
    batches = [x] if batch_size is None else list(x.split(batch_size))
    return pv.AggregatedPosterior(model, guide, **{"seed": 0, **options})(batches, progress=False, labels=labels)


def data(num_data=40, seed=1):
    return torch.randn(num_data, generator=torch.Generator().manual_seed(seed), dtype=F64)


def scalar_pair(prior, posterior):
    """A latent 'z' per datum; the likelihood is read by no number here."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x))
            pyro.sample("x", dist.Normal(z.to(x.dtype), 1.0), obs=x)

    return model, guide_of(posterior)


def moments_near(values, mean, variance):
    """Means and second moments of N draws, (N, D), of a normal with these. False alarm: 2 D numbers at 4.5 errors."""
    size = len(values)
    centred = values - mean
    assert_near(centred.mean(0), torch.zeros_like(variance), (variance / size).sqrt(), 0.1)
    assert_near(centred.square().mean(0), variance, variance * math.sqrt(2 / size), 0.1)


# --- closed forms ---


def test_draws_of_a_linear_gaussian_pair():
    """Around the posterior's means with its covariance; the prior's are N(0, I). Also one correlation, at 4.5 errors."""
    lm, x = linear_gaussian(num_data=5000)
    found = sample_of(model_of(lm), guide_of(exact_family(lm)), x, batch_size=700)
    posterior = lm.posterior(x)
    torch.testing.assert_close(found.means, posterior.mean, rtol=0, atol=1e-12)
    assert found.analytic.tolist() == [True, True] and found.names == ("z[0]", "z[1]")
    residual = torch.linalg.solve_triangular(posterior.scale_tril, (found.draws - posterior.mean).unsqueeze(-1), upper=False)
    unit = torch.ones(2, dtype=F64)
    moments_near(residual.squeeze(-1), 0.0, unit)
    moments_near(found.prior, 0.0, unit)
    assert abs(float((found.prior * found.draws).mean())) < 4.5 / math.sqrt(2 * 5000)  # nothing to do with one another
    assert found.draws.shape == found.means.shape == found.prior.shape == (5000, 2) and found.num_data == 5000


def test_q_of_z_is_the_prior_where_guide_and_model_are_exact():
    """Data of the model itself: under the posterior, covariance C, draws are N(0, I) over the data; under a diagonal guide
    with the same means and scales s, N(0, I - C + s^2) in each unit."""
    lm, x = linear_gaussian(num_data=5000)
    found = sample_of(model_of(lm), guide_of(exact_family(lm)), x)
    moments_near(found.draws, 0.0, torch.ones(2, dtype=F64))
    family = diagonal_family(lm, factor=3.0)
    wide = sample_of(model_of(lm), guide_of(family), x)
    covariance = lm.posterior(x[:1]).covariance_matrix
    variance = 1 - covariance.diagonal(dim1=-2, dim2=-1).flatten() + family(x[:1]).variance.flatten()
    assert float(variance.min()) > 1.1
    moments_near(wide.draws, 0.0, variance)


@pytest.mark.parametrize("batch_size", [None, 1, 4, 11])
def test_the_means_and_labels_are_those_of_their_data(batch_size):
    lm, x = linear_gaussian(num_data=12)
    y = torch.arange(12)
    loader = DataLoader(TensorDataset(x, y), batch_size or 12)
    estimator = pv.AggregatedPosterior(model_of(lm), guide_of(exact_family(lm)), seed=0)
    found = estimator(loader, labels=lambda batch: batch[1], progress=False)
    torch.testing.assert_close(found.means, lm.posterior(x).mean, rtol=0, atol=1e-12)
    assert torch.equal(found.labels, y)
    assert len(found.draws.unique(dim=0)) == len(found.prior.unique(dim=0)) == 12  # no two batches share their noise


def test_a_prior_that_depends_on_an_argument():
    """Draws of the prior are those for the labels of the data."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(100.0 * y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(100.0 * y + x, 0.5))

    x, y = data(50), torch.arange(50, dtype=F64)
    estimator = pv.AggregatedPosterior(model, guide, seed=0)
    found = estimator(DataLoader(TensorDataset(x, y), 20), args=tuple, labels=lambda batch: batch[1], progress=False)
    assert float((found.prior[:, 0] - 100 * found.labels).abs().max()) < 6
    torch.testing.assert_close(found.means[:, 0], 100 * y + x, rtol=0, atol=1e-12)


# --- which means are known ---


def two_sites(order, bound_first):
    """Two latents, of which the guide draws one given the other; the model has them in `order`."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = {name: pyro.sample(name, dist.Normal(torch.zeros_like(x), 1.0)) for name in order}
            pyro.sample("x", dist.Normal(z["a"] + z["b"], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample(bound_first, dist.Normal(x, 0.5))
            other = "b" if bound_first == "a" else "a"
            pyro.sample(other, dist.Normal(2 * first, 0.5))

    return model, guide


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("first", ["a", "b"])
def test_of_a_latent_drawn_given_another_only_the_draw_is_known(order, first):
    x = data()
    found = sample_of(*two_sites(order, first), x, batch_size=7)
    assert found.names == order
    assert found.analytic.tolist() == [name == first for name in order]
    free, bound = order.index(first), 1 - order.index(first)
    assert torch.equal(found.means[:, free], x) and torch.equal(found.means[:, bound], found.draws[:, bound])
    assert float((found.draws[:, bound] - 2 * found.draws[:, free]).abs().max()) < 0.5 * 6
    assert f"Posterior mean not known, a draw is used in its place: '{order[bound]}'." in one_line(found)
    assert bool(found.summary()["std_of_means"].isnan()[bound]) and found.order.tolist() == [free, bound]


def test_a_chain_of_three():
    """The second is drawn given the first, the third given nothing."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = [pyro.sample(name, dist.Normal(torch.zeros_like(x), 1.0)) for name in "abc"]
            pyro.sample("x", dist.Normal(sum(z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 0.5))
            pyro.sample("b", dist.Normal((a > 0).to(x), 0.5))
            pyro.sample("c", dist.Normal(3 * x, 0.5))

    x = data()
    found = sample_of(model, guide, x)
    assert found.analytic.tolist() == [True, False, True]
    assert torch.equal(found.means, torch.stack([x, found.draws[:, 1], 3 * x], 1))


def positive_and_real(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros_like(x), 1.0))
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + rate, 1.0), obs=x)


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoNormalMessenger])
def test_autoguides_of_independent_latents(kind):
    """'z' is a plain normal, 'rate' is transformed, and has no mean in a formula."""
    x = data(20)
    guide = kind(positive_and_real, init_scale=0.5)
    guide(x)
    with torch.no_grad():
        if kind is AutoDiagonalNormal:
            guide.loc[20:] = torch.stack([x, -x], 1).flatten()
        else:
            guide.locs.z.copy_(torch.stack([x, -x], 1))
    found = sample_of(positive_and_real, guide, x)
    assert found.names == ("rate", "z[0]", "z[1]") and found.analytic.tolist() == [False, True, True]
    torch.testing.assert_close(found.means[:, 1:], torch.stack([x, -x], 1), rtol=0, atol=1e-12)
    assert torch.equal(found.means[:, 0], found.draws[:, 0]) and bool((found.draws[:, 0] > 0).all())


def test_a_joint_draw_of_an_autoguide_has_draws_alone():
    x = data(3)
    guide = AutoMultivariateNormal(positive_and_real)
    guide(x)
    found = sample_of(positive_and_real, guide, x, datum_plate=None)
    assert found.draws.shape == (1, 9) and not bool(found.analytic.any()) and torch.equal(found.means, found.draws)


def test_bits_have_a_mean_and_classes_have_none():
    x = data(2000)
    bits = sample_of(
        *scalar_pair(lambda x: dist.Bernoulli(torch.full_like(x, 0.3)), lambda x: dist.Bernoulli(torch.sigmoid(x))), x
    )
    torch.testing.assert_close(bits.means[:, 0], torch.sigmoid(x), rtol=0, atol=1e-12)
    assert set(bits.draws.flatten().tolist()) == {0.0, 1.0} and bits.analytic.tolist() == [True]
    assert abs(float(bits.prior.mean()) - 0.3) < 4.5 * math.sqrt(0.21 / 2000)
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=F64)
    classes = sample_of(
        *scalar_pair(
            lambda x: dist.Categorical(torch.full((3,), 1 / 3, dtype=F64)),
            lambda x: dist.Categorical(logits=x[:, None] * logits),
        ),
        x,
    )
    assert classes.draws.is_floating_point() and set(classes.draws.flatten().tolist()) == {0.0, 1.0, 2.0}
    assert classes.analytic.tolist() == [False] and torch.equal(classes.means, classes.draws)


def test_a_point_guide_of_a_discrete_latent():
    model, guide = scalar_pair(lambda x: dist.Bernoulli(torch.full_like(x, 0.3)), lambda x: dist.Delta((x > 0).to(x.dtype)))
    x = data()
    found = sample_of(model, guide, x)
    assert torch.equal(found.draws[:, 0], (x > 0).to(x.dtype)) and found.analytic.tolist() == [False]


def test_a_mean_that_does_not_exist_is_not_known():
    model, guide = scalar_pair(
        lambda x: dist.Normal(torch.zeros_like(x), 1.0), lambda x: dist.StudentT(torch.ones_like(x), x, 1.0)
    )
    found = sample_of(model, guide, data())
    assert found.analytic.tolist() == [False] and torch.equal(found.means, found.draws)


# --- plates, masks, enumeration ---


def test_a_mixture_that_the_model_sums_out():
    """Its component is drawn for the prior: half of the draws lie at either side. False alarm: two numbers at 4.5."""

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full_like(x, 0.25)))
            z = pyro.sample("z", dist.Normal(20 * c - 10, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = data(2000)
    found = sample_of(model, guide_of(lambda x: dist.Normal(x, 0.5)), x, batch_size=300)
    assert found.names == ("z",) and torch.equal(found.means[:, 0], x)
    high = found.prior[:, 0] > 0
    assert abs(float(high.double().mean()) - 0.25) < 4.5 * math.sqrt(0.1875 / 2000)
    offset = found.prior[:, 0] - torch.where(high, 10.0, -10.0)
    assert float(offset.abs().max()) < 6 and abs(float(offset.mean())) < 4.5 / math.sqrt(2000)


def test_a_guide_that_enumerates_all_is_one_that_draws():
    model, guide = scalar_pair(lambda x: dist.Bernoulli(torch.full_like(x, 0.5)), lambda x: dist.Bernoulli(torch.sigmoid(x)))
    found, drawn = (sample_of(model, either, data()) for either in (config_enumerate(guide), guide))
    assert torch.equal(found.draws, drawn.draws) and torch.equal(found.means, drawn.means)


def test_masked_latents_are_nan():
    present = torch.arange(30) % 3 != 0
    model, guide = scalar_pair(lambda x: dist.Normal(torch.zeros_like(x), 1.0), lambda x: dist.Normal(x, 0.5))
    x = data(30)
    found = sample_of(*(poutine.mask(program, mask=present) for program in (model, guide)), x)
    for side in (found.draws, found.means, found.prior):
        assert torch.equal(side[:, 0].isnan(), ~present)
    assert found.analytic.tolist() == [True]
    summary = found.summary()
    assert float(summary["mean_of_means"]) == pytest.approx(float(x[present].mean()), abs=1e-12)
    assert float(summary["std_of_means"]) == pytest.approx(float(x[present].std()), abs=1e-12)


def test_a_plate_inside_a_datum_counts_as_units():
    weights = torch.tensor([1.0, 0.5, 0.0], dtype=F64)

    def program(is_model):
        def run(x):
            with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 3, dim=-1):
                loc = x[:, None] * weights
                q = dist.Normal(torch.stack([loc, 2 * loc], -1), 0.5).to_event(1)
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1) if is_model else q)
                if is_model:
                    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, None].expand(-1, 3))

        return run

    x = data(25)
    found = sample_of(program(True), program(False), x, batch_size=10, datum_plate="data")
    loc = x[:, None] * weights
    assert found.names == tuple(f"z[{j}]" for j in range(6))
    torch.testing.assert_close(found.means, torch.stack([loc, 2 * loc], -1).flatten(1), rtol=0, atol=1e-12)
    assert found.order.tolist()[0] == 1


def test_a_subsampled_plate():
    x = data(50)

    def program(is_model):
        def run():
            with pyro.plate("data", 50, subsample_size=20) as index:
                z = pyro.sample("z", dist.Normal(0.0 * x[index], 1.0) if is_model else dist.Normal(x[index], 0.5))
                if is_model:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        return run

    estimator = pv.AggregatedPosterior(program(True), program(False), seed=0)
    found = estimator([None] * 3, args=lambda batch: (), progress=False)
    assert found.num_data == 60 and set(found.means.flatten().tolist()) <= set(x.tolist())


def test_prior_sites_are_no_units():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            noise = pyro.sample("noise", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z + noise, 1.0), obs=x)

    x = data()
    found = sample_of(model, guide_of(lambda x: dist.Normal(x, 0.5)), x, prior_sites=["noise"])
    assert found.names == ("z",) and torch.equal(found.means[:, 0], x) and found.analytic.tolist() == [True]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_one_datum_with_one_unit(dtype):
    model, guide = scalar_pair(lambda x: dist.Normal(torch.zeros_like(x), 1.0), lambda x: dist.Normal(x, 0.5))
    found = sample_of(model, guide, torch.ones(1, dtype=dtype))
    assert found.draws.shape == (1, 1) and found.draws.dtype == found.prior.dtype == found.means.dtype == dtype
    assert math.isnan(float(found.summary()["std"])) and "Latents of 1 data" in one_line(found)


# --- the record ---


def test_the_summary_by_hand():
    """NaN stand for no place; a second unit has no means."""
    nan = math.nan
    draws = torch.tensor([[1.0, 0.0], [2.0, 4.0], [6.0, nan], [nan, 2.0]], dtype=F64)
    record = LatentSample(
        draws=draws,
        means=torch.tensor([[1.0, 0.0], [1.0, 4.0], [4.0, nan], [nan, 2.0]], dtype=F64),
        prior=torch.tensor([[0.0, 1.0], [1.0, nan], [2.0, 3.0], [3.0, nan]], dtype=F64),
        names=("a", "b"),
        analytic=torch.tensor([True, False]),
    )
    summary = {name: column.tolist() for name, column in record.summary().items()}
    assert summary["mean"] == [3.0, 2.0] and summary["prior_mean"] == [1.5, 2.0]
    assert summary["std"] == [pytest.approx(math.sqrt(7)), 2.0]
    assert summary["prior_std"] == [pytest.approx(math.sqrt(5 / 3)), pytest.approx(math.sqrt(2))]
    assert summary["mean_of_means"][0] == 2.0 and summary["std_of_means"][0] == pytest.approx(math.sqrt(3))
    assert math.isnan(summary["mean_of_means"][1]) and math.isnan(summary["std_of_means"][1])
    row = str(record).splitlines()[3].split()
    assert row == ["a", "3.000", "2.646", "1.500", "1.291", "1.732"]


def test_units_come_by_the_spread_of_their_means_and_at_most_twenty_are_printed():
    weights = torch.linspace(1, 3, 25, dtype=F64).roll(7)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(25), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(1), 1.0), obs=x)

    x = data(4000)
    found = sample_of(model, guide_of(lambda x: dist.Normal(x[:, None] * weights, 0.5).to_event(1)), x)
    spread = found.summary()["std_of_means"]
    torch.testing.assert_close(spread, weights * x.std(), rtol=0, atol=1e-10)
    scaled = (spread / found.prior.std(0))[found.order]
    assert bool((scaled[:-1] >= scaled[1:]).all()) and found.order[0] == 6
    assert len(str(found).splitlines()) == 24 and "... 5 more" in one_line(found)


def test_a_record_can_be_written_as_json():
    lm, x = linear_gaussian()
    plain = sample_of(model_of(lm), guide_of(exact_family(lm)), x).to_dict()
    again = json.loads(json.dumps(plain))
    assert again["num_data"] == 6 and again["names"] == ["z[0]", "z[1]"] and again["labels"] is None
    assert len(again["draws"]) == len(again["means"]) == len(again["prior"]) == 6 and again["analytic"] == [True, True]


# --- seeds, traces, errors ---


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x):
        pyro.module("body", self.body)
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.body(x), scale).to_event(1))


def test_seed_and_nothing_left_behind():
    lm, x = linear_gaussian(dtype=torch.float32)
    guide = Encoder().eval()
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in guide.state_dict().items()}
    first, again, other = (sample_of(model_of(lm), guide, x, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.draws, again.draws) and torch.equal(first.prior, again.prior)
    assert not torch.equal(first.draws, other.draws) and not torch.equal(first.prior, other.prior)
    assert torch.equal(torch.get_rng_state(), state) and len(pyro.get_param_store()) == 0
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.parameters()) and not first.draws.requires_grad
    free = sample_of(model_of(lm), guide, x, seed=None)
    assert not torch.equal(free.draws, sample_of(model_of(lm), guide, x, seed=None).draws)


def test_labels_that_do_not_fit_are_named():
    lm, x = linear_gaussian()
    pair = model_of(lm), guide_of(exact_family(lm))
    for labels, message in (
        (lambda batch: batch, r"\(6,\), got shape \(6, 4\)"),
        (lambda batch: torch.zeros(5), r"\(6,\), got shape \(5,\)"),
        (lambda batch: list("abcdef"), "got list"),
    ):
        with pytest.raises(ArgumentError, match=message):
            sample_of(*pair, x, labels=labels)


def test_errors_are_named():
    lm, x = linear_gaussian()
    model, guide = model_of(lm), guide_of(exact_family(lm))
    estimator = pv.AggregatedPosterior(model, guide, seed=0)
    with pytest.raises(ArgumentError, match="got a tensor"):
        estimator(x)
    with pytest.raises(EmptyBatchError, match="no batch"):
        estimator([], progress=False)
    with pytest.raises(InvalidDataError, match="NaN"):
        sample_of(model, guide, x.clone().fill_(math.nan))
    with pytest.raises(NonFiniteError, match="draws of the guide .* 'z'"):
        sample_of(
            *scalar_pair(
                lambda x: dist.Normal(torch.zeros_like(x), 1.0), lambda x: dist.Normal(x, torch.where(x > 9, 1.0, torch.nan))
            ),
            data(),
        )


def test_latents_of_another_shape_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    estimator = pv.AggregatedPosterior(model, guide_of(lambda x: dist.Normal(x, 1.0).to_event(1)), seed=0)
    with pytest.raises(StructureError, match="shapes"):
        estimator([torch.zeros(3, 2), torch.zeros(3, 4)], progress=False)
