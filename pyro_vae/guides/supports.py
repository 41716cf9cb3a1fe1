"""The transform from the reals to the support of a latent site, the same for all data."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.constraints import Constraint

from ..densities import bounds_of, innermost, is_angle, support_of
from ..errors import StructureError
from ..proposals import bijection

BY_HAND = "write a guide with a sample statement for this site"
CIRCLE = constraints.interval(-torch.pi, torch.pi)


def transform_of(site: Any, again: Any) -> Transform:
    """The bijection from the reals to the support of a site.

    :param again: the same site in another run under the prior.
    """
    support, later = support_at(site), support_at(again)
    if support.is_discrete:
        raise StructureError(
            f"the latent site '{site.name}' is discrete, and its draws have no gradient: let the model enumerate it, "
            f"pyro.infer.config_enumerate(model), which sums it out, or {BY_HAND}"
        )
    bounds = zip(bounds_of(support), bounds_of(later), strict=True)
    if not all(torch.equal(one, other) for one, other in bounds):
        raise StructureError(f"the support of the latent site '{site.name}' depends on other latents: {BY_HAND}")
    try:
        return bijection(support)
    except NotImplementedError as error:
        raise StructureError(
            f"the support of the latent site '{site.name}', {support}, has no bijection to the reals: {BY_HAND}"
        ) from error


def support_at(site: Any) -> Any:
    """The support of one event of a site."""
    event_dim, fn = site.fn.event_dim, innermost(site.fn)
    fn = fn.component_distribution if isinstance(fn, torch.distributions.MixtureSameFamily) else fn
    support = CIRCLE if is_angle(fn) else support_of(fn)  # torch gives the reals as the support of a circle
    if support is None:  # a flow of another library
        support = constraints.real
    return of_one_event(site.name, constraints.independent(support, event_dim - support.event_dim), event_dim)


def of_one_event(name: str, support: Constraint, event_dim: int) -> Constraint:
    """The constraint with bounds for one event, where they are tensors: those of a Uniform are repeated for all data."""
    changed = copy.copy(support)
    for key, part in vars(support).items():
        if isinstance(part, Constraint):
            vars(changed)[key] = of_one_event(name, part, event_dim)
        if isinstance(part, Tensor) and part.ndim > event_dim:
            one = part[(0,) * (part.ndim - event_dim)]
            if not bool((part == one).all()):
                raise StructureError(f"the support of the latent site '{name}' differs between data or places: {BY_HAND}")
            vars(changed)[key] = one
    return changed
