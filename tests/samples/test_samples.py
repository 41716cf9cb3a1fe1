"""`SampleCheck` against closed forms and brute force; copies are caught, and the errors are what they say."""

import copy
import inspect
import json
import math
import pickle

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import (
    F64,
    SIGMAS,
    assert_near,
    exact_pair,
    linear_gaussian,
    make_evidence,
    make_gaps,
    one_line,
    posterior_moments,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import (
    ArgumentError,
    EmptyBatchError,
    EnumerationError,
    InvalidDataError,
    MaskError,
    NonFiniteError,
    OptionError,
    StructureError,
    SupportError,
)
from pyro_vae.plots import plot_copies, plot_likelihood_and_looks, plot_nearest_neighbours
from pyro_vae.samples import Statistic, neighbours
from pyro_vae.samples.images import laplacian_variance
from pyro_vae.samples.ranks import probability_below, rank_correlation


def standard_guide(x, *others):
    """q(z) = p(z) = N(0, 1), one latent per datum."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


def likelihood_of(make, site="x"):
    """z ~ N(0, 1), and x ~ make(z, x) in the plate of the data."""

    def model(x, *others):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample(site, make(z, x, *others), obs=x)

    return model


def ignoring(loc=0.0, scale=1.0):
    """x ~ N(loc, scale^2) whatever z is."""
    return likelihood_of(lambda z, x: dist.Normal(x.new_full(x.shape, loc), scale).to_event(x.ndim - 1))


def batches(x, size=1000):
    return list(x.split(size))


def look(model, guide, x, train=None, **options):
    call = {name: options.pop(name) for name in ("args", "evidence") if name in options}
    check = pv.SampleCheck(model, guide, **{"seed": 0, **options})
    return check(batches(x), train=batches(x + 1 if train is None else train), progress=False, **call)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def assert_is(statistic, truth, largest_error):
    """Within 4.5 errors, which are small enough."""
    truth = torch.tensor([truth], dtype=F64)
    assert_near(statistic.value.reshape(1), truth, statistic.sampling_error.reshape(1), largest_error)


# Reconstruction error


def test_error_of_a_decoder_that_ignores_its_latent():
    """x - m is normal: the mean square has expectation s^2 + (b - m)^2, and the likelihood's own scale does not matter."""
    x = 0.7 * randn(2000, 9) + 0.5
    result = look(ignoring(loc=0.2, scale=3.0), standard_guide, x)
    torch.testing.assert_close(result.reconstruction_error, (x - 0.2).square().mean(1), rtol=0, atol=1e-12)
    mean = Statistic.mean_of(result.reconstruction_error)
    assert_is(mean, 0.49 + 0.09, 0.01)


def test_error_at_exact_posterior_draws():
    """E |x - W z - b|^2 = |x - W m - b|^2 + tr(W S W'), mean over 4,000 data, one draw each; 4.5 errors (7e-6)."""
    lm, _ = linear_gaussian(2, 4)
    x = pv.simulate(exact_pair(lm)[0], torch.zeros(4000, 4, dtype=F64), seed=3).observed["x"]
    result = look(*exact_pair(lm), x)
    mean, root = posterior_moments(lm)(x)
    rest = x - mean @ lm.weight.T - lm.bias
    expected = (rest.square().sum(1) + (lm.weight @ root).square().sum()) / 4
    assert result.reconstruction_error.shape == (4000,)
    difference = Statistic.mean_of(result.reconstruction_error - expected)
    assert_is(difference, 0.0, 0.01)


def test_reconstructions_are_those_of_reconstruct():
    lm, x = linear_gaussian(num_data=30)
    again = pv.reconstruct(*exact_pair(lm), x, seed=0)
    result = look(*exact_pair(lm), x)
    assert torch.equal(result.reconstruction_error, (x - again.means["x"]).square().mean(1))


# Nearest neighbours


def test_distances_are_those_of_brute_force():
    """Also where the data lie far from the origin, and where they come in whatever pieces."""
    for shift in (0.0, 1e6):
        x, train = randn(70, 5) + shift, randn(230, 5, seed=1) + shift
        result = look(ignoring(loc=shift), standard_guide, x, train)
        difference = x.unsqueeze(1) - train
        torch.testing.assert_close(result.data_distance, difference.norm(dim=2).min(1).values, rtol=0, atol=1e-10)
        kept = (result.closest_samples.unsqueeze(1) - train).norm(dim=2).min(1)
        torch.testing.assert_close(result.sample_distance[result.closest], kept.values, rtol=0, atol=1e-10)
        assert torch.equal(result.nearest[result.closest], kept.indices)
        assert torch.equal(result.closest_train, train[kept.indices])
        assert torch.equal(result.closest, result.sample_distance.argsort()[:20])
        assert result.num_train == 230


def test_pieces_change_nothing(monkeypatch):
    x, train = randn(70, 5), randn(230, 5, seed=1)
    check = pv.SampleCheck(ignoring(), standard_guide, seed=0)
    whole = check(batches(x), train=[train], progress=False)
    for chunk, size in ((7, 230), (3, 64), (1000, 10)):
        monkeypatch.setattr(neighbours, "CHUNK", chunk)
        parts = check(batches(x), train=batches(train, size), progress=False)
        assert torch.equal(parts.nearest, whole.nearest)
        assert torch.equal(parts.closest_train, whole.closest_train)
        torch.testing.assert_close(parts.sample_distance, whole.sample_distance, rtol=0, atol=1e-12)
        torch.testing.assert_close(parts.data_distance, whole.data_distance, rtol=0, atol=1e-12)


def test_a_copy_is_at_zero_and_the_first_of_equals_counts():
    search = neighbours.Neighbours(torch.tensor([[1000.1, 3.0], [0.0, 0.0]]))
    search.add(torch.tensor([[5.0, 5.0], [1000.1, 3.0], [3.0, 4.0]]), 0)
    search.add(torch.tensor([[1000.1, 3.0], [-3.0, 4.0]]), 1)
    assert search.distance.tolist() == [0.0, 5.0]
    assert search.index([(0, 3), (1, 2)]).tolist() == [1, 2]
    assert search.rows[1].tolist() == [3.0, 4.0]


def copying(train, noise):
    """z picks a training datum."""

    def make(z, x):
        chosen = train[(len(train) * torch.special.ndtr(z)).long().clamp(max=len(train) - 1)]
        return dist.Normal(chosen, noise).to_event(1)

    return likelihood_of(make)


def test_a_model_that_copies_is_caught():
    x, train = randn(120, 16), randn(300, 16, seed=1)
    result = look(copying(train, 0.01), standard_guide, x, train)
    nearer = result.probability_nearer()
    assert float(nearer.value) == 1.0
    assert float(nearer.sampling_error) == pytest.approx(1 / 240)
    assert result.z_score > 100
    assert result.verdict().startswith("Memorised, or drawn from the densest parts")
    torch.testing.assert_close(result.closest_samples, result.closest_train, rtol=0, atol=0.06)


def test_noise_is_farther_and_means_would_be_nearer():
    x, train = randn(120, 16), randn(300, 16, seed=1)
    result = look(ignoring(scale=2.0), standard_guide, x, train)
    assert float(result.probability_nearer().value) < 0.1
    assert result.verdict().startswith("Not memorised as a whole: samples are farther")
    # The trap: the mean of this likelihood is nearer to the training data than nearly any datum.
    assert float(train.norm(dim=1).min()) < float(result.data_distance.quantile(0.1))


@pytest.mark.parametrize("labelled", [False, True])
def test_a_right_model_gives_one_half_and_its_error_is_the_spread(labelled):
    """200 replicas of N = 60: the mean of the z-scores within 4.5 / 14, their spread within 4.5 / 20 + 0.03 of one
    (the error of 60 pairs is a little noisy itself). With labels, which decide the scale of datum and sample alike, the
    error must be far below that of independent draws, sqrt(1 / 6 N) = 0.053."""
    generator = torch.Generator().manual_seed(1)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0 * z.unsqueeze(-1), 1 + 19 * y.unsqueeze(-1)).expand(x.shape).to_event(1), obs=x)

    def data(size):
        y = torch.randint(2, (size,), generator=generator).to(F64) * labelled
        return torch.randn(size, 4, generator=generator, dtype=F64) * (1 + 19 * y.unsqueeze(-1)), y

    scores, errors = [], []
    for replica in range(200):
        check = check_of(model, replica)
        result = check([data(60)], train=[data(200)], args=lambda batch: batch, progress=False)
        scores.append(result.z_score)
        errors.append(float(result.probability_nearer().sampling_error))
    scores = torch.tensor(scores, dtype=F64)
    assert abs(float(scores.mean())) < SIGMAS / math.sqrt(200)
    assert abs(float(scores.std()) - 1.02) < SIGMAS / math.sqrt(400) + 0.03
    assert max(errors) < (0.045 if labelled else 0.065)


