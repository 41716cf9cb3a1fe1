"""What a model and guide look like: their sites, the datum plate, and whether weights per datum are known to be right."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import pyro.distributions as dist
import torch
from pyro.infer import autoguide
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine import unwrap
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from ..errors import (
    AuxiliarySiteError,
    DatumPlateError,
    EmptyBatchError,
    EnumerationError,
    GlobalLatentError,
    LazyGuideError,
    ObservedInGuideError,
    OptionError,
    SiteMismatchError,
    StructureError,
    SubsamplingError,
    quoted,
)
from .recorder import Layout, Site

INFER: Final = "infer"  # the default of `datum_plate=`: find the plate that all sites share
WAYS_OUT = (
    "Move the site into the plate, name the plate with datum_plate='...', or pass datum_plate=None to weigh the whole "
    "call as one datum"
)


@dataclass(frozen=True)
class Structure:
    """What the kernel found out about one (model, guide, shapes); the same for all calls of those shapes."""

    layout: Layout
    latents: tuple[str, ...]
    prior_sites: tuple[str, ...]
    guide_enumerated: tuple[str, ...]
    model_enumerated: tuple[str, ...]
    guide_sites: tuple[str, ...]
    model_sites: tuple[str, ...]
    stripped_scales: Mapping[str, float | Tensor]
    subsampled: bool
    bytes_per_particle: int
    latent_supports: frozenset[str] = frozenset()  # observed sites whose support depends on latents


def refuse_guide(guide: Callable, datum_plate: str | None) -> None:
    """Refuse, by name, the autoguides that have no density per datum, and those that were never run."""
    parts = auto_parts(guide) or [unwrap(guide)]
    for part in parts:
        name = type(part).__name__
        if isinstance(part, (autoguide.AutoDelta, autoguide.AutoLaplaceApproximation)):
            raise StructureError(f"{name} is a point mass and has no density: use AutoNormal, or an amortized guide")
        if isinstance(part, autoguide.AutoStructured):
            raise StructureError(f"{name} is not checked by the kernel: use AutoNormal, or an amortized guide")
        alone = len(parts) == 1
        joint = isinstance(part, AutoContinuous) and not (isinstance(part, autoguide.AutoDiagonalNormal) and alone)
        if joint and datum_plate is not None:
            raise StructureError(
                f"{name} is one joint density over all data and cannot be split per datum: use AutoNormal, or "
                "datum_plate=None to weigh the whole call as one datum"
            )
        lazy_auto = isinstance(part, autoguide.AutoGuide) and not isinstance(part, autoguide.AutoCallable)
        lazy_messenger = isinstance(part, GuideMessenger) and isinstance(part, torch.nn.Module)
        if (lazy_auto and getattr(part, "prototype_trace", True) is None) or (
            lazy_messenger and not any(True for _ in part.parameters())
        ):
            raise LazyGuideError(f"{name} was never run and has no parameters yet: train it, or call guide(*args) once")


def auto_parts(guide: Callable) -> list[Any]:
    """The autoguides that a guide consists of, not counting functions inside an AutoGuideList."""
    core = unwrap(guide)
    if isinstance(core, autoguide.AutoGuideList):
        return [part for item in core for part in auto_parts(item)]
    return [core] if isinstance(core, autoguide.AutoGuide) else []


def auto_sites(guide: Callable) -> set[str]:
    """The names of the draws of autoguides and of the latents that are point masses at their images."""
    names: set[str] = set()
    for part in auto_parts(guide):
        if isinstance(part, (autoguide.AutoNormal, AutoContinuous)) and part.prototype_trace is not None:
            latents = [name for name, _ in part.prototype_trace.iter_stochastic_nodes()]
            names.update(latents, (f"{name}_unconstrained" for name in latents), [f"_{part._pyro_name}_latent"])
    return names


def innermost(fn: Any) -> Any:
    """The distribution under masks, events and expansions."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution, ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def plates_of(site: Site) -> dict[str, Any]:
    return {frame.name: frame for frame in site.frames if frame.vectorized}


