"""The masks of a site: of `poutine.mask`, and of `fn.mask(m)` at any depth below `to_event`."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import MaskError
from .supports import WRAPPERS, innermost


def find_masks(fn: Any, site_mask: Tensor | bool | None, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The mask of a site as (per batch element, per event element if these differ), `None` where nothing is masked.

    Masks come from `poutine.mask` and from `fn.mask(m)`, also below `to_event`, where one mask value belongs to each
    element of an event.
    """
    mask = as_mask(site_mask, value)
    event_ndims = 0
    event_mask = None
    while True:
        if isinstance(fn, dist.MaskedDistribution):
            inner = as_mask(fn._mask, value)
            if inner is not None and event_ndims and inner.ndim:
                inner = inner.expand(torch.broadcast_shapes(inner.shape, fn.batch_shape))
                flat = inner.flatten(-event_ndims)
                whole = flat.all(-1)
                traced = isinstance(inner, FakeTensor)  # in a compiled step, which has no values to read
                with torch._C.DisableTorchFunction():  # our own look at the mask is not the program's
                    same = not traced and torch.equal(whole, flat.any(-1))
                if not same:  # one value for all dimensions that `to_event` added below the mask
                    event_mask = inner.reshape(inner.shape + (1,) * (fn.event_dim - innermost(fn).event_dim))
                else:
                    mask = whole if mask is None else mask & whole
            elif inner is not None:
                mask = inner if mask is None else mask & inner
        elif isinstance(fn, torch.distributions.Independent):
            event_ndims += fn.reinterpreted_batch_ndims
        elif not isinstance(fn, ExpandedDistribution):
            return mask, event_mask
        fn = fn.base_dist


def as_mask(mask: Tensor | bool | None, like: Tensor) -> Tensor | None:
    if mask is None or mask is True:
        return None
    return torch.zeros((), dtype=torch.bool, device=like.device) if mask is False else mask.bool()


def hidden_places(fn: Any, site_mask: Tensor | bool | None, value: Tensor) -> Tensor | None:
    """True where a number of `value` is masked, broadcastable to it; `None` where nothing is masked.

    Masks come from `poutine.mask` (`site_mask`) and from `fn.mask(m)` at any depth below `to_event`.
    """
    masks = [(site_mask, fn.event_dim)]
    below: Any = fn
    while isinstance(below, WRAPPERS):
        masks.append((getattr(below, "_mask", None), len(below.event_shape)))
        below = below.base_dist
    hidden = None
    for mask, event_dim in masks:
        if mask is None or mask is True:
            continue
        kept = torch.as_tensor(mask, dtype=torch.bool, device=value.device)
        mine = ~kept.reshape(kept.shape + (1,) * event_dim)
        hidden = mine if hidden is None else hidden | mine
    return hidden


def has_own_mask(fn: Any) -> bool:
    """Whether `fn.mask(m)` was used, also below `to_event`."""
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            return True
        fn = fn.base_dist
    return False


def mask_hides_score(fn: Any) -> bool:
    """Whether Pyro masks the score function of `fn.mask(m)` too: below `to_event`, and where m is `False`."""
    below = False
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution) and (below or fn._mask is False):
            return True
        below = below or isinstance(fn, torch.distributions.Independent)
        fn = fn.base_dist
    return False


def check_event_masks(name: str, ours: Tensor | None, theirs: Tensor | None) -> None:
    """Raise for masks inside events that differ between model and guide: the log-density of the other is already summed."""
    if ours is None and theirs is None:
        return
    if ours is None or theirs is None or not bool((ours == theirs).all()):
        raise MaskError(
            f"latent site '{name}' is masked inside its event, but differently in model and guide: put the same "
            "fn.mask(mask).to_event(...) on both sides, or mask whole events with poutine.mask"
        )
