"""Match the sites of model and guide, and raise for structures without a defined weight per datum."""

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import pyro.distributions as dist
import torch
from pyro.poutine import unwrap
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from ...densities import has_edges, innermost, inside_support, is_angle, is_discrete, support_of
from ...errors import (
    AuxiliarySiteError,
    EnumerationError,
    ObservedInGuideError,
    OptionError,
    SiteMismatchError,
    StructureError,
    quoted,
)
from ..recorder import Layout, Site
from .autoguides import auto_sites
from .enumeration import check_enumeration, enumeration_axes, find_indicators
from .plates import batch_shape, check_plates

IMPUTED = "_unobserved"  # the suffix of the missing half of an observation with obs_mask


@dataclass(frozen=True)
class Structure:
    """The structure of a model and guide at given shapes of arguments."""

    layout: Layout
    given: tuple[str, ...]  # sites outside the data that have one value
    latents: tuple[str, ...]
    prior_sites: tuple[str, ...]
    guide_enumerated: tuple[str, ...]
    model_enumerated: tuple[str, ...]
    guide_sites: tuple[str, ...]
    model_sites: tuple[str, ...]
    stripped_scales: Mapping[str, float | Tensor]
    subsampled: bool
    bytes_per_particle: int
    depend_on_enumerated: tuple[str, ...] = ()  # latents that the guide draws given sites that it enumerates
    unknown_supports: tuple[str, ...] = ()  # latents whose distribution has no support
    observed_with_moving_support: frozenset[str] = frozenset()  # observed sites whose support depends on latents
    unpacked: tuple[str, ...] = ()  # auxiliary draws of the guide, and the latents that Deltas set from them
    left_out: tuple[str, ...] = ()  # observations and factors of the guide that are not part of log q
    read_prior_sites: tuple[str, ...] = ()  # those of `prior_sites` on which other sites depend
    indicators: tuple[str, ...] = ()  # discrete draws that only the guide has, summed out of log q
    looped: Mapping[str, str] = field(default_factory=dict)  # why "guide" or "model" runs one particle at a time
    axes_in_scope: Mapping[str, Mapping[int, str]] = field(default_factory=dict)  # of the model's sites, see `axes_at`

    def axes_at(self, name: str) -> Mapping[int, str]:
        """The enumerated site of each axis at a site: a chain under `pyro.markov` reuses its axes."""
        everywhere = {self.layout.axes[n]: n for n in self.guide_enumerated}
        return self.axes_in_scope.get(name, everywhere)


def kept_guide_sites(
    guide: Callable, sites: Mapping[str, Site], model_sites: Collection[str], in_training: bool
) -> dict[str, Site]:
    """The sites of log q.

    They do not include observations of the model that a GuideMessenger also runs, or losses of the guide: observations
    marked ``infer={"is_auxiliary": True}``, and factors, which Pyro marks like that in any case, marked ``infer={"is_loss":
    True}``. In training such losses would be lost, and raise.
    """
    kept = {}
    for name, site in sites.items():
        if not site.is_observed:
            kept[name] = site
        elif isinstance(unwrap(guide), GuideMessenger) and name in model_sites:
            continue
        elif site.is_factor and site.fn.has_rsample and not site.infer.get("is_loss"):
            kept[name] = site
        elif site.is_factor and site.infer.get("is_loss") and not in_training:
            continue
        elif site.is_factor:
            raise AuxiliarySiteError(
                f"factor '{name}' in the guide: only has_rsample=True (a log-Jacobian) counts as log q. If it is a loss, "
                f"hide it: poutine.block(guide, hide=['{name}']); or mark it infer={{'is_loss': True}}, and an evaluation "
                "leaves it out"
            )
        elif site.infer.get("is_auxiliary") and not in_training:
            continue
        else:
            raise ObservedInGuideError(
                f"the guide observes '{name}', but log q has no observations. Were model and guide passed in this order? If "
                f"so, hide it: poutine.block(guide, hide=['{name}']); or mark it infer={{'is_auxiliary': True}}, and an "
                "evaluation leaves it out"
            )
    return kept


def left_out_sites(guide: Callable, sites: Collection[str], kept: Collection[str]) -> tuple[str, ...]:
    """The losses of the guide, which are not part of log q."""
    return () if isinstance(unwrap(guide), GuideMessenger) else tuple(name for name in sites if name not in kept)


