"""Choose the fastest execution that agrees with a loop over particles, by running a few particles with each.

Catching exceptions is not enough: `softmax(dim=1)` or `z.shape[0]` in a program give wrong numbers without an error.
"""

import warnings
from copy import copy
from dataclasses import replace

import torch
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor

from ...errors import BatchCouplingError, HiddenRandomnessError, StructureError
from ...isolation import LayerWatch
from ...noise import NOISE_BLOCK
from ...tolerance import close
from ..log_densities import masked_sum
from ..programs import Execution, Program, Values, ancestral, draw, score
from ..records import Record, SiteRecord, narrow_record, padded
from .data import bounds_vary
from .discrete import told_apart
from .enumerated import axes_by_name, check_enumerated_axes
from .givens import check_fixed_densities, check_fixed_values
from .reads import LostProvenance, ValueWatch, refuse_read_draws
from .structure import Structure

MOST_BYTES = 2**26  # numbers of the largest site in a run on many copies of the data
OTHER_NUMBERS = "with many particles at once it gives other densities"


def choose_executions(
    guide: Program, model: Program, structure: Structure, sizes: set[int], *, allow_dropout: bool
) -> Structure:
    """Set `execution` of both programs; raise for programs with hidden randomness or data that depend on one another.

    Returns the structure with further findings: `observed_with_moving_support`, sites for which a value outside the support
    is a weight of zero, not bad data; and `depend_on_enumerated`.

    :param sizes: every size that occurs among data and values; the number of particles differs from all of them.
    :param allow_dropout: whether dropout is allowed, as in training.
    """
    num_particles = next(k for k in range(2, len(sizes) + 3) if k not in sizes)
    with torch.no_grad(), LayerWatch() as watch:
        values = choose_for_guide(guide, structure, num_particles, folds=not allow_dropout)
        widths = {name: 1 + structure.layout.num_plates + structure.layout.event_dims[name] for name in structure.latents}
        dependent = tuple(name for name, width in widths.items() if name in values and values[name].ndim > width)
        layout = replace(structure.layout, along_expanded=frozenset(dependent))
        guide.layout = model.layout = layout
        structure = replace(structure, layout=layout, depend_on_enumerated=dependent)
        reference, read = choose_for_model(model, values, structure, num_particles, folds=not allow_dropout)
    if watch.saw_dropout and not allow_dropout:
        raise HiddenRandomnessError(
            "dropout is active, so every evaluation is of another random network: call .eval() on the modules of model and "
            "guide, and give training=self.training to functional dropout"
        )
    moving = frozenset(name for name, site in reference.items() if site.is_observed and bounds_vary(site.fns))
    looped = {side: p.why_looped for side, p in (("guide", guide), ("model", model)) if p.execution == "loop"}
    return replace(structure, observed_with_moving_support=moving, looped=looped, read_prior_sites=read)


def choose_for_guide(guide: Program, structure: Structure, num_particles: int, folds: bool) -> dict[str, Tensor]:
    guide.execution, guide.base_draws = "loop", True
    check_fixed_values(guide)
    with axes_by_name(structure.guide_enumerated):
        drawn = draw(guide, num_particles)
        again = score(guide, replayable(drawn, structure), num_particles)
    if not agree(drawn, again, structure, num_particles):
        raise HiddenRandomnessError(hidden_randomness("guide"))
    chosen: Execution = "loop"
    for candidate in candidates("leading", "folded", folds=folds):
        try:
            guide.execution = candidate
            with ValueWatch(num_particles if candidate == "leading" else None):
                found = draw(guide, num_particles)
                for site in found.values():
                    site.log_prob  # noqa: B018  computed here, watched
            if guide.execution != candidate:
                raise StructureError("it fails on copies of its data")
            guide.execution = "loop"
            values = replayable(found, structure)
            if agree(score(guide, values, num_particles), found, structure, num_particles):
                if candidate == "folded":
                    refuse_read_draws(guide, values)
                    check_wide(guide, values, structure, num_particles)
                chosen = candidate
                break
            guide.why_looped = OTHER_NUMBERS
        except Exception as error:  # a program may raise any error when its tensors have a further axis, or other data
            guide.why_looped = first_line(error)
    guide.execution, guide.base_draws = chosen, False
    values = values_of(drawn, structure)
    check_enumerated_axes(guide, values, drawn, structure)
    return {name: told_apart(drawn[name], structure.layout) for name in values}


