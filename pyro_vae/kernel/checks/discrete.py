"""Give discrete latents different values in a check: two draws of a rare class are nearly always equal."""

from typing import Any

import torch
from torch import Tensor

from ...densities import innermost, inside_support, is_discrete, support_values
from ..recorder import Layout
from ..records import SiteRecord


def told_apart(site: SiteRecord, layout: Layout) -> Tensor:
    """The values of a site, (K, *plates, *event), in which discrete draws equal to the first are changed.

    Inside `to_event` every element of an event is compared separately.
    """
    value, fn = site.value, innermost(site.fns[-1])
    if not is_discrete(fn) or value.ndim != 1 + layout.num_plates + site.event_dim:
        return value
    first, others = value[:1], value[1:]
    alike = first == others
    if fn.event_dim:
        alike = alike.flatten(-fn.event_dim).all(-1)
        alike = alike.reshape(alike.shape + (1,) * fn.event_dim)
    return torch.cat([first, torch.where(alike, another_value(fn, others), others)])


def another_value(fn: Any, value: Tensor) -> Tensor:
    """The next value of the support for every draw, (K, *plates, *event). Counts go up by one, or down at their end."""
    fn, support = innermost(fn), support_values(fn)
    if support is not None:
        draws = value.unsqueeze(0)
        hits = support.reshape(len(support), *(1,) * (value.ndim - fn.event_dim), *support.shape[1:]) == draws
        if fn.event_dim:
            hits = hits.flatten(-fn.event_dim).all(-1)
        return support[(hits.long().argmax(0) + 1) % len(support)]
    if fn.event_dim:  # counts of several classes are hardly ever equal
        return value
    inside = inside_support(fn, value + 1)
    return torch.where(inside, value + 1, value - 1)