def batch_shape(site: Site) -> torch.Size:
    """The batch shape of a site, as its value may widen it (an observed tensor under scalar parameters)."""
    value_batch = site.value.shape[: site.value.ndim - site.fn.event_dim]
    return torch.Size(torch.broadcast_shapes(site.fn.batch_shape, value_batch))


def kept_guide_sites(guide: Callable, sites: Mapping[str, Site], model_sites: Collection[str]) -> dict[str, Site]:
    """The sites that make up log q. A GuideMessenger also runs the model's observations: not part of it."""
    kept = {}
    for name, site in sites.items():
        if not site.is_observed:
            kept[name] = site
        elif isinstance(unwrap(guide), GuideMessenger) and name in model_sites:
            continue
        elif site.is_factor and site.fn.has_rsample:
            kept[name] = site
        elif site.is_factor:
            raise AuxiliarySiteError(
                f"factor '{name}' in the guide: only has_rsample=True (a log-Jacobian) counts as log q. Remove it from "
                "the guide that is evaluated"
            )
        else:
            raise ObservedInGuideError(f"the guide observes '{name}': log q has no observations. Remove obs= from it")
    return kept


def analyse(
    guide: Callable,
    guide_sites: Mapping[str, Site],
    model_sites: Mapping[str, Site],
    *,
    layout: Layout,
    prior_sites: Collection[str],
) -> Structure:
    """Match the sites of one plain run of guide and model and refuse what is not checked."""
    enumerated = {n: s for n, s in guide_sites.items() if s.is_enumerated}
    model_enumerated = {n: s for n, s in model_sites.items() if s.is_enumerated and n not in guide_sites}
    prior = find_prior_sites(model_sites, guide_sites, prior_sites)
    latents = [n for n, s in model_sites.items() if not s.is_observed and n in guide_sites and n not in enumerated]
    match_sites(guide, guide_sites, model_sites, prior, model_enumerated)

    all_sites = [*guide_sites.values(), *model_sites.values()]
    layout = replace(layout, enumerated=(*enumerated, *model_enumerated))
    for site in all_sites:
        check_plates(site, layout)
    for site in [*enumerated.values(), *model_enumerated.values()]:
        check_enumerated(site, layout)
    drawn = [s for s in all_sites if not s.is_observed]
    layout = replace(
        layout,
        plain_shapes={s.name: s.fn.batch_shape for s in drawn},
        event_dims={s.name: s.fn.event_dim for s in drawn},
    )
    return Structure(
        layout=layout,
        latents=tuple(latents),
        prior_sites=tuple(prior),
        guide_enumerated=tuple(enumerated),
        model_enumerated=tuple(model_enumerated),
        guide_sites=tuple(guide_sites),
        model_sites=tuple(model_sites),
        stripped_scales=find_scales(guide_sites, model_sites),
        bytes_per_particle=max(s.value.element_size() * batch_shape(s).numel() * s.fn.event_shape.numel() for s in all_sites),
        subsampled=any(f.name == layout.datum_plate and f.size != f.full_size for s in all_sites for f in s.frames),
    )


def find_scales(guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site]) -> dict[str, float | Tensor]:
    """The scales that differ from one, by site; one scale that both sides share is listed once."""
    scales: dict[str, float | Tensor] = {}
    for sites, suffix in ((model_sites, ""), (guide_sites, " (guide)")):
        for name, site in sites.items():
            scale = torch.as_tensor(site.scale)
            if bool((scale != 1).any()):
                listed = float(scale) if scale.numel() == 1 else scale
                both = name in scales and bool(torch.as_tensor(scales[name] == listed).all())
                scales[name if both or name not in scales else name + suffix] = listed
    return scales


