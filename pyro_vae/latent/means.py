"""Posterior means E_q[z | x] of the latents, where they have a formula."""

from typing import Any

import pyro.distributions as dist
from torch import Tensor

from ..densities import innermost
from ..kernel import Call, Record, first_dependent
from .formulas import density_of_guide, mean_of
from .per_unit import has_one_draw


def free_sites(call: Call, guide: Record) -> frozenset[str]:
    """The latents that the guide draws independently of one another given x: the mean of their distribution is E_q[z | x].

    For a latent drawn given another, only the mean given that one is known.
    """
    latents = call.structure.latents
    if call.structure.guide_enumerated or call.structure.indicators:
        return frozenset()
    if has_one_draw(call, guide):
        return frozenset(latents)
    # otherwise those of AutoNormal, all independent
    order = [name for name in latents if f"{name}_unconstrained" not in guide]
    bound: set[str] = set()
    while (found := first_dependent(call, order)) is not None and found[0] not in bound:
        bound.add(found[0])
        order.remove(found[0])
        order.append(found[0])  # removed last, so that the next one is found
    return frozenset(latents) - bound


def posterior_mean(name: str, guide: Record, p: Any) -> Tensor | None:
    """The mean of what the guide draws for a latent with prior `p`, broadcastable to (*plates, *event)."""
    if isinstance(innermost(guide[name].fns[0]), dist.Delta) and f"{name}_unconstrained" not in guide:
        return None  # a joint draw of an autoguide
    return mean_of(density_of_guide(name, guide, p))
