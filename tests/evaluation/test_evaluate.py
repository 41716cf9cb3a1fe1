"""`evaluate`: any estimator over a loader, in data order, each batch with noise of its own."""

import functools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import (
    F64,
    diagonal_family,
    exact_pair,
    guide_of,
    linear_gaussian,
    model_of,
    quiet,
    scaled_family,
)
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, EmptyBatchError

ESTIMATORS = {
    "importance": functools.partial(pv.ImportanceSampling, num_particles=50),
    "adaptive": functools.partial(pv.AdaptiveImportanceSampling, num_particles=60, num_gradients=10),
    "gaps": functools.partial(pv.InferenceGaps, num_particles=50),
}


def setting(num_data=11, exact=False):
    lm, x = linear_gaussian(num_data=num_data)
    if exact:
        return lm, x, *exact_pair(lm)
    return lm, x, model_of(lm), guide_of(diagonal_family(lm, 0.1, 1.2))


@pytest.fixture(params=sorted(ESTIMATORS))
def make(request):
    return ESTIMATORS[request.param]


def run(estimator, loader, **options):
    with quiet():
        return pv.evaluate(estimator, loader, **{"progress": False, **options})


def test_data_order_and_a_ragged_last_batch(make):
    """An exact guide makes every per-datum ELBO the truth, whatever the noise."""
    lm, x, model, guide = setting(exact=True)
    loader = DataLoader(TensorDataset(x), batch_size=4)
    result = run(make(model, guide), loader, seed=0)
    assert len(result) == len(x) == 11
    truth = lm.log_evidence(x)
    assert torch.allclose(result.elbo, truth, atol=1e-10)
    whole = make(model, guide, seed=0)
    with quiet():
        whole = whole(x)
    assert torch.allclose(result.elbo, whole.elbo, atol=1e-10)
    assert type(result) is type(whole)
    if not isinstance(result, pv.Gaps):  # the rounds of a fit depend on its batch
        assert result.cost == whole.cost
    assert torch.allclose(result.log_evidence, truth, atol=0.2)


def test_batches_have_noise_of_their_own_also_under_a_seed(make):
    """The same rows twice: the same noise would give the same numbers, whose errors do not average out."""
    _, x, model, guide = setting(4)
    loader = [x, x]
    for estimator, seed in (
        (make(model, guide, seed=7), None),
        (make(model, guide), 7),
        (make(model, guide, seed=1), 7),
    ):
        result = run(estimator, loader, seed=seed)
        assert not torch.isclose(result.elbo[:4], result.elbo[4:], rtol=0.0, atol=1e-9).any()
        assert not torch.isclose(result.log_evidence[:4], result.log_evidence[4:], rtol=0.0, atol=1e-9).any()


