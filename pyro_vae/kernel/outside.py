"""The latents outside the plate of the data, and their densities, in a call that treats all data as one datum."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.poutine import unwrap
from torch import Tensor

from ..densities import innermost
from ..errors import DatumPlateError, EnumerationError, StructureError, SubsamplingError, quoted
from ..tolerance import close
from .calls import Call
from .checks.plates import INFER, plates_of
from .log_densities import LogDensities, reduce_to_datum
from .outside_draws import plain_value
from .programs import score
from .recorder import Site
from .records import Record


@dataclass(frozen=True)
class Outside:
    """The sites outside the plate of the data, in a call that treats all data as one datum.

    :ivar plate: the plate of the data.
    :ivar full_size: full size of that plate, which may be subsampled.
    :ivar latents: latent sites of the model outside it.
    :ivar observed: observed sites of the model outside it.
    :ivar drawn: draws of the guide outside it, including auxiliary draws that contain no latents of the data.
    :ivar inside: latent sites of the data that the guide has too.
    """

    plate: str
    full_size: int
    latents: tuple[str, ...]
    observed: tuple[str, ...]
    drawn: tuple[str, ...]
    inside: tuple[str, ...]

    @classmethod
    def of(cls, call: Call, datum_plate: str | None) -> Outside:
        """From one plain run of guide and model. `datum_plate` is a name, or `INFER` for that of the observed sites."""
        guide = {n: s for n, s in call.guide.run().items() if not s.is_observed}
        model = call.model.run(values={n: s.value for n, s in guide.items()})
        plate = datum_plate if datum_plate not in (None, INFER) else plate_of_observed(model)
        assert plate is not None
        inside = {n for side in (guide, model) for n, s in side.items() if plate in plates_of(s)}
        if not any(n in inside and s.is_observed for n, s in model.items()):
            raise DatumPlateError(
                f"no observed site lies in the plate '{plate}': name the plate of the data, datum_plate='...'"
            )
        frames = [plates_of(s)[plate] for n, s in model.items() if n in inside]
        # The joint draw of AutoDiagonalNormal contains latents of both kinds, which it draws independently.
        diagonal = isinstance(unwrap(call.guide.fn), AutoDiagonalNormal)
        split = [n for n in guide if diagonal and n.startswith("_") and n.endswith("_latent")]
        outside = cls(
            plate=plate,
            full_size=max(int(f.full_size if f.full_size is not None else f.size) for f in frames),
            latents=tuple(n for n, s in model.items() if not s.is_observed and n not in inside),
            observed=tuple(n for n, s in model.items() if s.is_observed and n not in inside),
            drawn=tuple(n for n in guide if n not in inside and n not in split),
            inside=tuple(n for n, s in model.items() if not s.is_observed and n in inside and n in guide),
        )
        if not outside.latents:
            raise StructureError(
                f"no latent lies outside the plate '{plate}': the data are independent, and log p(x_n given the others) is "
                "log p(x_n): use AdaptiveImportanceSampling"
            )
        both = {*call.structure.guide_enumerated, *call.structure.model_enumerated} & {*outside.latents, *outside.drawn}
        if both:
            raise EnumerationError(
                f"the latents {quoted(sorted(both))} outside the plate '{plate}' are enumerated, and draws of them are "
                "needed here: remove infer={'enumerate': ...} and let the guide draw them"
            )
        for name in (*outside.latents, *outside.observed):
            if any(f.size != (f.full_size or f.size) for f in plates_of(model[name]).values()):
                raise SubsamplingError(
                    f"the site '{name}' lies in a subsampled plate, of which all is needed: pass all of it"
                )
        refuse_joint_draws(call.guide.fn, guide, outside)
        return outside

    def values(self, record: Record) -> dict[str, Tensor]:
        """The draws outside the plate, (K, *plates, *event) by site."""
        return {n: record[n].value for n in self.drawn if n in record}

    def plain_values(self, call: Call, values: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """The values of particle `k` in the shapes of a plain run, for `Pair.open(known=...)`."""
        sites = {**call.model.run(values=call.guide.plain_values(values, k)), **call.guide.run()}
        return {n: plain_value(sites[n], v, k, call.layout.num_plates) for n, v in values.items() if n in sites}

    def log_densities(self, weights: LogDensities) -> tuple[Tensor, Tensor, Tensor]:
        """(log p of the latents, of the observations, log q) outside the plate, (K,) each."""
        inside = {*self.inside, *(f"{n}_unconstrained" for n in self.inside)}
        ours = [n for n in weights.scored if n not in inside]
        sides = (self.latents, weights.model), (self.observed, weights.model), (ours, weights.guide)
        latents, observed, drawn = (total(weights, names, record) for names, record in sides)
        return latents, observed, drawn

    def check_drawn_first(self, call: Call, guide: Record, model: Record, num_particles: int) -> None:
        """Raise for guides that draw latents outside the plate given latents of the data: their density is not known."""
        if not self.inside or isinstance(unwrap(call.guide.fn), AutoDiagonalNormal):
            return
        again = score(call.guide, self.values(guide), num_particles)  # other latents of the data
        records = (LogDensities(call.structure, side, model, num_particles) for side in (guide, again))
        before, after = (self.log_densities(weights)[2] for weights in records)
        if not close(before, after):
            raise StructureError(
                f"the guide draws {quoted(self.latents)}, which lie outside the plate '{self.plate}', given latents of the "
                "data, so that their own density is not known: draw them first"
            )


def plate_of_observed(model: Mapping[str, Site]) -> str:
    """The plate common to all observed sites, except those without a plate."""
    observed = [set(plates_of(s)) for s in model.values() if s.is_observed and plates_of(s)]
    common = sorted(set.intersection(*observed)) if observed else []
    if len(common) != 1:
        found = f"the plates {quoted(common)} hold" if common else "no plate holds"
        raise DatumPlateError(f"{found} all observed sites: say which one holds the data to leave out, datum_plate='...'")
    return common[0]


def refuse_joint_draws(program: Any, guide: Mapping[str, Site], outside: Outside) -> None:
    """Raise for guides in which one draw outside the plate sets latents of the data: these have no separate density."""
    if isinstance(unwrap(program), AutoDiagonalNormal):
        return
    points = [n for n in outside.inside if isinstance(innermost(guide[n].fn), dist.Delta)]
    joint = [n for n in points if f"{n}_unconstrained" not in guide]
    if joint and any(n not in outside.latents for n in outside.drawn):
        raise StructureError(
            f"the guide draws {quoted(joint)}, latents of the data, in one draw with those outside the plate "
            f"'{outside.plate}', so that their density given these is not known: use AutoNormal, or an AutoGuideList "
            "with a separate guide for each of the two"
        )


def total(weights: LogDensities, names: Collection[str], record: Record) -> Tensor:
    log_prob = torch.zeros(1, device=next(iter(weights.model.values())).value.device)
    for name in names:
        term = reduce_to_datum(weights.masked(name, record), weights.layout)
        if term.ndim > 2:
            raise EnumerationError(
                f"the site '{name}' outside the plate of the data depends on an enumerated latent inside of it: put it into "
                "the plate"
            )
        log_prob = log_prob + term.squeeze(-1)
    return log_prob.expand(weights.num_particles)
