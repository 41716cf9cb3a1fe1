"""Checks of observed values: finite, and inside the support of their likelihood."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...densities import bounds_of, innermost, is_discrete, support_of
from ...errors import ArgumentError, InvalidDataError, SupportError, listed
from ..recorder import Layout
from ..records import SiteRecord, padded


def check_observed(site: SiteRecord, layout: Layout, check_support: bool) -> None:
    """Raise on NaN, infinite or impossible observations, naming the data; masked values do not count.

    NaN is allowed where the density is defined for it, as with `NanMaskedNormal`: where the log_prob is finite.
    """
    if site.value.layout != torch.strided:
        layout_of = str(site.value.layout).removeprefix("torch.")
        raise ArgumentError(f"the observed site '{site.name}' has {layout_of} values: pass obs=x.to_dense()")
    legal = legal_nan(site, layout)
    if site.value.is_floating_point():
        bad = bad_data(~site.value.isfinite() & ~legal, site, layout, site.event_dim)
        if bool(bad.any()):
            raise InvalidDataError(
                f"the observed site '{site.name}' has NaN or infinite values in data {listed(bad)}: remove those rows, or "
                "mask what is missing: fn.mask(~x.isnan()), poutine.mask or obs_mask"
            )
    if check_support and site.fns:
        inside, event_dim = inside_for_any(site.value, site.fns, layout)
        base_event_dim = site.event_dim - event_dim
        bad = bad_data(~(inside | any_of(legal, base_event_dim)), site, layout, event_dim)
        if bool(bad.any()):
            fn = site.fns[0]
            raise SupportError(
                f"the observed site '{site.name}' has values outside the support of its likelihood ({fn.support}) in "
                f"data {listed(bad)} (smallest {float(site.value.min()):g}, largest {float(site.value.max()):g}), so "
                "there is no log p(x). Transform the data to the support (for instance, binarise grey pixels), choose "
                "another likelihood, or pass check_support=False and take the result for a score, not for evidence"
            )


def check_not_shared(site: SiteRecord, layout: Layout) -> None:
    """Raise for one observed event for all data: nearly always a single datum, x[0], passed in place of a batch."""
    batch = site.value.shape[: site.value.ndim - site.event_dim]
    if layout.datum_dim is None or not site.event_dim or layout.batch_size == 1:
        return
    if len(batch) < -layout.datum_dim or batch[layout.datum_dim] == 1:
        first = site.event_dim > 1 and site.value.shape[0] == layout.batch_size
        swallowed = f". If its first axis holds the data, .to_event({site.event_dim}) counts them too: write one less"
        raise ArgumentError(
            f"the plate '{layout.datum_plate}' holds {layout.batch_size} data, but the observed site '{site.name}' has one "
            f"value of shape {tuple(site.value.shape)} for all of them. A single datum needs its own axis: pass x[None] or "
            f"x[:1]. If all data do share this observation, expand it to one row per datum{swallowed if first else ''}"
        )


def inside_for_any(value: Tensor, fns: Sequence[Any], layout: Layout) -> tuple[Tensor, int]:
    """Whether at least one particle gives the value a density, (*plates, *event), and the number of event dims.

    The check is made inside `to_event`, where single elements of an event may be masked.
    """
    inside = torch.zeros((), dtype=torch.bool, device=value.device)
    for fn in fns:
        base = innermost(fn)
        event_dim = fn.event_dim - base.event_dim
        try:
            ok = base.support.check(value)
        except NotImplementedError:  # a distribution without a support
            return torch.ones_like(inside), event_dim
        extra = max(ok.ndim - event_dim - layout.num_plates, 0)
        inside = inside | (ok.flatten(0, extra - 1).any(0) if extra else ok)
    return inside, event_dim


def legal_nan(site: SiteRecord, layout: Layout) -> Tensor:
    """True where a value is NaN and the density of a continuous distribution is finite nevertheless, (*plates, *event)."""
    missing = site.value.isnan()
    with torch._C.DisableTorchFunction():  # this check reads the data, not the program
        if not site.fns or is_discrete(site.fns[0]) or not bool(missing.any()):
            return torch.zeros_like(missing)
    finite = first_particle(site.log_prob.isfinite(), layout.num_plates)
    return missing & finite.reshape(finite.shape + (1,) * site.event_dim)


def any_of(flags: Tensor, event_dim: int) -> Tensor:
    return flags.flatten(-event_dim).any(-1) if event_dim else flags


def bad_data(bad: Tensor, site: SiteRecord, layout: Layout, event_dim: int) -> Tensor:
    """Reduce a flag per element, (*plates, *event), to one per datum, (B,), without masked elements."""
    if site.event_mask is not None:
        bad = any_of(bad, event_dim - site.to_event_dim)  # a mask has one value for an event of the base
        event_dim = site.to_event_dim
        bad = bad & first_particle(site.event_mask, layout.num_plates + event_dim)
    bad = any_of(bad, event_dim)
    if site.mask is not None:
        bad = bad & first_particle(site.mask, layout.num_plates)
    bad = padded(bad, layout.num_plates)
    if layout.datum_dim is None:
        return bad.any().reshape(1)
    bad = bad.movedim(layout.datum_dim, 0).flatten(1).any(1) if bad.ndim > 1 else bad
    return bad.expand(layout.batch_size)


def first_particle(mask: Tensor, width: int) -> Tensor:
    return mask[(0,) * (mask.ndim - width)] if mask.ndim > width else mask


def bounds_vary(fns: Sequence[Any]) -> bool:
    """Whether the support of an observed site differs between particles that were run one by one."""
    bounds = [bounds_of(support_of(fn)) for fn in fns]
    return any(not torch.equal(a, b) for other in bounds[1:] for a, b in zip(bounds[0], other, strict=True))
