"""A self-normalised weighted mean and its Monte Carlo error, in one pass over blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import MIN_PARTICLES_FOR_K, pareto_k_of_tail, size_of_tail

FIT_NUMBERS = 2**22  # intermediate results of a tail fit that are in memory at once
GRID = 60  # at least as many points as the fit uses


class WeightedMean:
    """Collects K results of f, (K, B, F), with weights (K, B) that sum to one over all blocks. float64.

    The mean is sum_k w_k f_k. Its error is that of the delta method for a ratio of two means, stratified by the origin of
    the draws. Each origin has a fixed share of the draws, so only the spread within an origin counts::

        t_k = w_k (f_k - mean),   error^2 = sum_s n_s/(n_s - 1) sum_{k in s} (t_k - mean of t in s)^2

    Results are taken relative to a centre close to the mean. This avoids cancellation, and a constant f has an error of
    zero.
    """

    _some: Tensor  # (B, F), as all below: f at one draw
    _defined: Tensor  # whether any result was a number
    _lowest: Tensor  # number of results that differ from that one
    _highest: Tensor
    _count: Tensor  # of draws by origin, (S, B, F), as the sums of w, w^2, w d, w^2 d and w^2 d^2, where d = f - centre
    _w: Tensor
    _ww: Tensor
    _wd: Tensor
    _wwd: Tensor
    _wdwd: Tensor
    _wdd: Tensor  # sum of w d^2
    _fourth: Tensor  # sum of (w d)^4
    _tail: Tensor | None = None  # the largest log(w |d|), (n + 1, B, F)

    def __init__(self, centre: Tensor, num_particles: int, num_origins: int = 1) -> None:
        """`centre`, (B, F), is a number close to the mean, and equal to f where f is constant."""
        self._centre = centre
        self.num_particles, self.num_origins = num_particles, num_origins
        self._num_blocks = 0
        self._started = False

    def add(self, result: Tensor, weight: Tensor, origin: Tensor, *, new_block: bool = True) -> None:
        """Add a block; `origin` is (K, B). Results at draws of weight zero are ignored."""
        used = (weight > 0).unsqueeze(-1) & result.isfinite()
        if not self._started:
            self._start(result, weight)
        self._num_blocks += new_block
        self._defined |= used.any(0)
        other = used & (result != self._some)
        self._lowest = torch.minimum(self._lowest, torch.where(other, result, math.inf).amin(0))
        self._highest = torch.maximum(self._highest, torch.where(other, result, -math.inf).amax(0))
        d = torch.where(used, result - self._centre, 0.0)
        for s in range(self.num_origins):
            w = torch.where(origin == s, weight, 0.0)
            wd = w.unsqueeze(-1) * d
            self._count[s] += (origin == s).sum(0).unsqueeze(-1)
            self._w[s] += w.sum(0).unsqueeze(-1)
            self._ww[s] += w.square().sum(0).unsqueeze(-1)
            self._wd[s] += wd.sum(0)
            self._wwd[s] += (w.unsqueeze(-1) * wd).sum(0)
            self._wdwd[s] += wd.square().sum(0)
        wd = weight.unsqueeze(-1) * d
        self._wdd += (wd * d).sum(0)
        self._fourth += wd.square().square().sum(0)
        if self._tail is not None:
            self._tail = torch.cat([self._tail, wd.abs().log()]).topk(len(self._tail), dim=0).values

    def _start(self, result: Tensor, weight: Tensor) -> None:
        self._started = True
        heaviest = weight.argmax(0)
        self._some = result[heaviest, torch.arange(len(heaviest), device=heaviest.device)].nan_to_num()
        zeros = torch.zeros_like(self._some)
        self._defined = zeros.bool()
        self._lowest, self._highest = zeros + math.inf, zeros - math.inf
        self._count, self._w, self._ww, self._wd, self._wwd, self._wdwd = (
            zeros.repeat(self.num_origins, 1, 1) for _ in range(6)
        )
        self._wdd, self._fourth = zeros.clone(), zeros.clone()
        if self.num_particles >= MIN_PARTICLES_FOR_K:
            self._tail = (zeros - math.inf).repeat(size_of_tail(self.num_particles) + 1, 1, 1)

    @property
    def _delta(self) -> Tensor:
        return self._wd.sum(0) / self._w.sum(0)

    @property
    def mean(self) -> Tensor:
        """(B, F); NaN where no weight is positive, or f is NaN at all draws."""
        return (self._centre + self._delta).masked_fill(~self._defined, math.nan)

    @property
    def variance_of_f(self) -> Tensor:
        """(B, F), the weighted variance of f."""
        return (self._wdd / self._w.sum(0) - self._delta.square()).clamp(min=0.0)

    @property
    def variance(self) -> Tensor:
        """(B, F), the square of the error of the mean; NaN for one draw."""
        if self.num_particles == 1:
            return torch.full_like(self._centre, math.nan)
        delta, n = self._delta, self._count
        total = self._wd - delta * self._w  # of t, by origin
        squares = self._wdwd - 2 * delta * self._wwd + delta.square() * self._ww
        spread = torch.where(n > 1, n / (n - 1).clamp(min=1.0) * (squares - total.square() / n.clamp(min=1.0)), squares)
        # In each block, the number of draws of a component is rounded at random, which adds a variance of at most 1/4.
        means = (total / n.clamp(min=1.0))[:-1]
        steps = torch.where((n[:-1] > 0).roll(-1, 0) & (n[:-1] > 0), means.roll(-1, 0) - means, 0.0)[:-1]
        variance = spread.sum(0) + 0.25 * self._num_blocks * steps.square().sum(0)
        return variance.clamp(min=0.0).masked_fill(~self._defined, math.nan)

    @property
    def num_behind_error(self) -> Tensor:
        """(B, F), the effective number of draws in the error: (sum t^2)^2 / sum t^4; NaN where f is constant."""
        return self._wdwd.sum(0).square() / self._fourth

    @property
    def is_constant(self) -> Tensor:
        """(B, F), whether f was the same at all draws."""
        return self._defined & (self._lowest == math.inf)

    @property
    def varies(self) -> Tensor:
        """(F,), whether f was not the same at all draws for some datum."""
        return (self._lowest < math.inf).any(0)

    def pareto_k(self, of_weights: Tensor) -> Tensor:
        """(B, F), the larger of the tail indices of w and of w |f - mean|; of w alone where f takes one or two values.

        :param of_weights: (B,).
        """
        k = of_weights.unsqueeze(-1).expand_as(self._centre)
        if self._tail is None:
            return k
        columns = self._tail.flatten(1).T
        step = max(1, FIT_NUMBERS // (len(self._tail) * GRID))
        of_f = torch.cat([pareto_k_of_tail(part) for part in columns.split(step)]).reshape(k.shape).to(k)
        return torch.where(self._lowest >= self._highest, k, torch.fmax(k, of_f))
