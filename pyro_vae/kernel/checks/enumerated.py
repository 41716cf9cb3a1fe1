"""Check that a program keeps the axis of an enumerated site in its place, by comparing with runs at single values.

A program may move that axis (`unsqueeze`, `squeeze`), take it for the data (as many classes as data) or not expect it at
all. Nothing raises then, and the sum over the values is a wrong number without any error.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...errors import EnumerationError, HiddenRandomnessError, quoted
from ..log_densities import masked_sum
from ..programs import Program, ancestral
from ..records import Record, SiteRecord, close, leading_record
from .structure import Structure

MOST_COMBINATIONS = 16  # of values; of more, the first, the last and some between


def check_enumerated_axes(program: Program, values: Mapping[str, Tensor], reference: Record, structure: Structure) -> None:
    """Raise where log-densities computed for all values at once differ from those at one value each.

    :param reference: the program at `values` with its enumerated axes; the first particle is looked at.
    """
    names = [n for n in structure.layout.enumerated if n in reference]
    if not names:
        return
    supports = {n: reference[n].value for n in names}
    sizes = [len(supports[n]) for n in names]
    alone = ancestral(program)
    plain = program.plain_values(values, 0)
    for choice in combinations(sizes):
        chosen = {n: (i, size) for n, i, size in zip(names, choice, sizes, strict=True)}
        single = {n: single_value(supports[n][i], structure, n) for n, (i, _) in chosen.items()}
        given = {n: at_single_values(value, n, chosen, structure) for n, value in plain.items()}
        for name, site in leading_record(alone.run(values={**given, **single}), structure.layout).items():
            if not agrees(reference[name], site, chosen, structure):
                raise EnumerationError(moved_axis(names, f"the log-density of site '{name}' differs"))


@contextmanager
def axes_by_name(names: Collection[str]) -> Iterator[None]:
    """Turn an error that the extra axis of an enumerated site causes into `EnumerationError`."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if not names or isinstance(error, HiddenRandomnessError):
            raise
        raise EnumerationError(moved_axis(names, f"the program fails ({str(error).splitlines()[0]})")) from error


def moved_axis(names: Collection[str], what: str) -> str:
    return (
        f"{quoted(names)} enumerated: with all values side by side {what}, which it does not at one value at a time. The "
        "values lie on a new axis left of all plates, which the program must leave there: use `...` and negative dims "
        "(Vindex of pyro.ops.indexing), no squeeze, reshape, positive dims or index that drops a dim (z[..., :1, :] for "
        "z[..., 0, :]). Or take out infer={'enumerate': ...}, and the site is drawn"
    )


def combinations(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of one index each if they are few, else some from the first to the last, in which each axis moves."""
    total = torch.Size(sizes).numel()
    if total <= MOST_COMBINATIONS:
        return list(itertools.product(*map(range, sizes)))
    steps = range(MOST_COMBINATIONS)
    return [tuple((step * (size - 1)) // (MOST_COMBINATIONS - 1) for size in sizes) for step in steps] + [
        tuple(size - 1 if i == axis else 0 for i, size in enumerate(sizes)) for axis in range(len(sizes))
    ]


def single_value(value: Tensor, structure: Structure, name: str) -> Tensor:
    """One value for all data, in the shape that a plain run draws."""
    event_dim = structure.layout.event_dims[name]
    event_shape = value.shape[value.ndim - event_dim :]
    one: Tensor = value.reshape(-1, *event_shape)[0].expand(structure.layout.plain_shapes[name] + event_shape)
    return one


def at_single_values(value: Tensor, name: str, chosen: Mapping[str, tuple[int, int]], structure: Structure) -> Tensor:
    """The value of a latent that depends on enumerated sites, (*E, *plates, *event), at the chosen ones."""
    layout = structure.layout
    width = layout.num_plates + layout.event_dims[name]
    if value.ndim <= width:
        return value
    for enumerated, (index, _) in chosen.items():
        axis = -(width + 1 + layout.enumerated.index(enumerated))
        if value.ndim >= -axis:
            value = value.narrow(axis, index if value.shape[axis] > 1 else 0, 1)
    shape = layout.plain_shapes[name]
    return value.reshape(shape + value.shape[value.ndim - layout.event_dims[name] :])


def agrees(side_by_side: SiteRecord, alone: SiteRecord, chosen: Mapping[str, tuple[int, int]], structure: Structure) -> bool:
    """Whether the log-density of one site at the chosen values, (B,) for the first particle, is the same in both.

    :param chosen: (index of the value, number of values) by enumerated site.
    """
    layout = structure.layout
    try:
        all_values = masked_sum(side_by_side.log_prob, side_by_side.mask, layout)
        one = masked_sum(alone.log_prob, alone.mask, layout)[0]
    except RuntimeError:  # shapes that do not broadcast
        return False
    if all_values.ndim > 2 + len(layout.enumerated) or one.ndim != 1:
        return False
    for name, (index, num_values) in chosen.items():
        axis = -(3 + layout.enumerated.index(name))
        if all_values.ndim >= -axis:
            if all_values.shape[axis] not in (1, num_values):
                return False
            all_values = all_values.narrow(axis, index if all_values.shape[axis] > 1 else 0, 1)
    all_values = all_values.reshape(-1, *all_values.shape[-2:])
    return len(all_values) == 1 and close(all_values[0, 0], one)
