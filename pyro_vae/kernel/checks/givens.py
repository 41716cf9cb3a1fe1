"""Givens are sites outside the data with one value. Errors for those whose value is drawn, and for those that are data."""

from collections.abc import Mapping

from torch import Tensor

from ...errors import DatumPlateError, StructureError
from ...tolerance import close
from ..programs import Program
from .structure import Structure


def check_fixed_values(guide: Program) -> None:
    """Raise for latents outside the data that the guide sets to a drawn point: they do not have one value."""
    if not guide.layout.fixed:
        return
    guide.run()
    before = dict(guide.fixed)
    guide.run()
    for name, value in before.items():
        if not close(value, guide.fixed[name]):
            raise StructureError(
                f"the latent site '{name}' has another value in every run, so there is no log p(x) given it: let the guide "
                "draw it from a distribution with a density, and pass datum_plate=None"
            )


def check_fixed_densities(model: Program, values: Mapping[str, Tensor], structure: Structure) -> None:
    """Raise for observed and known sites outside the plate that depend on latents inside it: they are data, not givens."""
    if not structure.layout.fixed:
        return
    first, second = (model.run(values=model.plain_values(values, k)) for k in (0, 1))
    for name in structure.given:
        kind = "latent" if name in structure.layout.known else "observed"
        judged = kind == "latent" or first[name].is_observed
        if judged and not close(first[name].log_prob(), second[name].log_prob()):
            raise DatumPlateError(
                f"the {kind} site '{name}' lies outside the datum plate '{structure.layout.datum_plate}' and depends on "
                "its latents, so it belongs to no one datum: put it into the plate, or pass datum_plate=None to weigh the "
                "whole call as one datum"
            )
