"""Supports of distributions, inside wrappers of masks, events and transforms."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import AffineTransform, IndependentTransform

ROUNDINGS = 8.0  # relative distance from an end of the support below which the distance is known to less than a digit
WRAPPERS = (torch.distributions.Independent, dist.MaskedDistribution, ExpandedDistribution)


def support_of(fn: Any) -> Any:
    """The constraint of the values; `None` where the distribution has none (normalizing flows of other libraries)."""
    try:
        return getattr(fn, "support", None)
    except NotImplementedError:
        return None


def is_discrete(fn: Any) -> bool:
    support = support_of(fn)
    return support is not None and bool(support.is_discrete)


def innermost(fn: Any) -> Any:
    """The distribution inside masks, events and expansions."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


TRANSFORMED = (dist.TransformedDistribution, torch.distributions.TransformedDistribution)


def of_one_value(transform: Any) -> Any:
    """Reduce a transform that acts separately on the elements of an event to one of single numbers."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, AffineTransform):
        return AffineTransform(transform.loc, transform.scale)
    return transform


def is_angle(fn: Any) -> bool:
    """Whether the density is periodic, on the circle: torch gives the reals as the support of a von Mises."""
    family = type(innermost(fn)).__name__
    return "VonMises" in family or family.startswith("Sine")


def has_edges(fn: Any) -> bool:
    """Whether the support of a continuous distribution may be bounded."""
    base = innermost(fn)
    if type(base) in TRANSFORMED:
        return True
    support: Any = support_of(base)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is not None and not support.is_discrete and support is not torch.distributions.constraints.real


def inside_support(fn: Any, value: Tensor) -> Tensor:
    """Whether the value has a density, shape (*batch). Transforms are inverted, since they hide the base's support."""
    base = innermost(fn)
    below = base.base_dist if type(base) in TRANSFORMED else base
    event_dim = max(len(fn.event_shape) - len(below.event_shape), 0)
    try:
        if below is not base:
            for transform in reversed(base.transforms):
                value = transform.inv(value)
        inside = inside_support(below, value) if below is not base else base.support.check(value)
    except (NotImplementedError, KeyError):  # a transform without an inverse, or a distribution without a support
        return torch.ones((), dtype=torch.bool, device=value.device)
    return inside.flatten(-event_dim).all(-1) if event_dim else inside


def next_to_far_end(fn: Any, value: Tensor) -> Tensor | None:
    """Whether values, (*batch, *event), are within a few roundings of an end of their support that is not zero, (*batch).

    `None` where the support has no such end. Near zero floats are fine enough. Ends that are tensors are not tested: they
    are those of a Uniform, whose density is constant up to its end.
    """
    support: Any = support_of(fn)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if bounds_of(support):
        return None
    near = None
    for end in (getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)):
        if end is not None and not is_discrete(fn) and value.is_floating_point():
            end = torch.as_tensor(end, dtype=value.dtype, device=value.device)
            close = (value - end).abs() < ROUNDINGS * torch.finfo(value.dtype).eps * end.abs()
            near = close if near is None else near | close
    return near.flatten(-fn.event_dim).any(-1) if near is not None and fn.event_dim else near


def bounds_of(constraint: Any) -> list[Tensor]:
    """The bounds of a constraint that are tensors."""
    parts = list(vars(constraint).values()) if hasattr(constraint, "__dict__") else []
    parts = [item for part in parts for item in (part if isinstance(part, (list, tuple)) else [part])]
    found = [part for part in parts if isinstance(part, Tensor)]
    return found + [t for part in parts if isinstance(part, Constraint) for t in bounds_of(part)]


def support_values(fn: Any) -> Tensor | None:
    """All values of a discrete distribution, (E, *event), or `None` where they cannot be listed.

    Inside `to_event`, the values of one element.
    """
    fn = innermost(fn)
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return values.reshape(len(values), *values.shape[values.ndim - fn.event_dim :])
