"""Replace masked numbers of a value, so that no density is computed at NaN or outside the support.

A mask on the log-density only, `torch.where(mask, log_prob, 0)`, is not enough: a masked NaN makes every gradient NaN,
because zero times NaN is NaN.
"""

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import constraints, transform_to

from ..noise import kept_random_state
from .masks import hidden_places
from .supports import TRANSFORMED, innermost, support_of


def filled(fn: Any, value: Tensor, site_mask: Tensor | bool | None) -> Tensor:
    """`value` with masked numbers replaced by numbers inside the support."""
    hidden = hidden_places(fn, site_mask, value)
    if hidden is None or not value.numel():
        return value
    return torch.where(hidden, inside(fn, value), value)


@torch.no_grad()
def inside(fn: Any, value: Tensor) -> Tensor:
    """Numbers inside the support, broadcastable to `value`."""
    base = innermost(fn)
    if type(base) in TRANSFORMED:
        inner = inside(base.base_dist, value)
        inner = inner.expand(torch.broadcast_shapes(inner.shape, base.base_dist.shape()))
        for transform in base.transforms:
            inner = transform(inner)
        return inner
    if hasattr(base, "fns"):  # the columns of a table have separate supports
        return torch.cat([inside(fn, value).expand(fn.batch_shape) for fn in base.fns], -1)
    support = support_of(base)
    if support is None:
        return value.new_zeros(())
    if not support.is_discrete:
        try:
            transform = transform_to(support)
            return transform(value.new_zeros(torch.Size(transform.inverse_shape(base.batch_shape + base.event_shape))))
        except NotImplementedError:  # a support without a transform: use a draw
            return drawn(base, value.device)
    if support in (constraints.boolean, constraints.nonnegative_integer):  # known without reading a tensor
        return value.new_zeros(base.batch_shape + base.event_shape)
    if isinstance(support, constraints.integer_interval) and isinstance(support.lower_bound, int):
        return value.new_full(base.batch_shape + base.event_shape, support.lower_bound)
    for number in (0, 1):
        constant = value.new_full(base.batch_shape + base.event_shape, number)
        with torch._C.DisableTorchFunction():  # our own look at the support is not the program's
            if bool(support.check(constant).all()):
                return constant
    return drawn(base, value.device)


def drawn(base: Any, device: torch.device) -> Tensor:
    """Draw and restore the random state."""
    with kept_random_state([device]):
        value: Tensor = base.sample()
    return value


class FillHoles(Messenger):
    """Replaces masked numbers in values that outer handlers record and score. The program gets its original values."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] or site_is_factor(msg) or site_is_subsample(msg):
            return
        if hidden_places(msg["fn"], msg["mask"], msg["value"]) is not None:
            self._passed[msg["name"]] = msg["value"]
            msg["value"] = filled(msg["fn"], msg["value"], msg["mask"])

    def _pyro_post_sample(self, msg: Any) -> None:
        """Restore the value of the program. Outer handlers have recorded theirs by now."""
        if msg["name"] in self._passed:
            msg["value"] = self._passed.pop(msg["name"])