def find_prior_sites(
    model_sites: Mapping[str, Site], guide_sites: Mapping[str, Site], named: Collection[str]
) -> list[str]:
    """Latent sites drawn from the prior: those the user named, and the missing half that `obs_mask` makes."""
    unknown = [n for n in named if n not in model_sites or model_sites[n].is_observed or n in guide_sites]
    if unknown:
        raise OptionError(f"prior_sites: {quoted(unknown)} must be latent sites of the model that the guide lacks")
    suffix = "_unobserved"
    imputed = [
        n
        for n, s in model_sites.items()
        if n.endswith(suffix) and not s.is_observed and n not in guide_sites
        if n.removesuffix(suffix) + "_observed" in model_sites
    ]
    return [n for n in model_sites if n in named or n in imputed]


def match_sites(
    guide: Callable,
    guide_sites: Mapping[str, Site],
    model_sites: Mapping[str, Site],
    prior: Collection[str],
    model_enumerated: Collection[str],
) -> None:
    for name, site in model_sites.items():
        if site.is_observed or name in guide_sites or name in prior or name in model_enumerated:
            continue
        near = difflib.get_close_matches(name, [n for n in guide_sites if n not in model_sites], n=1, cutoff=0.5)
        hint = f" Did you mean the guide's '{near[0]}'?" if near else ""
        raise SiteMismatchError(
            f"the model's latent site '{name}' has no counterpart in the guide (guide sites: {quoted(guide_sites)})."
            f"{hint} Add it to the guide under the same name, or pass prior_sites=['{name}'] to draw it from the prior"
        )
    for name, site in guide_sites.items():
        partner = model_sites.get(name)
        if partner is None or partner.is_observed:
            if site.is_factor or name in auto_sites(guide):
                continue
            raise AuxiliarySiteError(
                f"the guide's site '{name}' has no latent counterpart in the model: it would raise the evidence "
                "without limit. Add it to the model with its own prior, or marginalise it in the guide"
            )
        if isinstance(innermost(site.fn), dist.Delta) and name not in auto_sites(guide) and not partner.fn.support.is_discrete:
            raise AuxiliarySiteError(
                f"the guide's site '{name}' is a Delta, a point mass without a density over a continuous latent: use a "
                "distribution with a density (a TransformedDistribution for a transformed draw)"
            )
        if site.fn.event_dim != partner.fn.event_dim or squeezed(site) != squeezed(partner):
            raise SiteMismatchError(
                f"site '{name}' differs in shape: guide batch {tuple(site.fn.batch_shape)} event "
                f"{tuple(site.fn.event_shape)}, model batch {tuple(partner.fn.batch_shape)} event "
                f"{tuple(partner.fn.event_shape)}. Use the same plates and to_event on both sides"
            )
        if site.is_enumerated and site.fn.has_enumerate_support:
            ours, theirs = (s.fn.enumerate_support(expand=False).shape[0] for s in (site, partner))
            if ours != theirs:
                raise EnumerationError(f"site '{name}' has {ours} values in the guide and {theirs} in the model")


def squeezed(site: Site) -> torch.Size:
    shape = site.fn.shape()
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def find_layout(
    guide: Callable, guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site], datum_plate: str | None
) -> Layout:
    sites = [*guide_sites.values(), *model_sites.values()]
    if datum_plate is None:
        return Layout(num_plates=max((len(batch_shape(s)) for s in sites), default=0))
    # The one joint draw of AutoDiagonalNormal lies outside all plates; it is split per site and datum instead.
    auto_draws = {name for name in auto_sites(guide) if name.startswith("_")}
    members = [s for s in sites if s.name not in auto_draws]
    name = datum_plate if datum_plate != INFER else find_datum_plate([s for s in members if not s.is_factor])
    outside = [s for s in members if name not in plates_of(s)]
    if len(outside) == len(members):
        raise DatumPlateError(f"no site lies in the plate '{name}': plates of the model are {all_plates(sites)}")
    for site in outside:
        error = DatumPlateError if site.is_observed else GlobalLatentError
        what = "factor" if site.is_factor else "observed site" if site.is_observed else "latent site"
        raise error(f"{what} '{site.name}' lies outside the datum plate '{name}', so it belongs to no datum. {WAYS_OUT}")
    frames = [plates_of(s)[name] for s in members]
    dims = {f.dim for f in frames}
    if len(dims) > 1:
        raise DatumPlateError(f"plate '{name}' has different dims {sorted(dims)} in model and guide: give it dim=")
    dim = dims.pop()
    unsized = any(f.size == -1 for f in frames)
    sizes = {int(f.size) for f in frames if f.size != -1}
    if len(sizes) > 1:
        raise DatumPlateError(f"plate '{name}' has sizes {sorted(sizes)} in model and guide: they must agree")
    declared = max(-f.dim for s in sites for f in plates_of(s).values())
    num_plates = max([declared, *(len(batch_shape(s)) for s in sites)])
    if unsized:
        sizes |= {batch_shape(s)[dim] for s in members if len(batch_shape(s)) >= -dim} - {1} or {1}
    if len(sizes) > 1:
        raise DatumPlateError(f"plate '{name}' has sizes {sorted(sizes)} in model and guide: they must agree")
    size = sizes.pop()
    if size == 0:
        raise EmptyBatchError("the batch is empty: pass at least one datum")
    return Layout(num_plates=num_plates, datum_plate=name, datum_dim=dim, batch_size=size, unsized=unsized)


