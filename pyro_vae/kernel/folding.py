"""Run a program once for K particles on data that are repeated K times: recurrent networks, lengths read into Python.

Datum n of particle k is row k B + n of the repeated data. For the program this is a plain batch of K B data, so it needs no
particle axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..arguments import repeated
from ..densities import find_masks
from ..errors import StructureError
from .recorder import Adjust, Layout, Site
from .records import Record, SiteRecord, padded, to_event_dim

if TYPE_CHECKING:
    from .programs import Program, Values


def folded_draws(program: Program, num_particles: int, adjust: Adjust | None) -> Record:
    wide = repeated_program(program, num_particles)
    return folded_record(wide.run(adjust=adjust), program.layout, num_particles)


def folded_scores(program: Program, values: Values, num_particles: int, adjust: Adjust | None) -> Record:
    wide = repeated_program(program, num_particles)
    given = {name: fold(value, name, program.layout, num_particles) for name, value in values.items()}
    return folded_record(wide.run(values=given, adjust=adjust), program.layout, num_particles)


def repeated_program(program: Program, num_particles: int) -> Program:
    """The same program on K copies of its data."""
    layout = program.layout
    if layout.datum_dim is None or layout.datum_plate is None:
        raise StructureError("the whole call is one datum: there is no plate to fold particles into")
    wide = copy(program)
    wide.args, wide.kwargs = repeated((program.args, program.kwargs), layout.batch_size, num_particles)
    wide.indices = {n: i.repeat(num_particles) if n == layout.datum_plate else i for n, i in program.indices.items()}
    wide.layout = replace(layout, batch_size=num_particles * layout.batch_size)
    return wide


def fold(value: Tensor, name: str, layout: Layout, num_particles: int) -> Tensor:
    """A canonical value, (*E, K, *plates, *event), in the shape of a plain run on the repeated data."""
    assert layout.datum_dim is not None
    event_dim = layout.event_dims[name]
    width = layout.num_plates + event_dim
    particles, data = value.ndim - width - 1, value.ndim + layout.datum_dim - event_dim
    shape = list(value.shape)
    shape[particles], shape[data] = num_particles, layout.batch_size
    value = value.expand(shape).movedim(particles, data - 1).flatten(data - 1, data)
    if value.ndim > width:  # enumerated axes
        return value
    surplus = layout.num_plates - max(len(layout.plain_shapes[name]), -layout.datum_dim)
    return value.reshape(value.shape[surplus:])


def unfold(tensor: Tensor, layout: Layout, num_particles: int, width: int) -> Tensor:
    """(*E, *plates of the repeated data, ...) to (*E, K, *plates, ...), where `width` dims count as plates and the rest."""
    assert layout.datum_dim is not None
    axis = layout.datum_dim - (width - layout.num_plates)
    tensor = padded(tensor, width)
    if tensor.shape[axis] == 1:
        return tensor.unsqueeze(-width - 1)
    data, particles = tensor.ndim + axis, tensor.ndim - width
    return tensor.unflatten(data, (num_particles, layout.batch_size)).movedim(data, particles)


def folded_record(sites: Mapping[str, Site], layout: Layout, num_particles: int) -> Record:
    """From one run on the repeated data, without the sites outside the data."""
    record = {}
    for name, site in sites.items():
        if name in layout.fixed:
            continue
        mask, event_mask = find_masks(site.fn, site.mask, site.value)
        back = partial(unfold, layout=layout, num_particles=num_particles)
        width = layout.num_plates + site.fn.event_dim
        record[name] = SiteRecord(
            site,
            first_rows(site, layout, num_particles) if site.is_observed else back(site.value, width=width),
            lambda site=site, back=back: back(site.log_prob(), width=layout.num_plates),  # type: ignore[misc]
            None if mask is None else back(mask, width=layout.num_plates),
            None if event_mask is None else back(event_mask, width=layout.num_plates + to_event_dim(site)),
            [site.fn],
            None if site.base_draw is None else back(site.base_draw, width=width),
        )
    return record


def first_rows(site: Site, layout: Layout, num_particles: int) -> Tensor:
    """An observed value for the original data: that of the first copy of the data."""
    assert layout.datum_dim is not None
    axis = layout.datum_dim - site.fn.event_dim
    if site.value.ndim < -axis or site.value.shape[axis] != num_particles * layout.batch_size:
        return site.value
    return site.value.narrow(axis, 0, layout.batch_size)
