"""The latents of one datum: their values, quantiles of their prior, and decoded means with other values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..densities import innermost
from ..errors import EnumerationError, NonFiniteError, OptionError, StructureError, quoted
from ..kernel import Call, Layout, Record, SiteRecord, padded
from ..noise import NOISE_BLOCK, Noise
from ..options import is_whole
from .means import free_sites, posterior_mean
from .naming import unit_numbers
from .per_unit import unit_names
from .refusals import refuse_without_draws

PRIOR_BLOCKS = 10  # noise blocks of NOISE_BLOCK draws each, for the quantiles
MOST_UNITS = 10  # most units that are changed by default


@dataclass(frozen=True)
class Start:
    """The latents of one datum, while its call is open. D units."""

    call: Call
    datum: int
    values: Mapping[str, Tensor]  # of all data, by latent site: (1, *plates, *event)
    names: tuple[str, ...]  # D
    movable: tuple[bool, ...]  # D, whether a unit is a real number that may change alone
    kind: str  # "mean" or "draw"

    @property
    def row(self) -> Tensor:
        """The values of the units of this datum, (1, D)."""
        return self.units_of(self.values)

    def units_of(self, values: Mapping[str, Tensor]) -> Tensor:
        """The values of the units of this datum, (K, D), from values of all data by site, (K, *plates, *event)."""
        parts = [self._of_datum(values[name], name) for name in self.values]
        parts = [part.reshape(len(part), -1) for part in parts]
        return torch.cat([part if part.is_floating_point() else part.float() for part in parts], 1)

    def with_units(self, rows: Tensor) -> dict[str, Tensor]:
        """Values of all data by site, (K, *plates, *event), with these values of the units, (K, D), for this datum."""
        values, first = {}, 0
        for name, value in self.values.items():
            values[name] = value.expand(len(rows), *value.shape[1:]).clone()
            place = self._of_datum(values[name], name)
            size = place[0].numel()
            place.copy_(rows[:, first : first + size].reshape(place.shape))
            first += size
        return values

    def _of_datum(self, value: Tensor, name: str) -> Tensor:
        """The part of a value that belongs to this datum, as a view."""
        layout = self.call.layout
        return value if layout.datum_dim is None else value.select(layout.datum_dim - layout.event_dims[name], self.datum)

    def chosen(self, units: Sequence[int | str] | int | str | None) -> list[int]:
        """The indices of the units to change."""
        if units is None:
            numbers = [number for number, movable in enumerate(self.movable) if movable][:MOST_UNITS]
        else:
            listed: Any = [units] if is_whole(units) or isinstance(units, str) else units
            numbers = unit_numbers(listed, self.names)
        fixed = [self.names[number] for number in numbers if not self.movable[number]]
        if fixed or not numbers:
            raise StructureError(
                f"{quoted(fixed or self.names[:MOST_UNITS])} cannot be changed alone over the real numbers (a discrete "
                "latent, or part of a simplex or a matrix): name units of a real-valued latent site with units=, or draw "
                "from the whole prior with pv.simulate"
            )
        return numbers

    def prior_quantiles(self, levels: Tensor, units: Sequence[int]) -> Tensor:
        """Quantiles (U, S) of draws from the prior of this datum."""
        draws = []
        for block in range(PRIOR_BLOCKS):
            self.call.set_noise(Noise.SIMULATION, block)
            draws.append(self.units_of(self.call.draw_prior(NOISE_BLOCK)[0])[:, units])
        quantiles = torch.cat(draws).quantile(levels.to(draws[0]), dim=0).T
        if not bool(quantiles.isfinite().all()):
            raise NonFiniteError(
                f"draws of the prior of {quoted(self.names[unit] for unit in units)} are NaN or infinite: look for NaN in "
                "the arguments or parameters"
            )
        return quantiles.contiguous()

    def likelihood_means(self, rows: Tensor) -> tuple[str, Tensor]:
        """The first observed site with a mean, and that mean, (K, X), for this datum with these units, (K, D)."""
        sites, means = set(), []
        for first, length in self.call.chunks(len(rows)):
            self.call.set_noise(Noise.GUIDE, 1)
            record = self.call.score(self.with_units(rows[first : first + length]), length)
            site, mean = first_mean(record, self.call.layout, self.datum)
            sites.add(site)
            means.append(mean.expand(length, *mean.shape[1:]))
        return sites.pop(), torch.cat(means)


def starting_point(call: Call, datum: int) -> Start:
    """The posterior mean where it is known for all latents, otherwise one draw of the guide."""
    refuse_without_draws(call)
    if call.layout.enumerated:
        raise EnumerationError(
            f"{quoted(call.layout.enumerated)} is summed out, so the model decodes a mixture, which is no single picture: "
            f"let the guide draw these sites, without infer={{'enumerate': ...}}"
        )
    if not (is_whole(datum) and 0 <= int(datum) < call.batch_size):
        raise OptionError(f"datum must be a whole number from 0 to {call.batch_size - 1}, got {datum!r}")
    datum = int(datum)
    call.one_by_one(model_too=False)
    call.set_noise(Noise.GUIDE, 0)
    guide = call.draw(1)
    drawn = {name: call.latent_values(guide)[name] for name in call.structure.latents}
    model = call.score(drawn, 1)
    means = known_means(call, guide, model)
    names: list[str] = []
    movable: list[bool] = []
    for name, value in drawn.items():
        size = value[0].numel() // call.batch_size
        names += unit_names(name, size)
        movable += [moves_freely(model[name].fns[0])] * size
    if means is None or not all(movable):
        return Start(call, datum, drawn, tuple(names), tuple(movable), "draw")
    return Start(call, datum, means, tuple(names), tuple(movable), "mean")


def known_means(call: Call, guide: Record, model: Record) -> dict[str, Tensor] | None:
    """E_q[z given x] by site, (1, *plates, *event), if all latents have a formula for it."""
    if len(free_sites(call, guide)) < len(call.structure.latents):
        return None
    means = {}
    for name in call.structure.latents:
        mean = posterior_mean(name, guide, model[name].fns[0])
        if mean is None or not bool(mean.isfinite().all()):
            return None
        value = guide[name].value
        means[name] = mean.to(value.dtype).expand(value.shape[1:]).unsqueeze(0)
    return means


def moves_freely(fn: Any) -> bool:
    """Whether the single numbers of a latent are real and may change one by one."""
    support: Any = getattr(innermost(fn), "support", None)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is not None and not support.is_discrete and not support.event_dim


def first_mean(record: Record, layout: Layout, datum: int) -> tuple[str, Tensor]:
    for name, site in record.items():
        if site.is_observed and site.value.numel():  # a factor has an empty value
            mean = mean_of_likelihood(site, layout, datum)
            if mean is not None:
                return name, mean
    raise StructureError(
        "no observed site has a likelihood with a mean (a Categorical and a flow have none), so there is nothing to decode"
    )


def mean_of_likelihood(site: SiteRecord, layout: Layout, datum: int) -> Tensor | None:
    """The mean for one datum, (K, X) or, where all particles are alike, (1, X); plates inside the datum are part of X."""
    try:
        means = [fn.mean for fn in site.fns]
    except NotImplementedError:
        return None
    mean = torch.cat([padded(mean, layout.num_plates + site.event_dim + 1) for mean in means])
    if bool(mean.isnan().all()):
        return None
    own = {frame.dim for frame in site.frames}
    for dim in range(-layout.num_plates, 0):  # from the left, so that the positions of later axes stay the same
        axis = dim - site.event_dim
        if dim == layout.datum_dim:
            mean = mean.select(axis, datum if mean.shape[axis] > 1 else 0)
        elif dim not in own:
            mean = mean.select(axis, 0)
    return mean
