"""All continuous latents of a datum as one unconstrained vector u of D numbers, and the log joint as a function of it."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributions.transforms import IndependentTransform, identity_transform

from ..errors import LocalFitError
from ..kernel import Call, LogDensities, Record, reduce_to_datum
from .bijections import find_transforms, limits, num_values
from .circle import Wrapped, log_window, mean_direction, some_turn, wrapped
from .gradients import REMEDY, finite_rows


class LatentSpace:
    """The bijection between latent values by site, (K, *plates, *event), and vectors u, (K, B, D).

    A masked latent enters no density. Here it gets a standard normal density, which integrates to one. This leaves p(x)
    unchanged, and makes the density proper.

    :ivar sites: the shape of each latent site in the space, (*plates, *event), in the order of the numbers of u.
    :ivar transforms: from the space to the values of each site.
    :ivar dim: D.
    :ivar centre: (B, D), the centre from which turns of an angle are counted, NaN for other latents; `None` without angles.
    :ivar num_values: (D,), the number of values of a discrete latent, for which u is the index of the value; zero for
        others. `None` without discrete latents.
    :ivar cut: (B,), the highest log p(x, u) so far at an end of the range of floats where it rises; mass beyond is lost.
    :ivar bent: (B,), log of the largest mass so far by which the linear continuation beyond an end may be wrong.
    :raises LocalFitError: for discrete latents that are not enumerated, for latents that depend on an enumerated site, for
        a support that depends on another latent, for a mask that depends on drawn values.
    """

    def __init__(self, call: Call, guide: Record, model: Record, *, discrete: bool = False) -> None:
        """`guide` is any draw of the guide and `model` the model's record of it; both have the masks.

        :param discrete: allow discrete latents whose values can be listed.
        """
        self.call, self.layout = call, call.layout
        self._guide, self._model = call.first_particle(guide), call.first_particle(model)
        values = call.latent_values(guide)
        self.transforms = find_transforms(call, discrete)
        self.sites: dict[str, torch.Size] = {}
        ends: list[tuple[float, float]] = []  # of each dimension
        counts: list[int] = []
        for name, value in values.items():
            width = self.layout.num_plates + self.layout.event_dims[name]
            if value.ndim != width + 1:
                raise LocalFitError(f"the latent site '{name}' depends on an enumerated site. {REMEDY}")
            self.sites[name] = self.transforms[name].inv(value).shape[1:]
            size = self.sites[name].numel() // self.layout.batch_size
            ends += [limits(self.transforms[name], value.dtype)] * size
            counts += [num_values(self.transforms[name])] * size
        self.dim = len(ends)
        bounded = any(low > -math.inf for low, _ in ends)
        dtype = next((value.dtype for value in values.values() if value.is_floating_point()), torch.get_default_dtype())
        self.dtype = dtype
        self._limits = torch.tensor(ends, dtype=dtype, device=call.device).T if bounded else None
        self.num_values = torch.tensor(counts, device=call.device) if any(counts) else None
        self._kept: dict[str, Tensor] = {}  # where a site is not masked, broadcastable to its values
        self.cut = torch.full((self.layout.batch_size,), -math.inf, dtype=torch.float64, device=call.device)
        self.bent = self.cut.clone()
        self.index: Tensor | None = None  # of the data in a larger call, for error messages
        weights = call.weigh(guide, model, len(next(iter(values.values()))))
        self.centre = self._directions(values, weights)
        self.masked = self._masked_dims(weights)

    def compare_parts_at(self, draw: Callable[[int], Tensor]) -> None:
        """Check parts of the call at draws of a proposal too: a guide may be too narrow to cover the posterior.

        :param draw: function from a number of particles K to u, (K, B, D).
        """
        self.call.further = lambda num_particles: self.unpack(draw(num_particles))[0]

    def for_part(self, part: Call, kept: Tensor) -> "LatentSpace":
        """The space of the data with these indices, in a call for them."""
        guide = part.draw_latents(1)
        space = LatentSpace(part, guide, part.score(part.latent_values(guide), 1))
        if self.centre is not None:
            space.centre_at(self.centre[kept])
        space.cut, space.bent, space.index = self.cut[kept], self.bent[kept], kept
        return space

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """Where latents are not masked, for sites with a mask, broadcastable to (K, *plates, *event)."""
        return self._kept

    def pack(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Values by site to (u, log |d values / d u|), shapes (K, B, D) and (K, B)."""
        vectors, log_det = [], torch.zeros((), device=self.call.device)
        for name in self.sites:
            u = self.transforms[name].inv(values[name])
            log_det = log_det + self._log_det(name, u, values[name])
            vectors.append(self.flat(u).to(self.dtype))  # draws of the prior may have another dtype than those of the guide
        return torch.cat(vectors, -1), log_det

    def supports(self, values: Mapping[str, Tensor]) -> Tensor:
        """Whether the values lie inside their supports, (K, B): the inverse of a bijection may clamp silently."""
        outside = torch.zeros((), dtype=torch.long, device=self.call.device)
        for name, value in values.items():
            if self.transforms[name] != identity_transform:
                wrong = (~self.transforms[name].codomain.check(value)).long()
                extra = wrong.ndim - 1 - self.layout.num_plates
                outside = outside + reduce_to_datum(wrong.flatten(-extra).sum(-1) if extra else wrong, self.layout)
        return (outside == 0).expand(1, self.layout.batch_size)

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The inverse of `pack`, with the same log-Jacobian."""
        parts = self.split(u)
        values = {name: self.transforms[name](part) for name, part in parts.items()}
        log_det = torch.zeros((), device=self.call.device)
        for name, part in parts.items():
            log_det = log_det + self._log_det(name, part, values[name])
        return values, log_det

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """u, (K, B, D), by site, (K, *plates, *event), still unconstrained."""
        sizes = [shape.numel() // self.layout.batch_size for shape in self.sites.values()]
        parts = u.split(sizes, -1)
        return {n: self._unflat(part, shape) for part, (n, shape) in zip(parts, self.sites.items(), strict=True)}

    def join(self, by_site: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([self.flat(by_site[name].reshape(-1, *shape)) for name, shape in self.sites.items()], -1)

    def by_site(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One u for each datum, (B, D), as values and as unconstrained values by site, (*plates, *event)."""
        parts = self.split(u.unsqueeze(0))
        return {n: self.transforms[n](part)[0] for n, part in parts.items()}, {n: part[0] for n, part in parts.items()}

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(x, u), shape (K, B), the Jacobian included."""
        return self.log_joint_and_prior(u)[0]

    def log_joint_and_prior(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(log p(x, u), log p(u)), shape (K, B) each."""

        def at(u: Tensor) -> tuple[Tensor, ...]:
            values, log_det = self.unpack(u)
            return self.densities(self.call.score(values, len(u)), u, log_det)

        known = finite_rows(u)  # a model given NaN may raise rather than return NaN
        log_joint, log_prior = self._extended(at, torch.where(known.unsqueeze(-1), u, 0.0))
        return torch.where(known, log_joint, -math.inf), torch.where(known, log_prior, -math.inf)

    def log_guide(self, u: Tensor) -> Tensor:
        """log q(u given x), shape (K, B), the Jacobian included."""

        def at(u: Tensor) -> tuple[Tensor, ...]:
            values, log_det = self.unpack(u)
            return (self._with_filler(self.call.log_guide(values, len(u), self._model) + log_det, u),)

        return self._extended(at, u)[0]

    def _extended(self, at: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor) -> tuple[Tensor, ...]:
        """Log-densities at u, continued linearly where floats can no longer distinguish the values.

        Towards an end of the support, the tails of a density are powers of the distance, so they are linear in u: exp(a u)
        for a Gamma of concentration a. Without the continuation, much of a Gamma of small concentration would be lost. A
        log-density that still rises at the end must fall somewhere beyond; it is cut off there, see `cut`. If its slope
        still changes at the end, the mass under the lines with the last two slopes differs by `bent`.
        """
        if self._limits is None:
            return at(u)
        near = torch.minimum(torch.maximum(u, self._limits[0]), self._limits[1])
        found = at(near)
        beyond = u - near
        if not bool((beyond != 0).any()):
            return found
        length = beyond.abs().amax(-1, keepdim=True)
        step = beyond / torch.where(length > 0, length, 1.0)
        with torch.no_grad():  # gradients at the very end of the floats overflow
            inner, further_in = at(near - step), at(near - 2 * step)
        far = length.squeeze(-1)

        def slope_of(f: Tensor, g: Tensor) -> Tensor:
            known = (far > 0) & f.isfinite() & g.isfinite()
            return (torch.where(known, f, 0.0) - torch.where(known, g, 0.0)).detach()

        slopes = [slope_of(f, g) for f, g in zip(found, inner, strict=True)]
        end, slope, slope_before = found[0].detach(), slopes[0], slope_of(inner[0], further_in[0])
        self.cut = torch.maximum(self.cut, torch.where(slope > 0, end, -math.inf).amax(0).to(self.cut))
        falls = (slope < 0) & (slope_before < 0)  # the mass under exp(end + slope t), t > 0, is exp(end) / |slope|
        differ = torch.where(falls, (1 / slope - 1 / slope_before).abs(), 0.0)
        self.bent = torch.maximum(self.bent, torch.where(falls, end + differ.log(), -math.inf).amax(0).to(self.bent))
        return tuple(torch.where(s > 0, -math.inf, f + far * s) for f, s in zip(found, slopes, strict=True))

    def end_in_doubt(self, log_evidence: Tensor, negligible: float, share: float) -> Tensor:
        """(B,), whether mass beyond the ends of the range of floats may matter.

        :param negligible: nats below log p(x) at which a density that rises there does not matter.
        :param share: share of p(x) by which the lines of the last two slopes may differ.
        """
        return (self.cut > log_evidence - negligible) | (self.bent > log_evidence + math.log(share))

    def draw_prior(self, num_particles: int) -> tuple[Tensor, Tensor, Tensor]:
        """u from the prior, (K, B, D), with log p(x, u) and log p(u), (K, B) each."""
        values, model = self.call.draw_prior(num_particles)
        u, log_det = self.pack(values)
        u = self.filled(u)
        return u, *self.densities(model, u, log_det)

    def filled(self, u: Tensor) -> Tensor:
        """Replace masked latents by draws of their filler, and angles by one of their turns, see `_with_filler`."""
        if self.centre is not None:
            u = torch.where(self.centre.isnan(), u, some_turn(u, self.centre.nan_to_num()))
        if self.masked is None:
            return u
        filler = torch.randn_like(u)
        if self.num_values is not None:
            codes = (torch.rand_like(u) * self.num_values).floor()
            filler = torch.where(self.num_values > 0, codes, filler)
        return torch.where(self.masked, filler, u)

    def densities(self, model: Record, u: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """(log p(x, u), log p(u)), shape (K, B) each, from the model's record at u."""
        weights = self.call.weigh(self._guide, model, len(u))
        return self._with_filler(weights.log_joint + log_det, u), self._with_filler(weights.log_marginal_prior + log_det, u)

    def _with_filler(self, log_density: Tensor, u: Tensor) -> Tensor:
        """Add the density of masked latents, standard normal or, where they are discrete, uniform, and that of turns."""
        if self.centre is not None:
            no_turns = self.centre.isnan() if self.masked is None else self.centre.isnan() | self.masked
            log_density = log_density + torch.where(no_turns, 0.0, log_window(u, self.centre.nan_to_num())).sum(-1)
        if self.masked is None:
            return log_density
        filler = -0.5 * (u.square() + math.log(2 * math.pi))
        if self.num_values is not None:
            filler = torch.where(self.num_values > 0, -self.num_values.clamp(min=1).log(), filler)
        return log_density + torch.where(self.masked, filler, torch.zeros_like(filler)).sum(-1)

    def _masked_dims(self, weights: LogDensities) -> Tensor | None:
        """(B, D), true where a latent is masked on either side, or `None`."""
        for name in self.sites:
            if (kept := weights.kept_places(name)) is not None:
                if bool((kept != kept[:1]).any()):
                    raise LocalFitError(f"the mask of the latent site '{name}' depends on drawn values. {REMEDY}")
                self._kept[name] = kept[:1]
        if not self._kept:
            return None
        true = torch.ones((), dtype=torch.bool, device=self.call.device)
        flags = []
        for name, shape in self.sites.items():
            kept = narrowed(self._kept.get(name, true), 1 + len(shape))
            flags.append(self.flat(~kept.expand(1, *shape)))
        return torch.cat(flags, -1)[0]

    def centre_at(self, u: Tensor) -> None:
        """Count the turns of angles from u, (B, D)."""
        if self.centre is not None:
            self.centre = torch.where(self.centre.isnan(), math.nan, wrapped(u))

    def near_centre(self, u: Tensor) -> Tensor:
        """u, (B, D), with angles at the centre."""
        return u if self.centre is None else torch.where(self.centre.isnan(), u, self.centre)

    def _directions(self, values: Mapping[str, Tensor], weights: LogDensities) -> Tensor | None:
        """(B, D), the mean direction of the guide's draws of angles, by weight, NaN for other latents; `None` without."""
        if Wrapped() not in self.transforms.values():
            return None
        u = torch.cat([self.flat(self.transforms[name].inv(value)) for name, value in values.items()], -1)
        known = all(weights.model[name].value.shape == value.shape for name, value in values.items())
        log_weight = weights.log_weight if known else torch.zeros_like(u[..., 0])
        shares = log_weight.detach().softmax(0).unsqueeze(-1).nan_to_num().to(u.dtype).expand(u.shape)
        angles = [
            torch.full((size,), self.transforms[name] == Wrapped(), device=u.device)
            for name, shape in self.sites.items()
            for size in [shape.numel() // self.layout.batch_size]
        ]
        return torch.where(torch.cat(angles), mean_direction(u, shares), math.nan)

    def flat(self, u: Tensor) -> Tensor:
        """The numbers of one site, (K, *plates, *event) to (K, B, numbers)."""
        if self.layout.datum_dim is None:
            return u.reshape(len(u), 1, -1)
        moved = u.movedim(1 + self.layout.num_plates + self.layout.datum_dim, 1)
        return moved.reshape(*moved.shape[:2], -1)

    def _unflat(self, part: Tensor, shape: torch.Size) -> Tensor:
        if self.layout.datum_dim is None:
            return part.reshape(len(part), *shape)
        axis = self.layout.num_plates + self.layout.datum_dim
        moved = torch.Size((shape[axis], *shape[:axis], *shape[axis + 1 :]))
        return part.reshape(len(part), *moved).movedim(1, 1 + axis)

    def _log_det(self, name: str, u: Tensor, value: Tensor) -> Tensor:
        transform = self.transforms[name]
        if transform in (identity_transform, Wrapped()) or num_values(transform):
            return torch.zeros((), dtype=u.dtype, device=u.device)
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        log_det = transform.log_abs_det_jacobian(u, value)
        kept = self._kept.get(name)
        if kept is not None:  # masked latents have the density of the filler, in u
            log_det = torch.where(narrowed(kept, log_det.ndim), log_det, torch.zeros_like(log_det))
        extra = log_det.ndim - 1 - self.layout.num_plates
        return reduce_to_datum(log_det.flatten(-extra).sum(-1) if extra else log_det, self.layout)


def narrowed(kept: Tensor, ndim: int) -> Tensor:
    """Without surplus trailing dims of size one, which belong to an event that is drawn as a whole."""
    return kept.flatten(ndim - 1) if kept.ndim > ndim else kept
