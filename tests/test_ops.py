"""`pyro_vae.ops` against naive arithmetic, a scalar reference, and tails whose index is known."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyro_vae import ops

INF = math.inf
DTYPES = [torch.float32, torch.float64]


def power_law(k, num_particles, num_columns, dtype=torch.float64):
    """log of w = u^-k with u uniform: tail index k, mean 1 / (1 - k)."""
    return -k * torch.rand(num_particles, num_columns, dtype=dtype).log()


def tail_size(num_particles):
    return math.ceil(min(0.2 * num_particles, 3 * math.sqrt(num_particles)))


def reference_fit(x):
    """Zhang and Stephens (2009) for one sorted sample, term by term; returns k with and without the prior."""
    n = len(x)
    grid_size = 30 + int(n**0.5)
    theta, k, profile = [], [], []
    for j in range(1, grid_size + 1):
        quartile = x[int(n / 4 + 0.5) - 1]
        theta.append(1 / x[-1] + (1 - (grid_size / (j - 0.5)) ** 0.5) / (3 * quartile))
        k.append(np.mean([math.log1p(-theta[-1] * value) for value in x]))
        profile.append(n * (math.log(-theta[-1] / k[-1]) - k[-1] - 1))
    posterior = np.exp(np.array(profile) - max(profile))
    posterior /= posterior.sum()
    theta_mean = sum(p * t for p, t in zip(posterior, theta, strict=True))
    k_mean = np.mean([math.log1p(-theta_mean * value) for value in x])
    return (n * k_mean + 10 * 0.5) / (n + 10), -k_mean / theta_mean


def reference_smooth(log_weights):
    order = np.argsort(log_weights)
    m = tail_size(len(log_weights))
    top, cutoff = log_weights[order[-1]], log_weights[order[-m - 1]]
    k, sigma = reference_fit(np.exp(log_weights[order[-m:]] - top) - np.exp(cutoff - top))
    smoothed = log_weights.copy()
    for i, index in enumerate(order[-m:]):
        quantile = sigma / k * ((1 - (i + 0.5) / m) ** -k - 1)
        smoothed[index] = math.log(quantile + math.exp(cutoff - top)) + top
    return smoothed, k


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_mean_exp_and_its_gradient_equal_the_naive_ones(dtype):
    grid = torch.tensor(list(itertools.product([-1.5, 0.0, 2.0, INF, -INF], repeat=3)), dtype=dtype)
    x = grid.clone().requires_grad_()
    naive_x = grid.clone().requires_grad_()
    result, naive = ops.log_mean_exp(x, dim=1), naive_x.exp().mean(1).log()
    assert result.dtype == dtype
    torch.testing.assert_close(result, naive)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    (naive_gradient,) = torch.autograd.grad(naive.sum(), naive_x)
    # Where the result is infinite the naive gradient is nan; ours is zero.
    finite = naive.isfinite().unsqueeze(1).expand_as(grid)
    torch.testing.assert_close(gradient[finite], naive_gradient[finite])
    assert (gradient[~finite] == 0).all()


def test_log_mean_exp_neither_overflows_nor_hides_nan():
    x = torch.tensor([[1e4, 1e4], [-1e4, -1e4], [math.nan, 0.0]])
    assert ops.log_mean_exp(x, dim=1)[:2].tolist() == [1e4, -1e4]
    assert ops.log_mean_exp(x, dim=1)[2].isnan()


def test_log_mean_exp_has_second_derivatives():
    x = torch.tensor([0.3, -1.0, -INF], dtype=torch.float64, requires_grad=True)
    hessian = torch.autograd.functional.hessian(lambda x: ops.log_mean_exp(x, 0), x)
    weights = x.detach().softmax(0)
    torch.testing.assert_close(hessian, weights.diag() - weights.outer(weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_effective_sample_size_equals_the_naive_one(dtype):
    log_weights = torch.tensor(list(itertools.product([-1.5, 0.0, 2.0, -INF], repeat=3)), dtype=dtype).T
    weights = log_weights.exp()
    naive = weights.sum(0).square() / weights.square().sum(0)
    result = ops.effective_sample_size(log_weights)
    assert result.dtype == dtype
    torch.testing.assert_close(result, naive.nan_to_num(0.0))  # 0 where all weights are zero
    torch.testing.assert_close(ops.effective_sample_size(log_weights - 1e4), result, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_std_error_equals_the_naive_one(dtype):
    log_weights = torch.tensor(list(itertools.product([-1.5, 0.0, 2.0, -INF], repeat=3)), dtype=dtype).T
    weights = log_weights.exp()
    naive = weights.std(0) / weights.mean(0) / math.sqrt(3)
    result = ops.log_mean_exp_std_error(log_weights)
    assert result.dtype == dtype
    torch.testing.assert_close(result, naive, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert ops.log_mean_exp_std_error(torch.zeros(1, 4, dtype=dtype)).isnan().all()


def test_std_error_covers_the_spread_of_log_mean_exp():
    # Log-normal weights. 4,000 replicates pin the ratio to 4.3 / sqrt(8000) = 5 % (false-alarm rate 2e-5);
    # 3 % more for the skew of the weights and the second order of the delta method.
    torch.manual_seed(0)
    log_weights = 0.5 * torch.randn(1000, 4000, dtype=torch.float64)
    spread = ops.log_mean_exp(log_weights, 0).std()
    ratio = ops.log_mean_exp_std_error(log_weights).square().mean().sqrt() / spread
    assert abs(ratio - 1) < 0.08


@pytest.mark.parametrize("num_values", [5, 20, 95, 949])
@pytest.mark.parametrize("k", [-0.4, 0.0, 0.5, 1.2])
def test_generalized_pareto_fit_equals_the_scalar_reference(num_values, k):
    torch.manual_seed(1)
    exponential = -torch.rand(num_values, 3, dtype=torch.float64).log()
    x = 2.5 * (torch.expm1(k * exponential) / k if k else exponential)
    result_k, result_sigma = ops.fit_generalized_pareto(x)
    for column in range(3):
        expected = reference_fit(np.sort(x[:, column].numpy()))
        np.testing.assert_allclose((result_k[column], result_sigma[column]), expected, rtol=1e-9, atol=1e-10)


def test_generalized_pareto_fit_ignores_what_is_not_positive():
    torch.manual_seed(2)
    x = torch.rand(50, dtype=torch.float64)
    padded = torch.cat([torch.zeros(6, dtype=torch.float64), x, -torch.ones(1, dtype=torch.float64)])
    # 57 entries and 50 share a grid of 37 points.
    torch.testing.assert_close(ops.fit_generalized_pareto(padded), ops.fit_generalized_pareto(x))
    assert all(value.isnan() for value in ops.fit_generalized_pareto(torch.zeros(10)))


@pytest.mark.parametrize("num_particles", [100, 1000, 4321])
@pytest.mark.parametrize("k", [0.1, 0.7, 1.5])
def test_smoothing_equals_the_scalar_reference(num_particles, k):
    torch.manual_seed(3)
    log_weights = power_law(k, num_particles, 2) - 800.0
    smoothed, result_k = ops.pareto_smooth(log_weights)
    for column in range(2):
        expected, expected_k = reference_smooth(log_weights[:, column].numpy())
        assert result_k[column].item() == pytest.approx(expected_k, rel=1e-9)
        np.testing.assert_allclose(smoothed[:, column], expected, rtol=1e-11)


@pytest.mark.parametrize("k", [0.1, 0.3, 0.5, 0.7])
def test_known_tail_index_is_recovered(k):
    # 4.6 standard errors are a false-alarm rate of 4e-6, 2e-5 over the four; 0.01 is the bias at 300 tail
    # values. The asymptotic standard deviation (1 + k) / sqrt(300) gates the spread on both sides.
    torch.manual_seed(4)
    num_particles, num_columns = 10_000, 200
    m = tail_size(num_particles)
    estimates = ops.pareto_k(power_law(k, num_particles, num_columns))
    without_prior = ((m + 10) * estimates - 5) / m
    std_error = without_prior.std() / math.sqrt(num_columns)
    assert std_error < 0.01
    assert abs(without_prior.mean() - k) < 4.6 * std_error + 0.01
    # 200 columns know their standard deviation to 5 %: 4.6 of those.
    assert without_prior.std() == pytest.approx((1 + k) / math.sqrt(m), rel=0.23)


@pytest.mark.parametrize("k", [0.1, 0.3, 0.5, 0.7])
def test_tail_index_of_a_gaussian_pair(k):
    # q = N(0, v_q), p = N(0, v_p) has k = 1 - v_q / v_p. Its tail carries a logarithm: at 1e5 draws the
    # estimate is still up to 0.04 low. 4.6 standard errors on top: a false-alarm rate of 2e-5 over the four.
    torch.manual_seed(5)
    variance = 1 - k
    z = math.sqrt(variance) * torch.randn(100_000, 16, dtype=torch.float64)
    estimates = ops.pareto_k(0.5 * z.square() * (1 / variance - 1))
    std_error = estimates.std() / 4
    assert std_error < 0.025
    assert abs(estimates.mean() - k) < 0.04 + 4.6 * std_error


def test_light_tails_are_below_every_threshold():
    torch.manual_seed(6)
    z = torch.randn(10_000, 20, dtype=torch.float64)
    assert (ops.pareto_k(-z.square()) < 0.1).all()  # bounded weights: a proposal wider than the target
    # Under the opposite sign convention these would read as k = -1 and lower.
    assert (ops.pareto_k(power_law(1.0, 10_000, 20)) > 0.7).all()


@pytest.mark.parametrize("k", [0.3, 0.5, 0.6, 0.7])
def test_smoothing_does_not_worsen_the_log_mean_and_improves_it_on_heavy_tails(k):
    # Absolute errors of the log mean, whose truth is -log(1 - k), paired over 2,000 replicates. On heavy
    # tails the gain is 12 to 20 %, seven standard errors; at k = 0.3 it is 2 %, and a loss of 2 % would pass.
    torch.manual_seed(7)
    log_weights = power_law(k, 1000, 2000)
    smoothed, _ = ops.pareto_smooth(log_weights)
    raw_error, error = ((ops.log_mean_exp(x, 0) + math.log1p(-k)).abs() for x in (log_weights, smoothed))
    paired = (error - raw_error) / raw_error.mean()
    assert paired.std() / math.sqrt(2000) < 0.05
    assert paired.mean() < (0.02 if k < 0.5 else -0.05)


def test_smoothing_is_not_truncated_at_the_largest_weight_and_keeps_the_order():
    torch.manual_seed(8)
    log_weights = power_law(0.7, 1000, 100)
    smoothed, _ = ops.pareto_smooth(log_weights)
    beyond = smoothed.amax(0) > log_weights.amax(0)
    assert 0.2 < beyond.double().mean() < 0.9
    assert (smoothed.argsort(0) == log_weights.argsort(0)).all()
    changed = (smoothed != log_weights).sum(0)
    assert (changed <= tail_size(1000)).all() and (changed > tail_size(1000) - 3).all()


def test_too_few_particles_to_judge():
    log_weights = torch.randn(99, 2)
    smoothed, k = ops.pareto_smooth(log_weights)
    assert k.isnan().all() and k.shape == (2,)
    assert torch.equal(smoothed, log_weights)
    assert ops.pareto_k(torch.zeros(1, 2)).isnan().all()
    assert ops.pareto_k(torch.randn(100)).isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -812.7, 3.0e5])
def test_weights_constant_up_to_rounding_are_perfect_and_stay(dtype, value):
    torch.manual_seed(9)
    exact = torch.full((500,), value, dtype=dtype)
    rounded = exact * (1 + 100 * torch.finfo(dtype).eps * (torch.rand(500, dtype=dtype) - 0.5))
    log_weights = torch.stack([exact, rounded], 1)
    smoothed, k = ops.pareto_smooth(log_weights)
    assert (k == -INF).all()
    assert torch.equal(smoothed, log_weights)


def test_nearly_constant_weights_are_still_fitted():
    torch.manual_seed(10)
    noise = torch.rand(2000, 50, dtype=torch.float64)
    smoothed, k = ops.pareto_smooth(1e-7 * noise)
    fitted = ops.pareto_k(noise)
    torch.testing.assert_close(k, fitted, rtol=0, atol=0.1)
    assert (k < -0.5).all()
    torch.testing.assert_close(smoothed, 1e-7 * noise, rtol=0, atol=3e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_weights(dtype):
    torch.manual_seed(11)
    log_weights = power_law(0.5, 1000, 4, dtype)
    log_weights[:500, 0] = -INF  # below the tail: nothing to see
    log_weights[30:, 1] = -INF  # 30 of 95 tail values left
    log_weights[4:, 2] = -INF  # 4 left: no fit
    log_weights[:, 3] = -INF
    smoothed, k = ops.pareto_smooth(log_weights)
    assert k[:2].isfinite().all()
    assert (k[2:] == INF).all()
    assert torch.equal(smoothed == -INF, log_weights == -INF)
    assert torch.equal(smoothed[:, 2:], log_weights[:, 2:])
    alone = ops.fit_generalized_pareto(log_weights[:30, 1].double().exp())[0]
    assert k[1].item() == pytest.approx(alone.item(), abs=0.02)  # up to the number of grid points


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_too_far_apart_to_exponentiate(dtype):
    torch.manual_seed(12)
    log_weights = torch.stack([300.0 * torch.randn(1000), 3000.0 * torch.randn(1000)], 1).to(dtype)
    smoothed, k = ops.pareto_smooth(log_weights)
    assert (k > 5).all()
    assert smoothed.isfinite().all()
    # Twenty weights count, the rest of the tail is subnormal beside them: the fit is that of the twenty.
    few = torch.cat([-torch.rand(20), -100 - torch.rand(980)]).to(dtype)
    alone = torch.cat([few[:20], torch.full((980,), -INF, dtype=dtype)])
    if dtype == torch.float32:
        torch.testing.assert_close(ops.pareto_k(few), ops.pareto_k(alone))
    assert ops.pareto_k(few).isfinite()


def test_ties_and_weights_that_are_no_numbers():
    two_values = torch.zeros(1000, 3)
    two_values[:40, 0] = 1.0
    two_values[0, 1] = INF
    two_values[0, 2] = math.nan
    smoothed, k = ops.pareto_smooth(two_values)
    assert k[0] < 0 and k[0].isfinite() and smoothed[:, 0].isfinite().all()
    assert k[1:].isnan().all()
    torch.testing.assert_close(smoothed[:, 1:], two_values[:, 1:], equal_nan=True)


def test_dim_shapes_dtype_and_gradients():
    torch.manual_seed(13)
    log_weights = power_law(0.4, 200, 6, torch.float32).reshape(200, 2, 3)
    reductions = [
        ops.log_mean_exp,
        ops.effective_sample_size,
        ops.log_mean_exp_std_error,
        ops.pareto_k,
        lambda x, dim: ops.fit_generalized_pareto(x, dim)[1],
    ]
    for reduction in reductions:
        expected = reduction(log_weights, 0)
        assert expected.shape == (2, 3) and expected.dtype == torch.float32
        for dim in (1, -1):
            moved = log_weights.movedim(0, dim).contiguous()
            torch.testing.assert_close(reduction(moved, dim), expected)
        torch.testing.assert_close(reduction(log_weights.double(), 0).float(), expected, rtol=1e-3, atol=1e-3)
        single = reduction(log_weights[:, 1, 2], 0)
        torch.testing.assert_close(single, expected[1, 2])
    smoothed, _ = ops.pareto_smooth(log_weights, 0)
    moved, _ = ops.pareto_smooth(log_weights.movedim(0, 1), 1)
    assert smoothed.dtype == torch.float32
    torch.testing.assert_close(moved.movedim(1, 0), smoothed)
    assert not any(value.requires_grad for value in ops.pareto_smooth(log_weights.requires_grad_()))


def test_inputs_are_left_alone():
    torch.manual_seed(14)
    log_weights = power_law(0.7, 300, 2)
    before = log_weights.clone()
    ops.pareto_smooth(log_weights)
    ops.fit_generalized_pareto(log_weights)
    ops.pareto_smooth(log_weights[:50])[0].zero_()
    assert torch.equal(log_weights, before)


def test_exponential_distribution_on_the_grid_of_the_fit():
    # For 100 equal values the third grid point is theta = 0 to the last digit, where k / theta is 0 / 0.
    k, sigma = ops.fit_generalized_pareto(torch.full((100,), 2.0))
    assert k < 0 and k.isfinite() and sigma.isfinite()


def test_threshold():
    assert ops.pareto_k_threshold(100) == 0.5
    assert ops.pareto_k_threshold(1000) == pytest.approx(2 / 3)
    assert ops.pareto_k_threshold(2200) == 0.7
    assert ops.pareto_k_threshold(10) == 0.0
    assert ops.pareto_k_threshold(1) == -INF


def test_module_needs_torch_alone():
    code = (
        "import importlib.util, sys\n"
        "sys.modules['pyro'] = None\n"
        "spec = importlib.util.spec_from_file_location('ops', sys.argv[1])\n"
        "ops = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(ops)\n"
        "import torch\n"
        "assert ops.log_mean_exp(torch.zeros(3), 0) == 0\n"
        "assert 'pyro_vae' not in sys.modules and 'pyro.ops' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, ops.__file__], check=True)


# The jackknife


def jackknife_by_definition(x, order):
    """Nowozin (2018) with every subset of a column of log-weights, one logsumexp each."""

    def mean_without(count):
        subsets = itertools.combinations(range(len(x)), len(x) - count)
        return torch.stack([x[list(subset)].logsumexp(0) - math.log(len(x) - count) for subset in subsets]).mean(0)

    n = len(x)
    if order == 1:
        return n * mean_without(0) - (n - 1) * mean_without(1)
    return n**2 / 2 * mean_without(0) - (n - 1) ** 2 * mean_without(1) + (n - 2) ** 2 / 2 * mean_without(2)


@pytest.mark.parametrize("num_particles", [3, 4, 9, 20])
@pytest.mark.parametrize("order", [1, 2])
def test_jackknife_equals_its_definition(order, num_particles):
    """From all but equal weights to one that outweighs the others by e^100."""
    scale = torch.tensor([0.0, 1e-4, 0.1, 1.0, 5.0, 50.0], dtype=torch.float64)
    x = torch.randn(num_particles, 6, dtype=torch.float64) * scale - 10
    x[1, 1] = x[2, 1] = x[0, 1]  # ties at the top or not
    expected = jackknife_by_definition(x, order)
    value, _ = ops.jackknife_log_mean_exp(x, order)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(ops.jackknife_log_mean_exp(x.T, order, dim=1)[0], value, rtol=0, atol=1e-12)
    torch.testing.assert_close(ops.jackknife_log_mean_exp(x + 500, order)[0], value + 500, rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("ratio", [0.4, 0.9, 0.99, 1.0])
def test_jackknife_where_two_or_three_weights_hold_nearly_all(order, ratio):
    """Where leaving out cancels, and where the series of order 2 converges slowest (three equal shares)."""
    for heavy in (2, 3):
        x = torch.full((12,), -30.0, dtype=torch.float64)
        x[2 : 2 + heavy] = math.log(ratio) * torch.arange(heavy)
        value, _ = ops.jackknife_log_mean_exp(x, order)
        torch.testing.assert_close(value, jackknife_by_definition(x, order), rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_particles", [2, 3, 20])
def test_jackknife_error_is_that_of_the_pseudo_values(num_particles):
    x = 3 * torch.randn(num_particles, dtype=torch.float64)
    whole = ops.log_mean_exp(x, 0)
    left = torch.stack([ops.log_mean_exp(torch.cat([x[:i], x[i + 1 :]]), 0) for i in range(num_particles)])
    pseudo_values = num_particles * whole - (num_particles - 1) * left
    value, std_error = ops.jackknife_log_mean_exp(x)
    torch.testing.assert_close(value, pseudo_values.mean())
    torch.testing.assert_close(std_error, pseudo_values.std() / num_particles**0.5)
    if num_particles > 2:
        assert ops.jackknife_log_mean_exp(x, 2)[1] == std_error


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.3, 2.0, 20.0])
def test_jackknife_in_single_precision_up_to_a_hundred_thousand_draws(order, scale):
    """Six digits (2.9e-6 at most was seen), where differences of the definition's own terms would keep none."""
    x = scale * torch.randn(100_000, 4)
    value, std_error = ops.jackknife_log_mean_exp(x, order)
    expected, expected_error = ops.jackknife_log_mean_exp(x.double(), order)
    assert value.dtype == std_error.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(std_error.double(), expected_error, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_jackknife_with_one_dominating_weight(dtype):
    """One weight e^200 above 999 equal ones, by hand. The error is as large as the correction."""
    x = torch.zeros(1000, dtype=dtype)
    x[3] = 200
    log_mean = 200 - math.log(1000)
    without_it, without_another = 0.0, 200 - math.log(999)
    expected = 1000 * log_mean - 999 * (without_it + 999 * without_another) / 1000
    value, std_error = ops.jackknife_log_mean_exp(x)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(std_error) == pytest.approx(999 / 1000 * (without_another - without_it), rel=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_jackknife_is_nan_where_leaving_out_leaves_nothing(order):
    columns = [[-INF] * 4, [0.0, -INF, -INF, -INF], [0.0, 1.0, -INF, -INF], [0.0, 1.0, 2.0, -INF]]
    broken = [[math.nan, 0.0, 0.0, 0.0], [INF, 0.0, 0.0, 0.0]]
    value, std_error = ops.jackknife_log_mean_exp(torch.tensor(columns + broken).T, order)
    assert value.isnan().tolist() == [True, True, order == 2, False, True, True]
    assert std_error.isnan().tolist() == value.isnan().tolist()


@pytest.mark.parametrize(("order", "num_particles"), [(0, 10), (3, 10), (1, 1), (2, 2)])
def test_jackknife_refuses_other_orders_and_too_few_draws(order, num_particles):
    with pytest.raises(ValueError, match=f"got {order} and {num_particles}"):
        ops.jackknife_log_mean_exp(torch.zeros(num_particles), order)
