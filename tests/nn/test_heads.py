"""What is true of every head: densities, shapes, types, copies, extremes."""

import copy
import itertools
import pickle

import pyro
import pytest
import torch
from head_specs import F64, SPECS
from nn_helpers import FALSE_ALARM, SIGMAS, density, in_eval_mode, log_density, raw_numbers, simulated

import pyro_vae.nn as nn
from pyro_vae.errors import ArgumentError, OptionError
from pyro_vae.nn.head import Family

every_head = pytest.mark.parametrize("name", SPECS)
with_a_mean = pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.has_mean])


def test_every_public_head_is_held():
    """The families of guides are left out: their numbers are no data, and `test_families.py` has them. `Heterogeneous` has
    `test_heterogeneous.py`."""
    public = {value for name in nn.__all__ if issubclass(value := getattr(nn, name), nn.Head)}
    families = {head for head in public if issubclass(head, Family)}
    assert public - {nn.Head, nn.Heterogeneous, *families} == {type(spec.make()) for spec in SPECS.values()}


# --- densities ---


@pytest.mark.parametrize(("name", "spread"), [(name, spread) for name, spec in SPECS.items() for spread in spec.spreads])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 2e-5)])
def test_the_density_sums_or_integrates_to_one(name, dtype, tolerance, spread):
    head = in_eval_mode(name, dtype=dtype)
    for seed in range(5):
        raw = raw_numbers(head, seed, spread=spread, dtype=dtype)
        if SPECS[name].innermost in ("Normal", "Laplace", "StableStudentT"):
            raw[0] = 0  # float32 has no points to tell a narrow density far from zero
        fn = head(raw)
        where = SPECS[name].points(fn, dtype)
        total = (where.weights * density(fn, where)).sum()
        assert total.dtype == dtype
        assert float(total) == pytest.approx(1, abs=tolerance)


@with_a_mean
def test_mean_and_variance_are_those_of_the_density(name):
    head = in_eval_mode(name)
    for seed, spread in itertools.product(range(4), (0.001, 1.0, min(10.0, SPECS[name].spreads[-1]))):
        fn = head(raw_numbers(head, seed, spread=spread))
        where = SPECS[name].points(fn, F64)
        weights = where.weights * density(fn, where)
        mean = (weights * where.values).sum()
        torch.testing.assert_close(fn.mean.squeeze(), mean, rtol=1e-9, atol=1e-9)
        variance = (weights * (where.values - mean) ** 2).sum()
        torch.testing.assert_close(fn.variance.squeeze(), variance, rtol=1e-8, atol=1e-9)


@every_head
def test_draws_follow_the_density(name):
    """Mean, mean square and mean log-density of 20,000 draws, 3 numbers per head: false alarm 3 * 7e-6 each.

    Of the logarithm or the arc tangent of draws, where few large ones decide the mean.
    """
    head = in_eval_mode(name)
    with torch.no_grad():
        check_draws(name, head)


def check_draws(name, head):
    fn = head(raw_numbers(head, seed=3))
    where = SPECS[name].points(fn, F64)
    weights = where.weights * density(fn, where)
    draws = fn.sample((20_000,)).to(F64)
    assert bool(head.support.check(draws).all())
    log_prob = torch.where(weights > 0, log_density(fn, where), 0.0)
    seen, values = SPECS[name].seen_as(draws.squeeze(-1)), SPECS[name].seen_as(where.values)
    for found, expected in (
        (seen, values),
        (seen**2, values**2),
        (fn.log_prob(draws), log_prob),
    ):
        truth = (weights * expected).sum()
        error = found.std() / len(found) ** 0.5
        assert float(error) < 0.05 * max(1.0, abs(float(truth))), "blunt"
        assert float((found.mean() - truth).abs()) <= SIGMAS * float(error) + 1e-12, (name, FALSE_ALARM)


def test_numbers_of_an_event_are_independent_and_parameters_come_in_chunks():
    """Event of three numbers against three events of one, whose raw numbers are picked by hand."""
    for name in SPECS:
        head = in_eval_mode(name)
        raw = raw_numbers(head, seed=1, size=3, batch=(4,))
        x = head(raw).sample()
        single = [head(raw[:, i::3]).log_prob(x[:, i : i + 1]) for i in range(3)]
        torch.testing.assert_close(head(raw).log_prob(x), sum(single), msg=name)


# --- shapes ---


@every_head
def test_images_are_chunked_along_channels(name):
    vectors, images = in_eval_mode(name), in_eval_mode(name, event_dim=3)
    raw = torch.randn(5, images.num_outputs(2), 4, 3, dtype=F64)
    fn = images(raw)
    assert (fn.batch_shape, fn.event_shape) == ((5,), (2, 4, 3))
    x = fn.sample()
    torch.testing.assert_close(fn.log_prob(x), vectors(raw.flatten(1)).log_prob(x.flatten(1)))
    assert images.support.event_dim == 3
    assert bool(images.support.check(x).all())


@every_head
def test_any_leading_dimensions(name):
    head = in_eval_mode(name)
    raw = raw_numbers(head, size=3, batch=(4, 5))
    fn = head(raw)
    assert (fn.batch_shape, fn.event_shape) == ((4, 5), (3,))
    x = fn.sample()
    one_by_one = torch.stack([torch.stack([head(raw[k, b]).log_prob(x[k, b]) for b in range(5)]) for k in range(4)])
    torch.testing.assert_close(fn.log_prob(x), one_by_one)
    torch.testing.assert_close(fn.log_prob(x[0]), torch.stack([head(r).log_prob(x[0]) for r in raw]))