def check_of(model, seed, known={}):  # noqa: B006  one pair for all replicas, so that its structure is found out once
    check = known.setdefault(model, pv.SampleCheck(model, standard_guide))
    check.seed = seed
    return check


def test_held_out_data_that_were_trained_on_give_no_verdict():
    x = randn(40, 3)
    result = look(ignoring(), standard_guide, x, torch.cat([randn(20, 3, seed=1), x]))
    assert result.num_known == 40
    assert result.verdict().startswith("No verdict: 40 of the 40 held-out data")
    assert "40 held-out data are themselves in the training data." in one_line(result)


# Statistics of ranks


@pytest.mark.parametrize("ties", [False, True])
def test_probability_and_error_are_those_of_brute_force(ties):
    for seed in range(20):
        first, second = randn(9, seed=seed), randn(9, seed=100 + seed) + 0.3
        if ties:
            first, second = first.round(), second.round()
        h = (first.unsqueeze(1) < second).to(F64) + 0.5 * (first.unsqueeze(1) == second).to(F64)
        w, v, u = h.mean(1), h.mean(0), h.mean()
        rest = (h - w.unsqueeze(1) - v + u).square().sum() / 64
        expected = ((w + v).var() / 9 - rest / 81).clamp(min=1 / 18**2).sqrt()
        found = probability_below(first, second)
        torch.testing.assert_close(found.value, u, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.sampling_error, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["shifted", "ties", "shared"])
