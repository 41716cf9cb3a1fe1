"""Draw data from a model: from its prior, or at a draw of the guide."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from . import isolation
from .calls import GUIDE, SIMULATION
from .checks.plates import find_layout
from .pairs import Pair, check_signature, checked_seed, devices_of
from .programs import Program, ancestral
from .recorder import Site

SAY_WHERE = "Say with data=lambda observed: (...) how simulated values become the model's arguments"


def simulate_sites(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], *, datum_plate: str | None, seed: int | None
) -> dict[str, Site]:
    """One plain run of the model that draws its observed sites too."""
    return simulation(model, args, kwargs, datum_plate=datum_plate, seed=seed)[1]


def simulate_arguments(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], *, datum_plate: str | None, seed: int | None
) -> tuple[dict[str, Site], tuple[Any, ...]]:
    """Simulate, and return the arguments with each drawn value in place of the observed argument.

    :raises ArgumentError: where no argument, or more than one, holds what a site observed.
    """
    before, drawn = simulation(model, args, kwargs, datum_plate=datum_plate, seed=seed)
    filled, taken = list(args), set[int]()
    for name, site in drawn.items():
        if site.is_observed and not site.is_factor:
            place = place_of(name, before[name].value, args)
            value = site.value.reshape(args[place].shape)
            value = torch.where(args[place].isnan(), args[place].to(value), value)  # a hole stays a hole
            filled[place] = value.to(args[place].dtype)
            if place in taken or not same_numbers(filled[place].to(value), value):
                why = "is observed by another site too" if place in taken else f"({args[place].dtype}) cannot hold them"
                raise ArgumentError(f"the argument that '{name}' observes {why}. {SAY_WHERE}")
            taken.add(place)
    return drawn, tuple(filled)


def simulation(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], *, datum_plate: str | None, seed: int | None
) -> tuple[dict[str, Site], dict[str, Site]]:
    """The sites with the observed values as given, and with drawn ones."""
    check_signature("model", model, args, kwargs)
    seed = checked_seed(seed)
    devices = devices_of((args, kwargs), isolation.modules_of(model))
    with isolation.isolated(model, devices=devices):
        isolation.seed_torch(isolation.noise_seed(seed, SIMULATION, 0))
        program = Program(model, args, kwargs, indices={}, draw_indices=lambda name, fn: fn.sample())
        before = program.run()
        program.layout = find_layout(model, {}, before, datum_plate)
        return before, program.run(redraw_observed=True)


def place_of(name: str, observed: Tensor, args: tuple) -> int:
    """Find the argument that holds the observed values, in their shape or another."""
    places = [
        place
        for place, arg in enumerate(args)
        if isinstance(arg, Tensor)
        and arg.numel() == observed.numel()
        and (arg.shape == observed.shape or arg.shape[:1] == observed.shape[:1])  # the rest may be flattened, not turned
        and same_numbers(arg.flatten().to(observed), observed.flatten())
    ]
    if len(places) != 1:
        raise ArgumentError(
            f"{len(places)} of the {len(args)} positional arguments hold what the site '{name}' observes, where one was "
            f"expected (an argument that the model rescales first is none). {SAY_WHERE}"
        )
    return places[0]


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN being equal to NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def reconstruct_sites(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    datum_plate: str | None,
    prior_sites: Collection[str],
    seed: int | None,
) -> dict[str, Site]:
    """One plain run of the model at one plain draw of the guide; what they enumerate is drawn."""
    pair = Pair(model, guide, datum_plate=datum_plate, prior_sites=prior_sites, check_support=False)
    with pair.open(args, kwargs, seed) as call:
        call.set_noise(GUIDE, 0)
        drawn = ancestral(call.guide).run()
        return ancestral(call.model).run(values={n: s.value for n, s in drawn.items() if not s.is_observed})
