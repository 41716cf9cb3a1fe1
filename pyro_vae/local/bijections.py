"""From the real line to the support of a latent, and how far along it floats can still tell the values apart."""

import math

import torch
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    Transform,
    identity_transform,
)

DIGITS = 0.63  # of the digits of a float, which a distance from an end keeps in the value


def bijection(support: Constraint) -> Transform:
    """`biject_to`, with the identity recognised under the wrappers that `to_event` leaves."""
    transform = inner = biject_to(support)
    while isinstance(inner, IndependentTransform):
        inner = inner.base_transform
    return identity_transform if inner == identity_transform else transform


def limits(transform: Transform, dtype: torch.dtype) -> tuple[float, float]:
    """Between which u the values and their distances from the ends of the support are known to several digits.

    Beyond, an exponential is zero or infinite, and a sigmoid is one.
    """
    floats = torch.finfo(dtype)
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    parts = transform.parts if isinstance(transform, ComposeTransform) else [transform]
    if not parts:
        return -math.inf, math.inf
    if isinstance(parts[0], ExpTransform):
        return math.log(floats.tiny / floats.eps), math.log(floats.max * floats.eps)
    end = -DIGITS * math.log(floats.eps)
    return -end, end
