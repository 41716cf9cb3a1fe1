"""Distributions of a latent site split into single numbers, and formulas for their means and KLs."""

from typing import Any

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import biject_to, constraints

from ..densities import by_number, innermost, known_kl, without_mask
from ..kernel import Record, Summed


def density_of_guide(name: str, guide: Record, p: Any) -> Any:
    """The distribution of a latent in the guide, also of AutoNormal, which draws an auxiliary site and transforms it.

    None where the transform mixes the units of a site, where other draws are summed out, or where latents are drawn jointly.
    """
    q = guide[name].fns[0]
    if isinstance(q, Summed):
        return None
    if not isinstance(innermost(q), dist.Delta):
        return q
    draw = guide.get(f"{name}_unconstrained")
    if draw is None:
        return None
    prior = by_number(p)
    if prior.event_shape:
        return None
    base = innermost(draw.fns[0])
    if prior.support is constraints.real:
        return base
    return dist.TransformedDistribution(base, [biject_to(prior.support)])


def mean_of(q: Any) -> Tensor | None:
    """The mean of a distribution, or None where it has no formula."""
    try:
        mean = None if q is None else by_number(q).mean
    except (NotImplementedError, AttributeError):
        return None
    return mean if isinstance(mean, Tensor) else None


def joint_kl(q: Any, p: Any) -> Tensor | None:
    q, p = without_mask(q), without_mask(p)
    if isinstance(innermost(p), dist.Normal) and p.event_dim == 1:
        shape = p.batch_shape + p.event_shape  # torch has the KL between two full covariances, not between one and a product
        loc, stddev = innermost(p).mean.expand(shape), innermost(p).stddev.expand(shape)
        p = dist.MultivariateNormal(loc, scale_tril=stddev.diag_embed())
    return known_kl(q, p)