def all_plates(sites: Collection[Site]) -> str:
    return quoted(sorted({f.name for s in sites for f in s.frames}))


def find_datum_plate(sites: Collection[Site]) -> str:
    common = [name for name in plates_of(next(iter(sites))) if all(name in plates_of(s) for s in sites)] if sites else []
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
    where = "; ".join(f"'{s.name}' in {quoted(plates_of(s))}" for s in sites)
    observed = [s for s in sites if s.is_observed]
    shared = {name for s in observed[:1] for name in plates_of(s) if all(name in plates_of(o) for o in observed)}
    outside = [s.name for s in sites if not s.is_observed and shared and not shared & set(plates_of(s))]
    if outside:
        raise GlobalLatentError(
            f"latent site {quoted(outside)} lies outside the plate {quoted(sorted(shared))} of the data ({where}): it is "
            f"shared by all of them. {WAYS_OUT}"
        )
    raise DatumPlateError(
        f"no plate is common to all sites ({where}), so there is no weight per datum. Wrap model and guide in "
        "`with pyro.plate('data', len(x)):` (the same name in both), or pass datum_plate=None"
    )


def check_plates(site: Site, layout: Layout) -> None:
    """Every batch dimension must be declared; nothing inside a datum may be subsampled or of unknown size."""
    for frame in site.frames:
        full_size = frame.full_size if frame.full_size is not None else frame.size
        if frame.name != layout.datum_plate:
            if frame.size != full_size:
                raise SubsamplingError(
                    f"plate '{frame.name}' at site '{site.name}' is subsampled ({frame.size} of {full_size}) inside a "
                    "datum: its log p would be a random estimate inside the logarithm. Evaluate with the full plate"
                )
            if frame.size == -1:
                raise StructureError(f"plate '{frame.name}' at site '{site.name}' has no size: give it one")
    if layout.datum_plate is None:
        return
    declared = {frame.dim for frame in plates_of(site).values()}
    shape = batch_shape(site)
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and dim not in declared:
            raise StructureError(
                f"site '{site.name}' has batch dimension {dim} of size {shape[dim]} that no plate declares: add "
                ".to_event(...) for dimensions of one datum, or a pyro.plate"
            )


def check_enumerated(site: Site, layout: Layout) -> None:
    try:
        site.fn.enumerate_support(expand=False)
    except NotImplementedError:
        raise EnumerationError(
            f"site '{site.name}' is marked for enumeration but its values cannot be listed: remove infer={{'enumerate': ...}}"
        ) from None
    shape = site.fn.batch_shape
    inner = [shape[dim] for dim in range(-len(shape), 0) if dim != layout.datum_dim and shape[dim] != 1]
    if inner:
        raise EnumerationError(
            f"enumerated site '{site.name}' lies in a plate inside the datum (sizes {inner}): summing it out needs "
            "variable elimination. Write the mixture as a distribution (MixtureSameFamily) instead"
        )
