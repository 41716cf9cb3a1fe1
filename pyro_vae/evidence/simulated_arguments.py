"""Replace the arguments that a model observes by simulated values."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..kernel import simulation
from ..options import check_function

SAY_WHERE = "Say with data=lambda observed: (...) how simulated values become the model's arguments"


def check_data_option(data: Any) -> None:
    if data is not None:
        check_function("data", data, "a function from simulated values by observed site to the model's arguments, or None")


def simulate_data(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    data: Callable[[dict[str, Tensor]], tuple[Any, ...]] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    """The drawn sites, and the model's arguments with the simulated values, placed by `data` if it is given."""
    if data is None:
        return simulate_arguments(model, args, kwargs, **options)
    sites = simulation(model, args, kwargs, **options)[1]
    return sites, data({n: s.value for n, s in sites.items() if s.is_observed and not (s.is_factor or s.is_fixed)}), {}


def simulate_arguments(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], **options: Any
) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    """Simulate by `kernel.simulation`, and return the arguments with the drawn values in place of the observed ones.

    :raises ArgumentError: where no argument, or more than one, holds what a site observed.
    """
    before, drawn = simulation(model, args, kwargs, **options)
    filled: dict[int | str, Any] = dict(enumerate(args))
    for name, value in kwargs.items():
        filled[name] = value
    given, taken = dict(filled), set[int | str]()
    for name, site in drawn.items():
        if site.is_observed and not (site.is_factor or site.is_fixed):
            place = place_of(name, before[name].value, given)
            observed = given[place]
            value = site.value.reshape(observed.shape)
            value = torch.where(observed.isnan(), observed.to(value), value)  # a missing value (NaN) stays missing
            filled[place] = value.to(observed.dtype)
            if place in taken or not same_numbers(filled[place].to(value), value):
                why = "is observed by another site too" if place in taken else f"({observed.dtype}) cannot hold them"
                raise ArgumentError(f"the argument that '{name}' observes {why}. {SAY_WHERE}")
            taken.add(place)
    return drawn, tuple(filled[place] for place in range(len(args))), {name: filled[name] for name in kwargs}


def place_of(name: str, observed: Tensor, given: Mapping[int | str, Any]) -> int | str:
    """Find the argument, by its number or name, that holds the observed values, in their shape or another."""
    places = [
        place
        for place, arg in given.items()
        if isinstance(arg, Tensor)
        and arg.numel() == observed.numel()
        # the other axes may be flattened, not transposed
        and (arg.shape == observed.shape or arg.shape[:1] == observed.shape[:1])
        and same_numbers(arg.flatten().to(observed), observed.flatten())
    ]
    if len(places) != 1:
        raise ArgumentError(
            f"{len(places)} of the {len(given)} arguments hold what the site '{name}' observes, where one was "
            f"expected (an argument that the model rescales first is none). {SAY_WHERE}"
        )
    return places[0]


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN being equal to NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