def check_wide(program: Program, values: Values, structure: Structure, num_particles: int) -> None:
    """Raise where a noise block of folded particles differs from a loop: a program may depend on the size of its batch."""
    layout = structure.layout
    number = min(NOISE_BLOCK, MOST_BYTES // max(structure.bytes_per_particle, 1))
    if number < 2 * num_particles:
        return
    first = torch.arange(number) % num_particles
    wide, own = copy(program), copy(program)
    wide.execution, own.execution = "folded", "loop"
    many = {}
    for name, value in values.items():
        axis = value.ndim - layout.num_plates - layout.event_dims[name] - 1
        many[name] = value if value.shape[axis] == 1 else value.index_select(axis, first.to(value.device))
    record = score(wide, many, number)
    reference = score(own, values, num_particles)
    for start in (0, number - number % num_particles - num_particles):
        if not agree(reference, narrow_record(record, layout, start, num_particles), structure, num_particles):
            raise StructureError("on many copies of the data it gives other densities")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def candidates(*names: Execution, folds: bool) -> list[Execution]:
    return [name for name in names if folds or name != "folded"]


def replayable(record: Record, structure: Structure) -> dict[str, Tensor]:
    """The values with which a guide repeats its draws: the drawn values, or base draws for flows without an inverse."""
    values = values_of(record, structure)
    return {name: value if (base := record[name].base_draw) is None else base for name, value in values.items()}


def choose_for_model(
    model: Program, values: dict[str, Tensor], structure: Structure, num_particles: int, folds: bool
) -> tuple[Record, tuple[str, ...]]:
    """The densities of a loop at these values, and the sites drawn from the prior on which other sites depend."""
    model.execution = "loop"
    if structure.layout.enumerated:
        values = values_for_model(values, structure)
    else:  # draws of the prior are further apart than those of a narrow guide, and show more
        prior = draw(model, num_particles)
        values = {name: told_apart(prior[name], structure.layout) for name in structure.latents}
    with axes_by_name(structure.layout.enumerated):
        reference = score(model, values, num_particles)
    read = read_prior_sites(model, values, structure)
    values |= {name: reference[name].value for name in structure.prior_sites}
    if not agree(reference, score(model, values, num_particles), structure, num_particles):
        raise HiddenRandomnessError(hidden_randomness("model"))
    check_enumerated_axes(model, values, reference, structure)
    check_fixed_densities(model, values, structure)
    check_data_are_independent(model, values, reference, structure)
    if structure.layout.enumerated:  # again with latents that are further apart: a saturating function can hide a coupling
        prior = draw(ancestral(model), num_particles)
        apart = {name: told_apart(prior[name], structure.layout) for name in structure.latents}
        check_data_are_independent(model, apart, score(model, apart, num_particles), structure)
    for candidate in candidates("leading", "vmap", "folded", folds=folds):
        if candidate == "vmap" and structure.prior_sites:  # sites that are drawn while scoring cannot be drawn there
            continue
        try:
            model.execution = candidate
            with ValueWatch(num_particles if candidate == "leading" else None), warnings.catch_warnings():
                # torch's warning where it has no batched kernel under vmap (GRU cells) and uses a loop.
                warnings.filterwarnings("error", "There is a performance drop")
                record = score(model, values, num_particles)
                for site in record.values():
                    site.log_prob  # noqa: B018  computed here, watched
            if model.execution != candidate:
                raise StructureError("it fails on copies of its data")
            if agree(reference, record, structure, num_particles):
                if candidate == "folded":
                    refuse_read_draws(model, values)
                    check_wide(model, values, structure, num_particles)
                return reference, read
            model.why_looped = OTHER_NUMBERS
        except Exception as error:
            model.why_looped = first_line(error)
    model.execution = "loop"
    return reference, read


def choose_at_draws(guide: Program, model: Program, outside: Values, structure: Structure) -> tuple[Execution, Execution]:
    """The executions of guide and model where the latents outside the data have a value per particle.

    :param outside: (S, *plates, *event) by site. A few draws are run by the loop and by each candidate.
    """
    sites = [site for program in (guide, model) for site in program.run().values()]
    sizes = {size for site in sites for size in (*site.value.shape, *site.fn.shape())} | {structure.layout.batch_size}
    num_particles = next(k for k in range(2, len(sizes) + 3) if k not in sizes)
    values = {n: v[torch.arange(num_particles, device=v.device) % len(v)] for n, v in outside.items()}
    guide, model = copy(guide), copy(model)
    with torch.no_grad(), LayerWatch():
        guide.base_draws, guide.execution = True, "leading"
        try:
            with ValueWatch(num_particles):
                found = score(guide, values, num_particles)
                for site in found.values():
                    site.log_prob  # noqa: B018  computed here, watched
            guide.execution = "loop"
            again = score(guide, {**replayable(found, structure), **values}, num_particles)
            of_guide: Execution = "leading" if agree(again, found, structure, num_particles) else "loop"
        except Exception:  # a program may raise any error when its tensors have a further axis
            of_guide = "loop"
        model.execution = "loop"
        prior = score(model, values, num_particles)
        values |= {name: told_apart(prior[name], structure.layout) for name in structure.latents if name in prior}
        reference = score(model, values, num_particles)
        values |= {name: reference[name].value for name in structure.prior_sites}
        for candidate in candidates("leading", "vmap", folds=False):
            if candidate == "vmap" and structure.prior_sites:
                continue
            try:
                model.execution = candidate
                with ValueWatch(num_particles if candidate == "leading" else None):
                    record = score(model, values, num_particles)
                    for site in record.values():
                        site.log_prob  # noqa: B018
                if agree(reference, record, structure, num_particles):
                    return of_guide, candidate
            except Exception:
                continue
    return of_guide, "loop"


def read_prior_sites(model: Program, values: Values, structure: Structure) -> tuple[str, ...]:
    """The sites drawn from the prior if others depend on them, by the provenance of their densities; none otherwise."""
    names = frozenset(structure.prior_sites)
    if not names:
        return ()
    plain = model.plain_values(values, 0)
    drawn = {name: site.value for name, site in model.run(values=plain).items() if name in names}
    with LostProvenance() as lost:
        sites = model.run(values={**plain, **{n: track_provenance(v, frozenset({n})) for n, v in drawn.items()}})
        read = [get_provenance(site.log_prob()) for name, site in sites.items() if name not in names]
    return structure.prior_sites if names & frozenset().union(lost.names, *read) else ()


def hidden_randomness(what: str) -> str:
    return (
        f"the {what} gives other densities when it is run again at the same values: something in it is random besides "
        "its sample statements (torch.randn, a site hidden by poutine.block). Make every random draw a pyro.sample"
    )


def values_of(record: Record, structure: Structure) -> dict[str, Tensor]:
    """Drawn values by site, without enumerated sites, whose values every program lists."""
    parts = structure.layout.event_dims
    return {n: s.value for n, s in record.items() if n in parts and n not in structure.layout.enumerated}


def values_for_model(values: Values, structure: Structure) -> dict[str, Tensor]:
    return {n: v for n, v in values.items() if n in structure.model_sites}


def agree(reference: Record, candidate: Record, structure: Structure, num_particles: int) -> bool:
    """Whether two records have the same shapes, deterministic values, and log-densities per site, particle and datum."""
    layout = structure.layout
    if reference.keys() != candidate.keys():
        return False
    for name, ours in reference.items():
        theirs = candidate[name]
        drawn = not ours.is_observed and name not in layout.enumerated
        if drawn and (ours.value.shape != theirs.value.shape or not close(ours.value, theirs.value)):
            return False
        if not same_plates(ours, theirs, layout.num_plates):
            return False
        a, b = (masked_sum(s.log_prob, s.mask, layout) for s in (ours, theirs))
        if a.ndim < 2 or b.shape[-2:-1] not in ((num_particles,), (1,)):
            return False
        try:
            a, b = torch.broadcast_tensors(a, b)
        except RuntimeError:
            return False
        if not close(a, b):
            return False
    return True


def same_plates(reference: SiteRecord, candidate: SiteRecord, num_plates: int) -> bool:
    """Whether no axis of particles stands in the place of a plate. Densities that a mask makes zero do not show it."""
    ours, theirs = (padded(site.log_prob, num_plates).shape[-num_plates:] for site in (reference, candidate))
    return all(b in (a, 1) for a, b in zip(ours, theirs, strict=True))


def check_data_are_independent(model: Program, values: Values, reference: Record, structure: Structure) -> None:
    """Check that densities of a datum do not depend on the latents of other data, by changing those of some data.

    Each run changes the data that have a given bit in their index, since any two data differ in some bit. Changes of several
    data may cancel in a sum over them, so the first datum and the last are also changed alone.
    """
    layout = structure.layout
    if layout.datum_dim is None or layout.batch_size == 1:
        return
    index = torch.arange(layout.batch_size)
    by_bit = [(index >> bit) % 2 == 1 for bit in range((layout.batch_size - 1).bit_length())]
    for moved in [*by_bit, index == 0, index == layout.batch_size - 1]:
        mixed = {}
        for name, value in values.items():
            width = layout.num_plates + layout.event_dims[name]
            flags = moved.to(value.device).reshape((-1,) + (1,) * (layout.event_dims[name] - layout.datum_dim - 1))
            first, second = (value.narrow(-(width + 1), k, 1) for k in (0, 1))
            mixed[name] = torch.where(flags, second, first)
        check_unmoved(score(model, mixed, 1), reference, moved, structure)


def check_unmoved(record: Record, reference: Record, moved: Tensor, structure: Structure) -> None:
    layout = structure.layout
    for name, ours in record.items():
        a = masked_sum(ours.log_prob, ours.mask, layout)[..., 0, :]
        b = masked_sum(reference[name].log_prob, reference[name].mask, layout)
        expected = torch.where(moved.to(b.device), b[..., min(1, b.shape[-2] - 1), :], b[..., 0, :])
        if not close(a, expected):
            raise BatchCouplingError(
                f"the log-density of site '{name}' for one datum changes with the latents of another: something in the "
                "model mixes the batch (softmax or a mean over the batch axis, attention across data). Weights per datum "
                "do not exist for it; pass datum_plate=None to weigh the whole call as one datum"
            )
