"""The optimum of the guide's family for each datum: offsets added to its parameters in unconstrained space."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..densities import is_one_way, lacks_inverse
from ..errors import LocalFitError
from ..kernel import Call, Record
from ..proposals import refuse_gradients
from .families import family_of, rebuilt, transforms_of

SAME = 1e-4  # units of its offset by which rounding may make a parameter differ between particles
UNCONSTRAINED = "_unconstrained"  # suffixes of the names of sites that autoguides draw in place of a latent


class GuideOffsets:
    """Offsets per datum that are added to the parameters of each site of a guide; with zero offsets the guide is unchanged.

    The family therefore contains the guide, also where parameters of a site depend on other latents (hierarchical and Markov
    guides). A family that replaces the parameters would not contain such a guide.
    """

    def __init__(self, call: Call) -> None:
        self._layout = call.layout
        self._tensors: dict[tuple[str, str], Tensor] = {}
        # offsets of locations are in units of the guide's standard deviation
        self._units: dict[tuple[str, str], Tensor | None] = {}
        self._origins: dict[tuple[str, str], Tensor] = {}  # the parameters of the guide without offsets, on the real line
        self.transforms: dict[str, list[Any]] = {}  # transforms from the space of the location to the values of the site
        self._event_dims: dict[tuple[str, str], int] = {}
        self.families: dict[str, str] = {}  # the innermost distribution of each site
        self._spread: dict[tuple[str, str], float] | None = None  # spread of parameters over particles, while it is measured
        self.converged = torch.zeros(call.batch_size, dtype=torch.bool, device=call.device)
        self.usable = torch.ones((), dtype=torch.bool, device=call.device)  # no gradient of the round was NaN

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._tensors.values())

    @property
    def sites(self) -> set[str]:
        """The sites of the guide whose parameters have offsets."""
        return {site for site, _ in self._tensors}

    @property
    def family(self) -> str:
        freed: dict[str, list[str]] = {}
        for site, parameter in self._tensors:
            freed.setdefault(site, []).append(parameter)
        sites = "; ".join(f"{site}: {', '.join(parameters)}" for site, parameters in freed.items())
        return f"the guide's family, fitted to each datum ({sites})"

    def adjust(self, name: str, fn: Any) -> tuple[Any, Any]:
        """The distribution to draw from, and the same with detached offsets, for the sticking-the-landing log q."""
        if not fn.has_rsample:
            raise LocalFitError(
                f"the guide's site '{name}' ({family_of(fn)}) has no reparameterised draws, so it cannot be fitted per "
                "datum: enumerate it if it is discrete, or use ImportanceSampling, which needs no fit"
            )
        self.transforms[name], self.families[name] = transforms_of(fn), family_of(fn)
        moving = rebuilt(fn, partial(self._shifted, name, False), fn.batch_shape)
        if is_one_way(moving):  # log q is known at its own draws only, so the full gradient is used
            return moving, moving
        return moving, rebuilt(fn, partial(self._shifted, name, True), fn.batch_shape)

    def _shifted(
        self, site: str, detach: bool, parameter: str, value: Tensor, event_dim: int, unit: Tensor | None
    ) -> Tensor:
        key = (site, parameter)
        if key not in self._tensors:
            self._create(key, value, event_dim, unit)
        if self._spread is not None:
            self._spread[key] = max(self._spread.get(key, 0.0), self._distance(key, value, event_dim))
        offset, fixed_unit = self._tensors[key], self._units[key]
        offset = offset.detach() if detach else offset
        offset = offset if fixed_unit is None else fixed_unit * offset
        copies = self._copies(value, event_dim)
        if copies > 1:
            axis = self._layout.datum_dim - event_dim  # type: ignore[operator]
            offset = torch.cat([offset] * copies, axis) if offset.ndim >= -axis else offset
        return value + offset

    def _create(self, key: tuple[str, str], value: Tensor, event_dim: int, unit: Tensor | None) -> None:
        """An offset of zero per datum, in the shape that a parameter has without its particles."""
        location, surplus = self._with_particles_first(value.detach(), event_dim)
        self._tensors[key] = torch.zeros_like(location[(0,) * surplus]).requires_grad_()
        self._units[key] = None
        if unit is not None:
            self._units[key] = mean_of_first(*self._with_particles_first(unit.detach().expand(value.shape), event_dim))
        self._origins[key] = mean_of_first(location, surplus)
        self._event_dims[key] = event_dim

    def _with_particles_first(self, value: Tensor, event_dim: int) -> tuple[Tensor, int]:
        """A parameter with its axes of particles first, and their number; particles may be folded into the data."""
        copies = self._copies(value, event_dim)
        if copies > 1:
            axis = value.ndim + self._layout.datum_dim - event_dim  # type: ignore[operator]
            value = value.unflatten(axis, (copies, -1)).movedim(axis, 0)
        return value, (copies > 1) + max(value.ndim - (copies > 1) - event_dim - self._layout.num_plates, 0)

    def _distance(self, key: tuple[str, str], value: Tensor, event_dim: int) -> float:
        """The largest distance over particles of a parameter from that of the guide, in units of its offset."""
        location, _ = self._with_particles_first(value.detach(), event_dim)
        unit = self._units[key]
        return float(((location - self._origins[key]) / (1.0 if unit is None else unit)).abs().max())

    def draw(self, call: Call, num_particles: int) -> tuple[Record, bool]:
        """Draws of the guide with the current offsets, and whether parameters of one latent depend on another latent."""
        self._spread = {}
        drawn = call.draw(num_particles, adjust=self.adjust)
        spread, self._spread = self._spread, None
        return drawn, max(spread.values(), default=0.0) > SAME

    def _copies(self, value: Tensor, event_dim: int) -> int:
        """How many copies of the data a parameter has: particles may be folded into the plate of the data."""
        dim = self._layout.datum_dim
        axis = 0 if dim is None else dim - event_dim
        return 1 if dim is None or value.ndim < -axis else max(value.shape[axis] // self._layout.batch_size, 1)

    def move_to(self, values: Mapping[str, Tensor], unconstrained: Mapping[str, Tensor], where: Tensor) -> None:
        """Set locations to these values of the latents, by site, (*plates, *event), where `where`, (B,), is true."""
        before = self.state()
        for key, unit in self._units.items():
            site = key[0]
            latent = site.removesuffix(UNCONSTRAINED)
            value = (values if latent == site else unconstrained).get(latent)
            if key[1] != "loc" or value is None or unit is None or any(lacks_inverse(t) for t in self.transforms[site]):
                continue
            try:
                for transform in reversed(self.transforms[site]):
                    value = transform.inv(value)
            except RuntimeError:  # the networks of a conditional flow hold a context for each particle
                continue
            if value.numel() == self._origins[key].numel() and bool(value.isfinite().all()):
                self.put(key, value)
        self.restore(before, ~where)

    def parameters_of(self, site: str) -> dict[str, Tensor]:
        """The guide's parameters of a site, on the real line, (*plates, *event), without particles."""
        return {parameter: origin for (name, parameter), origin in self._origins.items() if name == site}

    def put(self, key: tuple[str, str], value: Tensor) -> None:
        """Set a parameter, by site and name, to this value on the real line."""
        origin, unit = self._origins[key], self._units[key]
        offset = value.reshape(origin.shape) - origin
        self._tensors[key].detach().copy_(offset if unit is None else offset / unit)

    def state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors]

    def set_state(self, state: list[Tensor]) -> None:
        for tensor, new in zip(self.tensors, state, strict=True):
            tensor.detach().copy_(new)

    def restore(self, state: list[Tensor], where: Tensor) -> None:
        """Restore an earlier state for the data where `where`, (B,), is true."""
        for (key, tensor), old in zip(self._tensors.items(), state, strict=True):
            if self._layout.datum_dim is None:
                flags = where.reshape((1,) * tensor.ndim)
            else:
                axis = self._axis_of_data(key)
                if axis is None:
                    continue
                flags = where.reshape((-1,) + (1,) * (-axis - 1))
            tensor.detach().copy_(torch.where(flags, old, tensor.detach()))

    def _axis_of_data(self, key: tuple[str, str]) -> int | None:
        """The axis of the data; None for the joint draw of AutoDiagonalNormal, and where the whole call is one datum."""
        tensor = self._tensors[key]
        if self._layout.datum_dim is None:
            return None
        axis = self._layout.datum_dim - self._event_dims[key]
        return axis if tensor.ndim >= -axis and tensor.shape[axis] == self._layout.batch_size else None

    def check_gradients(self, gradients: Sequence[Tensor], elbo: Tensor) -> None:
        """Raise where all ELBO terms of a datum, (K, B), are finite and the gradient at its offsets is not."""
        finite = elbo.isfinite().all(0)
        bad = torch.zeros_like(finite)
        for key, gradient in zip(self._tensors, gradients, strict=True):
            wrong, axis = ~gradient.isfinite(), self._axis_of_data(key)
            if axis is None:  # shared by all data, so it is checked only where all of them are finite
                bad = bad | (wrong.any() & finite.all())
            else:
                bad = bad | (wrong.movedim(axis, 0).flatten(1).any(1) & finite if wrong.ndim > 1 else wrong & finite)
        refuse_gradients(bad)


def mean_of_first(tensor: Tensor, dims: int) -> Tensor:
    return tensor.mean(tuple(range(dims))) if dims else tensor
