"""Normal numbers with one scale: fixed, learned, or optimal for the scored batch."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .checked import Accepts, CheckedIndependent, check_value

# The kept variance is averaged over about this many batches. With the last batch only, its noise costs 0.03 (batches of 128)
# to 0.1 nats (batches of 32) per datum of 64 pixels in evaluation, and sometimes ten times that. With the average it costs
# 0.004 and 0.01.
BATCHES = 10
SMALLEST_VARIANCE = 1e-8
LOG_2PI = math.log(2 * math.pi)


class SharedScale(CheckedIndependent):
    """Independent normals with one variance, shape (): the density needs only the sum of squares."""

    shared_variance: Tensor

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SharedScale":
        new: Any = super().expand(batch_shape, _instance)
        new.shared_variance = self.shared_variance
        return new

    def squares(self, value: Tensor) -> Tensor:
        check_value(value, self.event_shape, self.accepts)
        return (value - self.base_dist.loc).square()

    def log_density(self, squares: Tensor, variance: Tensor) -> Tensor:
        total = squares.flatten(-self.event_dim).sum(-1)
        return -0.5 * (total / variance + self.event_shape.numel() * (variance.log() + LOG_2PI))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_density(self.squares(value), self.shared_variance)


class BatchOptimal(SharedScale):
    """With gradients on, `log_prob` uses the best variance for its data, and passes it to `keep`.

    At this variance the derivative of the log-density by the variance is zero. The gradient for everything else is therefore
    right without a gradient through the variance.
    """

    keep: Callable[[Tensor], None]

    def expand(self, batch_shape: Any, _instance: Any = None) -> "BatchOptimal":
        new: Any = super().expand(batch_shape, _instance)
        new.keep = self.keep
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().log_prob(value)
        squares = self.squares(value)
        variance = squares.detach().mean().clamp(min=SMALLEST_VARIANCE)
        self.keep(variance)
        return self.log_density(squares, variance)


def shared_scale(
    loc: Tensor, scale: Tensor, event_dim: int, accepts: Accepts, keep: Callable[[Tensor], None] | None = None
) -> SharedScale:
    """N(loc, scale^2) with one scale, shape (); with `keep`, the scale is replaced by the best one of each batch."""
    base = dist.Normal(loc, scale, validate_args=False)
    fn: Any = SharedScale(base, event_dim) if keep is None else BatchOptimal(base, event_dim)
    fn.accepts, fn.shared_variance = accepts, scale.square()
    if keep is not None:
        fn.keep = keep
    return fn
