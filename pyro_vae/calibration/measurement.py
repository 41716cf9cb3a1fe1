"""Draws of the guide for simulated data, compared with the latents of these data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError, StructureError, listed
from ..kernel import Call, Layout, LogDensities, Record, is_moved, narrow_record, padded
from ..noise import NOISE_BLOCK, Noise
from .calibration import ELBO, GAP, Calibration
from .ranks import Ranks, misfit, units
from .rows import LOG_DENSITY

SCORED = 10  # draws of the guide that the model scores; few, because the true latent of a datum is a single draw too
ROUNDING = 200.0  # multiples of the precision of a float by which equal log-densities may differ between runs


@dataclass(frozen=True)
class Truth:
    """The true latents of the data. B data, U units of a site."""

    units: Mapping[str, Tensor]  # (B, U) by site
    kept: Mapping[str, Tensor]  # (B, U) by site, false where masked
    log_joint: Tensor  # (B,)
    log_guide: Tensor | None  # (B,)
    why_not: str  # log_guide is not known


def measure(call: Call, sites: Mapping[str, Any], num_particles: int, *, blind: bool, cost: int) -> Calibration:
    """The record for the data of a call; `sites` has the draws of the model in the simulation."""
    structure, layout = call.structure, call.layout
    guide = draw(call, num_particles, 0)
    scored = min(num_particles, SCORED)
    few = narrow_record(guide, layout, 0, scored)
    model = call.score(call.latent_values(few), scored)
    masks = call.first_particle(model)
    weights = call.weigh(call.summed(few, model, scored), model, scored)
    terms = weights.log_joint - log_guide_of(call, few, masks, scored)
    call.check_finite(terms)
    error = terms.std(0) / math.sqrt(scored) if scored > 1 else torch.full_like(terms[0], math.nan)
    moved = is_moved(call, terms.mean(0), error)
    truth = truth_of(call, sites, call.first_particle(few), weights)
    coarse = call.coarse(guide, min(num_particles, NOISE_BLOCK)).any(0) | moved
    why_not = coarse_in_words(coarse) if bool(coarse.any()) else ""

    ranks = {name: Ranks(value) for name, value in truth.units.items()}
    if truth.log_guide is not None:
        near = ROUNDING * torch.finfo(truth.log_guide.dtype).eps * (1 + truth.log_guide.abs())
        ranks[LOG_DENSITY] = Ranks(truth.log_guide.unsqueeze(1), near.unsqueeze(1))
    sizes = []
    for block, start in enumerate(range(0, num_particles, NOISE_BLOCK)):
        guide = draw(call, num_particles - start, block) if block else guide
        size = min(num_particles - start, NOISE_BLOCK)
        for name, value in call.latent_values(guide).items():
            draws = units(value, layout, layout.event_dims[name])
            ranks[name].add(draws)
            if not block:
                sizes.append(misfit(draws, truth.units[name]))
        if truth.log_guide is not None:
            ranks[LOG_DENSITY].add(log_guide_of(call, guide, masks, size).unsqueeze(-1))

    call.set_noise(Noise.CALIBRATION, 0)
    uniform = [found.uniform() for found in ranks.values()]
    kept = torch.cat(list(truth.kept.values()), 1)
    of_latents, joint = uniform[: len(truth.kept)], uniform[len(truth.kept) :]
    parts = torch.cat(of_latents, 1), *(torch.cat(part, 1) for part in zip(*sizes, strict=True))
    of_units, shift, stretch = (part.masked_fill(~kept, torch.nan) for part in parts)
    names = [unit for name, known in truth.kept.items() for unit in unit_names(name, known.shape[1])]
    return Calibration(
        names=(*names, *([LOG_DENSITY] if joint else [])),
        ranks=torch.cat([of_units, *joint], 1),
        shift=shift,
        stretch=stretch,
        at_latents=None if truth.log_guide is None or why_not else truth.log_joint - truth.log_guide,
        elbo=terms.mean(0),
        num_particles=num_particles,
        cost=call.cost + cost,
        blind=blind,
        given=structure.given,
        left_out=tuple(n for n, s in sites.items() if not (s.is_observed or s.is_fixed or n in truth.units)),
        unchecked={GAP: why_not, ELBO: why_not} if why_not else {GAP: truth.why_not} if truth.why_not else {},
    )


def coarse_in_words(coarse: Tensor) -> str:
    return (
        f"for data {listed(coarse)} floats are too coarse to distinguish draws of the guide from one another, or from "
        "an end of their support, or float64 changes the ELBO by more than a tenth of its error: convert model, guide "
        "and data to float64 (.double())"
    )


def draw(call: Call, num_left: int, block: int) -> Record:
    """Draws of the guide with the next noise block; sites that it enumerates are drawn first."""
    call.set_noise(Noise.GUIDE, block)
    return call.draw_latents(min(num_left, NOISE_BLOCK))


def log_guide_of(call: Call, drawn: Record, masks: Record, num_particles: int) -> Tensor:
    """log q(z | x) at draws of the guide, (K, B), with enumerated sites summed out; `masks` is any record of the model."""
    if call.structure.guide_enumerated:
        return call.log_guide(call.latent_values(drawn), num_particles, masks)
    return LogDensities(call.structure, drawn, masks, num_particles).log_marginal_guide


def truth_of(call: Call, sites: Mapping[str, Any], guide: Record, weights: LogDensities) -> Truth:
    """:param guide: any particle of the guide, used for its masks; `weights` are those of its draws."""
    structure, layout = call.structure, call.layout
    names = (*structure.latents, *(name for name in structure.prior_sites if name in sites))
    values = {name: as_particle(sites[name], layout) for name in names}
    model = call.score(values, 1)
    densities = LogDensities(structure, guide, model, 1)
    values = {name: values[name] for name in structure.latents}
    log_guide, why_not = None, ""
    try:
        log_guide = call.log_guide(values, 1, model)[0]
    except StructureError as error:  # a guide that computes its latents from other draws, or a flow without an inverse
        why_not = str(error)
    return Truth(
        units={n: units(value, layout, layout.event_dims[n])[0] for n, value in values.items()},
        kept={n: kept_units(n, weights, densities, value) for n, value in values.items()},
        log_joint=densities.log_joint[0],
        log_guide=log_guide,
        why_not=why_not,
    )


def as_particle(site: Any, layout: Layout) -> Tensor:
    """The value of a plain run in the shape of one particle, (1, *plates, *event)."""
    return padded(site.value, layout.num_plates + site.fn.event_dim).unsqueeze(0)


def kept_units(name: str, weights: LogDensities, at_truth: LogDensities, like: Tensor) -> Tensor:
    """Where the units of a site are not masked, (B, U), at draws of the guide and at the true latents alike."""
    layout, found = weights.layout, []
    for densities in (weights, at_truth):
        kept = densities.kept_places(name)
        kept = torch.ones((), dtype=torch.bool, device=like.device) if kept is None else kept
        found.append(kept.expand(torch.broadcast_shapes(kept.shape, like.shape)))
    if bool((found[0] != found[1]).any()):
        raise MaskError(
            f"the mask of the latent site '{name}' depends on drawn values, so a latent is masked in some draws only "
            "and has no rank: use a mask that depends on data only"
        )
    return units(found[1], layout, layout.event_dims[name])[0] > 0


def unit_names(site: str, count: int) -> list[str]:
    return [site] if count == 1 else [f"{site}[{unit}]" for unit in range(count)]
