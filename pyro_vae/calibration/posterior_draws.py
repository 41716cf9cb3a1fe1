"""Simulate data whose latents are posterior draws; raise for models for which they would not be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..densities import find_masks
from ..errors import ArgumentError, StructureError, SubsamplingError, quoted
from ..evidence import simulate_data
from ..kernel import Call, simulation
from ..tolerance import close

RUNS = 4  # runs of the model per simulation: two that simulate, two that test whether the model reads its observations


def simulated(
    call: Call,
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    data: Callable | None,
    datum_plate: str | None,
) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], int]:
    """The drawn sites, the arguments that hold the data, and the number of decoder evaluations.

    :param call: the call of the pair with the original arguments, with the latents outside the data and the subsamples.
    :raises StructureError: for a model whose data or masks change when it is run with the data that it drew.
    """
    if not call.structure.latents:
        raise StructureError("the guide draws no latent site of the model, so there is nothing to calibrate")
    if call.structure.subsampled:
        call.run_prior()  # so that the plates have drawn their subsamples
    options: Any = {
        "datum_plate": datum_plate,
        "seed": call.seed,
        "fixed": call.fixed,
        "indices": call.subsamples,
    }
    try:
        sites, args, kwargs = simulate_data(model, args, kwargs, data, **options)
    except ArgumentError as error:
        if call.structure.subsampled and data is None:
            raise SubsamplingError(
                "the model uses only a part of the data that it is given, so simulated values cannot replace all of "
                f"them ({error}): pass only the batch"
            ) from error
        raise
    again = simulation(model, args, kwargs, **options)[1]
    moved = [name for name, site in sites.items() if not (site.is_factor or site.is_fixed or alike(site, again[name]))]
    if moved:
        raise StructureError(
            f"{quoted(moved)} of the model change with what is observed: the model reads its observations elsewhere "
            "than in obs= (teacher forcing, statistics of the batch, a mask made from values), so latents drawn "
            "before the data are not posterior draws. Use the values that pyro.sample returns, or pass the values "
            "that the model reads as another argument"
        )
    return sites, args, kwargs, RUNS


def alike(one: Any, other: Any) -> bool:
    """Whether a site has the same value and the same masks in two runs."""
    if one.value.shape != other.value.shape or not close(one.value, other.value):
        return False
    pairs = zip(*(find_masks(site.fn, site.mask, site.value) for site in (one, other)), strict=True)
    return all(same_mask(a, b) for a, b in pairs)


def same_mask(one: Tensor | None, other: Tensor | None) -> bool:
    true = torch.ones((), dtype=torch.bool)
    one, other = (true if mask is None else mask.cpu() for mask in (one, other))
    return bool((one == other).all())
