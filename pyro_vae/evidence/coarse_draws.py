"""Draws for which floats are too coarse: Beta draws next to one in float32, draws whose scale vanishes beside their size."""

import math

import torch
from torch import Tensor

from ..densities import is_discrete, next_to_far_end
from ..kernel import Call, Record, padded, reduce_to_datum

SHARE = 0.02  # of p(x), that such draws may carry
STEPS = 2.0  # between neighbouring floats, that the standard deviation of draws must be worth


class CoarseDraws:
    """The share of the weight on draws of the guide whose distance from an end of the support, or from one another, is
    mostly rounding.

    Floats next to one lie 6e-8 apart in float32. A draw of 1 - 1e-7 becomes a neighbour of it, whose density, of the prior
    and of the guide alike, is another. The weights look good, and their mean is wrong. A mean of 1e9 with a scale of one
    makes all draws the same float: all weights are equal then, whatever the scale says.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._log_near = self._log_all = torch.full((call.batch_size,), -math.inf, dtype=torch.float64, device=call.device)

    def watch(self, guide: Record, model: Record, log_weight: Tensor) -> None:
        """One noise block: draws of the guide and their log-weights, (K, B)."""
        layout, near = self._call.layout, torch.zeros_like(log_weight, dtype=torch.bool)
        for name in self._call.structure.latents:
            site = guide[name]
            if not site.fns or is_discrete(site.fns[0]):
                continue
            coarse = indistinct(site.value, layout.num_plates + layout.event_dims[name])
            at_end = next_to_far_end(site.fns[0], site.value)
            coarse = any_in_event(coarse, layout.event_dims[name])
            coarse = coarse if at_end is None else coarse | at_end
            coarse = padded(coarse, 1 + layout.num_plates)
            if site.mask is not None:
                coarse = coarse & site.mask
            at_datum = reduce_to_datum(coarse.long(), layout) > 0
            near = near | at_datum.reshape(-1, *at_datum.shape[-2:]).any(0)  # for any value of what is enumerated
        log_weight = log_weight.detach().double()
        self._log_all = torch.logaddexp(self._log_all, log_weight.logsumexp(0))
        self._log_near = torch.logaddexp(self._log_near, torch.where(near, log_weight, -math.inf).logsumexp(0))

    def too_many(self) -> Tensor:
        """(B,)"""
        return self._log_near > self._log_all + math.log(SHARE)


def indistinct(value: Tensor, width: int) -> Tensor:
    """Where draws, (*E, K, *plates, *event), differ by hardly more than the distance between floats; of the same shape.

    Not where all are 0, 1 or -1, as parts of a Cholesky factor are by their nature.

    :param width: the number of dims of a plate or an event.
    """
    axis = value.ndim - width - 1
    if axis < 0 or value.shape[axis] < 2 or not value.is_floating_point():
        return torch.zeros_like(value, dtype=torch.bool)
    size = value.abs().amax(axis, keepdim=True)
    spread = value.double().std(axis, keepdim=True)
    return ((spread <= STEPS * torch.finfo(value.dtype).eps * size) & (size != 1) & (size > 0)).expand_as(value)


def any_in_event(flags: Tensor, event_dim: int) -> Tensor:
    return flags.flatten(-event_dim).any(-1) if event_dim else flags
