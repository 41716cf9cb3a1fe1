"""Find the plate of the data, and raise for plates with which weights per datum are not defined."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import pyro.distributions as dist
import torch

from ...densities import innermost
from ...errors import (
    DatumPlateError,
    EmptyBatchError,
    GlobalLatentError,
    SiteMismatchError,
    StructureError,
    SubsamplingError,
    quoted,
)
from ..recorder import Layout, Site
from .autoguides import auto_sites
from .subsamples import different_sizes

INFER: Final = "infer"  # the default of `datum_plate=`: find the plate common to all sites


def ways_out(name: str) -> str:
    return (
        f"Move it into the plate; or give it one value, for log p(x) given that: pyro.condition(model, {{'{name}': value}}) "
        "or a Delta for it in the guide (AutoDelta); or pass datum_plate=None to weigh the whole call as one datum; or "
        "score each datum given all others, by LeaveOneOut"
    )


def plates_of(site: Site) -> dict[str, Any]:
    return {frame.name: frame for frame in site.frames if frame.vectorized}


def batch_shape(site: Site) -> torch.Size:
    """The batch shape of a site, widened by its value (an observed tensor under scalar parameters)."""
    value_batch = site.value.shape[: site.value.ndim - site.fn.event_dim]
    return torch.Size(torch.broadcast_shapes(site.fn.batch_shape, value_batch))


def find_layout(
    guide: Callable,
    guide_sites: Mapping[str, Site],
    model_sites: Mapping[str, Site],
    datum_plate: str | None,
    known: Collection[str] = (),
    *,
    takes_givens: bool = True,
) -> Layout:
    """The positions of plates and data, and the givens: sites outside the data that have one value.

    :param known: latents whose value is known without a guide.
    """
    sites = [*guide_sites.values(), *model_sites.values()]
    if datum_plate is None:
        return Layout(num_plates=max((len(batch_shape(s)) for s in sites), default=0))
    # The joint draw of AutoDiagonalNormal is outside all plates; it is split by site and datum instead.
    auto_draws = {name for name in auto_sites(guide) if name.startswith("_")} - set(known)
    members = [s for s in sites if s.name not in auto_draws]
    pinned = {*known, *pinned_sites(guide, guide_sites, model_sites)}
    name = datum_plate if datum_plate != INFER else plate_of_data(members, pinned)
    outside = [s for s in members if name not in plates_of(s)]
    if len(outside) == len(members):
        raise DatumPlateError(f"no site lies in the plate '{name}': plates of the model are {all_plates(sites)}")
    has_data = any(s.is_observed and name in plates_of(s) for s in model_sites.values())
    for site in outside:
        if site.name not in pinned or not has_data:
            raise outside_the_plate(site, name)
    fixed = frozenset(s.name for s in outside)
    deepest = max((len(batch_shape(s)) for s in sites if known), default=0)  # their values may have particles too
    if fixed and not takes_givens:
        raise StructureError(
            f"the sites {quoted(sorted(fixed))} lie outside the datum plate '{name}': weights per datum would leave their "
            "densities, and the gradients of these, out of the loss. Train with a Beta*_ELBO, which adds them once, or pass "
            "datum_plate=None"
        )
    members = [s for s in members if s.name not in fixed]
    sites = [s for s in sites if s.name not in fixed]
    frames = [plates_of(s)[name] for s in members]
    dims = {f.dim for f in frames}
    if len(dims) > 1:
        raise DatumPlateError(f"plate '{name}' has different dims {sorted(dims)} in model and guide: give it dim=")
    dim = dims.pop()
    unsized = any(f.size == -1 for f in frames)
    sizes = {int(f.size) for f in frames if f.size != -1}
    declared = max(-f.dim for s in sites for f in plates_of(s).values())
    num_plates = max([declared, deepest, *(len(batch_shape(s)) for s in sites)])
    if unsized:
        sizes |= {batch_shape(s)[dim] for s in members if len(batch_shape(s)) >= -dim} - {1} or {1}
    if len(sizes) > 1:
        raise DatumPlateError(different_sizes(name, sizes))
    size = sizes.pop()
    if size == 0:
        raise EmptyBatchError("the batch is empty: pass at least one datum")
    # The split draws of AutoDiagonalNormal do not have the name of a site that runs.
    fixed |= {f"{n}_unconstrained" for n in known if f"{n}_unconstrained" in auto_sites(guide)}
    names = frozenset(known) & fixed
    return Layout(num_plates, datum_plate=name, datum_dim=dim, batch_size=size, unsized=unsized, fixed=fixed, known=names)


def pinned_sites(guide: Callable, guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site]) -> set[str]:
    """The sites with one value: observed, replayed, or a point in the guide."""
    points = {n for n, s in guide_sites.items() if isinstance(innermost(s.fn), dist.Delta)} - auto_sites(guide)
    return points | {n for n, s in model_sites.items() if s.is_observed or s.has_own_value}


def plate_of_data(members: Collection[Site], pinned: Collection[str]) -> str:
    """The plate common to all sites. If there is none, sites with one value may be outside it."""
    all_sites = [s for s in members if not s.is_factor]
    in_some_plate = [s for s in all_sites if s.name not in pinned or plates_of(s)]
    for sites in (in_some_plate, [s for s in all_sites if s.name not in pinned]):
        if sites and not shared_plates(all_sites) and shared_plates(sites):
            return find_datum_plate(sites)
    return find_datum_plate(all_sites)


def outside_the_plate(site: Site, plate: str) -> StructureError:
    what = "factor" if site.is_factor else "observed site" if site.is_observed else "latent site"
    where = f"{what} '{site.name}' lies outside the datum plate '{plate}', so it belongs to no datum"
    return (DatumPlateError if site.is_observed else GlobalLatentError)(f"{where}. {ways_out(site.name)}")


def shared_plates(sites: Collection[Site]) -> list[str]:
    return [name for name in plates_of(next(iter(sites))) if all(name in plates_of(s) for s in sites)] if sites else []


def all_plates(sites: Collection[Site]) -> str:
    return quoted(sorted({f.name for s in sites for f in s.frames}))


def find_datum_plate(sites: Collection[Site]) -> str:
    common = shared_plates(sites)
    if len(common) == 1:
        return common[0]
    if common:
        raise DatumPlateError(
            f"the plates {quoted(common)} are all common to every site: say which one holds the data, datum_plate='...'"
        )
    sequential = {f.name for s in sites for f in s.frames if not f.vectorized}
    if sequential and all(any(f.name in sequential for f in s.frames) for s in sites):
        raise DatumPlateError(
            f"plate {quoted(sequential)} is sequential (`for i in pyro.plate(...)`): use `with pyro.plate(...)`"
        )
    where = "; ".join(dict.fromkeys(f"'{s.name}' in {quoted(plates_of(s))}" for s in sites))
    observed = [s for s in sites if s.is_observed]
    shared = {name for s in observed[:1] for name in plates_of(s) if all(name in plates_of(o) for o in observed)}
    outside = dict.fromkeys(s.name for s in sites if not s.is_observed and shared and not shared & set(plates_of(s)))
    if outside:
        halves = [n for n in outside if any(s.name == n and shared & set(plates_of(s)) for s in sites)]
        if halves:
            raise SiteMismatchError(
                f"site {quoted(halves)} lies in the plate {quoted(sorted(shared))} of the data in the model or in the guide "
                f"alone ({where}): put it into `with pyro.plate({quoted(sorted(shared))}, ...)` in both, under the same name"
            )
        auxiliary = {s.name for s in sites if s.infer.get("is_auxiliary")}  # draws that only the guide has, as in autoguides
        of_model = next((name for name in outside if name not in auxiliary), next(iter(outside)))
        raise GlobalLatentError(
            f"latent site {quoted(outside)} lies outside the plate {quoted(sorted(shared))} of the data ({where}): it is "
            f"shared by all of them. {ways_out(of_model)}"
        )
    raise DatumPlateError(
        f"no plate is common to all sites ({where}), so there is no weight per datum. Wrap model and guide in "
        "`with pyro.plate('data', len(x)):` (the same name in both), or pass datum_plate=None"
    )


def swallowed_plates(sites: Collection[Site], layout: Layout) -> str:
    """A hint where the event of a site seems to hold the data of the plate."""
    for site in sites:
        event, batch = site.fn.event_shape, site.fn.batch_shape
        in_plate = layout.datum_dim is not None and len(batch) >= -layout.datum_dim and batch[layout.datum_dim] == 1
        if site.fn.event_dim and event[0] == layout.batch_size and (in_plate or not batch or batch == event[:1]):
            return (
                f"The event of '{site.name}' has the shape {tuple(event)}, and its first size is that of the plate "
                f"'{layout.datum_plate}': .to_event({site.fn.event_dim}) seems to count the data as well, write "
                f".to_event({site.fn.event_dim - 1})"
            )
    return ""


def check_plates(site: Site, layout: Layout, sites: Collection[Site] = ()) -> None:
    """Check that every batch dimension is declared, and that no plate inside a datum is subsampled or of unknown size.

    :param sites: all sites, for a hint.
    """
    for frame in site.frames:
        full_size = frame.full_size if frame.full_size is not None else frame.size
        if frame.name != layout.datum_plate:
            if frame.size != full_size and not layout.takes_subsamples:
                raise SubsamplingError(
                    f"plate '{frame.name}' at site '{site.name}' is subsampled ({frame.size} of {full_size}) inside a "
                    "datum: its log p would be a random estimate inside the logarithm. Evaluate with the full plate"
                )
            if frame.size == -1 and layout.datum_plate is not None:
                raise StructureError(f"plate '{frame.name}' at site '{site.name}' has no size: give it one")
    if layout.datum_plate is None:
        return
    declared = {frame.dim for frame in plates_of(site).values()}
    shape = batch_shape(site)
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and dim not in declared:
            raise StructureError(
                f"site '{site.name}' has batch dimension {dim} of size {shape[dim]} that no plate declares: add "
                f".to_event(...) for dimensions of one datum, or a pyro.plate. {swallowed_plates(sites, layout)}".rstrip()
            )
