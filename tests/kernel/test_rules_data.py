"""DESIGN 5.10 and 5.11: bad observations and broken densities are named by their data."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from kernel_helpers import (
    F64,
    assert_close,
    assert_weights,
    exact_pair,
    linear_gaussian,
    normal,
    randn,
    tensor,
    weigh,
)
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, InvalidDataError, NonFiniteError, SupportError
from pyro_vae.kernel import Pair

ZERO = tensor(0.0)
B = 5


def observed(likelihood, event_dim=0, latent_dim=0):
    """A pair with any likelihood(z) and the prior as the guide."""

    def latent(x):
        return pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = latent(x)
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            latent(x)

    return model, guide


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("known", [False, True])
def test_rows_with_nan_or_infinity_are_named(bad, known):
    lm, x = linear_gaussian()
    pair = Pair(*exact_pair(lm))
    if known:
        weigh(None, None, x, pair=pair)
    x[1, 2] = x[3, 0] = bad
    with pytest.raises(InvalidDataError, match=r"'x' has NaN or infinite values in data \[1, 3\]"):
        weigh(None, None, x, pair=pair)


@pytest.mark.parametrize("known", [False, True])
def test_bad_rows_are_named_under_vmap(known):
    y, x = randn(B, 2), randn(B)
    weight = randn(3)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(tensor([0.0]), 1.0).to_event(1))
            pyro.sample("x", dist.LogNormal(torch.cat([z, y], -1) @ weight, 0.5), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(tensor([0.0]), 1.0).to_event(1))

    pair = Pair(model, guide)
    x = x.exp()
    if known:
        assert weigh(None, None, x, y, pair=pair).executions[1] != "leading"
    with pytest.raises(InvalidDataError, match=r"data \[2\]"):
        weigh(None, None, torch.where(torch.arange(B) == 2, torch.nan, x), y, pair=pair)
    with pytest.raises(SupportError, match=r"data \[4\]"):
        weigh(None, None, torch.where(torch.arange(B) == 4, -1.0, x), y, pair=pair)


def test_bad_rows_are_named_by_datum_in_nested_plates():
    x = randn(3, B)  # pixels by data

    def model(x):
        with pyro.plate("data", B, dim=-1):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            with pyro.plate("pixels", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B, dim=-1):
            pyro.sample("z", dist.Normal(ZERO, 1.0))

    x[2, 4] = torch.nan
    with pytest.raises(InvalidDataError, match=r"data \[4\]"):
        weigh(model, guide, x)


def test_many_bad_rows_are_counted():
    lm, x = linear_gaussian(num_data=30)
    x[:25, 0] = torch.nan
    with pytest.raises(InvalidDataError, match=r"\[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] and 15 more"):
        weigh(*exact_pair(lm), x)


def test_nan_under_a_mask_does_not_count():
    x = randn(B)
    x[2] = torch.nan
    mask = x.isfinite()

    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", B):
            pyro.sample("z", dist.Normal(ZERO, 1.0))

    result = weigh(model, guide, x)
    z = result.values["z"]
    assert_close(result.log_weight, torch.where(mask, normal(torch.nan_to_num(x), z, 1.0), ZERO))


def test_grey_pixels_under_a_bernoulli():
    x = (randn(B) > 0).to(F64)
    x[1] = 0.5
    model, guide = observed(lambda z: dist.Bernoulli(logits=z))
    with pytest.raises(SupportError, match=r"'x' has values outside.*data \[1\].*check_support=False"):
        weigh(model, guide, x)
    result = weigh(model, guide, x, check_support=False)
    z = result.values["z"]
    expected = -binary_cross_entropy_with_logits(z, x.expand(4, B), reduction="none")
    assert_close(result.log_weight, expected)


def test_more_successes_than_trials():
    model, guide = observed(lambda z: dist.Binomial(total_count=10, logits=z))
    with pytest.raises(SupportError, match=r"data \[3\].*largest 11"):
        weigh(model, guide, tensor([0.0, 10.0, 3.0, 11.0, 2.0]))
    result = weigh(model, guide, tensor([0.0, 10.0, 3.0, 9.0, 2.0]))
    assert result.log_weight.isfinite().all()


def test_binomial_with_a_number_of_trials_per_datum():
    total = tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    model, guide = observed(lambda z: dist.Binomial(total_count=total, logits=z))
    assert weigh(model, guide, total).log_weight.isfinite().all()
    with pytest.raises(SupportError, match=r"data \[0, 2\]"):
        weigh(model, guide, total + tensor([1.0, 0.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    "likelihood, value",
    [
        (lambda z: dist.Poisson(z.exp()), -1.0),
        (lambda z: dist.Poisson(z.exp()), 1.5),
        (lambda z: dist.LogNormal(z, 1.0), 0.0),
        (lambda z: dist.Beta(z.exp(), 1.0), 1.5),
        (lambda z: dist.Gamma(z.exp(), 1.0), -0.5),
    ],
)
def test_other_supports(likelihood, value):
    model, guide = observed(likelihood)
    x = tensor([1.0, 1.0, value, 1.0, 1.0]) if value != 1.5 else tensor([0.0, 0.0, 1.5, 0.0, 0.0]) + 0
    if likelihood(ZERO).support is dist.constraints.unit_interval:
        x = tensor([0.5, 0.5, value, 0.5, 0.5])
    with pytest.raises(SupportError, match=r"data \[2\]"):
        weigh(model, guide, x)


def test_a_category_that_does_not_exist():
    logits = torch.zeros(3, dtype=F64)
    model, guide = observed(lambda z: dist.Categorical(logits=logits + z[..., None]))
    with pytest.raises(SupportError, match=r"data \[1\]"):
        weigh(model, guide, torch.tensor([0, 3, 1, 2, 0]))


@pytest.mark.parametrize("seed", range(6))
def test_a_support_that_depends_on_the_latent_is_a_weight_of_zero_not_an_error(seed):
    """x ~ Uniform(0, exp(z)): most particles cannot have made a large x, and that is no fault of the data."""
    model, guide = observed(lambda z: dist.Uniform(torch.zeros_like(z), z.exp()))
    x = tensor([0.1, 0.5, 1.5, 2.0, 0.2])
    result = weigh(model, guide, x, K=40, seed=seed)
    z = result.values["z"]
    expected = torch.where(x < z.exp(), -z, torch.tensor(-torch.inf, dtype=F64))
    assert_close(result.log_weight, expected)


def test_check_support_off_still_refuses_nan():
    model, guide = observed(lambda z: dist.Bernoulli(logits=z))
    with pytest.raises(InvalidDataError, match=r"data \[0\]"):
        weigh(model, guide, tensor([torch.nan, 0.5, 1.0, 0.0, 1.0]), check_support=False)


def test_integer_and_boolean_observations():
    logits = torch.zeros(3, dtype=F64)
    model, guide = observed(lambda z: dist.Categorical(logits=logits.expand(*z.shape, 3)))
    expected = torch.full((B,), -torch.log(tensor(3.0)), dtype=F64)
    assert_weights(weigh(model, guide, torch.tensor([0, 1, 2, 2, 0])), expected)


def test_log_weights_that_are_not_finite_are_named():
    lm, x = linear_gaussian()
    with Pair(*exact_pair(lm)).open((x,), {}, 0) as call:
        good = torch.zeros(3, B)
        call.check_finite(good)
        good[1, 2] = -torch.inf
        call.check_finite(good)
        for bad in (torch.nan, torch.inf):
            weights = torch.zeros(3, B)
            weights[0, 1] = weights[2, 4] = bad
            with pytest.raises(NonFiniteError, match=r"data \[1, 4\]"):
                call.check_finite(weights)


def test_data_are_checked_when_drawn_from_the_prior():
    """draw_prior scores the observations as well."""
    lm, x = linear_gaussian()
    pair = Pair(*exact_pair(lm))
    with torch.no_grad(), pair.open((x,), {}, 0) as call:
        call.set_noise(1, 0)
        values, record = call.draw_prior(3)
    z = values["z"]
    assert z.shape == (3, B, 2)
    mean = z @ lm.weight.T + lm.bias
    assert_close(record["x"].log_prob, normal(x, mean, lm.variance.sqrt()).sum(-1))


# ------------------------------------------------------------------------------- one observation for all data


@pytest.mark.parametrize(
    "run",
    [
        lambda m, g: pv.ImportanceSampling(m, g, num_particles=10),
        lambda m, g: pv.AdaptiveImportanceSampling(m, g, num_particles=10),
        lambda m, g: pv.InferenceGaps(m, g),
        lambda m, g: pv.ExactEvidence(m, g),
    ],
)
def test_a_single_datum_in_the_place_of_a_batch_is_refused_and_the_remedy_works(run):
    """A datum of 64 numbers would be taken for 64 data that all observe the same 64 numbers."""
    x = torch.zeros(20, 64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.expand(z.shape[:-1] + (64,)), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 0.2).to_event(1))

    with pytest.raises(ArgumentError, match=r"x\[None\]"):
        run(model, guide)(x[0])
    assert len(pv.ImportanceSampling(model, guide, num_particles=10)(x[0][None])) == 1


def test_an_observed_number_may_be_shared():
    """A constant that all data observe, without an event: log N(0; 0, sqrt 2) for each."""

    def model(n):
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(n), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    def guide(n):
        with pyro.plate("data", n):
            pyro.sample("z", dist.Normal(torch.zeros(n), 0.5**0.5))

    found = pv.ImportanceSampling(model, guide, num_particles=5)(3).log_evidence
    torch.testing.assert_close(found, dist.Normal(0.0, 2**0.5).log_prob(torch.zeros(3)))