def analyse(
    guide: Callable,
    guide_sites: Mapping[str, Site],
    model_sites: Mapping[str, Site],
    *,
    layout: Layout,
    prior_sites: Collection[str],
) -> Structure:
    """Match the sites of one plain run of guide and model. Raise for sites without a defined weight."""
    given = tuple(n for n in model_sites if n in layout.fixed)
    known = [s for side in (guide_sites, model_sites) for s in side.values() if s.name in layout.known and not s.is_observed]
    guide_sites, model_sites = (
        {n: s for n, s in side.items() if n not in layout.fixed} for side in (guide_sites, model_sites)
    )
    for name, site in (*guide_sites.items(), *model_sites.items()):
        if site.has_own_value:
            raise StructureError(
                f"the latent site '{name}' of the data already has a value (poutine.replay): log p(x) is about latents that "
                "the guide draws. Pass model and guide without the handler"
            )
    indicators = find_indicators(guide_sites, model_sites, layout)
    enumerated = {n: s for n, s in guide_sites.items() if s.is_enumerated and n not in indicators}
    model_enumerated = {n: s for n, s in model_sites.items() if s.is_enumerated and n not in guide_sites}
    prior = find_prior_sites(model_sites, guide_sites, prior_sites)
    latents = [n for n, s in model_sites.items() if not s.is_observed and n in guide_sites and n not in enumerated]
    unpacked = unpacked_sites(guide_sites, model_sites, auto_sites(guide))
    match_sites(guide, guide_sites, model_sites, prior, model_enumerated, (*unpacked, *indicators))

    all_sites = [*guide_sites.values(), *model_sites.values()]
    axes, axes_in_scope = enumeration_axes(enumerated, model_enumerated, model_sites)
    layout = replace(layout, enumerated=(*enumerated, *model_enumerated), axes=axes)
    for site in all_sites:
        check_plates(site, layout, all_sites)
        check_straight_through(site)
    check_enumeration(enumerated, model_enumerated, layout)
    drawn = [s for s in all_sites if not s.is_observed]
    layout = replace(
        layout,
        expanded={
            n: len(s.fn.enumerate_support(expand=False))
            for n, s in (enumerated | model_enumerated).items()
            if s.infer.get("expand")
        },
        plain_shapes={s.name: s.fn.batch_shape for s in (*known, *drawn)},
        event_dims={s.name: s.fn.event_dim for s in (*known, *drawn)},
    )
    return Structure(
        layout=layout,
        given=given,
        unpacked=unpacked,
        indicators=indicators,
        latents=tuple(latents),
        prior_sites=tuple(prior),
        guide_enumerated=tuple(enumerated),
        model_enumerated=tuple(model_enumerated),
        axes_in_scope=axes_in_scope,
        guide_sites=tuple(guide_sites),
        model_sites=tuple(model_sites),
        unknown_supports=tuple(n for n in latents if support_of(innermost(model_sites[n].fn)) is None),
        stripped_scales=find_scales(guide_sites, model_sites),
        bytes_per_particle=max(
            s.value.element_size() * math.prod(batch_shape(s)) * math.prod(s.fn.event_shape) for s in all_sites
        ),
        subsampled=any(f.name == layout.datum_plate and f.size != f.full_size for s in all_sites for f in s.frames),
    )


def find_scales(guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site]) -> dict[str, float | Tensor]:
    """The scales that differ from one, by site; a scale common to both sides is listed once."""
    scales: dict[str, float | Tensor] = {}
    for sites, suffix in ((model_sites, ""), (guide_sites, " (guide)")):
        for name, site in sites.items():
            scale = torch.as_tensor(site.scale)
            if bool((scale != 1).any()):
                listed = float(scale) if scale.numel() == 1 else scale
                both = name in scales and bool(torch.as_tensor(scales[name] == listed).all())
                scales[name if both or name not in scales else name + suffix] = listed
    return scales


def find_prior_sites(model_sites: Mapping[str, Site], guide_sites: Mapping[str, Site], named: Collection[str]) -> list[str]:
    """Latent sites drawn from the prior: those the user named, and the missing half that `obs_mask` makes."""
    unknown = [n for n in named if n not in model_sites or model_sites[n].is_observed or n in guide_sites]
    if unknown:
        raise OptionError(f"prior_sites: {quoted(unknown)} must be latent sites of the model that the guide lacks")
    lacking = [n for n, s in model_sites.items() if not s.is_observed and n not in guide_sites]
    return [n for n in lacking if n in named or is_imputed(n, model_sites)]


def is_imputed(name: str, model_sites: Collection[str]) -> bool:
    """Whether a latent is the missing half of an observation with `obs_mask`, by its name."""
    return name.endswith(IMPUTED) and name.removesuffix(IMPUTED) + "_observed" in model_sites


