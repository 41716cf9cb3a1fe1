"""Check that a program keeps the position of the axis of an enumerated site, by comparison with runs at single values.

A program may move that axis (`unsqueeze`, `squeeze`), confuse it with that of the data (as many classes as data), or not
expect it. Nothing raises then, and the sum over the values is wrong without an error.
"""

import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...errors import EnumerationError, HiddenRandomnessError, quoted
from ...tolerance import close
from ..programs import Program, ancestral
from ..records import Record, SiteRecord, leading_record, padded
from .structure import Structure

MOST_COMBINATIONS = 16  # combinations of values; of more, the first, the last and some between

Chosen = Mapping[str, tuple[Tensor, int]]  # (indices of the values, number of values) by enumerated site


def check_enumerated_axes(program: Program, values: Mapping[str, Tensor], reference: Record, structure: Structure) -> None:
    """Raise where log-densities computed for all values at once differ from those at one value each.

    :param reference: the program at `values` with its enumerated axes; the first particle is compared.
    """
    names = [n for n in structure.layout.enumerated if n in reference]
    if not names:
        return
    values_of = {n: listed_values(reference[n]) for n in names}
    sizes = [len(values_of[n]) for n in names]
    alone = ancestral(program)
    plain = program.plain_values(values, 0)
    steps = range(2 if any(places_inside(n, structure).numel() > 1 for n in names) else 1)
    for choice, step in itertools.product(combinations(sizes), steps):
        chosen = {
            n: (chosen_indices(n, i, size, step, structure), size) for n, i, size in zip(names, choice, sizes, strict=True)
        }
        single = {n: values_of[n][indices] for n, (indices, _) in chosen.items()}
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
        "z[..., 0, :]). Or remove infer={'enumerate': ...}, and the site is drawn"
    )


def combinations(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of one index each if they are few, otherwise some from the first to the last, which vary every axis.

    For many sites, 16 further combinations at random: any two sites differ in some.
    """
    total = math.prod(sizes)
    if total <= MOST_COMBINATIONS:
        return list(itertools.product(*map(range, sizes)))
    spread = [tuple((step * (size - 1)) // (MOST_COMBINATIONS - 1) for size in sizes) for step in range(MOST_COMBINATIONS)]
    if len(sizes) <= MOST_COMBINATIONS:
        return spread + [tuple(size - 1 if i == axis else 0 for i, size in enumerate(sizes)) for axis in range(len(sizes))]
    draw = random.Random(0)
    return spread + [tuple(draw.randrange(size) for size in sizes) for _ in range(MOST_COMBINATIONS)]


def listed_values(site: SiteRecord) -> Tensor:
    """The values of an enumerated site, (E, *event)."""
    event_shape = site.value.shape[site.value.ndim - site.event_dim :]
    return site.value.reshape(len(site.value), -1, *event_shape)[:, 0]


def places_inside(name: str, structure: Structure) -> torch.Size:
    """The batch shape of a plain run with a size of one for the data: the places inside a datum."""
    shape = structure.layout.plain_shapes[name]
    return torch.Size(1 if dim - len(shape) == structure.layout.datum_dim else n for dim, n in enumerate(shape))


def chosen_indices(name: str, index: int, size: int, step: int, structure: Structure) -> Tensor:
    """The indices of the values of a site, in the shape of a plain run.

    They are equal for all data, and different at each place inside a datum.

    In the first step neighbours differ; in the second, places at any distance.
    """
    inner = places_inside(name, structure)
    places = torch.arange(inner.numel())
    if step:
        places = torch.randint(size, (inner.numel(),), generator=torch.Generator().manual_seed(len(name)))
    return ((index + places.reshape(inner)) % size).expand(structure.layout.plain_shapes[name])


def at_single_values(value: Tensor, name: str, chosen: Chosen, structure: Structure) -> Tensor:
    """The value of a latent that depends on enumerated sites, (*E, *plates, *event), at the chosen ones."""
    layout = structure.layout
    width = layout.num_plates + layout.event_dims[name]
    if value.ndim <= width:
        return value
    for axis, enumerated in structure.axes_at(name).items():
        dim = -(width + 1 + axis)
        if enumerated in chosen and value.ndim >= -dim:
            index = int(chosen[enumerated][0].reshape(-1)[0])  # the guide enumerates only outside inner plates
            value = value.narrow(dim, index if value.shape[dim] > 1 else 0, 1)
    shape = layout.plain_shapes[name]
    return value.reshape(shape + value.shape[value.ndim - layout.event_dims[name] :])


def agrees(side_by_side: SiteRecord, alone: SiteRecord, chosen: Chosen, structure: Structure) -> bool:
    """Whether the log-density of one site at the chosen values, for the first particle, is the same in both.

    :param chosen: (indices of the values, number of values) by enumerated site.
    """
    width = structure.layout.num_plates + 1
    try:
        table = padded(unmasked(side_by_side), width)
        one = padded(unmasked(alone), width)
        if one.ndim > width:
            return False
        axes = structure.axes_at(side_by_side.name)
        for axis in range(table.ndim - width):
            dim = -(width + 1 + axis)
            if table.shape[dim] > 1:
                indices, size = chosen.get(axes.get(axis, ""), (torch.zeros(()), 0))
                if table.shape[dim] != size:
                    return False
                at = padded(indices, table.ndim).to(table.device)
                table = torch.take_along_dim(table, at, dim)
        table = table.reshape(table.shape[-width:]).narrow(0, 0, 1)
        return close(*torch.broadcast_tensors(table, one))
    except RuntimeError:  # shapes that do not broadcast
        return False


def unmasked(site: SiteRecord) -> Tensor:
    """The log-density with a zero where the site is masked."""
    return site.log_prob if site.mask is None else torch.where(site.mask, site.log_prob, site.log_prob.new_zeros(()))
