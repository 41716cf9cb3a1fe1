"""The latent sites of a model, for guides that are built from it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import isolation
from ..arguments import check_signature, devices_of
from ..errors import DatumPlateError, SubsamplingError, quoted
from ..noise import Noise, noise_seed, seed_torch
from ..options import plate_or_none
from .checks.failures import check_program, named_failure
from .checks.plates import INFER, batch_shape, plates_of
from .checks.structure import is_imputed
from .programs import Program
from .recorder import Layout, Site


@torch.no_grad()
def latent_sites(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], datum_plate: str | None
) -> tuple[dict[str, Site], dict[str, Site], Layout]:
    """The latents that a guide must draw, in the model's order, from two runs under the prior; and the layout of the data.

    Latents that the model enumerates, and the missing half of `obs_mask`, are left out.
    """
    check_program("model", model)
    plate_or_none(datum_plate)
    check_signature("model", model, args, kwargs)
    devices = devices_of((args, kwargs), isolation.modules_of(model))
    with named_failure("model", model, args, kwargs), isolation.isolated(model, devices=devices):
        seed_torch(noise_seed(0, Noise.PROBE, 0))
        drawn: set[str] = set()  # plates whose indices are not given

        def draw_indices(name: str, fn: Any) -> Tensor:
            drawn.add(name)
            return fn.sample()

        taken: Any = {"indices": {}, "draw_indices": draw_indices, "fixed": {}, "full_sizes": {}}
        program = Program(model, args, kwargs, **taken)
        sites, again = program.run(), program.run()
        refuse_given_subsamples(sites, drawn)
    left_out = {n for n, s in sites.items() if s.is_observed or s.is_enumerated or is_imputed(n, sites)}
    latents = {n: s for n, s in sites.items() if n not in left_out}
    return latents, again, layout_of(sites, latents, datum_plate)


def layout_of(sites: Mapping[str, Site], latents: Mapping[str, Site], datum_plate: str | None) -> Layout:
    num_plates = max((len(batch_shape(s)) for s in sites.values()), default=0)
    num_plates = max([num_plates, *(-frame.dim for s in sites.values() for frame in plates_of(s).values())])
    if datum_plate is None:
        return Layout(num_plates)
    plate = plate_of_data(sites, latents) if datum_plate == INFER else datum_plate
    frames = [plates_of(s)[plate] for s in sites.values() if plate in plates_of(s)]
    if not frames:
        raise DatumPlateError(f"no site of the model lies in the plate '{plate}': name another, datum_plate='...'")
    return Layout(num_plates, datum_plate=plate, datum_dim=frames[0].dim)


def plate_of_data(sites: Mapping[str, Site], latents: Mapping[str, Site]) -> str:
    """The plate common to all observed sites; of several, the one also common to all latents."""
    common = shared([s for s in sites.values() if s.is_observed and not s.is_factor])
    found = common if len(common) == 1 else shared([*latents.values()]) & common
    if len(found) != 1:
        what = f"the plates {quoted(sorted(common))} hold" if common else "no plate holds"
        raise DatumPlateError(
            f"{what} all observed sites: say which one holds the data, datum_plate='...', or pass datum_plate=None for a "
            "guide of the whole call"
        )
    return found.pop()


def shared(sites: list[Site]) -> set[str]:
    return set.intersection(*(set(plates_of(s)) for s in sites)) if sites else set()


def refuse_given_subsamples(sites: Mapping[str, Site], drawn: set[str]) -> None:
    for site in sites.values():
        for frame in site.frames:
            if frame.full_size not in (None, frame.size) and frame.name not in drawn:
                raise SubsamplingError(
                    f"plate '{frame.name}' is given its subsample, and a guide made from the model would not know which: "
                    f"let the model draw it, pyro.plate('{frame.name}', {frame.full_size}, subsample_size={frame.size}), or "
                    "write the plate for the batch alone and scale both, pyro.poutine.scale(model, N / B) and "
                    "pyro.poutine.scale(guide, N / B)"
                )
