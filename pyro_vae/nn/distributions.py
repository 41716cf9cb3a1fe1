"""Distributions that torch and Pyro lack, or whose densities are slow or inaccurate there."""

import math
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import broadcast_all

from ..autocast import switched_off
from .checked import check_value, finite_numbers

SMALL = 0.02  # logits below which two terms of a series are more accurate than a difference of large numbers


class LogisticLevels(TorchDistribution):
    r"""A logistic variable rounded to the whole numbers 0, ..., n - 1, with the tails assigned to the edges::

        P(x) = F((x + 1/2 - loc) / scale) - F((x - 1/2 - loc) / scale),   F(t) = 1 / (1 + exp(-t))

    with F = 1 above x = n - 1 and F = 0 below x = 0. The logarithm is taken without the difference, `log P = log F(b) + log
    F(-a) + log(1 - exp(a - b))` for a < b, so it is accurate for any x in the tails.

    Kingma et al., 2016, https://arxiv.org/abs/1606.04934; Salimans et al., 2017, https://arxiv.org/abs/1701.05517.

    :param loc: in units of x.
    :param scale: of the logistic variable, positive, in units of x.
    :param num_levels: n, the number of levels.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, num_levels: int, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        self.num_levels = num_levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogisticLevels":
        new = self._get_checked_instance(LogisticLevels, _instance)
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        LogisticLevels.__init__(new, loc, scale, self.num_levels, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return constraints.integer_interval(0, self.num_levels - 1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  as in torch
        with torch.no_grad():
            uniform = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
            return (self.loc + self.scale * uniform.logit()).round().clamp(0, self.num_levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inverse = 1 / self.scale
        distance = value - self.loc
        below_top, above_bottom = value < self.num_levels - 1, value > 0
        zero = inverse.new_zeros(())
        upper = torch.where(below_top, F.logsigmoid((distance + 0.5) * inverse), zero)
        lower = torch.where(above_bottom, F.logsigmoid((0.5 - distance) * inverse), zero)
        return upper + lower + torch.where(below_top & above_bottom, (-torch.expm1(-inverse)).log(), zero)

    def _sum_of_tails(self, weights: Tensor) -> Tensor:
        """The sum of weight_k P(x >= k) over k = 1, ..., n - 1, one level at a time, so memory does not grow with n."""
        total = torch.zeros_like(self.loc)
        for level, weight in enumerate(weights, start=1):
            total = total + weight * torch.sigmoid((self.loc - level + 0.5) / self.scale)
        return total

    @property
    def mean(self) -> Tensor:
        return self._sum_of_tails(self.loc.new_ones(self.num_levels - 1))

    @property
    def variance(self) -> Tensor:
        odd = 2 * torch.arange(1, self.num_levels, dtype=self.loc.dtype, device=self.loc.device) - 1
        return self._sum_of_tails(odd) - self.mean.square()


class StableContinuousBernoulli(TorchDistribution):
    r"""Density on [0, 1] proportional to p^x (1 - p)^(1 - x); with l = log(p / (1 - p)) and h = l / 2::

        log p(x) = l (x - 1/2) - log(sinh(h) / h)

    Loaiza-Ganem and Cunningham, 2019, https://arxiv.org/abs/1907.06845. In this form it integrates to one for all logits.
    `torch.distributions.ContinuousBernoulli` (2.13) clamps p in its normaliser only: in float32 its density integrates to
    0.32 at l = 50, and near p = 1/2 the gradient of the normaliser is wrong by several times its size.

    :param logits: l, any real numbers.
    """

    arg_constraints = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StableContinuousBernoulli":
        new = self._get_checked_instance(StableContinuousBernoulli, _instance)
        StableContinuousBernoulli.__init__(new, self.logits.expand(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * (value - 0.5) - log_sinh_ratio(self.logits / 2)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  as in torch
        uniform = torch.rand(self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device)
        steepness = self.logits.abs().clamp(min=1e-6)  # below it the density is constant up to rounding
        falling = torch.log1p(uniform * torch.expm1(-steepness)) / -steepness
        return torch.where(self.logits > 0, 1 - falling, falling)

    @property
    def mean(self) -> Tensor:
        """1/2 + (coth(h) - 1/h) / 2."""
        small = self.logits.abs() < SMALL
        half = torch.where(small, torch.ones_like(self.logits), self.logits) / 2
        series = self.logits / 12 - self.logits**3 / 720
        return 0.5 + torch.where(small, series, (1 / half.tanh() - 1 / half) / 2)

    @property
    def variance(self) -> Tensor:
        """(1/h^2 - 1/sinh(h)^2) / 4."""
        small = self.logits.abs() < SMALL
        half = torch.where(small, torch.ones_like(self.logits), self.logits).abs() / 2
        series = 1 / 12 - self.logits.square() / 240
        inverse_sinh = 2 * torch.exp(-half) / -torch.expm1(-2 * half)
        return torch.where(small, series, (1 / half.square() - inverse_sinh.square()) / 4)


def log_sinh_ratio(half: Tensor) -> Tensor:
    """log(sinh(h) / h); value and gradient are accurate for all h."""
    twice = 2 * half.abs()
    small = twice < SMALL
    safe = torch.where(small, torch.ones_like(twice), twice)
    square = half.square()
    series = square / 6 - square.square() / 180
    return torch.where(small, series, safe / 2 + (-torch.expm1(-safe) / safe).log())


class FastBinomial(dist.Binomial):
    """Pyro's Binomial for one number of trials n; terms that depend on the data only are computed once, not per particle."""

    def __init__(self, num_trials: int, logits: Tensor, validate_args: bool | None = None) -> None:
        self.num_trials = num_trials
        super().__init__(logits.new_full((), num_trials), logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FastBinomial":
        new = self._get_checked_instance(FastBinomial, _instance)
        new.num_trials = self.num_trials
        return super().expand(batch_shape, new)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return constraints.integer_interval(0, self.num_trials)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        n = self.num_trials
        value = value if value.is_floating_point() else value.to(torch.promote_types(self.logits.dtype, torch.float32))
        log_binomial = math.lgamma(n + 1) - torch.lgamma(value + 1) - torch.lgamma(n + 1 - value)
        return value * self.logits - n * F.softplus(self.logits, threshold=40) + log_binomial


class CheckedMultivariateNormal(dist.MultivariateNormal):
    """`MultivariateNormal` whose `log_prob` checks its data like `CheckedIndependent`. Autocast is off inside."""

    accepts = finite_numbers("MultivariateNormal")

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        with switched_off():
            return super().rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        check_value(value, self.event_shape, self.accepts)
        with switched_off():
            return super().log_prob(value)


@register_kl(CheckedMultivariateNormal, torch.distributions.Independent)
def kl_to_diagonal(p: CheckedMultivariateNormal, q: torch.distributions.Independent) -> Tensor:
    """KL(N(m, L L^T) to N(l, diag(s^2))), shape (B,), nats; torch has it for two full covariances only."""
    normal = q.base_dist
    if not isinstance(normal, torch.distributions.Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    shift = (p.loc - normal.loc) / normal.scale
    root = p.scale_tril / normal.scale.unsqueeze(-1)
    log_det = p.scale_tril.diagonal(dim1=-2, dim2=-1).log() - normal.scale.log()
    return (shift.square() + root.square().sum(-1) - 1).sum(-1) / 2 - log_det.sum(-1)
