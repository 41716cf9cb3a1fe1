"""Arithmetic on log importance weights: means in log space, effective sample size, Pareto-smoothed tails.

Every function reduces one axis, ``dim``, of length ``K`` (particles) and treats all other axes as independent columns.
Inputs are *log importance weights* in nats, larger meaning more weight, in float32 or float64; dtype and device are kept.
Other input raises a `TypeError` or `ValueError`. This module imports only torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A tail is fitted with at least this many particles (Vehtari et al. 2024 need 20 tail values: a fifth of 100).
MIN_PARTICLES_FOR_K = 100
# A generalised Pareto distribution is not fitted to fewer positive exceedances than this.
MIN_EXCEEDANCES = 5


def _checked(x: Tensor, dim: int, *, half: bool = False) -> Tensor:
    """`x`, after a check that it is a tensor of floats with at least one entry along `dim`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected log-weights as a tensor, got {type(x).__name__}: pass torch.as_tensor(x)")
    if not x.is_floating_point() or (not half and x.dtype not in (torch.float32, torch.float64)):
        raise TypeError(f"expected log-weights in float32 or float64, got {x.dtype}: pass x.float()")
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"expected dim as a whole number, got {dim!r}: pass the axis of the particles, 0 for (K, ...)")
    if not -x.ndim <= dim < x.ndim or not x.shape[dim]:
        raise ValueError(
            f"expected at least one log-weight along dim {dim}, got the shape {tuple(x.shape)}: pass (K, ...), K >= 1"
        )
    return x


def log_mean_exp(x: Tensor, dim: int) -> Tensor:
    r"""``log(1/K sum_k exp x_k)`` along ``dim``, in nats: shape ``(K, ...)`` gives ``(...)`` for ``dim=0``.

    ``-inf`` terms count as zeros. A column of only ``-inf`` gives ``-inf``, one with ``+inf`` gives ``+inf``, one with nan
    gives nan. Where the result is not finite the gradient is zero, not nan, so that a datum without any usable particle does
    not affect the gradients of other data.

    >>> log_mean_exp(torch.tensor([0.0, -math.inf]), dim=0)
    tensor(-0.6931)
    """
    top = _checked(x, dim, half=True).detach().amax(dim, keepdim=True)
    finite = top.isfinite()
    relative = torch.where(finite, x - top, torch.zeros_like(x))
    return relative.exp().mean(dim).log() + top.squeeze(dim)


def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""``(sum_k w_k)^2 / sum_k w_k^2`` (Kong, 1992), between 1 and ``K``; 0 where all weights are zero.

    It depends only on the drawn weights: a proposal that misses a mode may have a large effective sample size.

    >>> effective_sample_size(torch.tensor([0.0, 0.0, -math.inf]))
    tensor(2.)
    """
    top = _checked(log_weights, dim).detach().amax(dim, keepdim=True)
    weights = (log_weights - top.masked_fill(top == -math.inf, 0.0)).exp()
    ratio = weights.sum(dim).square() / weights.square().sum(dim)
    return ratio.masked_fill(top.squeeze(dim) == -math.inf, 0.0)


def log_mean_exp_std_error(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Monte Carlo standard error of `log_mean_exp` over ``K`` independent draws, in nats.

    The delta method: ``sqrt(1/(K (K - 1)) sum_k (w_k / w_mean - 1)^2)`` (Owen, 2013, chapter 9,
    https://artowen.su.domains/mc/). It is nan for ``K = 1`` and where all weights are zero, and too small
    when the weights have a heavy tail (see `pareto_k`).

    >>> log_mean_exp_std_error(torch.tensor([1.0, 3.0]).log())
    tensor(0.5000)
    """
    num_particles = _checked(log_weights, dim).shape[dim]
    if num_particles == 1:
        return torch.full_like(log_weights.select(dim, 0), math.nan)
    relative = log_weights - log_weights.detach().amax(dim, keepdim=True)  # first: the mean of large ones is rounded
    excess = (relative - log_mean_exp(relative, dim).unsqueeze(dim)).expm1()
    return (excess.square().sum(dim) / (num_particles * (num_particles - 1))).sqrt()


