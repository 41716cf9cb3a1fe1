"""Bijections from the real line to the support of a latent, and the range in which floats distinguish the values."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint, nonnegative_integer
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    Transform,
    identity_transform,
)

from ..densities import TRANSFORMED, innermost, is_angle, support_of, support_values
from ..errors import LocalFitError
from ..kernel import Call
from .circle import Wrapped
from .gradients import REMEDY

DIGITS = 0.63  # share of the digits of a float that a distance from an end keeps in the value


class Listed(Transform):
    """From the index of a value, 0 to n - 1, to the value, for a discrete distribution whose values can be listed."""

    bijective = True

    def __init__(self, values: Tensor, support: Constraint) -> None:
        """`values`, (n, *event); single numbers are sorted."""
        super().__init__()
        self.values, self.domain, self.codomain = values, nonnegative_integer, support

    def _call(self, x: Tensor) -> Tensor:
        return self.values[x.long()]

    def _inverse(self, y: Tensor) -> Tensor:
        event_dim = self.values.ndim - 1
        if not event_dim:  # in memory of the size of y
            return torch.searchsorted(self.values.to(y.dtype), y.contiguous()).to(torch.get_default_dtype())
        hits = (y.unsqueeze(y.ndim - event_dim) == self.values).flatten(-event_dim).all(-1)
        return hits.to(torch.uint8).argmax(-1).to(torch.get_default_dtype())


MOST_VALUES = 1000  # of a discrete latent that are listed


def num_values(transform: Transform) -> int:
    """The number of values of a discrete latent; zero for others."""
    return len(transform.values) if isinstance(transform, Listed) else 0


def bijection(support: Constraint) -> Transform:
    """`biject_to`, with the identity recognised inside the wrappers of `to_event`."""
    transform = inner = biject_to(support)
    while isinstance(inner, IndependentTransform):
        inner = inner.base_transform
    return identity_transform if inner == identity_transform else transform


def limits(transform: Transform, dtype: torch.dtype) -> tuple[float, float]:
    """The range of u in which the values and their distances from the ends of the support are known to several digits.

    Outside, an exponential is zero or infinite, and a sigmoid is one.
    """
    if num_values(transform):
        return -math.inf, math.inf
    floats = torch.finfo(dtype)
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    parts = transform.parts if isinstance(transform, ComposeTransform) else [transform]
    if not parts:
        return -math.inf, math.inf
    if parts[0] == Wrapped():
        return -math.inf, math.inf
    end = -DIGITS * math.log(floats.eps)
    shift = max((float(torch.as_tensor(p.loc).abs().max()) for p in parts if isinstance(p, AffineTransform)), default=0.0)
    # Floats are finest near zero, so values can be much closer to an end at zero than to another end.
    smallest = math.log(floats.tiny / floats.eps)
    if isinstance(parts[0], ExpTransform):
        return smallest if shift == 0 else math.log(shift) - end, math.log(floats.max * floats.eps)
    if isinstance(parts[0], SigmoidTransform):
        return smallest if shift == 0 else -end, end
    return -end, end


def find_transforms(call: Call, discrete: bool = False) -> dict[str, Transform]:
    """The bijection of each latent site, from plain runs under the prior; `discrete` allows discrete latents."""
    sites = call.run_prior()
    transforms: dict[str, Transform] = {}
    for name in call.structure.latents:
        base = innermost(sites[name].fn)
        mixture = isinstance(base, torch.distributions.MixtureSameFamily)
        if is_angle(base.component_distribution if mixture else base):
            transforms[name] = Wrapped()
            continue
        if type(base) in TRANSFORMED and is_angle(base.base_dist):
            raise LocalFitError(f"the latent site '{name}' is a transformed angle, whose space is not known. {REMEDY}")
        support = support_of(base.component_distribution if mixture else sites[name].fn)
        if support is None:  # a flow of another library: assumed to be the reals, which the record states
            transforms[name] = identity_transform
            continue
        if support.is_discrete:
            transforms[name] = listed(name, base, support, wanted=discrete)
            continue
        try:
            transforms[name] = bijection(support)
        except NotImplementedError as error:
            raise LocalFitError(
                f"the support of the latent site '{name}' has no bijection to the reals. {REMEDY}"
            ) from error
    if all(transform == identity_transform for transform in transforms.values()):
        return transforms
    # A drawn number of trials may be the same in two runs.
    drawn_counts = any(num_values(t) and hasattr(innermost(sites[n].fn), "total_count") for n, t in transforms.items())
    for _ in range(4 if drawn_counts else 1):
        again = call.run_prior()
        for name, transform in transforms.items():
            endless = transform in (identity_transform, Wrapped())
            if not endless and not same_support(transform, sites[name].value, again[name].fn):
                raise LocalFitError(f"the support of the latent site '{name}' depends on another latent. {REMEDY}")
    return transforms


def sorted_values(fn: Any) -> Tensor | None:
    values = support_values(fn)
    return values if values is None or values.ndim > 1 else values.sort().values


def same_support(transform: Transform, value: Tensor, fn: Any) -> bool:
    """Whether a distribution of another run has the support of a transform."""
    if isinstance(transform, Listed):
        values = sorted_values(fn)
        return values is not None and torch.equal(values, transform.values)
    u = transform.inv(value)
    return torch.allclose(transform(u), bijection(fn.support)(u))


def listed(name: str, fn: Any, support: Constraint, wanted: bool) -> Listed:
    values = sorted_values(fn)
    if wanted and (values is None or len(values) > MOST_VALUES):
        raise LocalFitError(f"the latent site '{name}' is discrete and its values cannot be listed. {REMEDY}")
    if not wanted or values is None:
        raise LocalFitError(f"the latent site '{name}' is discrete: enumerate it, or {REMEDY[0].lower()}{REMEDY[1:]}")
    return Listed(values, support)
