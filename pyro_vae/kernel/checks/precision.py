"""Measure rounding in float32: compute the weights of a few particles again in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...float64 import InFloat64, kept_modules
from ..calls import Call
from ..log_densities import LogDensities
from ..programs import score
from ..records import Record, padded
from .agreement import values_of

# Tolerated rounding: half of the third decimal that records print, and the rounding of float32 sums, eps |log p(x)|.
UNSEEN, SCATTER = 5e-4, 3.0


class Movement(NamedTuple):
    """The change of log-weights when they are computed in float64.

    :ivar shift: (P, B), float64 minus float32, for the tested particles; `None` where it is not known.
    :ivar why: why it is not known.
    """

    shift: Tensor | None
    why: str = ""


@torch.no_grad()
def movement(call: Call) -> Movement:
    """Compute the log-weights of two of the last particles again in float64: the best, and a typical one of the posterior.

    It costs one decoder evaluation per particle, and none if everything was computed in float64 already. The density of the
    guide is included if the particles are its draws.
    """
    before = call.weighed
    if before is None:
        return Movement(None, "no particles were weighed")
    own = is_own_draw(before)
    records = [before.model, before.guide] if own else [before.model]
    if all(site.log_prob.dtype == torch.float64 for record in records for site in record.values()):
        return Movement(torch.zeros(1, call.batch_size, dtype=torch.float64, device=call.device))
    particles = best_and_typical(before, own)
    call.cost += len(particles)
    mode = InFloat64()
    try:
        with kept_modules(), mode:
            after = weigh_again(call, before, particles, own)
    except Exception as error:  # a program may raise any error when its tensors have another dtype
        first_line = str(error).strip().partition("\n")[0]
        return Movement(None, f"the programs cannot be run in float64 ({type(error).__name__}: {first_line})")
    if mode.lowered or after.dtype != torch.float64:
        return Movement(None, f"the programs return to a lower precision (in {mode.lowered or 'their log-densities'})")
    weight = (before.log_weight if own else before.log_joint).detach()
    return Movement(after - torch.take_along_dim(weight, particles, 0))


def is_moved(call: Call, value: Tensor, std_error: Tensor) -> Tensor:
    """(B,) whether float64 changes log-weights by more than a tenth of the error of a number (B,) computed from them.

    False where that is not known.
    """
    shift = movement(call).shift
    if shift is None:
        return torch.zeros_like(value, dtype=torch.bool)
    size = value.abs().nan_to_num(posinf=0.0)  # a change from an infinite value to a finite one counts
    usual = UNSEEN + SCATTER * torch.finfo(value.dtype).eps * size
    return shift.abs().amax(0) > torch.fmax(0.1 * std_error, usual)


def weigh_again(call: Call, before: LogDensities, particles: Tensor, own: bool) -> Tensor:
    """The log-weights of these particles, (P, B); log p(x, z) where they are not draws of the guide."""
    model = score(call.model, picked_values(before, before.model, particles), len(particles))
    if not own:
        masks = call.first_particle(before.guide)
        return LogDensities(before.structure, masks, model, len(particles)).log_joint
    guide = call.score_guide(picked_values(before, before.guide, particles), len(particles))
    return LogDensities(before.structure, guide, model, len(particles)).log_weight


def is_own_draw(weights: LogDensities) -> bool:
    """Whether the particles are draws of the guide. Those of a proposal have the record of one draw, for its masks."""
    guide, model = weights.guide, weights.model
    sides = [(guide[n].value, model[n].value) for n in weights.structure.latents if n in guide]
    return all(drawn.shape == given.shape and torch.equal(drawn, given) for drawn, given in sides)


def best_and_typical(weights: LogDensities, own: bool) -> Tensor:
    """Indices of two particles per datum, (2, B), or (2, 1) where all data share a draw.

    The one with the highest log p(x, z), and the median by weight. The latter is needed because, where rounding hides the
    effect of an observation, the best particles are those that do not depend on it.
    """
    log_joint = weights.log_joint.detach().nan_to_num(nan=-torch.inf)
    log_weight = weights.log_weight.detach().nan_to_num(nan=-torch.inf) if own else torch.zeros_like(log_joint)
    layout, values = weights.layout, drawn_values(weights, weights.guide)
    if layout.datum_dim is not None:
        dims = [layout.datum_dim - layout.event_dims[name] for name in values]
        if any(v.shape[dim] != layout.batch_size for v, dim in zip(values.values(), dims, strict=True)):
            log_joint, log_weight = (part.sum(-1, keepdim=True) for part in (log_joint, log_weight))
    if len(log_joint) == 1:
        return torch.zeros_like(log_joint, dtype=torch.long)
    order = log_joint.sort(dim=0, descending=True, stable=True).indices
    share = torch.take_along_dim(log_weight, order, 0).softmax(0).nan_to_num().cumsum(0)
    place = (share < 0.5).sum(0, keepdim=True).clamp(max=len(share) - 1)
    return torch.cat([order[:1], torch.take_along_dim(order, place, 0)])


def drawn_values(weights: LogDensities, record: Record) -> dict[str, Tensor]:
    return {n: v for n, v in values_of(record, weights.structure).items() if not record[n].is_observed}


def picked_values(weights: LogDensities, record: Record, particles: Tensor) -> dict[str, Tensor]:
    """The values of these particles by site, canonical shapes (*E, P, *plates, *event)."""
    layout, values = weights.layout, {}
    for name, value in drawn_values(weights, record).items():
        width = layout.num_plates + layout.event_dims[name]
        value = value.detach()
        if value.ndim > width and value.shape[-(width + 1)] > 1:
            plates = [1] * layout.num_plates
            if layout.datum_dim is not None:
                plates[layout.datum_dim] = particles.shape[1]
            index = particles.reshape(len(particles), *plates, *[1] * layout.event_dims[name])
            value = torch.take_along_dim(value, padded(index, value.ndim), -(width + 1))
        values[name] = value
    return values