def jackknife_log_mean_exp(log_weights: Tensor, order: int = 1, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Jackknife estimate of the log-mean: without the bias in ``1/K`` (order 1), or in ``1/K`` and ``1/K^2`` (order 2).

    It combines the value ``L_K`` of all draws and the means ``L_K-1``, ``L_K-2`` of the values without each draw or without
    each pair of draws (Nowozin, 2018, https://openreview.net/forum?id=HyZoi-WRb)::

        order 1    K L_K - (K - 1) L_K-1
        order 2    K^2/2 L_K - (K - 1)^2 L_K-1 + (K - 2)^2/2 L_K-2

    The draws must be independent and identically distributed. The bias falls from ``O(1/K)`` to ``O(1/K^(order + 1))`` and
    may have either sign, so the jackknife gives no lower bound. It takes time and memory ``O(K)``, also for pairs.

    Takes ``(K, ...)`` for ``dim=0`` with ``K > order``; returns two tensors ``(...)`` in nats, the value and its standard
    error. The error is that of the pseudo-values of order 1, which to first order is right for both (2.8 % too small for
    order 2 at ``K = 4`` and chi-squared divergence 0.9). Where one weight dominates, it is as large as the correction.
    No gradient flows through either. Both are nan where no more than ``order`` weights are positive (leaving them out
    leaves nothing) or one is nan or ``+inf``.

    :raises ValueError: for another order, or too few draws for it.

    >>> value, std_error = jackknife_log_mean_exp(torch.tensor([1.0, 3.0]).log())  # 2 log 2 - (log 3 + log 1) / 2
    >>> round(value.item(), 4), round(std_error.item(), 4)
    (0.837, 0.5493)
    """
    num_particles = _checked(log_weights, dim).shape[dim]
    if not isinstance(order, int) or isinstance(order, bool) or order not in (1, 2) or num_particles <= order:
        raise ValueError(f"the jackknife takes order 1 or 2 and more draws than that, got {order} and {num_particles}")
    x = log_weights.detach().movedim(dim, 0)
    top = x.amax(0, keepdim=True)
    x = x - top
    value = log_mean_exp(x, 0)
    without, largest, others = _log_share_without_each(x)
    excess = without.mean(0) - math.log1p(-1 / num_particles)  # mean of L_K-1 - L_K, and so below without cancellation
    if order == 1:
        value = value - (num_particles - 1) * excess
    else:
        pairs = 2 * _sum_over_pairs(x, without, largest, others) / (num_particles * (num_particles - 1))
        pairs = pairs - math.log1p(-1 / (num_particles - 1) ** 2)
        value = value - (2 * num_particles - 3) * excess + (num_particles - 2) ** 2 / 2 * pairs
    spread = (without - without.mean(0)).square().sum(0)
    std_error = (spread * (num_particles - 1) / num_particles).sqrt()
    undefined = ~value.isfinite()
    return (value + top.squeeze(0)).masked_fill(undefined, math.nan), std_error.masked_fill(undefined, math.nan)


def fit_generalized_pareto(x: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Shape ``k`` and scale ``sigma`` of a generalised Pareto distribution at location zero, per column.

    The density is ``(1 + k x / sigma)^(-1/k - 1) / sigma``: ``k > 0`` is a power-law tail with moments up to order ``1/k``,
    ``k < 0`` a bounded one. The estimate is the empirical-Bayes average over a grid of profile likelihoods of Zhang and
    Stephens (2009, https://doi.org/10.1198/tech.2009.08017; their ``k`` is minus ours). As in Vehtari et al. (2024,
    https://jmlr.org/papers/v25/19-556.html) and arviz, ``k`` is then shrunk by a weak prior worth ten observations at one
    half, ``(n k + 10 * 0.5) / (n + 10)``, while ``sigma`` is not changed.

    Takes ``x`` of shape ``(n, ...)`` for ``dim=0`` in any order and any unit; returns two tensors ``(...)``, ``k`` a number
    and ``sigma`` in the unit of ``x``. Entries that are not positive are ignored and do not count in ``n``; a column without
    positive entries gives nan.

    >>> u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    >>> k, sigma = fit_generalized_pareto((u**-0.3 - 1) / 0.3)  # quantiles of k = 0.3, sigma = 1
    >>> round(k.item(), 2), round(sigma.item(), 2)
    (0.3, 1.0)
    """
    x = _checked(x, dim).movedim(dim, -1).sort(-1).values
    used = x > 0
    count = used.sum(-1, keepdim=True)
    largest = x[..., -1:]
    # The grid of theta = -k / sigma is laid out in units of the first quartile.
    quartile_index = x.shape[-1] - count + (count / 4 + 0.5).floor().long().clamp(min=1) - 1
    quartile = x.gather(-1, quartile_index.clamp(max=x.shape[-1] - 1))
    grid_size = 30 + math.isqrt(x.shape[-1])
    rank = torch.arange(1, grid_size + 1, dtype=x.dtype, device=x.device) - 0.5
    grid = _away_from_zero(1 / largest + (1 - (grid_size / rank).sqrt()) / (3 * quartile), largest)

    def shape_at(theta: Tensor) -> Tensor:
        # Profile maximum of k, for theta (..., G): unused entries are zeros, whose log1p vanishes.
        terms = (-theta.unsqueeze(-1) * torch.where(used, x, torch.zeros_like(x)).unsqueeze(-2)).log1p()
        return terms.sum(-1) / count

    shapes = shape_at(grid)
    profile = count * ((-grid / shapes).log() - shapes - 1)
    theta = _away_from_zero((profile.softmax(-1) * grid).sum(-1, keepdim=True), largest)
    k = shape_at(theta)
    sigma = -k / theta
    return ((count * k + 5.0) / (count + 10)).squeeze(-1), sigma.squeeze(-1)


def pareto_smooth(log_weights: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    r"""Pareto-smoothed importance sampling (Vehtari et al. 2024, https://jmlr.org/papers/v25/19-556.html).

    The ``ceil(min(K / 5, 3 sqrt(K)))`` largest weights of each column are replaced, in order, by the expected order
    statistics (quantiles at ``(i - 1/2)/n``) of a generalised Pareto distribution fitted to their excess over the next one.
    Unlike in the paper they are **not** truncated at the largest raw weight, because this makes the mean too low just when
    the draws have missed the tail.

    Takes ``(K, ...)`` for ``dim=0``; returns the smoothed log weights, same shape and not normalised, and the
    tail index ``k`` per column ``(...)``. No gradient flows through either. Columns without a fit come back
    unsmoothed, with

    - ``k = nan`` for ``K < 100``, too few draws to judge, and for columns with nan or ``+inf``;
    - ``k = -inf`` if the tail weights are equal up to rounding error (an exact proposal: nothing to smooth);
    - ``k = +inf`` if fewer than five of them exceed the next one, as when nearly all weights are zero: a few draws then
      determine the mean. Unlike nan, ``+inf`` is above every threshold.

    >>> smoothed, k = pareto_smooth(torch.zeros(1000, 3))
    >>> k
    tensor([-inf, -inf, -inf])
    """
    log_weights = _checked(log_weights, dim).detach()
    num_particles = log_weights.shape[dim]
    if num_particles < MIN_PARTICLES_FOR_K:
        return log_weights.clone(), torch.full_like(log_weights.select(dim, 0), math.nan)
    columns = log_weights.movedim(dim, -1)
    tail_size = size_of_tail(num_particles)
    largest, index = columns.topk(tail_size + 1, dim=-1)
    tail, index = largest[..., :-1].flip(-1), index[..., :-1].flip(-1)  # ascending
    top = largest[..., :1]
    k, sigma, cutoff, exceeds = _fitted_tail(largest)
    k, sigma = k.unsqueeze(-1), sigma.unsqueeze(-1)
    count = exceeds.sum(-1, keepdim=True)
    rank = torch.arange(tail_size, dtype=columns.dtype, device=columns.device) - (tail_size - count) + 0.5
    quantile = _log_generalized_pareto_quantile(rank / count, k, sigma)
    smoothed_tail = torch.logaddexp(cutoff, quantile + top)
    smoothed_tail = torch.where(k.isfinite() & exceeds, smoothed_tail, tail)
    smoothed = columns.scatter(-1, index, smoothed_tail)
    return smoothed.movedim(-1, dim), k.squeeze(-1)


def size_of_tail(num_particles: int) -> int:
    """The number of the ``K`` weights in the tail to which a generalised Pareto distribution is fitted."""
    return math.ceil(min(0.2 * num_particles, 3 * math.sqrt(num_particles)))


def pareto_k_of_tail(largest: Tensor) -> Tensor:
    r"""Tail index ``k`` from the tail only, ``(..., n + 1)``: the ``size_of_tail(K)`` largest log-weights and the next one.

    The log-weights must be in falling order. Returns ``(...)``, the ``k`` of `pareto_smooth` for all ``K`` weights.
    """
    return _fitted_tail(largest)[0]


def _fitted_tail(largest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # (k, sigma, both (...); the cutoff (..., 1), and which of the tail lie above it, (..., n), ascending).
    eps, tiny = torch.finfo(largest.dtype).eps, torch.finfo(largest.dtype).tiny
    tail, top, next_one = largest[..., :-1].flip(-1), largest[..., :1], largest[..., -1:]
    # Weights that are negligible relative to the largest one are zeros for the fit.
    cutoff = next_one.clamp(min=math.log(tiny / eps) + top.masked_fill(~top.isfinite(), 0.0))
    excess = torch.where(tail > cutoff, (tail - top).exp() - (cutoff - top).exp(), torch.zeros_like(tail))
    k, sigma = fit_generalized_pareto(excess, dim=-1)
    k = k.masked_fill((excess > 0).sum(-1) < MIN_EXCEEDANCES, math.inf)
    # Under an exact guide log weights differ by rounding alone, measured at up to 120 eps of their size.
    k = k.masked_fill((top - next_one <= 200 * eps * (1 + top.abs())).squeeze(-1), -math.inf)
    return k.masked_fill((top.isnan() | (top == math.inf)).squeeze(-1), math.nan), sigma, cutoff, excess > 0


def pareto_k(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Tail index ``k`` of the weights: ``(K, ...)`` gives ``(...)`` for ``dim=0``; see `pareto_smooth`.

    Weights with tail index ``k`` have finite moments up to order ``1/k``; for ``k`` above one half their variance is
    infinite. Compare it with `pareto_k_threshold`. It measures the tail of the drawn weights only: a missed mode does not
    show in it.

    >>> u = (torch.arange(100_000) + 0.5) / 100_000
    >>> round(pareto_k(-0.5 * u.log()).item(), 2)  # w = u^-0.5
    0.5
    """
    return pareto_smooth(log_weights, dim)[1]


def pareto_k_threshold(num_particles: int) -> float:
    r"""``min(1 - 1/log10 K, 0.7)``: the largest good `pareto_k` of ``K`` draws (Vehtari et al. 2024).

    >>> round(pareto_k_threshold(1000), 3), pareto_k_threshold(10_000)
    (0.667, 0.7)
    """
    if not isinstance(num_particles, int) or isinstance(num_particles, bool):
        raise TypeError(f"expected num_particles as a whole number, got {num_particles!r}: pass K, the number of draws")
    if num_particles < 2:
        return -math.inf  # the limit: no tail index is good enough
    return min(1 - 1 / math.log10(num_particles), 0.7)


def _log_share_without_each(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log(1 - r_i) for the shares r_i of the weights along dim 0; index of the largest; ``x`` without the largest)."""
    top, largest = x.max(0, keepdim=True)
    others = x.scatter(0, largest, -math.inf)
    log_rest = others.logsumexp(0, keepdim=True)  # 1 - r cancels only for the largest share
    log_total = torch.logaddexp(top, log_rest)
    return (-(x - log_total).exp()).log1p().scatter(0, largest, log_rest - log_total), largest, others


def _sum_over_pairs(x: Tensor, without: Tensor, largest: Tensor, others: Tensor) -> Tensor:
    """Sum over i < j of log(1 - r_i - r_j) - log(1 - r_i) - log(1 - r_j) in O(K).

    Pairs with the largest share are one more leave-one-out. Any other pair is log(1 - t_i t_j) with t = r / (1 - r) and
    t_i t_j <= 1/4: a power series in which a sum over pairs is a product of sums over draws.
    """
    with_largest = (_log_share_without_each(others)[0] - without).scatter(0, largest, 0.0).sum(0)
    odds = (x - x.logsumexp(0) - without).exp().scatter(0, largest, 0.0)
    power, series = odds, torch.zeros_like(with_largest)
    num_terms = math.ceil(-math.log2(torch.finfo(x.dtype).eps) / 2)
    for n in range(1, num_terms + 1):
        series = series + (power.sum(0).square() - power.square().sum(0)) / (2 * n)
        power = power * odds
    return with_largest - series


def _away_from_zero(theta: Tensor, scale: Tensor) -> Tensor:
    # theta = 0 is the exponential distribution, reached only as a limit: k / theta there is 0 / 0.
    eps = torch.finfo(theta.dtype).eps
    return torch.where(theta.abs() * scale < eps, eps / scale, theta)


def _log_generalized_pareto_quantile(probability: Tensor, k: Tensor, sigma: Tensor) -> Tensor:
    # log(sigma ((1 - p)^-k - 1) / k), which overflows for large k when not taken in logs; k = 0 is the limit.
    exponential = -(-probability).log1p()
    size = k.abs().clamp(min=torch.finfo(k.dtype).eps)
    return sigma.log() + (-(-size * exponential).expm1()).log() + k.clamp(min=0.0) * exponential - size.log()


def index_code_information(log_q: Tensor, num_data: int) -> Tensor:
    r"""``log q(z_i|x_i) - log q(z_i)`` in nats for ``B`` of ``N`` data: ``(B, B, ...)`` gives ``(B, ...)``.

    ``log_q[i, j]`` is ``log q(z_i|x_j)``, the log-density of the draw for datum ``i`` under datum ``j``. The aggregated
    posterior ``q(z) = 1/N sum_n q(z|x_n)`` is estimated from the batch with stratification: datum ``i`` is always in it, and
    the others represent the rest of the data::

        q(z_i) ~ 1/N q(z_i|x_i) + (N - 1) / (N (B - 1)) sum over j != i of q(z_i|x_j)

    That is unbiased if the others are a uniform sample without ``i``, and exact for ``B = N``. The result is at most
    ``log N``, always. Needs ``2 <= B <= N``.

    >>> index_code_information(torch.tensor([[0.0, -math.inf], [-2.0, -1.0]]), num_data=2)
    tensor([0.6931, 0.3799])
    """
    batch_size = len(_checked(log_q, 0))
    if log_q.ndim < 2 or log_q.shape[1] != batch_size:
        raise ValueError(f"expected log_q of shape (B, B, ...), got {tuple(log_q.shape)}: log_q[i, j] is log q(z_i|x_j)")
    if not isinstance(num_data, int) or isinstance(num_data, bool) or not 2 <= batch_size <= num_data:
        raise ValueError(
            f"expected num_data as a whole number N >= B, here {batch_size} >= 2, got {num_data!r}: pass all data"
        )
    own = log_q.diagonal().movedim(-1, 0)
    log_share = log_q.new_full((batch_size, batch_size), math.log((num_data - 1) / (num_data * (batch_size - 1))))
    log_share.fill_diagonal_(-math.log(num_data))
    log_share = log_share.reshape(log_share.shape + (1,) * (log_q.ndim - 2))
    return -(log_q - own.unsqueeze(1) + log_share).logsumexp(1)