def test_a_seed_makes_it_repeatable(make):
    _, x, model, guide = setting()
    loader = DataLoader(TensorDataset(x), batch_size=4)
    first, again, other = (run(make(model, guide), loader, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.log_evidence, again.log_evidence)
    assert torch.equal(first.elbo, again.elbo)
    assert not torch.equal(first.elbo, other.elbo)
    built = [run(make(model, guide, seed=3), loader) for _ in range(2)]
    assert torch.equal(built[0].elbo, built[1].elbo)


@pytest.mark.parametrize("kind", ["list", "DataLoader"])
def test_the_random_state_is_left_alone_with_a_seed(make, kind):
    """A DataLoader itself draws a number when it is iterated."""
    _, x, model, guide = setting()
    loader = [x[:4], x[4:]] if kind == "list" else DataLoader(TensorDataset(x), 4)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run(make(model, guide), loader, seed=3)
    if kind == "list":
        run(make(model, guide, seed=3), loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_without_a_seed_pyros_own_seed_rules(make):
    _, x, model, guide = setting()
    values = []
    for seed in (5, 5, 6):
        pyro.set_rng_seed(seed)
        values.append(run(make(model, guide), [x[:4], x[4:]]).elbo)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_a_call_after_evaluate_is_as_before(make):
    """The batch number does not leak out of `evaluate`."""
    _, x, model, guide = setting()
    estimator = make(model, guide, seed=3)
    with quiet():
        before = estimator(x).elbo
        run(estimator, [x[:4], x[4:]])
        assert torch.equal(estimator(x).elbo, before)


def test_a_call_after_a_failed_evaluate_is_as_before():
    _, x, model, guide = setting()
    estimator = pv.ImportanceSampling(model, guide, num_particles=20, seed=3)
    before = estimator(x).elbo
    with pytest.raises(pv.errors.InvalidDataError, match="NaN"):
        run(estimator, [x[:4], x[4:8], x[8:] * float("nan")])
    assert torch.equal(estimator(x).elbo, before)


@pytest.mark.parametrize("loader", [[], iter(()), DataLoader(TensorDataset(torch.zeros(0, 4)), batch_size=2)])
def test_an_empty_loader_is_named(loader):
    _, _, model, guide = setting()
    with pytest.raises(EmptyBatchError, match="has no batch"):
        run(pv.ImportanceSampling(model, guide, num_particles=5), loader)


def test_args_maps_a_batch_to_the_arguments():
    """A conditional model: x ~ N(z + y, 1), batches are dicts."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - y) / 2, 0.5**0.5))

    x, y = torch.randn(7, dtype=F64), torch.randn(7, dtype=F64)
    loader = [{"image": x[i : i + 3], "label": y[i : i + 3]} for i in (0, 3, 6)]
    estimator = pv.ImportanceSampling(model, guide, num_particles=5)
    result = run(estimator, loader, args=lambda batch: (batch["image"], batch["label"]))
    truth = dist.Normal(y, 2**0.5).log_prob(x)
    assert torch.allclose(result.log_evidence, truth, atol=1e-10)
    two = run(estimator, DataLoader(TensorDataset(x, y), 3), args=lambda batch: (batch[0], batch[1]))
    assert torch.allclose(two.log_evidence, truth, atol=1e-10)


@pytest.mark.parametrize("kind", ["loader of tuples", "loader with labels", "tensors", "lists", "generator"])
def test_the_first_element_of_a_batch_by_default(kind):
    lm, x, model, guide = setting(exact=True)
    labels = torch.arange(len(x))
    loader = {
        "loader of tuples": DataLoader(TensorDataset(x), 5),
        "loader with labels": DataLoader(TensorDataset(x, labels), 5),
        "tensors": [x[:5], x[5:]],
        "lists": [[x[:5]], [x[5:]]],
        "generator": (part for part in (x[:5], x[5:])),
    }[kind]
    result = run(pv.ImportanceSampling(model, guide, num_particles=3), loader)
    assert torch.allclose(result.log_evidence, lm.log_evidence(x), atol=1e-10)


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar(progress, capsys):
    _, x, model, guide = setting(exact=True)
    loader = DataLoader(TensorDataset(x), 5)
    run(pv.ImportanceSampling(model, guide, num_particles=3), loader, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("ImportanceSampling" in captured.err) == progress
    assert ("3/3" in captured.err) == progress


def test_monte_carlo_errors_average_over_batches():
    """Independent noise per batch: the error of the mean falls like 1 / sqrt(N) (4 errors, 6e-5)."""
    lm, x = linear_gaussian(num_data=1)
    guide = guide_of(scaled_family(lm, 1.2))
    estimator = pv.ImportanceSampling(model_of(lm), guide, num_particles=500, seed=0)
    mean = run(estimator, [x] * 100).mean()
    assert float(mean.std_error) < 0.003
    assert abs(float(mean.value - lm.log_evidence(x))) < 4 * float(mean.std_error)


def test_a_tensor_or_a_data_set_in_the_place_of_a_loader_is_refused_and_the_remedy_works():
    """20 data of 64 numbers were taken for 20 batches of 64 data."""
    x = torch.zeros(20, 64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.expand(z.shape[:-1] + (64,)), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 0.2).to_event(1))

    estimator = pv.ImportanceSampling(model, guide, num_particles=10)
    for loader in (x, TensorDataset(x)):
        with pytest.raises(ArgumentError, match="expected an iterable of batches"):
            pv.evaluate(estimator, loader, progress=False)
    for loader in ([x], DataLoader(TensorDataset(x), batch_size=7)):
        assert len(pv.evaluate(estimator, loader, progress=False)) == 20


def test_a_refusal_says_what_else_the_batch_held():
    """A regression on (x, y) pairs: with x alone, y would be a latent site, and drawing it from the prior no remedy."""

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + x, 1.0), obs=y)

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    batches = [(torch.zeros(3), torch.ones(3))]
    with pytest.raises(
        pv.errors.SiteMismatchError, match="the first of the 2 elements of a batch; args=lambda batch: batch"
    ):
        pv.evaluate(pv.ImportanceSampling(model, guide), batches, progress=False)
    assert len(pv.evaluate(pv.ImportanceSampling(model, guide), batches, args=lambda batch: batch, progress=False)) == 3
