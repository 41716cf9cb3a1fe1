"""From the real line to the support of a latent and back, without the ends where a density may be infinite or NaN."""

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    StickBreakingTransform,
    Transform,
    identity_transform,
)


class BoundedExp(ExpTransform):
    """exp that stops short of zero and infinity, where the density of a Gamma or its gradient is infinite or NaN."""

    def _call(self, x: Tensor) -> Tensor:
        limits = torch.finfo(x.dtype)
        return x.exp().clamp(limits.tiny / limits.eps, limits.max * limits.eps)


class BoundedStickBreaking(StickBreakingTransform):
    """Likewise for the parts of a simplex."""

    def _call(self, x: Tensor) -> Tensor:
        y: Tensor = super()._call(x)
        return y.clamp(min=torch.finfo(y.dtype).tiny / torch.finfo(y.dtype).eps)


def bounded(transform: Transform) -> Transform:
    """The same transform with its exponentials kept away from the ends of what a float holds."""
    if isinstance(transform, IndependentTransform):
        return IndependentTransform(bounded(transform.base_transform), transform.reinterpreted_batch_ndims)
    if isinstance(transform, ComposeTransform):
        return ComposeTransform([bounded(part) for part in transform.parts])
    if type(transform) is ExpTransform:
        return BoundedExp()
    return BoundedStickBreaking() if type(transform) is StickBreakingTransform else transform


def bijection(support: Constraint) -> Transform:
    """`biject_to`, bounded, with the identity recognised under the wrappers that `to_event` leaves."""
    transform = inner = bounded(biject_to(support))
    while isinstance(inner, IndependentTransform):
        inner = inner.base_transform
    return identity_transform if inner == identity_transform else transform
