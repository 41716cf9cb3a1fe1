"""Draw data from a model alone."""

from collections.abc import Callable, Mapping
from typing import Any

from ..arguments import check_signature, devices_of
from ..noise import Noise, checked_seed, noise_seed, seed_torch
from . import isolation
from .checks.plates import find_layout
from .programs import Program
from .recorder import Site


def simulation(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], *, datum_plate: str | None, seed: int | None
) -> tuple[dict[str, Site], dict[str, Site]]:
    """The sites of two plain runs of the model: with the observed values as given, and with drawn ones."""
    check_signature("model", model, args, kwargs)
    seed = checked_seed(seed)
    devices = devices_of((args, kwargs), isolation.modules_of(model))
    with isolation.isolated(model, devices=devices):
        seed_torch(noise_seed(seed, Noise.SIMULATION, 0))
        program = Program(model, args, kwargs, indices={}, draw_indices=lambda name, fn: fn.sample())
        before = program.run()
        program.layout = find_layout(model, {}, before, datum_plate)
        return before, program.run(redraw_observed=True)
