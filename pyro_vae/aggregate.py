"""log q(z_i | x_j), the density of the draw for one datum under the guide for another: terms of the aggregated posterior."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from .densities import has_edges, innermost, inside_support, log_prob_at
from .errors import MaskError, StructureError, quoted
from .kernel import Call, Layout, LogDensities, Record, SiteRecord, first_dependent


def log_q_by_dimension(
    drawn: Record, names: Collection[str], layout: Layout, rows: Mapping[str, Tensor] | None = None
) -> Tensor:
    """log q(z_d | x_j) at the draw of datum i, (R, B, D) as [i, j, d], from one particle of the guide.

    A dimension is one element of one site: of its event, and of the plates inside the datum.

    :param rows: R draws, for any data, by site, as returned by `rows_of`; by default those of the B data.
    """
    return torch.cat([site_log_q(drawn[n], layout, None if rows is None else rows[n]) for n in names], -1)


def site_log_q(site: SiteRecord, layout: Layout, rows: Tensor | None = None) -> Tensor:
    assert layout.datum_dim is not None
    fn = innermost(site.fns[0])
    axis = layout.datum_dim - site.event_dim
    draws = rows_of(site, layout) if rows is None else rows
    if has_edges(fn) or not fn.has_rsample:  # a support may depend on the data, and draws for other data may be outside
        inside = inside_support(fn, draws)
        log_q = log_prob_at(site.name, fn, torch.where(inside, draws, site.value))
        log_q = torch.where(inside, log_q, log_q.new_full((), -torch.inf))
    else:
        log_q = log_prob_at(site.name, fn, draws)
    shape = list(draws.shape)
    shape[axis] = layout.batch_size
    log_q = log_q.expand(shape).movedim(axis, 1).flatten(2)
    return log_q.to(torch.promote_types(log_q.dtype, torch.float32))


def rows_of(site: SiteRecord, layout: Layout) -> Tensor:
    """The draws of one particle, one datum after the other: (B, 1, *plates, *event) with one datum in its plate."""
    if layout.datum_dim is None:
        return site.value.unsqueeze(0)
    axis = layout.datum_dim - site.event_dim
    return site.value.movedim(axis, 0).unsqueeze(axis)  # broadcast over the data


def as_particles(rows: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """View the draws from `rows_of` as R particles common to all B data: (R, *plates, *event), without a copy."""
    values = {}
    for name, draws in rows.items():
        shape = list(draws.squeeze(1).shape)
        if layout.datum_dim is not None:
            shape[layout.datum_dim - layout.event_dims[name]] = layout.batch_size
        values[name] = draws.squeeze(1).expand(shape)
    return values


def check_dimensions(drawn: Record, guide_sites: Collection[str], latents: Collection[str]) -> None:
    """Raise for draws whose log q is not a sum over single numbers, each with a separate density."""
    check_draws(drawn, guide_sites, latents)
    for name in joint_sites(drawn, guide_sites)[:1]:
        raise StructureError(
            f"the guide's site '{name}' is {type(innermost(drawn[name].fns[0])).__name__}, whose single dimensions "
            "have no known densities: draw independent dimensions, as in Normal(loc, scale).to_event(1) (transforms "
            "go below to_event)"
        )


def check_draws(drawn: Record, guide_sites: Collection[str], latents: Collection[str]) -> None:
    """Raise for a guide with sites that are not latents drawn from a density."""
    for name in guide_sites:
        fn = innermost(drawn[name].fns[0])
        if name not in latents or isinstance(fn, dist.Delta):
            raise StructureError(
                f"the guide's site '{name}' ({type(fn).__name__}) is part of log q, but is not a latent that is drawn "
                "from a density (an autoguide, or a factor): its density under other data is not known. Let the guide "
                "draw the latents themselves, from parameters that an encoder computes"
            )


def check_unmasked(weights: LogDensities) -> None:
    kept = {name: weights.kept_places(name) for name in weights.structure.latents}
    masked = [name for name, places in kept.items() if places is not None and not bool(places.all())]
    if masked:
        raise MaskError(
            f"the latents {quoted(masked)} are masked, but the aggregated posterior needs all dimensions of all data: "
            "remove masked data, and mask observations only"
        )


def joint_sites(drawn: Record, names: Collection[str]) -> list[str]:
    """The sites whose distribution is not a product over single numbers."""
    return [name for name in names if innermost(drawn[name].fns[0]).event_dim]


def check_separate(call: Call, drawn: Record, names: Collection[str]) -> None:
    """Raise for a guide that draws one site given another: q(z_2|x) is then an integral over z_1."""
    if (found := first_dependent(call, names)) is not None:
        name, read = found
        raise StructureError(
            f"the guide draws '{name}' given {quoted(read) if read else 'its other latents'}, so the density "
            f"q({name}|x) is not known, nor is its part of the aggregated posterior: draw the latents independently "
            "given x, or as one site"
        )