def test_the_variance_of_the_probability_has_no_bias(kind):
    """4,000 replicas of N = 20: mean of the squared errors against the variance of the values, within 4.5 errors of both;
    a shared part correlates the two sides, which biases the variance by a term in 1 / N^2 (DeLong's would be 3.6 times)."""
    values, squares = [], []
    for seed in range(4000):
        first, second, shared = randn(3, 20, seed=seed)
        if kind == "shifted":
            second = 3 * second + 2
        elif kind == "ties":
            first, second = first.round(), (1.5 * second).round()
        else:
            first, second = first + 4 * shared.sign(), second + 4 * shared.sign()
        found = probability_below(first, second)
        values.append(found.value)
        squares.append(found.sampling_error.square())
    values, squares = torch.stack(values), torch.stack(squares)
    spread = (values - values.mean()).square()
    error = math.sqrt(float(spread.var() + squares.var()) / len(values))
    assert error < 0.05 * float(spread.mean())
    assert abs(float(squares.mean() - spread.mean())) < SIGMAS * error + (
        0.2 * float(spread.mean()) if kind == "shared" else 0
    )


def test_separation_ties_and_one_pair():
    low, high = torch.arange(50.0, dtype=F64), torch.arange(50.0, dtype=F64) + 100
    assert float(probability_below(low, high).value) == 1
    assert float(probability_below(high, low).value) == 0
    assert float(probability_below(low, high).sampling_error) == pytest.approx(0.01)
    same = probability_below(torch.ones(50), torch.ones(50))
    assert float(same.value) == 0.5 and float(same.sampling_error) == pytest.approx(0.01)
    one = probability_below(low[:1], high[:1])
    assert float(one.value) == 1 and math.isnan(float(one.sampling_error))


def midranks(values):
    return torch.stack([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values]).to(F64)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_the_correlation_of_ranks(ties):
    for seed in range(10):
        first, second = randn(2, 25, seed=seed)
        second = second + first
        if ties:
            first, second = first.round(), second.round()
        expected = torch.corrcoef(torch.stack([midranks(first), midranks(second)]))[0, 1]
        torch.testing.assert_close(rank_correlation(first, second).value, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ties", [False, True])
def test_its_error_is_that_of_the_jackknife(ties):
    first, second = randn(2, 150)
    second = first.exp() * second + first
    if ties:
        first, second = first.round(), second.round()
    found = rank_correlation(first, second)
    keep = ~torch.eye(150, dtype=torch.bool)
    left_out = torch.stack([rank_correlation(first[k], second[k]).value for k in keep])
    jackknife = ((left_out - left_out.mean()).square().sum() * 149 / 150).sqrt()
    assert float(found.sampling_error) == pytest.approx(float(jackknife), rel=0.03)


@pytest.mark.parametrize("correlation", [0.0, 0.6, -0.9])
def test_rank_correlation_of_normal_pairs(correlation):
    """6 / pi arcsin(r / 2); 500 replicas of N = 100, the spread of z-scores within 4.5 / sqrt(1000) of one."""
    scores, values = [], []
    for seed in range(500):
        first, second = randn(2, 100, seed=seed)
        second = correlation * first + math.sqrt(1 - correlation**2) * second
        found = rank_correlation(first, second)
        values.append(float(found.value))
        scores.append((float(found.value) - 6 / math.pi * math.asin(correlation / 2)) / float(found.sampling_error))
    spread = float(torch.tensor(values, dtype=F64).std())
    assert abs(sum(values) / 500 - 6 / math.pi * math.asin(correlation / 2)) < SIGMAS * spread / math.sqrt(500) + 0.006
    assert abs(float(torch.tensor(scores).std()) - 1) < SIGMAS / math.sqrt(1000)


def test_rank_correlation_at_its_ends():
    x = torch.arange(10.0, dtype=F64)
    for sign in (1, -1):
        found = rank_correlation(x, sign * x.exp())
        assert float(found.value) == pytest.approx(sign)
        assert float(found.sampling_error) == pytest.approx(math.sqrt(9 / 7) / 20)
    for first, second in ((x[:3], x[:3]), (x, torch.ones_like(x)), (x, x.where(x > 0, math.nan))):
        assert math.isnan(float(rank_correlation(first, second).value))
        assert math.isnan(float(rank_correlation(first, second).sampling_error))


# Sharpness


def test_sharpness_by_hand():
    """A bright pixel: -4 at itself, 1 at its four neighbours, so (16 + 4) / 9 over 3 x 3 inner pixels, whose mean is 0."""
    image = torch.zeros(5, 5, dtype=F64)
    image[2, 2] = 3.0
    ramp = torch.arange(5.0, dtype=F64).expand(5, 5)
    found = laplacian_variance(torch.stack([image, torch.full_like(image, 7.0), ramp]).flatten(1), (5, 5))
    torch.testing.assert_close(found, torch.tensor([9 * 20 / 9, 0.0, 0.0], dtype=F64), rtol=0, atol=1e-12)


def test_sharpness_is_the_variance_of_a_convolution_and_blur_takes_it():
    images = randn(6, 3, 9, 7)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=F64)
    expected = torch.conv2d(images.mean(1, keepdim=True), kernel[None, None]).flatten(1).numpy().var(1)
    found = laplacian_variance(images.flatten(1), (3, 9, 7))
    assert found.numpy() == pytest.approx(expected, abs=1e-12)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    assert bool((laplacian_variance(blurred.flatten(1), (3, 9, 7)) < found / 3).all())


