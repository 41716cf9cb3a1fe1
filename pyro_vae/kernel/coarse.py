"""Draws for which floats are too coarse: Beta draws near one in float32, or draws with a tiny relative scale."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..densities import is_discrete, next_to_far_end
from .log_densities import reduce_to_datum
from .recorder import Layout
from .records import Record, padded

STEPS = 2.0  # steps between neighbouring floats that the standard deviation of draws must have


def coarse_draws(guide: Record, latents: Collection[str], layout: Layout, num_particles: int) -> Tensor:
    """(K, B) where the distance of a draw from an end of the support, or from the other draws, is mostly rounding.

    Near one, floats in float32 are 6e-8 apart. A draw of 1 - 1e-7 is rounded to a neighbour, whose densities under prior and
    guide differ. The weights look good, but their mean is wrong. With a mean of 1e9 and a scale of one, all draws are the
    same float, so all weights are equal for any scale.
    """
    near = torch.zeros(num_particles, layout.batch_size, dtype=torch.bool)
    for name in latents:
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
        near = near.to(at_datum.device) | at_datum.reshape(-1, *at_datum.shape[-2:]).any(0)  # at any enumerated value
    return near


def indistinct(value: Tensor, width: int) -> Tensor:
    """Where draws, (*E, K, *plates, *event), differ by hardly more than the distance between floats; in the same shape.

    Not where all are 0, 1 or -1, as some entries of a Cholesky factor always are.

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
