"""Records of a program run for K particles: values and log-densities per site, shapes (*E, K, *plates)."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.poutine import unwrap
from torch import Tensor

from ..densities import find_masks, innermost
from .recorder import Layout, Site


class SiteRecord:
    """Value, lazily computed log-density and mask of one site.

    :param value: canonical, shape (*E, K, *plates, *event); an observed value keeps its original shape.
    :param log_prob: function that computes the log-density, broadcastable to (*E, K, *plates), without plate masks.
    :param mask: boolean over (*E, K, *plates), or `None`.
    :param event_mask: the mask inside events if it differs within an event, over (*E, K, *plates) and the dims that
        `to_event` added, or `None`.
    :param base_draw: the base draw of a flow without an inverse, of the same shape; otherwise `None`.
    :param fns: the distributions, one (leading axis) or one per particle (loop); none after `torch.vmap`.
    :ivar is_summed: whether the log-density is already a sum over the plates inside a datum, without masked elements.
    """

    is_summed = False

    def __init__(
        self,
        site: Site,
        value: Tensor,
        log_prob: Callable[[], Tensor],
        mask: Tensor | None,
        event_mask: Tensor | None = None,
        fns: Sequence[Any] = (),
        base_draw: Tensor | None = None,
    ) -> None:
        self.name, self.value, self.mask, self.event_mask = site.name, value, mask, event_mask
        self.is_observed, self.event_dim, self.fns = site.is_observed, site.fn.event_dim, fns
        self.to_event_dim = to_event_dim(site)
        self.scale, self.frames, self.base_draw = site.scale, site.frames, base_draw
        self._log_prob = log_prob

    @cached_property
    def log_prob(self) -> Tensor:
        return self._log_prob()


Record = dict[str, SiteRecord]


def to_event_dim(site: Site) -> int:
    """The number of dims of an event that `to_event` added."""
    return int(site.fn.event_dim - innermost(site.fn).event_dim)


def padded(tensor: Tensor, width: int) -> Tensor:
    return tensor.reshape((1,) * (width - tensor.ndim) + tensor.shape) if tensor.ndim < width else tensor


def stack_particles(tensors: Sequence[Tensor], width: int) -> Tensor:
    """Insert a particle axis `width` dimensions from the right."""
    return torch.stack(torch.broadcast_tensors(*[padded(t, width) for t in tensors]), dim=-(width + 1))


def select_particle(value: Tensor, k: int, width: int) -> Tensor:
    """The value of particle `k` without its axis, which lies `width` dimensions from the right."""
    if value.ndim <= width:
        return value
    return value.select(-(width + 1), k if value.shape[-(width + 1)] > 1 else 0)


def leading_record(sites: Mapping[str, Site], layout: Layout) -> Record:
    """From one run with a leading particle axis, without the sites outside the data."""
    record = {}
    for name, site in sites.items():
        if name in layout.fixed:
            continue
        mask, event_mask = find_masks(site.fn, site.mask, site.value)
        record[name] = SiteRecord(site, site.value, site.log_prob, mask, event_mask, [site.fn], site.base_draw)
    return record


def looped_record(runs: Sequence[Mapping[str, Site]], layout: Layout) -> Record:
    """From one plain run per particle, without the sites outside the data."""
    record = {}
    width = layout.num_plates
    for name, first in runs[0].items():
        if name in layout.fixed:
            continue
        sites = [run[name] for run in runs]
        masks = [find_masks(site.fn, site.mask, site.value) for site in sites]
        value, base_draw = first.value, first.base_draw
        if not first.is_observed:
            value = stack_particles([site.value for site in sites], width + first.fn.event_dim)
        if base_draw is not None:
            base_draw = stack_particles([site.base_draw for site in sites], width + first.fn.event_dim)  # type: ignore[misc]
        record[name] = SiteRecord(
            first,
            value,
            lambda sites=sites: stack_particles([site.log_prob() for site in sites], width),  # type: ignore[misc]
            stack_masks([mask for mask, _ in masks], value, width),
            stack_masks([mask for _, mask in masks], value, width + to_event_dim(first)),
            [site.fn for site in sites],
            base_draw,
        )
    return record


def stack_masks(masks: Sequence[Tensor | None], like: Tensor, width: int) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    true = torch.ones((), dtype=torch.bool, device=like.device)
    return stack_particles([true if mask is None else mask for mask in masks], width)


def split_joint_draw(guide: Callable, sites: Mapping[str, Site]) -> dict[str, Site]:
    """Split the joint draw of AutoDiagonalNormal into independent draws, named as those of AutoNormal.

    The joint site is kept without a density, so that its value can be replayed.
    """
    auto = unwrap(guide)
    if not isinstance(auto, AutoDiagonalNormal):
        return dict(sites)
    split = dict(sites)
    name = next(n for n in sites if n.startswith("_") and n.endswith("_latent"))
    joint = sites[name]
    for part in ("fn", "density"):
        base = getattr(joint, part).base_dist
        shape = base.batch_shape
        values = {s["name"]: u for s, u in auto._unpack_latent(joint.value)}
        locs = {s["name"]: u for s, u in auto._unpack_latent(base.loc.expand(shape))}
        for latent, scale in auto._unpack_latent(base.scale.expand(shape)):
            key = latent["name"]
            event_dim = len(auto._unconstrained_shapes[key]) - len(latent["fn"].batch_shape)
            fn = dist.Normal(locs[key], scale).to_event(event_dim)
            old = split.get(f"{key}_unconstrained", replace(joint, name=f"{key}_unconstrained", value=values[key]))
            split[f"{key}_unconstrained"] = replace(old, **{part: fn})
    split[name] = replace(joint, density=dist.Delta(joint.value, event_dim=1))
    return split


def latent_of(name: str, record: Record) -> str:
    """The latent site to which a draw of an autoguide belongs; for other sites, the site."""
    latent = name.removesuffix("_unconstrained")
    return latent if latent in record else name


def narrow_record(record: Record, layout: Layout, start: int, length: int) -> Record:
    """The particles `start` to `start + length` of a record."""
    width = layout.num_plates

    def narrow(tensor: Tensor, width: int) -> Tensor:
        shared = tensor.ndim <= width or tensor.shape[-(width + 1)] == 1
        return tensor if shared else tensor.narrow(-(width + 1), start, length)

    part: Record = {}
    for name, site in record.items():
        narrowed = copy(site)
        narrowed.__dict__.pop("log_prob", None)
        narrowed._log_prob = lambda site=site: narrow(site.log_prob, width)  # type: ignore[misc]
        if not site.is_observed:
            narrowed.value = narrow(site.value, width + site.event_dim)
        if site.mask is not None:
            narrowed.mask = narrow(site.mask, width)
        if site.event_mask is not None:
            narrowed.event_mask = narrow(site.event_mask, width + site.to_event_dim)
        part[name] = narrowed
    return part