@every_head
def test_under_vmap(name):
    """As the kernel does it, with argument checks off: a check reads values, which vmap refuses."""
    head = in_eval_mode(name)
    raw = raw_numbers(head, size=3, batch=(4, 5))
    x = head(raw[0]).sample()
    expected = head(raw).log_prob(x)
    with pyro.validation_enabled(False):
        torch.testing.assert_close(torch.vmap(lambda r: head(r).log_prob(x))(raw), expected)


@every_head
def test_expand(name):
    head = in_eval_mode(name)
    fn = head(raw_numbers(head, size=3))
    x = fn.sample((5,))
    wide = fn.expand((4, 5))
    assert type(wide) is type(fn)
    assert (wide.batch_shape, wide.event_shape) == ((4, 5), (3,))
    assert wide.sample().shape == (4, 5, 3)
    torch.testing.assert_close(wide.log_prob(x), fn.log_prob(x).expand(4, 5))


@every_head
def test_a_width_that_is_no_multiple_is_refused(name):
    head = SPECS[name].make()
    if head.num_params > 1:
        with pytest.raises(ArgumentError, match=f"{head.num_params} numbers per number of an event.*num_outputs"):
            head(torch.zeros(5, 7))
    with pytest.raises(ArgumentError, match=r"shape \(3,\)"):
        SPECS[name].make(3)(torch.zeros(3))


# --- types, devices, copies ---


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtype_is_kept(name, dtype):
    head = in_eval_mode(name, dtype=dtype)
    fn = head(raw_numbers(head, size=3, batch=(5,), dtype=dtype))
    x = fn.sample()
    assert x.dtype == (torch.long if name == "Categorical" else dtype)
    assert fn.log_prob(x).dtype == dtype
    assert head.input_layer().to(dtype)(x).dtype == dtype


@every_head
def test_all_tensors_follow_the_device(name):
    """On the meta device, where a tensor left behind on another one raises."""
    head = SPECS[name].make().to("meta").eval()
    with pyro.validation_enabled(False):
        fn = head(torch.zeros(5, head.num_outputs(3), device="meta"))
        x = torch.zeros(5, 3, device="meta")
        assert fn.log_prob(x).device == x.device
        if SPECS[name].has_mean:
            assert fn.mean.device == x.device
        assert head.input_layer().to("meta")(x).device == x.device


@every_head
def test_copies_are_as_good(name):
    """A copy gives the same densities and still refuses what the original refuses."""
    head = SPECS[name].make()
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            tensor.add_(2)  # not the values that a new head starts with
    head.eval()
    raw = raw_numbers(head, size=3, batch=(5,), dtype=torch.float32)
    x = head(raw).sample()
    loaded = SPECS[name].make()
    loaded.load_state_dict(head.state_dict())
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded.eval()):
        torch.testing.assert_close(twin(raw).log_prob(x), head(raw).log_prob(x), rtol=0, atol=0)
        with pytest.raises(ValueError, match="takes"):
            twin(raw).log_prob(x + torch.nan)
        torch.testing.assert_close(twin.input_layer()(x), head.input_layer()(x))


# --- extremes ---


@every_head
def test_gradients_are_finite_far_out(name):
    """Raw numbers of +-50 in all combinations against the smallest and largest data, in float32; Adam squares them."""
    head = in_eval_mode(name, dtype=torch.float32)
    for signs in itertools.product((-50.0, 0.0, 50.0), repeat=head.num_params):
        for x in SPECS[name].edges:
            raw = torch.tensor(signs, requires_grad=True)
            log_prob = head(raw).log_prob(torch.tensor([x]))
            (gradient,) = torch.autograd.grad(log_prob, raw)
            assert bool(log_prob.isfinite()), (signs, x)
            assert bool(gradient.square().isfinite().all()), (signs, x, gradient)


# --- what heads ask for ---


def test_discretised_logistic_counts_in_half_ranges():
    raw = torch.tensor([-1.0, 0.0, 1.0, 0.5, 0.0, -3.0, 2.0, 0.0], dtype=F64)
    base = nn.DiscretizedLogistic(17)(raw).base_dist
    torch.testing.assert_close(base.loc, torch.tensor([0.0, 8.0, 16.0, 12.0], dtype=F64))
    torch.testing.assert_close(base.scale, 2 * torch.log2(1 + 2 ** raw[4:]) + 1 / 32)


def test_num_outputs():
    for name, spec in SPECS.items():
        assert spec.make().num_outputs(10) == 10 * spec.num_params, name
    assert nn.MultivariateNormal().num_outputs(3) == 3 + 6


def test_options_out_of_range():
    for make in (
        lambda: nn.Binomial(0),
        lambda: nn.Binomial(2.5),
        lambda: nn.Categorical(1),
        lambda: nn.DiscretizedLogistic(1),
        lambda: nn.Bernoulli(event_dim=0),
        lambda: nn.StandardNormal(0),
        lambda: nn.MLP(3, 0),
        lambda: nn.BatchApply(nn.MLP(3, 3), event_dim=0),
    ):
        with pytest.raises(OptionError, match="whole number of at least"):
            make()
    for scale in (0, -1.0, float("nan"), float("inf"), "fixed", True, [1.0]):
        with pytest.raises(OptionError, match="scale must be"):
            nn.Normal(scale)


def test_simulated_data_are_what_the_other_tests_take_them_for():
    for name in SPECS:
        head = SPECS[name].make()
        x = simulated(head)
        assert x.shape == (60, 6)
        assert bool(head.support.check(x).all())
        assert len(x.unique()) > 1