@pytest.mark.parametrize(
    ("event", "given", "expected"),
    [
        ((16,), None, (4, 4)),
        ((4, 5), None, (4, 5)),
        ((2, 4, 5), None, (2, 4, 5)),
        ((20,), (4, 5), (4, 5)),
        ((40,), (2, 4, 5), (2, 4, 5)),
        ((10,), None, None),
        ((9,), None, None),  # a square with one inner pixel
        ((2, 2, 4, 4), None, None),
        ((), None, None),
    ],
)
def test_which_data_are_images(event, given, expected):
    x = randn(12, *event)
    result = look(ignoring(), standard_guide, x, image_shape=given)
    assert result.image_shape == expected
    if expected is None:
        assert result.sharpness is None and result.mean_sharpness() == {}
        assert "sharpness: the data are not images" in one_line(result)
        json.dumps(result.to_dict())
    else:
        assert set(result.sharpness) == {"data", "reconstruction_means", "sample_means", "sample_draws"}
        torch.testing.assert_close(result.sharpness["data"], laplacian_variance(x.flatten(1), expected), rtol=0, atol=1e-12)
        # The likelihood's mean is flat, its draws are noise: var of the Laplacian of unit noise is 20 on average.
        for name in ("reconstruction_means", "sample_means"):
            assert float(result.sharpness[name].abs().max()) < 1e-12
        assert float(result.mean_sharpness()["sample_draws"].value) > 1


def test_sharpness_of_noise():
    """The Laplacian of unit noise has variance 20; over the m inner pixels of one image, correlated -8 with a neighbour, 2
    with a diagonal one and 1 with the second next, the expected sample variance is 20 less the variance of their mean."""
    size, num_images = 6, 4000
    offsets = {(0, 0): 20.0, (0, 1): -8.0, (1, 1): 2.0, (0, 2): 1.0}
    total = sum(
        value * sum(1 for a in cells(size) for b in cells(size) if sorted((abs(a[0] - b[0]), abs(a[1] - b[1]))) == list(key))
        for key, value in offsets.items()
    )
    x = randn(num_images, 8, 8)
    sharpness = Statistic.mean_of(laplacian_variance(x.flatten(1), (8, 8)))
    assert_is(sharpness, 20 - total / size**4, 0.15)


def cells(size):
    return [(i, j) for i in range(size) for j in range(size)]


@pytest.mark.parametrize("shape", [(3,), (2, 2, 4, 4), (2, 8), (4.0, 4), (0, 4, 4)])
def test_image_shapes_that_are_none_are_refused(shape):
    with pytest.raises(OptionError, match="image_shape must be"):
        pv.SampleCheck(ignoring(), standard_guide, image_shape=shape)


def test_an_image_shape_of_other_size_is_refused():
    with pytest.raises(OptionError, match=r"image_shape=\(4, 4\) has 16 numbers, but a datum has 15"):
        look(ignoring(), standard_guide, randn(5, 15), image_shape=(4, 4))


# Programs of many kinds


