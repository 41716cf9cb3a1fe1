"""A hash per datum: results are for the same data if their hashes are equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..densities import is_discrete
from .recorder import Layout
from .records import Record, SiteRecord, padded

# Steele, Lea and Flood (2014): the steps of SplitMix64, in which every bit of the input affects every bit of the output.
GOLDEN, FIRST, SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
CHUNK = 2**16  # numbers at a time, so that the int64 of each stay in the cache


class Observed(NamedTuple):
    """The observations of one site.

    :ivar values: (B, X) its numbers by datum, in the order of memory.
    :ivar shown: (B, X) false where they are masked, or `None`.
    :ivar discrete: whether its density is a probability.
    """

    values: Tensor
    shown: Tensor | None
    discrete: bool


def observed_in(record: Record, layout: Layout) -> list[Observed] | None:
    """The observations of a run of the model; `None` if one of them is computed from draws.

    Factors have no value and do not count.
    """
    found = []
    for site in record.values():
        if site.is_observed and site.value.numel():
            particles = max(site.value.ndim - layout.num_plates - site.event_dim, 0)
            if site.value.shape[:particles].numel() > 1:
                return None
            found.append(observed_at(site, layout))
    return found


def observed_at(site: SiteRecord, layout: Layout) -> Observed:
    num_plates, width = layout.num_plates, layout.num_plates + site.event_dim
    value = padded(site.value.detach(), width)
    value = value.reshape(value.shape[value.ndim - width :])
    shape = list(value.shape)
    for frame in site.frames:  # one value may be common to a whole plate
        if frame.dim is not None:
            size = layout.batch_size if frame.name == layout.datum_plate else frame.size
            shape[num_plates + frame.dim] = max(size, shape[num_plates + frame.dim])
    shown = None
    for mask, inside in ((site.mask, 0), (site.event_mask, site.to_event_dim)):
        if mask is not None:
            mask = padded(mask.detach(), num_plates + inside)
            extra = mask.ndim - num_plates - inside
            mask = mask.flatten(0, extra - 1).any(0) if extra else mask
            mask = mask.reshape(mask.shape + (1,) * (site.event_dim - inside))
            shown = mask if shown is None else shown & mask

    def by_datum(tensor: Tensor) -> Tensor:
        tensor = tensor.expand(shape)
        if layout.datum_dim is None:
            return tensor.reshape(1, -1)
        return tensor.movedim(num_plates + layout.datum_dim, 0).flatten(1) if width > 1 else tensor.unsqueeze(-1)

    return Observed(by_datum(value), None if shown is None else by_datum(shown), is_discrete(site.fns[0]))


def fingerprint_of(observed: Sequence[Observed]) -> Tensor | None:
    """(B,) int64, a hash of the observations of a datum; `None` without observed sites.

    Values are converted to float32, so that the same data in double have the same fingerprint, and a bool is 0 or 1. Masked
    values and NaN are ignored. The position of a number within its site counts; the names and the order of the sites do not.
    """
    with torch._C.DisableTorchFunction():  # this check reads the data, not the program
        sites = [torch.cat([of_rows(*part) for part in chunks(one)]) for one in observed]
        return torch.stack([mixed(site) for site in sites]).sum(0) if sites else None


def chunks(one: Observed) -> list[tuple[Tensor, Tensor | None]]:
    size = max(CHUNK // one.values.shape[1], 1)
    values = one.values.split(size)
    return list(zip(values, [None] * len(values) if one.shown is None else one.shown.split(size), strict=True))


def of_rows(values: Tensor, shown: Tensor | None) -> Tensor:
    """(B,) from (B, X): the sum of hashes of the values with their positions."""
    numbers = values.to(torch.float32).contiguous() + 0.0  # -0.0 is 0.0
    place = torch.arange(1, numbers.shape[1] + 1, device=numbers.device) * GOLDEN
    terms = mixed(numbers.view(torch.int32).long() + place)
    empty = numbers.isnan() if shown is None else numbers.isnan() | ~shown
    return terms.masked_fill(empty, 0).sum(1)


def mixed(numbers: Tensor) -> Tensor:
    """A pseudorandom bijection of int64; integers wrap. Zero stays zero."""
    for shift, factor in ((30, FIRST), (27, SECOND)):
        numbers = (numbers ^ shifted(numbers, shift)) * factor
    return numbers ^ shifted(numbers, 31)


def shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shifted to the right, filled with zeros like an unsigned number."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)


def measure_of(observed: Sequence[Observed]) -> str:
    """The kind of p(x): "probability" for discrete data, "density", or "mixed"; empty without observed sites."""
    kinds = {"probability" if one.discrete else "density" for one in observed}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else ""
