"""Checks of observed values: finite, and inside the support of their likelihood."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidDataError, SupportError
from .recorder import Layout
from .records import SiteRecord, padded
from .supports import bounds_of, innermost


def check_observed(site: SiteRecord, layout: Layout, check_support: bool) -> None:
    """Raise on NaN, infinite or impossible observations, naming the data; what is masked does not count."""
    if site.value.is_floating_point():
        bad = bad_data(~site.value.isfinite(), site, layout, site.event_dim)
        if bool(bad.any()):
            raise InvalidDataError(
                f"the observed site '{site.name}' has NaN or infinite values in data {rows(bad)}: remove those rows, or "
                "mask what is missing (poutine.mask or obs_mask) and fill it with any finite number"
            )
    if check_support and site.fns:
        inside, event_dim = inside_for_any(site.value, site.fns, layout)
        bad = bad_data(~inside, site, layout, event_dim)
        if bool(bad.any()):
            fn = site.fns[0]
            raise SupportError(
                f"the observed site '{site.name}' has values outside the support of its likelihood ({fn.support}) in "
                f"data {rows(bad)} (smallest {float(site.value.min()):g}, largest {float(site.value.max()):g}), so there "
                "is no log p(x). Bring the data into the support (binarise grey pixels, say), choose another likelihood, "
                "or pass check_support=False and read the result as a score, not as evidence"
            )


def inside_for_any(value: Tensor, fns: Sequence[Any], layout: Layout) -> tuple[Tensor, int]:
    """True where at least one particle gives the value a density, (*plates, *event), and how many dims are event.

    The check is made below `to_event`, where single elements of an event may be masked.
    """
    inside = torch.zeros((), dtype=torch.bool, device=value.device)
    for fn in fns:
        base = innermost(fn)
        event_dim = fn.event_dim - base.event_dim
        try:
            ok = base.support.check(value)
        except NotImplementedError:
            return torch.ones_like(inside), 0
        extra = max(ok.ndim - event_dim - layout.num_plates, 0)
        inside = inside | (ok.flatten(0, extra - 1).any(0) if extra else ok)
    return inside, event_dim


def bad_data(bad: Tensor, site: SiteRecord, layout: Layout, event_dim: int) -> Tensor:
    """Reduce a flag per element, (*plates, *event), to one per datum, (B,), leaving out what is masked."""
    if site.event_mask is not None:
        bad = bad & first_particle(site.event_mask, layout.num_plates + event_dim)
    bad = bad.flatten(-event_dim).any(-1) if event_dim else bad
    if site.mask is not None:
        bad = bad & first_particle(site.mask, layout.num_plates)
    bad = padded(bad, layout.num_plates)
    if layout.datum_dim is None:
        return bad.any().reshape(1)
    bad = bad.movedim(layout.datum_dim, 0).flatten(1).any(1) if bad.ndim > 1 else bad
    return bad.expand(layout.batch_size)


def first_particle(mask: Tensor, width: int) -> Tensor:
    return mask[(0,) * (mask.ndim - width)] if mask.ndim > width else mask


def rows(bad: Tensor) -> str:
    """The indices where `bad`, shape (B,), is true: the first ten of them and how many there are."""
    indices = bad.nonzero().flatten().tolist()
    return f"{indices[:10]}{f' and {len(indices) - 10} more' if len(indices) > 10 else ''}"


def bounds_vary(fns: Sequence[Any]) -> bool:
    """Whether the support of an observed site differs between particles that were run one by one."""
    bounds = [bounds_of(fn.support) for fn in fns if hasattr(fn, "support")]
    return any(not torch.equal(a, b) for other in bounds[1:] for a, b in zip(bounds[0], other, strict=True))
