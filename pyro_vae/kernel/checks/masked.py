"""Raise for masked latents on which unmasked sites depend: change them, and check that log p(x, z) stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...densities import is_discrete, support_values
from ...errors import MaskError, listed, quoted
from ..log_densities import LogDensities, reduce_to_datum
from ..programs import score
from ..records import Record, padded, select_particle
from .discrete import another_value
from .enumeration import masked_beside

if TYPE_CHECKING:
    from ..calls import Call

MOVES = 4  # draws to which a continuous latent is set; several, because a saturating function may hide one
MOST_VALUES = 16  # values of a discrete latent; of more, some from the first to the last
TOLERANCE = 1e-4


def check_masked_latents(call: Call, guide: Record, model: Record, weights: LogDensities, *, noise: tuple[int, int]) -> None:
    """Set continuous latents to draws of the guide and of the prior, discrete ones to every value.

    Enumerated latents need no change. Draws of the guide alone are not enough: they may be so close that nothing changes.

    :param noise: stream and block of the draw.
    """
    structure = call.structure
    names = (*structure.latents, *structure.guide_enumerated, *structure.model_enumerated)
    kept = {n: m for n in names if (m := weights.kept_places(n)) is not None and not bool(m.all())}
    if not kept:
        return
    if structure.indicators:  # nothing was masked in the call in which the structure was found
        raise MaskError(masked_beside(structure.indicators, kept))
    changed = torch.zeros(call.batch_size, dtype=torch.bool, device=call.device)
    for name in kept.keys() & call.layout.enumerated:
        changed = changed | varies_with(name, weights)
    if moved := {n: m for n, m in kept.items() if n not in call.layout.enumerated}:
        call.set_noise(*noise)
        changed = changed | varies_when_moved(call, moved, guide, model)
    if bool(changed.any()):
        raise MaskError(
            f"the masked latents {quoted(kept)} of data {listed(changed)} change the density of what is not masked: "
            "without a density of their own there is no log p(x). Mask what depends on them as well, or do not mask them"
        )


def varies_with(name: str, weights: LogDensities) -> Tensor:
    """Data, (B,), where an enumerated site is masked and another density differs between its values."""
    layout, mask = weights.layout, weights.joint_mask(name)
    assert mask is not None  # events of more than one number are not enumerated
    found = torch.zeros(layout.batch_size, dtype=torch.bool, device=mask.device)
    width = layout.num_plates + 1
    if mask.ndim > width:  # the site that masks it is enumerated
        return found
    hidden = padded(~mask, width)
    names = [(n, weights.model) for n in (*weights.observed, *weights.unobserved)]
    for other, record in (*names, *((n, weights.guide) for n in weights.scored)):
        axis = next((a for a, n in weights.structure.axes_at(other).items() if n == name), None)
        if other == name or axis is None:
            continue
        log_prob, dim = weights.masked(other, record), -(width + 1 + axis)
        if log_prob.ndim >= -dim:
            low, high = log_prob.amin(dim), log_prob.amax(dim)
            differs = ~torch.isclose(low, high, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
            there = reduce_to_datum((differs & hidden).long(), layout) > 0
            found = found | there.reshape(-1, layout.batch_size).any(0)
    return found


def varies_when_moved(call: Call, kept: Mapping[str, Tensor], guide: Record, model: Record) -> Tensor:
    """Data, (B,), where the density of a site changes when masked latents change, for the first particle.

    :param kept: where these latents are not masked, broadcastable to their values.

    Each site is tested separately: in a sum, a large density of one would hide a small change of another.
    """
    layout, first = call.layout, call.first_particle(model)
    moved = [n for n, s in first.items() if not s.is_observed and n in layout.event_dims and n not in layout.enumerated]
    values = {n: first[n].value for n in moved}
    drawn, plain, prior = call.draw(MOVES), call.draw(1), call.draw_prior(MOVES)[0]
    before = LogDensities(call.structure, call.first_particle(guide), first, 1)
    changed = torch.zeros(call.batch_size, dtype=torch.bool, device=call.device)
    moves = {}
    for name in kept:
        width = layout.num_plates + layout.event_dims[name]
        moves[name] = moves_of([drawn[name].value, prior[name]], plain[name].fns[0], width)
    for step in range(max(map(len, moves.values()))):
        swapped = dict(values)
        for name, mask in kept.items():
            width = layout.num_plates + layout.event_dims[name]
            mask = select_particle(mask, 0, width).unsqueeze(-1 - width)
            swapped[name] = torch.where(mask, values[name], moves[name][step % len(moves[name])])
        call.cost += 1
        after = LogDensities(call.structure, call.first_particle(guide), score(call.model, swapped, 1), 1)
        for old, new in (
            (before.log_likelihood_by_site, after.log_likelihood_by_site),
            (before.log_prior_by_site, after.log_prior_by_site),
        ):
            for name in old:
                differs = ~torch.isclose(old[name], new[name], rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
                changed = changed | differs.reshape(-1, differs.shape[-1]).any(0)
    return changed


def moves_of(drawn: Sequence[Tensor], fn: Any, width: int) -> list[Tensor]:
    """Other values for a latent, canonical for one particle, whose axis lies `width` dimensions from the right.

    :param drawn: draws, of several origins.
    :param fn: its distribution in a run for one particle.
    """
    axis = -(width + 1)
    draws = [value.narrow(axis, k if value.shape[axis] > 1 else 0, 1) for value in drawn for k in range(MOVES)]
    value = draws[0]
    if not is_discrete(fn):
        return draws
    support = support_values(fn)
    if support is None:
        return [value, another_value(fn, value)]
    steps = range(min(len(support), MOST_VALUES))
    return [support[(step * (len(support) - 1)) // max(len(steps) - 1, 1)].expand_as(value) for step in steps]
