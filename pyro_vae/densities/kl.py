"""KL divergences for which torch has a formula, of a whole site or of single numbers."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.transforms import ComposeTransform

from .supports import TRANSFORMED, innermost, of_one_value


def known_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q || p), in the broadcast batch shape of both; None where torch has no formula."""
    try:
        if q.batch_shape != p.batch_shape:  # some of torch's formulas do not broadcast: of Bernoullis, binomials
            shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
            q, p = q.expand(shape), p.expand(shape)
        kl = kl_divergence(q, p)
    except NotImplementedError:
        return None
    return kl if isinstance(kl, Tensor) else None


def by_number(fn: Any) -> Any:
    """The distribution of single numbers of a site, if the site factorises over them; otherwise that of the event."""
    base = innermost(fn)
    if type(base) not in TRANSFORMED or not base.event_shape:
        return base
    below = by_number(base.base_dist)
    transforms = [of_one_value(transform) for transform in base.transforms]
    if below.event_shape or any(t.domain.event_dim or t.codomain.event_dim for t in transforms):
        return base
    transforms = [t for t in transforms if not (isinstance(t, ComposeTransform) and not t.parts)]  # the identity
    return dist.TransformedDistribution(below, transforms) if transforms else below


def without_mask(fn: Any) -> Any:
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn
