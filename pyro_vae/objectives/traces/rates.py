"""The KL of a latent by site or by dimension, summed over the data that are not masked, and their number."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ...densities import find_masks, innermost
from ...errors import DatumPlateError, SubsamplingError, quoted
from ..terms import PARTICLES, common_plates, places_of
from .beta_messenger import WeighedTraces
from .kl_formulas import kl_by_dimension


class Rate(NamedTuple):
    """A KL summed over data and particles, and the number of data in the sum; both scaled, without masked data.

    :ivar kl: in nats, by group where there are several.
    :ivar num_data: of the shape of `kl`; zero where no floor applies.
    """

    kl: Tensor
    num_data: Tensor


Rates = Mapping[str, Rate]


def mean_rates(runs: Sequence[Rates], num_particles: int) -> Rates:
    """The mean over particles, which were computed together or in several runs."""
    names = dict.fromkeys(name for run in runs for name in run)  # a program may have a site in some particles only
    sides = {name: zip(*(run[name] for run in runs if name in run), strict=True) for name in names}
    return {name: Rate(*(reduce(operator.add, side) / num_particles for side in both)) for name, both in sides.items()}


def datum_plate(sites: Any, what: str, remedy: str) -> str:
    """The one plate common to all sites."""
    sites = list(sites)
    shared = common_plates(places_of(sites))
    vectorized = {f.name for s in sites for f in s["cond_indep_stack"] if f.vectorized}
    if len(shared) != 1 or not vectorized.issuperset(shared):
        raise DatumPlateError(
            f"{what} needs the KL per datum, in one vectorised plate common to all sites, but the sites share "
            f"{quoted(shared)}: put latents and observations into one pyro.plate('data', B), and turn other common "
            f"plates into events by to_event. {remedy}"
        )
    return next(iter(shared))


def data_dims(site: Any, plate: str) -> tuple[int, ...]:
    """The dimensions of data and of vectorised particles in the batch shape, counted from the right."""
    for frame in site["cond_indep_stack"]:
        if frame.name not in (plate, PARTICLES) and frame.full_size not in (None, frame.size):
            raise SubsamplingError(
                f"site '{site['name']}' is in the subsampled plate '{frame.name}' inside the datum, so its KL per "
                f"datum is not known: subsample '{plate}' alone"
            )
    return tuple(frame.dim for frame in site["cond_indep_stack"] if frame.name in (plate, PARTICLES))


def kl_of_site(traces: WeighedTraces, analytic: Mapping[str, Tensor], name: str) -> Tensor:
    """One KL of the loss, without beta: by formula or sampled, scaled, masked and summed."""
    if name in analytic:
        return scale_and_mask(analytic[name], traces.scales[name], traces.guide_sites[name]["mask"]).sum()

    def sums(side: Mapping[str, Any]) -> list[Tensor]:
        sites = [(n, side[n]) for n in traces.groups[name] if n in side]
        return [scale_and_mask(s["unscaled_log_prob"], traces.scales[n], s["mask"]).sum() for n, s in sites]

    return reduce(operator.sub, sums(traces.model_sites), reduce(operator.add, sums(traces.guide_sites)))


def rate_by_dimension(traces: WeighedTraces, name: str, by_formula: bool, dims: tuple[int, ...]) -> Rate:
    """The KL summed over data and particles only: one for each dimension of the latent."""
    site, scale = traces.guide_sites[name], traces.scales[name]
    event_dim = site["fn"].event_dim
    mask, event_mask = find_masks(site["fn"], site["mask"], site["value"])
    mask, scale = beside_event(mask, event_dim), beside_event(scale, event_dim)
    mask = mask if event_mask is None else event_mask if mask is None else mask & event_mask
    kl = kl_by_dimension(traces, name, by_formula)
    summed = [dim - event_dim for dim in dims if event_dim - dim <= kl.dim()]
    parts = [scale_and_mask(part, scale, mask) for part in (kl, torch.ones_like(kl))]
    return Rate(*(part.sum(summed) if summed else part for part in parts))


def weight_of_data(traces: WeighedTraces, name: str, dtype_of: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The weight of each datum: its scale, or zero where all of the latent is masked; all other dimensions have size 1."""
    site = traces.model_sites[name]
    mask, event_mask = find_masks(site["fn"], site["mask"], site["value"])
    if event_mask is not None:
        added = site["fn"].event_dim - innermost(site["fn"]).event_dim  # by to_event: a block of numbers has one mask
        any_left = event_mask.flatten(-added).any(-1)
        mask = any_left if mask is None else mask & any_left
    weight = scale_and_mask(dtype_of.new_ones(site["fn"].batch_shape), traces.scales[name], mask)
    inner = [dim for dim in range(-weight.dim(), 0) if dim not in dims]
    return weight.amax(inner, keepdim=True) if inner else weight


def beside_event(value: Any, event_dim: int) -> Any:
    """A tensor of batch shape, with dimensions added to broadcast it over events."""
    return value.reshape(value.shape + (1,) * event_dim) if isinstance(value, Tensor) else value
