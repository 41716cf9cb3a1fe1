"""log q of what one datum drew under the guide of another: what the aggregated posterior is made of."""

from __future__ import annotations

from collections.abc import Collection

import pyro.distributions as dist
import torch
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor

from ..errors import StructureError, quoted
from .agreement import close
from .calls import Call
from .live import rehearsal
from .programs import score
from .recorder import Layout
from .records import Record, SiteRecord
from .supports import has_edges, innermost, inside_support


def log_q_by_dimension(drawn: Record, names: Collection[str], layout: Layout) -> Tensor:
    """log q(z_d | x_j) at the draw of datum i, (B, B, D) as [i, j, d], from one particle of the guide.

    A dimension is one element of one site: of its event, and of the plates inside the datum.
    """
    return torch.cat([site_log_q(drawn[name], layout) for name in names], -1)


def site_log_q(site: SiteRecord, layout: Layout) -> Tensor:
    assert layout.datum_dim is not None
    fn = innermost(site.fns[0])
    axis = layout.datum_dim - site.event_dim
    draws = site.value.movedim(axis, 0).unsqueeze(axis)  # (B, 1, *plates, *event), broadcast over the data
    if has_edges(fn) or not fn.has_rsample:  # a support may depend on the data, and draws of others lie outside
        inside = inside_support(fn, draws)
        log_q = fn.log_prob(torch.where(inside, draws, site.value))
        log_q = torch.where(inside, log_q, log_q.new_full((), -torch.inf))
    else:
        log_q = fn.log_prob(draws)
    shape = list(draws.shape)
    shape[axis] = layout.batch_size
    log_q = log_q.expand(shape).movedim(axis, 1).flatten(2)
    return log_q.to(torch.promote_types(log_q.dtype, torch.float32))


def check_dimensions(drawn: Record, guide_sites: Collection[str], latents: Collection[str]) -> None:
    """Refuse draws whose log q is not a sum over single numbers, each with a density of its own."""
    for name in guide_sites:
        fn = innermost(drawn[name].fns[0])
        if name not in latents or isinstance(fn, dist.Delta):
            raise StructureError(
                f"the guide's site '{name}' ({type(fn).__name__}) is part of log q without being the draw of a latent with "
                "a density of its own (an autoguide, or a factor): the densities of other data at it are not known. Let "
                "the guide draw the latents themselves, from parameters that an encoder computes"
            )
        if fn.event_dim:
            raise StructureError(
                f"the guide's site '{name}' is {type(fn).__name__}, whose dimensions have no densities of their own that "
                "are known: draw independent dimensions, as in Normal(loc, scale).to_event(1) (transforms go below "
                "to_event)"
            )


def check_separate(call: Call, drawn: Record, names: Collection[str]) -> None:
    """Refuse a guide that draws one site given another: q(z_2|x) is then an integral over z_1.

    The guide runs at other draws, whose way through the program is followed; the densities must stay as well.
    """
    with torch.no_grad(), rehearsal(call.guide.fn, devices=[call.device]):
        first, other = call.draw(1), call.draw(1)
        values = {n: track_provenance(other[n].value, frozenset({n})) for n in names}
        moved = score(call.guide, values, 1)
        for name in names:
            read = get_provenance(moved[name].log_prob) - {name}
            stays = close(first[name].log_prob, moved[name].fns[0].log_prob(first[name].value))
            if read or not stays:
                raise StructureError(
                    f"the guide draws '{name}' given {quoted(sorted(read)) if read else 'its other latents'}, so "
                    f"q({name}|x) has no density of its own that is known, and neither has its part of the aggregated "
                    "posterior: draw the latents independently given x, or as one site"
                )