def test_two_observed_sites_are_joined_in_order():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Bernoulli(0.25 * torch.ones_like(y) + 0 * z.unsqueeze(-1)).to_event(1), obs=y)
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    x, y = randn(30), torch.bernoulli(torch.full((30, 15), 0.5, dtype=F64))
    result = pv.SampleCheck(model, standard_guide, seed=0)(
        [(x, y)], train=[(x[:10] + 1, 1 - y[:10])], args=lambda batch: batch, progress=False
    )
    expected = torch.cat([(y - 0.25).square(), x.square().unsqueeze(1)], 1).mean(1)
    torch.testing.assert_close(result.reconstruction_error, expected, rtol=0, atol=1e-12)
    rows = [torch.cat([side_y, side_x.unsqueeze(1)], 1) for side_y, side_x in ((y, x), (1 - y[:10], x[:10] + 1))]
    distances = (rows[0].unsqueeze(1) - rows[1]).norm(dim=2).min(1).values
    torch.testing.assert_close(result.data_distance, distances, rtol=0, atol=1e-10)
    assert result.closest_samples.shape == (20, 16)
    assert set(result.closest_samples[:, :15].flatten().tolist()) == {0.0, 1.0}
    assert result.image_shape is None  # 16 numbers, but of two sites


def test_samples_of_a_conditional_model_have_the_labels_of_the_data():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal((100.0 * y + z).unsqueeze(-1), 0.1).expand(x.shape).to_event(1), obs=x)

    y = torch.arange(60, dtype=F64)
    x = (100 * y).unsqueeze(1).expand(-1, 3) + 0.0
    loader = DataLoader(TensorDataset(x, y), 25)
    result = pv.SampleCheck(model, standard_guide, seed=0)(
        loader, train=DataLoader(TensorDataset(x + 0.5, y), 7), args=lambda batch: tuple(batch), progress=False
    )
    assert torch.equal(result.nearest, torch.arange(60))
    assert float(result.sample_distance.max()) < 10


