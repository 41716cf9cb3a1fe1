"""The KL of a latent given those drawn before it: by formula where torch has one, for the site or for each dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.distributions import biject_to

from ...arguments import signature_of
from ...densities import by_number, innermost, known_kl, without_mask
from ...errors import StructureError
from .beta_messenger import WeighedTraces
from .draw_order import depends_on_own_draw, out_of_order


class OwnDraws:
    """Find the latents whose prior depends on the draw of the same latent, through later draws of the guide.

    Their KL has no formula. Nothing is run where both sides draw in the same order. The last result is kept for later steps.
    """

    _last: tuple[Any, frozenset[str]] = ((), frozenset())  # the last question and its result

    def find(
        self,
        guide_sites: Mapping[str, Any],
        model_sites: Mapping[str, Any],
        model: Callable,
        guide: Callable,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> frozenset[str]:
        names = out_of_order(guide_sites, model_sites)
        if not names:
            return frozenset()
        asked = model, guide, names, signature_of((args, kwargs), floats=False)
        if self._last[0] != asked:
            self._last = asked, depends_on_own_draw(names, guide, model, args, kwargs)
        return self._last[1]

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of the objective holds no programs


def analytic_kl(traces: WeighedTraces, sites: tuple[str, ...]) -> Tensor | None:
    """KL(q(z|x) || p(z)) of one latent, of the shape of its plates; None where torch has no formula or q is a Delta."""
    sides = [side[sites[0]]["fn"] for side in (traces.guide_sites, traces.model_sites) if sites[0] in side]
    if len(sides) < 2 or len(sites) > 1 or isinstance(innermost(sides[0]), dist.Delta):
        return None
    q, p = map(without_mask, sides)  # the sites have the masks of both sides by now
    return known_kl(q, p)


def kl_by_dimension(traces: WeighedTraces, name: str, by_formula: bool) -> Tensor:
    """The parts of a KL, by formula or sampled: log q_d - log p_d of the draw; nats, of the shape (*plates, *event).

    :raises StructureError: for a latent whose dimensions depend on one another in the model or in the guide.
    """
    drawn, latent = traces.guide_sites[traces.groups[name][-1]], traces.model_sites[name]
    q, p = by_number(drawn["fn"]), by_number(latent["fn"])
    for side, fn in (("guide", q), ("model", p)):
        if fn.event_dim:
            raise StructureError(
                f"the {side}'s site '{name}' ({type(fn).__name__}) does not factorise over dimensions, so it has no KL "
                "for each of them: use free_bits_per='site', which takes the site as a whole"
            )
    shapes = (torch.Size(side[name]["fn"].shape()) for side in (traces.guide_sites, traces.model_sites))
    shape = torch.broadcast_shapes(*shapes)  # a prior that depends on one element of a plate has an extra axis of size one
    if by_formula:  # of all dimensions together, then of each
        kl = known_kl(q, p)
        assert kl is not None  # tested before, for the site as a whole
        return kl.expand(shape)
    log_q = q.log_prob(drawn["value"])
    if drawn["name"] != name:
        log_q = log_q + log_jacobian(traces.guide_sites[name], drawn["value"], p)
    return (log_q - p.log_prob(latent["value"])).expand(shape)


def log_jacobian(site: Any, unconstrained: Tensor, prior: Any) -> Tensor:
    """log |dz/du| of each dimension, for a draw that an autoguide makes in unconstrained space and maps by `biject_to`."""
    point = innermost(site["fn"])
    if not point.event_dim:
        log_density: Tensor = point.log_density
        return log_density
    jacobian: Tensor = biject_to(prior.support).inv.log_abs_det_jacobian(site["value"], unconstrained)
    # An autoguide gives the sum only. Another guide may have another transform: test it, as Pyro does in its validation.
    whole = sum_rightmost(jacobian, point.event_dim)
    if is_validation_enabled() and not torch.allclose(
        whole, torch.as_tensor(point.log_density).to(whole), rtol=1e-4, atol=1e-4
    ):
        raise StructureError(
            f"the guide transforms the draw of '{site['name']}' by another transform than biject_to, so its KL has no "
            "parts by dimension: use free_bits_per='site', which takes the site as a whole"
        )
    return jacobian
