"""Data with missing values: the likelihood of the observed part, and the input of an encoder."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..densities import filled
from ..errors import ArgumentError, StructureError, described
from ..nn.checked import CheckedIndependent
from ..nn.shared_scale import BatchOptimal


class SeenPart(dist.Independent):
    """A likelihood of independent numbers in which masked numbers do not count.

    A missing value is replaced by a number inside the support before the density is computed. A NaN that is masked
    afterwards would still make every gradient NaN.
    """

    whole: TorchDistribution  # the distribution whose validation of data is kept

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SeenPart":
        new: Any = super().expand(batch_shape, _instance)
        new.whole = self.whole
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        value = filled(self, value, None)
        if isinstance(self.whole, CheckedIndependent):
            self.whole.check(value)
        return super().log_prob(value)


def seen_part(likelihood: TorchDistribution, seen: Tensor) -> TorchDistribution:
    """The likelihood in which numbers that are not `seen`, (B, *event), are masked."""
    base, event_dim = likelihood, 0
    while isinstance(base, torch.distributions.Independent):
        event_dim += base.reinterpreted_batch_ndims
        base = base.base_dist
    if base.event_shape or isinstance(likelihood, BatchOptimal):
        raise StructureError(
            "missing values need a likelihood whose numbers are independent given the latents, with a density for each, got "
            f"{type(base).__name__} of event shape {tuple(likelihood.event_shape)}"
            f"{', with a scale computed from the whole batch' if isinstance(likelihood, BatchOptimal) else ''}: "
            "end the decoder with a head such as pv.nn.Normal() or pv.nn.Normal('learned')"
        )
    fn: Any = SeenPart(base.mask(seen), event_dim)
    fn.whole = likelihood
    return fn


def zeros_and_mask(x: Tensor) -> Tensor:
    """x with zeros for missing values, followed along dimension 1 by ones where a number is observed: (B, X) to (B, 2 X)."""
    if x.ndim < 2:
        raise ArgumentError(f"x must have a row of numbers for each datum, (B, X), got {described(x)}: pass x.unsqueeze(-1)")
    seen = ~x.isnan()
    return torch.cat([torch.where(seen, x, 0), seen.to(x.dtype)], 1)