def unpacked_sites(
    guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site], known: Collection[str]
) -> tuple[str, ...]:
    """The auxiliary draws and the points that may unpack them; empty without both. `known` are those of autoguides."""
    own = {n: s for n, s in guide_sites.items() if n not in known and not s.is_observed}
    auxiliary = [n for n, s in own.items() if n not in model_sites and s.infer.get("is_auxiliary") and not is_discrete(s.fn)]
    points = [n for n, s in own.items() if n in model_sites and isinstance(innermost(s.fn), dist.Delta)]
    return (*auxiliary, *points) if auxiliary and points else ()


def match_sites(
    guide: Callable,
    guide_sites: Mapping[str, Site],
    model_sites: Mapping[str, Site],
    prior: Collection[str],
    model_enumerated: Collection[str],
    unpacked: Collection[str],
) -> None:
    known = {*auto_sites(guide), *unpacked}  # and indicators
    blind = not any(site.is_observed for site in model_sites.values())  # factors are observed, too
    for name, site in model_sites.items():
        if site.is_observed or name in guide_sites or name in prior or name in model_enumerated:
            continue
        near = difflib.get_close_matches(name, [n for n in guide_sites if n not in model_sites], n=1, cutoff=0.5)
        hint = f" Did you mean the guide's '{near[0]}'?" if near else ""
        add = "The model observes nothing: if this site is the data, pass obs= to it. Otherwise add" if blind else "Add"
        raise SiteMismatchError(
            f"the model's latent site '{name}' has no counterpart in the guide (guide sites: {quoted(guide_sites)})."
            f"{hint} {add} it to the guide under the same name, or pass prior_sites=['{name}'] to draw it from the prior"
        )
    for name, site in model_sites.items():
        if not site.is_observed and isinstance(innermost(site.fn), dist.Delta):
            raise StructureError(
                f"the model's latent site '{name}' is a Delta, a point mass without a density: use pyro.deterministic for a "
                "computed value"
            )
    for name, site in guide_sites.items():
        partner = model_sites.get(name)
        if partner is None or partner.is_observed:
            if site.is_factor or name in known:
                continue
            raise AuxiliarySiteError(
                f"the guide's site '{name}' has no latent counterpart in the model: it would raise the evidence "
                "without limit. Add it to the model with its own prior, or marginalise it in the guide. If Deltas set "
                "latents from it, mark it infer={'is_auxiliary': True}"
            )
        if isinstance(innermost(site.fn), dist.Delta) and name not in known and not is_discrete(partner.fn):
            raise AuxiliarySiteError(
                f"the guide's site '{name}' is a Delta, a point mass without a density over a continuous latent: use a "
                "distribution with a density (AutoNormal in the place of AutoDelta, a TransformedDistribution for a "
                "transformed draw). Only a latent outside the plate of the data may be a point, which is then given"
            )
        check_reach(name, site, partner)
        check_circle(name, site, partner)
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


def check_reach(name: str, guide: Site, model: Site) -> None:
    """Check absolute continuity: otherwise log p(x) is underestimated, and no diagnostic shows it."""
    if isinstance(innermost(guide.fn), dist.Delta) or not has_edges(guide.fn) or guide.fn.event_dim:
        return
    if not bool(inside_support(guide.fn, model.fn.sample(torch.Size([100]))).all()):
        raise SiteMismatchError(
            f"the guide's site '{name}' cannot draw all values that its prior can ({type(innermost(guide.fn)).__name__} "
            f"against {type(innermost(model.fn)).__name__}), so log p(x) would come out too low: use a family with the "
            "support of the prior"
        )


def check_circle(name: str, guide: Site, model: Site) -> None:
    """Raise for a density on the line against one on the circle: they have different base measures."""
    on_line = support_of(innermost(guide.fn)) is torch.distributions.constraints.real
    drawn_before = isinstance(innermost(guide.fn), dist.Delta)  # an autoguide, which draws on the line
    if is_angle(model.fn) and not is_angle(guide.fn) and (on_line or drawn_before):
        raise SiteMismatchError(
            f"the guide's site '{name}' is a density on the line ({type(innermost(guide.fn)).__name__}), and its prior one "
            f"on the circle ({type(innermost(model.fn)).__name__}), where numbers that are 2 pi apart are the same: draw it "
            "from a VonMises in the guide"
        )


def check_straight_through(site: Site) -> None:
    family = type(innermost(site.fn)).__name__
    if not site.is_observed and family.endswith("StraightThrough"):
        raise StructureError(
            f"the site '{site.name}' is {family}: its draws are rounded, and their density is that of the numbers before "
            "rounding, which are gone when the draws are scored again. Evaluate with "
            f"{family.removesuffix('StraightThrough')} on both sides"
        )


def squeezed(site: Site) -> torch.Size:
    shape = site.fn.shape()
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape
