"""Many draws of the latents outside the data in one run. Each pair of such a draw and a datum counts as a datum.

With S draws and N data, datum n given draw s is datum s N + n of S N. Its particle k is particle k S + s of the program.
Everything that is done for the data of a call is thereby done for all pairs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .folding import unfold
from .recorder import Layout, Site
from .records import Record, padded, select_particle

if TYPE_CHECKING:
    from .programs import Program, Values


@dataclass(frozen=True, eq=False)
class OutsideDraws:
    """S values of the latents outside the data, (S, *plates, *event) by site, for N data."""

    values: Mapping[str, Tensor]
    num_draws: int
    num_data: int

    def for_particles(self, num_particles: int) -> dict[str, Tensor]:
        """(K S, *plates, *event), the draws repeated for each of K particles."""
        return {name: value.repeat(num_particles, *[1] * (value.ndim - 1)) for name, value in self.values.items()}


def one_draw_at_a_time(program: Program) -> Program:
    """The program for N data, with values for its latents outside the data."""
    assert program.outside is not None
    inner = copy(program)
    inner.outside, inner.layout = None, replace(program.layout, batch_size=program.outside.num_data)
    return inner


def at_any_draw(program: Program) -> Program:
    """The program at one of the draws, at random, for plain runs."""
    assert program.outside is not None
    inner, s = one_draw_at_a_time(program), int(torch.randint(program.outside.num_draws, ()))
    inner.fixed = {**inner.fixed, **inner.plain_values(program.outside.values, s)}
    return inner


def scored_at_draws(
    program: Program, values: Values, num_particles: int, score: Callable[[Program, Values, int], Record]
) -> Record:
    """The record of `score` for S N data; latents without a value are drawn."""
    assert program.outside is not None
    outside, inner = program.outside, one_draw_at_a_time(program)
    given = {n: apart(v, inner.layout, outside.num_draws, inner.layout.event_dims[n]) for n, v in values.items()}
    record = score(inner, {**outside.for_particles(num_particles), **given}, num_particles * outside.num_draws)
    return together(record, inner.layout, outside.num_draws)


def apart(tensor: Tensor, layout: Layout, num_draws: int, width: int) -> Tensor:
    """(*E, K, *plates of S N data, ...) to (*E, K S, *plates of N data, ...); `width` dims stand right of the plates."""
    tensor = unfold(tensor, layout, num_draws, layout.num_plates + width)
    draws = tensor.ndim - layout.num_plates - width - 1
    if draws == 0:
        return tensor
    return tensor.expand(*tensor.shape[:draws], num_draws, *tensor.shape[draws + 1 :]).flatten(draws - 1, draws)


def joined(tensor: Tensor, layout: Layout, num_draws: int, width: int) -> Tensor:
    """The inverse of `apart`."""
    assert layout.datum_dim is not None
    width += layout.num_plates
    tensor = padded(tensor, width + 1)
    particles = tensor.ndim - width - 1
    alone = tensor.shape[particles] == 1
    tensor = tensor.unsqueeze(particles) if alone else tensor.unflatten(particles, (-1, num_draws))
    draws, data = particles + 1, tensor.ndim + layout.datum_dim - (width - layout.num_plates)
    shape = list(tensor.shape)
    shape[draws], shape[data] = num_draws, layout.batch_size
    return tensor.expand(shape).movedim(draws, data - 1).flatten(data - 1, data)


def together(record: Record, layout: Layout, num_draws: int) -> Record:
    """A record of N data at K S particles as one of S N data at K. Observed and enumerated values are unchanged."""
    wide: Record = {}
    for name, site in record.items():
        join = partial(joined, layout=layout, num_draws=num_draws)
        moved = wide[name] = copy(site)
        moved.__dict__.pop("log_prob", None)
        moved._log_prob = lambda site=site, join=join: join(site.log_prob, width=0)  # type: ignore[misc]
        if not (site.is_observed or name in layout.enumerated):
            moved.value = join(site.value, width=site.event_dim)
        if site.mask is not None:
            moved.mask = join(site.mask, width=0)
        if site.event_mask is not None:
            moved.event_mask = join(site.event_mask, width=site.to_event_dim)
        if site.base_draw is not None:
            moved.base_draw = join(site.base_draw, width=site.event_dim)
    return wide


def padded_values(values: Values, layout: Layout) -> dict[str, Tensor]:
    """Values (S, *plates, *event) with as many plates as the layout has, for known names."""
    found = {}
    for name, value in values.items():
        if name in layout.event_dims:
            missing = 1 + layout.num_plates + layout.event_dims[name] - value.ndim
            found[name] = value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])
    return found


def plain_value(site: Site, value: Tensor, k: int, num_plates: int) -> Tensor:
    """The value of particle `k` of a site, (K, *plates, *event), in the shape of a plain run."""
    return select_particle(value, k, num_plates + site.fn.event_dim).reshape(site.value.shape)