def test_plates_inside_a_datum_and_data_that_are_not_leftmost():
    def model(x):
        pixels = pyro.plate("pixels", 3, dim=-2)
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pixels:
                pyro.sample("x", dist.Normal(0 * z + 0.5, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x, train = randn(3, 8), randn(3, 20, seed=1)
    result = pv.SampleCheck(model, guide, seed=0)([x], train=[train], progress=False)
    torch.testing.assert_close(result.reconstruction_error, (x - 0.5).square().mean(0), rtol=0, atol=1e-12)
    expected = (x.T.unsqueeze(1) - train.T).norm(dim=2).min(1).values
    torch.testing.assert_close(result.data_distance, expected, rtol=0, atol=1e-10)


def test_no_plate_makes_every_batch_one_datum():
    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(0 * z, 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x = randn(6, 4)
    result = pv.SampleCheck(model, guide, seed=0, datum_plate=None)(list(x), train=list(x + 1), progress=False)
    torch.testing.assert_close(result.reconstruction_error, x.square().mean(1), rtol=0, atol=1e-12)
    assert result.num_train == len(result) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_dtypes(dtype):
    x = torch.randint(0, 17, (20, 9)).to(dtype)
    model = likelihood_of(lambda z, x: dist.Binomial(16, logits=torch.zeros(x.shape) + 0 * z.unsqueeze(-1)).to_event(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    def float_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Binomial(16, logits=torch.zeros(x.shape) + 0 * z.unsqueeze(-1)).to_event(1), obs=x)

    result = look(float_model if dtype == torch.int64 else model, guide, x, 16 - x)
    for name in ("reconstruction_error", "sample_distance", "data_distance", "closest_train"):
        assert getattr(result, name).dtype == torch.float32
    torch.testing.assert_close(result.reconstruction_error, (x.float() - 8).square().mean(1))


def mixture(enumerate_in_guide, guide_lacks_it=False):
    """Two components at -5 and 5, chosen by a discrete latent."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_ones(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(10.0 * c - 5 + 0 * z, 0.1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            if not guide_lacks_it:
                infer = {"enumerate": "parallel"} if enumerate_in_guide else {}
                pyro.sample("c", dist.Categorical(logits=torch.stack([-10 * x, 10 * x], -1)), infer=infer)
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    return model, guide


@pytest.mark.parametrize("enumerated", [True, False])
def test_what_a_guide_enumerates_is_drawn(enumerated):
    x = torch.tensor([-5.0, 5.0, 5.1, -4.9], dtype=F64)
    result = look(*mixture(enumerated), x)
    torch.testing.assert_close(result.reconstruction_error, (x - 5 * x.sign()).square(), rtol=0, atol=1e-12)
    assert float(result.sample_distance.max()) < 2  # ancestral draws lie at -5 and 5, the training data at -4, ..., 6.1


def test_what_only_the_model_enumerates_is_refused():
    with pytest.raises(EnumerationError, match="sums out 'c', which the guide lacks"):
        look(*mixture(False, guide_lacks_it=True), torch.tensor([-5.0, 5.0]))


def test_prior_sites_are_drawn():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0 * z + w, 1.0), obs=x)

    x = randn(4000)
    result = look(model, standard_guide, x, prior_sites=["w"])
    mean = Statistic.mean_of(result.reconstruction_error - x.square())  # E (x - w)^2 - x^2 = 1
    assert_is(mean, 1.0, 0.06)


# Evidence, records


def test_evidence_stands_beside_the_error():
    """A scale per datum: log p(x) and error rank the data apart, as the closed form does."""
    x = randn(80, 4)
    log_p = dist.Normal(0.0, 1.0).log_prob(x).sum(1)
    result = look(ignoring(), standard_guide, x, evidence=make_evidence(log_p))
    assert torch.equal(result.log_evidence, log_p)
    correlation = result.rank_correlation()
    assert float(correlation.value) == pytest.approx(1.0)
    reversed_ = look(ignoring(), standard_guide, x, evidence=make_evidence(-log_p))
    assert float(reversed_.rank_correlation().value) == pytest.approx(-1.0)
    none = look(ignoring(), standard_guide, x)
    assert none.log_evidence is None and math.isnan(float(none.rank_correlation().value))


def test_evidence_of_gaps_will_do_and_records_print_and_travel():
    torch.manual_seed(0)
    vae = pv.mlp_vae(16, latent_dim=2, likelihood=pv.nn.Normal(), hidden=(8,))
    gaps = make_gaps(1.0, 2.0, num_data=12)
    result = look(vae.model, vae.guide, torch.randn(12, 16), evidence=gaps.evidence)
    assert torch.equal(result.log_evidence, gaps.log_evidence)
    assert result.reconstruction_error.dtype == torch.float32
    again = pickle.loads(pickle.dumps(result))
    assert str(again) == str(result)
    plain = result.to_dict()
    json.dumps(plain)
    assert plain["probability_nearer"]["value"] == float(result.probability_nearer().value)
    for part in ("rank correlation", "sample draws", "held-out data", "P(sample nearer)", result.verdict()):
        assert part in one_line(result)


def test_wrong_evidence_is_refused():
    x = randn(10, 4)
    with pytest.raises(ArgumentError, match="evidence is of 9 data, the loader has 10"):
        look(ignoring(), standard_guide, x, evidence=make_evidence(x[:9, 0]))
    with pytest.raises(ArgumentError, match="must be a record of log p"):
        look(ignoring(), standard_guide, x, evidence=x[:, 0])


def test_evidence_of_other_data_of_a_subsampled_plate_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=10):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x = randn(40)
    same = pv.ImportanceSampling(model, guide, num_particles=100, seed=0)(x)
    other = pv.ImportanceSampling(model, guide, num_particles=100, seed=1)(x)
    check = pv.SampleCheck(model, guide, seed=0)
    result = check([x], train=[x], evidence=same, progress=False)
    torch.testing.assert_close(result.reconstruction_error, x[same.index].square(), rtol=0, atol=1e-12)
    with pytest.raises(ArgumentError, match="has other data in the evidence"):
        check([x], train=[x], evidence=other, progress=False)


def test_one_datum():
    result = look(ignoring(), standard_guide, randn(1, 16))
    assert math.isnan(result.z_score) and math.isnan(float(result.mean_sharpness()["data"].sampling_error))
    assert result.verdict() == "No verdict from one datum."
    str(result)


# Seeds and traces


def test_seeds_and_the_random_state_of_the_caller():
    lm, x = linear_gaussian(num_data=30)
    train = DataLoader(TensorDataset(x + 1), 7, shuffle=True)
    state = torch.get_rng_state()
    first, again, other = (
        pv.SampleCheck(*exact_pair(lm), seed=seed)([x], train=train, progress=False) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.sample_distance, again.sample_distance)
    assert torch.equal(first.reconstruction_error, again.reconstruction_error)
    assert not torch.equal(first.sample_distance, other.sample_distance)
    assert torch.equal(first.data_distance, other.data_distance)
    pyro.set_rng_seed(0)
    free, next_one = (pv.SampleCheck(*exact_pair(lm))([x], train=[x], progress=False) for _ in range(2))
    assert not torch.equal(free.reconstruction_error, next_one.reconstruction_error)


def test_batches_do_not_share_their_noise():
    lm, x = linear_gaussian(num_data=10)
    result = pv.SampleCheck(*exact_pair(lm), seed=0)([x, x], train=[x + 1], progress=False)
    assert not torch.equal(*result.reconstruction_error.split(10))
    assert not torch.equal(*result.sample_distance.split(10))


def test_nothing_is_left_behind():
    layer = nn.Linear(2, 4)
    layer.train()

    def model(x):
        pyro.module("decoder", layer)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(layer(z), scale).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    x = torch.randn(6, 4)
    before = x.clone()
    result = look(model, guide, x)
    assert len(pyro.get_param_store()) == 0
    assert layer.training and all(p.grad is None for p in layer.parameters())
    assert torch.equal(x, before)
    assert not result.reconstruction_error.requires_grad and not result.closest_samples.requires_grad


def test_copies_look_alike():
    lm, x = linear_gaussian()
    original = pv.SampleCheck(*exact_pair(lm), seed=0)
    first, second = (check([x], train=[x + 1], progress=False) for check in (original, copy.deepcopy(original)))
    assert torch.equal(first.sample_distance, second.sample_distance)


# What is refused


@pytest.mark.parametrize(
    ("make", "x", "error", "words"),
    [
        (lambda z, x: dist.Cauchy(z, 1.0), randn(5), StructureError, "'x' \\(Cauchy\\) has no mean"),
        (
            lambda z, x: dist.TransformedDistribution(dist.Normal(z, 1.0), [dist.transforms.SigmoidTransform()]),
            randn(5).sigmoid(),
            StructureError,
            "'x' \\(TransformedDistribution\\) has no mean",
        ),
        (lambda z, x: dist.StudentT(torch.ones_like(z), z), randn(5), NonFiniteError, "mean of the likelihood of 'x'"),
        (
            lambda z, x: dist.Categorical(torch.ones(5, 3, dtype=F64)),
            torch.zeros(5, dtype=F64),
            StructureError,
            "'x' is a class \\(Categorical\\)",
        ),
        (
            lambda z, x: dist.OneHotCategorical(torch.ones(5, 3, dtype=F64)),
            torch.eye(3, dtype=F64)[[0, 1, 2, 0, 1]],
            StructureError,
            "'x' is a class \\(OneHotCategorical\\)",
        ),
        (lambda z, x: dist.Normal(z, 1.0).mask(x > 0), randn(5), MaskError, "'x' is masked"),
        (
            lambda z, x: dist.Normal(z.unsqueeze(-1), 1.0).expand([5, 2]).mask(x > 0).to_event(1),
            randn(5, 2),
            MaskError,
            "'x' is masked",
        ),
        (lambda z, x: dist.Normal(z, 1.0), randn(5) / 0, InvalidDataError, "NaN or infinite values"),
        (lambda z, x: dist.Bernoulli(logits=z), torch.full((5,), 0.3), SupportError, "outside the support"),
    ],
)
def test_sites_that_are_refused(make, x, error, words):
    with pytest.raises(error, match=words):
        look(likelihood_of(make), standard_guide, x, x)


def test_masks_of_poutine_and_of_missing_values_are_refused():
    x = randn(6)

    def masked(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def missing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=x > 0)

    with pytest.raises(MaskError, match="'x' is masked"):
        look(masked, standard_guide, x)
    with pytest.raises(MaskError, match="'x_observed' is masked"):
        look(missing, standard_guide, x)
    assert len(look(masked, standard_guide, x.abs())) == 6


def test_factors_and_models_without_data_are_refused():
    def factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("extra", -z.square())

    def nothing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    with pytest.raises(StructureError, match="the factor 'extra'"):
        look(factor, standard_guide, randn(5))
    with pytest.raises(StructureError, match="the model has no observed site"):
        look(nothing, standard_guide, randn(5))


def test_nan_in_model_and_guide():
    broken = likelihood_of(lambda z, x: dist.Normal(z / 0 - z / 0, 1.0))
    with pytest.raises(NonFiniteError, match="NaN"):
        look(broken, standard_guide, randn(5))
    x = randn(8)
    x[7] = math.nan
    check = pv.SampleCheck(ignoring(), standard_guide, seed=0)
    with pytest.raises(InvalidDataError, match=r"data \[3\]"):  # of the second batch, whose shapes are known
        check([x[:4], x[4:]], train=[x[:4]], progress=False)
    with pytest.raises(InvalidDataError, match=r"data \[3\]"):
        check([x[:4]], train=[x[:4], x[4:]], progress=False)


def test_support_may_be_let_through_and_the_record_says_so():
    model = likelihood_of(lambda z, x: dist.Bernoulli(logits=z.unsqueeze(-1).expand(x.shape)).to_event(1))
    x = randn(10, 9).sigmoid()
    result = look(model, standard_guide, x, check_support=False, evidence=make_evidence(x[:, 0]))
    assert not result.support_checked
    assert "score (values outside the support), nats" in one_line(result)
    assert plot_likelihood_and_looks(result).get_ylabel() == "score, nats"
    plt.close("all")


def test_loaders_that_are_refused():
    x = randn(6, 4)
    check = pv.SampleCheck(ignoring(), standard_guide, seed=0)
    for loader, train in ((x, [x]), ([x], x)):
        with pytest.raises(ArgumentError, match="got a tensor"):
            check(loader, train=train, progress=False)
    for loader, train in (([], [x]), ([x], [])):
        with pytest.raises(EmptyBatchError):
            check(loader, train=train, progress=False)
    for loader, train in (([x, x[:, :3]], [x]), ([x], [x[:, :3]])):
        with pytest.raises(StructureError, match=r"differ in shape between batches, \[\(4,\)\] before and \[\(3,\)\] now"):
            check(loader, train=train, progress=False)


def test_training_data_are_gone_through_once():
    x = randn(6, 4)
    seen = []

    def train():
        for batch in (x + 1, x + 2):
            seen.append(batch)
            yield batch

    result = pv.SampleCheck(ignoring(), standard_guide, seed=0)([x], train=train(), progress=False)
    assert len(seen) == 2 and result.num_train == 12


def test_built_and_documented_as_its_siblings():
    parameters = inspect.signature(pv.SampleCheck).parameters
    assert list(parameters)[:2] == ["model", "guide"]
    assert all(p.kind is p.KEYWORD_ONLY for n, p in parameters.items() if n not in ("model", "guide"))
    assert {n: parameters[n].default for n in ("seed", "prior_sites", "check_support")} == {
        "seed": None,
        "prior_sites": (),
        "check_support": True,
    }
    call = inspect.signature(pv.SampleCheck.__call__).parameters
    assert list(call)[1] == "loader" and all(p.kind is p.KEYWORD_ONLY for n, p in list(call.items())[2:])
    doc = inspect.getdoc(pv.SampleCheck)
    for part in (*(f":param {n}:" for n in parameters), "nats", "(N,)", ":raises", "https://", "Example::"):
        assert part in doc, part


# Pictures


@pytest.fixture
def result():
    x, train = randn(60, 16), randn(90, 16, seed=1)
    log_p = dist.Normal(0.0, 1.0).log_prob(x).sum(1) + randn(60, seed=2)
    yield look(ignoring(), standard_guide, x, train, evidence=make_evidence(log_p))
    plt.close("all")


def test_the_scatter_carries_the_numbers(result):
    _, given = plt.subplots()
    ax = plot_likelihood_and_looks(result, ax=given)
    assert ax is given
    points = np.asarray(ax.collections[0].get_offsets())
    assert points[:, 0] == pytest.approx(result.reconstruction_error.numpy())
    assert points[:, 1] == pytest.approx(result.log_evidence.numpy())
    correlation = result.rank_correlation()
    assert (
        ax.get_title()
        == f"60 data: rank correlation {float(correlation.value):.2f} \u00b1 {float(correlation.sampling_error):.2f}"
    )
    assert ax.get_ylabel() == "log p(x), nats"


def test_a_scatter_needs_log_p():
    with pytest.raises(ValueError, match="no log p"):
        plot_likelihood_and_looks(look(ignoring(), standard_guide, randn(5, 9)))


def test_both_distributions_hold_all_data_and_differ_in_black_and_white(result):
    ax = plot_nearest_neighbours(result)
    bars = [patch for patch in ax.patches if patch.get_fill() and hasattr(patch, "get_height")]
    assert sum(bar.get_height() for bar in bars) == 60
    (outline,) = [patch for patch in ax.patches if not hasattr(patch, "get_height")]
    assert not outline.get_fill()
    counts, _ = np.histogram(result.sample_distance, bins=[*(bar.get_x() for bar in bars), np.inf])
    assert outline.get_xy()[:, 1].max() == counts.max()
    assert f"P(sample nearer) = {float(result.probability_nearer().value):.3f}" in ax.get_title()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["held-out data", "samples"]
    assert "units of the data" in ax.get_xlabel()


def test_distances_that_are_all_zero_are_drawn():
    x = torch.ones(5, 9, dtype=F64)
    model = likelihood_of(lambda z, x: dist.Normal(x.new_ones(x.shape), 1e-30).to_event(1))
    plot_nearest_neighbours(look(model, standard_guide, x, x)).figure.canvas.draw()
    plt.close("all")


@pytest.mark.parametrize("num_images", [3, 8, 100])
def test_copies_stand_above_what_they_copy(result, num_images):
    ax = plot_copies(result, num_images=num_images)
    sheet = np.asarray(ax.images[0].get_array())
    shown = min(num_images, 20)
    assert sheet.shape == (9, 5 * shown - 1)
    for i in range(shown):
        columns = slice(5 * i, 5 * i + 4)
        assert sheet[:4, columns] == pytest.approx(result.closest_samples[i].reshape(4, 4).numpy(), abs=1e-6)
        assert sheet[5:, columns] == pytest.approx(result.closest_train[i].reshape(4, 4).numpy(), abs=1e-6)


def test_copies_of_colour_images_are_drawn_and_of_no_images_refused():
    x = randn(10, 3, 4, 5)
    ax = plot_copies(look(ignoring(), standard_guide, x), num_images=2)
    assert ax.images[0].get_array().shape == (9, 11)
    with pytest.raises(ValueError, match="no images"):
        plot_copies(look(ignoring(), standard_guide, randn(10, 7)))
    plt.close("all")
