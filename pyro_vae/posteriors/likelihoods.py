"""The likelihoods of a model at draws of its latents: which numbers are missing, their moments, draws of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError, StructureError
from ..kernel import Call, Record, SiteRecord
from ..noise import Noise
from .data_first import DataFirst, last_dims
from .function import Values, drawn_values

LOOKED_AT, HOLES = 3, 6  # draws with which missing values are found, and their noise block
Moments = dict[str, tuple[Tensor, Tensor]]


class Likelihoods:
    """The likelihoods of a call, by observed site: numbers (B, *rest), or (K, B, *rest) at draws.

    :ivar observed: the data.
    :ivar missing: bool, true for missing values: NaN, and masked values.
    :ivar has_mean: bool, whether the likelihood of the value has a mean.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        call.set_noise(Noise.POSTERIOR, HOLES)
        self._looked_at = drawn_values(call, LOOKED_AT)
        record = call.run_at(self._looked_at, LOOKED_AT)
        sites = [site for site in record.values() if site.is_observed and site.value.numel()]  # a factor has no value
        if not sites:
            raise StructureError("the model has no observed site, so no value can be missing: pass the data with obs=")
        self._data_first = {site.name: DataFirst(site, call.layout) for site in sites}
        self.observed = {site.name: self._observed(site, site.value)[0] for site in sites}
        self.missing = {site.name: self._holes(site) for site in sites}
        self._centres = {name: mean.mean(0) for name, (mean, _) in self._moments(record, LOOKED_AT).items()}
        self.has_mean = {name: ~centre.isnan() for name, centre in self._centres.items()}

    def _observed(self, site: SiteRecord, value: Tensor) -> Tensor:
        data_first = self._data_first[site.name]
        return data_first(last_dims(value, data_first.width).unsqueeze(0), 1)

    def _holes(self, site: SiteRecord) -> Tensor:
        missing = self._observed(site, site.value.isnan())
        for mask, inside in ((site.mask, 0), (site.event_mask, site.to_event_dim)):
            if mask is not None:
                mask = mask.reshape(-1, *last_dims(mask, self._call.layout.num_plates + inside).shape)
                mask = mask.reshape(*mask.shape, *[1] * (site.event_dim - inside))
                missing = missing | ~self._data_first[site.name](mask, len(mask))
        if not bool((missing == missing[:1]).all()):
            raise MaskError(
                f"the mask of '{site.name}' depends on draws of the latents, so it is not known which values are "
                "missing: use a mask that depends on the data only, fn.mask(~x.isnan())"
            )
        check_independent(site, missing[0])
        return missing[0]

    def unknown(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bool, missing values that depend on a masked latent, for which the model has no distribution.

        An example is a value after the end of a sequence.

        :param kept: where latents are not masked, by site that has a mask.
        """
        moved = {n: torch.where(kept[n], v, v.roll(1, 0)) if n in kept else v for n, v in self._looked_at.items()}
        pairs = [self._moments(self._run_at(values, LOOKED_AT), LOOKED_AT) for values in (self._looked_at, moved)]
        found = {}
        for name, (mean, variance) in pairs[0].items():
            other_mean, other_variance = pairs[1][name]
            same = mean.eq(other_mean) & (variance.eq(other_variance) | variance.isnan())
            found[name] = self.missing[name] & self.has_mean[name] & ~same.all(0)
        return found

    def moments(self, values: Values) -> Tensor:
        """Mean and second moment of missing values, (K, B, F), site by site, float64; zeros for observed values.

        A function of the latents, in the shapes of the program. The second moment is about a centre close to the mean, to
        avoid cancellation.
        """
        num_particles = len(next(iter(values.values()))) if values else 1
        canonical = {name: self._canonical(name, value) for name, value in values.items()}
        parts = []
        for first, length in self._call.chunks(num_particles):
            some = {name: value[first : first + length] for name, value in canonical.items()}
            columns = []
            for name, (mean, variance) in self._moments(self._run_at(some, length), length).items():
                second = variance + (mean - self._centres[name]).square()
                columns += [torch.where(self.missing[name], m, 0.0).reshape(length, m.shape[1], -1) for m in (mean, second)]
            parts.append(torch.cat(columns, 2))
        return torch.cat(parts)

    def _canonical(self, name: str, value: Tensor) -> Tensor:
        layout = self._call.layout
        return value.reshape(len(value), *[1] * (layout.num_plates - len(layout.plain_shapes[name])), *value.shape[1:])

    def _run_at(self, values: Mapping[str, Tensor], num_particles: int) -> Record:
        return self._call.run_at(values, num_particles, together=True)

    def _moments(self, record: Record, num_particles: int) -> Moments:
        """Mean and variance of each likelihood, (K, B, *rest) float64; NaN where it has none."""

        def each(name: str, moment: Callable[[Any], Tensor]) -> Tensor:
            return self._of_fns(name, record, num_particles, moment).double()

        return {name: (each(name, mean_of), each(name, variance_of)) for name in self.observed}

    def _of_fns(self, name: str, record: Record, num_particles: int, get: Callable[[Any], Tensor]) -> Tensor:
        """The results of `get` for the distributions of a site, (K, B, *rest)."""
        fns, data_first = record[name].fns, self._data_first[name]
        if len(fns) == 1:  # with a leading particle axis if the site depends on latents
            tensor = get(fns[0]).to(self._call.device)
            return data_first(tensor if tensor.ndim > data_first.width else tensor.unsqueeze(0), num_particles)
        return data_first(torch.stack([get(fn).to(self._call.device) for fn in fns]), num_particles)

    def split(self, columns: Tensor) -> Moments:
        """Split numbers (B, F) about `moments` by site: those about the mean, and those about the second moment."""
        parts = iter(columns.split([holes[0].numel() for holes in self.missing.values() for _ in range(2)], 1))
        return {n: (next(parts).reshape(m.shape), next(parts).reshape(m.shape)) for n, m in self.missing.items()}

    def stddev(self, name: str, mean: Tensor, second: Tensor) -> Tensor:
        """The standard deviation from the expectations of `moments`, by the law of total variance."""
        return (second - (mean - self._centres[name]).square()).clamp(min=0.0).sqrt()

    def _draw(self, fn: Any, num_samples: int) -> Tensor:
        """A draw with a leading axis of draws, also where the distribution does not depend on latents."""
        num_plates = self._call.layout.num_plates
        if fn.batch_shape[: max(len(fn.batch_shape) - num_plates, 0)] == (num_samples,):
            return fn.sample()
        drawn, width = fn.sample((num_samples,)), num_plates + fn.event_dim
        shape = last_dims(drawn[0], width).shape
        return drawn.reshape(num_samples, *[1] * (width - len(shape)), *shape)

    def drawn(self, values: Mapping[str, Tensor], num_samples: int) -> dict[str, Tensor]:
        """A draw of all missing values at each canonical draw of the latents, with the observed values, (S, B, *rest)."""
        record, draws = self._run_at(values, num_samples), {}
        for name in self.observed:
            one_by_one = len(record[name].fns) == num_samples > 1
            draw = (lambda fn: fn.sample()) if one_by_one else partial(self._draw, num_samples=num_samples)
            draws[name] = self._of_fns(name, record, num_samples, draw)
        return {n: torch.where(self.missing[n], d, self.observed[n].to(d)) for n, d in draws.items()}


def check_independent(site: SiteRecord, missing: Tensor) -> None:
    """Raise if missing values depend on observed ones given the latents: their mean is then not that of the likelihood."""
    if own := site.event_dim - site.to_event_dim:
        of_draws = missing.flatten(-own)
        if bool((of_draws.any(-1) != of_draws.all(-1)).any()):
            raise StructureError(
                f"single draws of '{site.name}' are partly missing, and the missing part depends on the observed part "
                "even given the latents: use a likelihood of independent numbers, such as NanMaskedNormal"
            )


def mean_of(fn: Any) -> Tensor:
    return known(lambda: fn.mean, fn)


def variance_of(fn: Any) -> Tensor:
    variance = known(lambda: fn.variance, fn)
    return torch.where(variance.isfinite(), variance, math.nan)  # that of heavy tails is infinite


def known(moment: Callable[[], Tensor], fn: Any) -> Tensor:
    try:
        return moment()
    except NotImplementedError:  # a flow
        return torch.full(fn.shape(), math.nan)
