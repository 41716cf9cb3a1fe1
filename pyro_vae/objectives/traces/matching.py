"""Match guide and model sites into KL terms, share their masks, check their scales; raise for other sites."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine import Trace
from torch import Tensor

from ...densities import check_event_masks, find_masks, has_own_mask, innermost, mask_hides_score
from ...errors import (
    AuxiliarySiteError,
    MaskError,
    ObservedInGuideError,
    OptionError,
    SiteMismatchError,
    StructureError,
    quoted,
)
from ...kernel import is_imputed

Beta = float | Tensor
Betas = Beta | Mapping[str, Beta]
UNCONSTRAINED = "_unconstrained"  # the suffix of the site from which AutoNormal computes a latent


def is_jacobian(site: Mapping[str, Any]) -> bool:
    """Whether a factor of the guide counts as log q: the log-Jacobian of a reparameterised draw, not marked as a loss."""
    return isinstance(site["fn"], dist.Unit) and bool(site["fn"].has_rsample) and not site["infer"].get("is_loss")


def drop_imputed(model_trace: Trace, guide_sites: Mapping[str, Any], latents: list[str]) -> frozenset[str]:
    """Remove values drawn because of `obs_mask` from the loss. Raise for any other latent that the guide lacks."""
    imputed = []
    for name in latents[:]:
        site: Any = model_trace.nodes[name]
        if name in guide_sites or "_enumerate_dim" in site["infer"]:
            continue
        if not is_imputed(name, model_trace.nodes):
            enumerated = site["infer"].get("enumerate")
            remedy = "use BetaTraceEnum_ELBO" if enumerated else "add it to the guide under the same name"
            raise SiteMismatchError(
                f"the model's latent site '{name}' has no counterpart in the guide (guide sites: {quoted(guide_sites)}): "
                f"its prior would enter the loss without a log q. Remedy: {remedy}"
            )
        latents.remove(name)
        imputed.append(name)
        site["is_observed"] = True  # with a weight of zero
        site["value"] = detach_provenance(site["value"])  # TraceGraph would look for its draw in the guide
        set_mask(site, False)
    return frozenset(imputed)


def check_imputed(model_sites: Mapping[str, Any], imputed: frozenset[str]) -> None:
    """Raise for log-densities that depend on a draw of the model whose score-function term is missing in the gradient."""
    for name, site in model_sites.items():
        read = get_provenance(site.get("unscaled_log_prob")) & imputed - {name}
        if read and not site["infer"].get("_deterministic"):
            raise StructureError(
                f"site '{name}' depends on {quoted(sorted(read))}, which the model draws because of obs_mask and which "
                "is not reparameterised, so the gradient would lack a term: add it to the guide"
            )


def check_guide(guide_sites: Mapping[str, Any], latents: list[str]) -> None:
    for name, site in guide_sites.items():
        if site["is_observed"]:
            if not isinstance(site["fn"], dist.Unit) and not site["infer"].get("_deterministic"):
                raise ObservedInGuideError(
                    f"the guide observes '{name}', but log q has no observations. Hide it: poutine.block(guide, "
                    f"hide=['{name}'])"
                )
        elif name not in latents and not site["infer"].get("is_auxiliary"):
            raise AuxiliarySiteError(
                f"the guide's site '{name}' has no latent counterpart in the model (latents: {quoted(latents)}). Give "
                f"it the name of its latent, or mark it infer={{'is_auxiliary': True}} where that is meant"
            )
        elif not site["fn"].has_rsample and mask_hides_score(site["fn"]):
            raise MaskError(
                f"the guide's site '{name}' is not reparameterised and masked by fn.mask, so its score function, which the "
                "gradient needs, would be masked too: use poutine.mask around the site"
            )


def make_losses_direct(guide_sites: Mapping[str, Any]) -> None:
    """Mark factors of the guide that are not a log q as losses: Pyro would take them for scores of discrete draws."""
    for site in guide_sites.values():
        if isinstance(site["fn"], dist.Unit) and site["is_observed"] and "score_parts" in site:
            log_prob = site["score_parts"].log_prob
            site["score_parts"] = ScoreParts(log_prob, 0, log_prob)  # type: ignore[arg-type]
            site.pop("packed", None)


def check_scales(model_scales: Mapping[str, Beta], guide_scales: Mapping[str, Beta]) -> None:
    """Raise for different scales of log p(z) and log q(z): their difference would not be a KL."""
    for name, theirs in guide_scales.items():
        ours = model_scales.get(name, theirs)
        if not same_scales(ours, theirs):
            raise StructureError(
                f"site '{name}' has scale {ours} in the model and {theirs} in the guide: log p(z) and log q(z) would be "
                f"weighed differently. Use poutine.scale and subsampling alike on both sides, or beta={{'{name}': ...}}"
            )


def check_joint_scales(scales: Mapping[str, Beta], groups: Mapping[str, tuple[str, ...]]) -> None:
    """Raise for subsampled plates with a joint autoguide: its draw is outside all plates and lacks their scale."""
    for sites in (s for s in groups.values() if is_joint(s)):
        first = scales[sites[-1]]
        for name in sites[:-1]:
            if not same_scales(scales[name], first):
                raise StructureError(
                    f"site '{name}' has scale {scales[name]}, but the guide draws it jointly in '{sites[-1]}', whose "
                    f"log q has scale {first}: a joint draw does not have the scale of subsampled plates. Use "
                    "AutoNormal, with create_plates= where the model is given its subsample"
                )


def same_scales(one: Beta, other: Beta) -> bool:
    """Whether two scales are equal; plain numbers are compared without tensors, which saves time in every step."""
    if one is other or not (isinstance(one, Tensor) or isinstance(other, Tensor)) and one == other:
        return True
    as_double = partial(torch.as_tensor, dtype=torch.double)
    return torch.allclose(as_double(one), as_double(other), rtol=1e-6, atol=0.0)


def kl_groups(guide_sites: Mapping[str, Any], latents: list[str]) -> dict[str, tuple[str, ...]]:
    """The sites of each KL: a latent with the draw that gives it, or all latents of a joint draw of an autoguide."""
    shared = [n for n in latents if n in guide_sites]
    auxiliary = [n for n, s in guide_sites.items() if n not in shared and (not s["is_observed"] or is_jacobian(s))]
    groups = {n: (n, *(a for a in auxiliary if a == n + UNCONSTRAINED)) for n in shared}
    left = [a for a in auxiliary if a.removesuffix(UNCONSTRAINED) not in groups]
    alone = [n for n, sites in groups.items() if len(sites) == 1]
    points = [n for n in alone if isinstance(innermost(guide_sites[n]["fn"]), dist.Delta)]
    joint = [a for a in left if guide_sites[a]["infer"].get("is_auxiliary") and not guide_sites[a]["is_observed"]]
    if joint and points:
        groups = {n: sites for n, sites in groups.items() if n not in points}
        groups["+".join(points)] = (*points, *joint)
        left = [a for a in left if a not in joint]
    return {**groups, **{a: (a,) for a in left}}


def check_names(
    betas: Mapping[str, Beta],
    groups: Mapping[str, tuple[str, ...]],
    guide_sites: Collection[str],
    latents: Collection[str],
) -> None:
    unknown = [n for n in betas if n not in latents and n not in groups]
    if unknown:
        raise OptionError(f"beta names {quoted(unknown)}, but the latent sites are {quoted(latents)}")
    summed_out = [n for n in betas if n not in guide_sites]
    if summed_out:
        raise OptionError(
            f"beta names {quoted(summed_out)}, which the model sums out, so it has no KL: remove it from the dict, or "
            "enumerate it in the guide"
        )
    for name, sites in groups.items():
        if is_joint(sites):
            raise AuxiliarySiteError(
                f"the guide draws '{name}' jointly ({quoted(s for s in sites if s not in latents)}), so the KL cannot "
                "be weighted by site: pass one beta for all, or use AutoNormal"
            )


def is_joint(sites: tuple[str, ...]) -> bool:
    """Whether a KL belongs to a joint draw of an autoguide, and so has no part per latent."""
    return len(sites) > 1 and sites[1] != sites[0] + UNCONSTRAINED


def share_masks(model_trace: Trace, guide_trace: Trace, groups: Mapping[str, tuple[str, ...]]) -> None:
    """Mask a latent on both sides where it is masked on one: otherwise only one of its densities would enter the loss."""
    for name, names in groups.items():
        sites: list[Any] = [trace.nodes[n] for trace in (model_trace, guide_trace) for n in names if n in trace.nodes]
        masks = [site["mask"] for site in sites]
        own = any(has_own_mask(site["fn"]) for site in sites)
        if own:
            found = [find_masks(site["fn"], site["mask"], site["value"]) for site in sites]
            check_event_masks(name, found[0][1], found[-1][1])
            masks = [mask for mask, _ in found]
        if not own and all(mask is masks[0] for mask in masks):
            continue
        if is_joint(names):
            if same_masks(masks):
                continue
            raise MaskError(
                f"the guide draws '{name}' jointly, so a mask on a part of it cannot be applied to its log q: mask "
                "model and guide alike, or use AutoNormal"
            )
        mask: Tensor | bool | None = None
        for other in masks:
            mask = other if mask is None else mask if other is None else mask & other
        for site in sites:
            set_mask(site, mask)


def same_masks(masks: list[Tensor | bool | None]) -> bool:
    tensors = [torch.as_tensor(True if mask is None else mask) for mask in masks]
    return all(bool((mask == tensors[0]).all()) for mask in tensors)


def set_mask(site: Any, mask: Tensor | bool | None) -> None:
    """Replace the mask of a site and delete its log-densities, so that the trace computes them again."""
    site["mask"] = mask
    for key in ("log_prob", "log_prob_sum", "unscaled_log_prob", "score_parts", "packed"):
        site.pop(key, None)
