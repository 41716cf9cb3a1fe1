"""A random program as a Pyro model and guide, written as a user would: plates, masks, scales, enumeration, events.

Values of a datum have the batch shape (B,), or (B, 1) where the plate of the data is dim -2; those of a plate inside the
datum (WIDTH, B) or (B, WIDTH); an event has WIDTH more on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from .case import DATUM_STEP, ELEMENT_STEP, Case, GuideSite, on_values_above_zero, reading
from .description import DISCRETE, WIDTH, Latent, Observed, Site, bent, distribution, guide_distribution, real_value, within


class Plates(NamedTuple):
    data: Any
    inner: Any


class Shapes:
    """Where the plates of a program lie."""

    def __init__(self, case: Case) -> None:
        self.dim = case.program.data_dim
        self.inner_dim = -3 - self.dim  # the other one of -1 and -2
        self.num_data, self.dtype = case.num_data, case.program.dtype
        # Found beforehand: a program that reads the value of a tensor is run one particle at a time.
        sites = (*case.program.latents, *case.program.observed)
        self.styles = {s.name: mask_style(case, s) for s in sites}
        self.masks = {s.name: self.place(case.masks[s.name], s.place) for s in sites}
        self.bases = {s.name: self.place(base_location(case, s), s.place) for s in sites}
        self.guides = {s.name: self.placed(s, case.program.site(s.name).place) for s in case.guide}

    def plates(self) -> Plates:
        """Those of one run."""
        return Plates(
            data=pyro.plate("data", self.num_data, dim=self.dim), inner=pyro.plate("inner", WIDTH, dim=self.inner_dim)
        )

    def place(self, values: Tensor, place: str) -> Tensor:
        """(B, width, ...) of the oracle to the shape that the program has for it; what follows the width stays right."""
        values = values.to(self.dtype) if values.is_floating_point() else values
        if place == "datum":
            values = values[:, 0]
            return values.unsqueeze(1) if self.dim == -2 else values
        if place == "plate":
            return values if self.dim == -2 else values.transpose(0, 1)
        return values.unsqueeze(1) if self.dim == -2 else values

    def placed(self, site: GuideSite, place: str) -> GuideSite:
        """A site of the guide with its parameters in the shapes of the program."""
        parameters = {name: value for name, value in vars(site).items() if isinstance(value, Tensor)}
        return replace(site, **{name: self.place(value, place) for name, value in parameters.items()})

    def read(self, value: Tensor, parent: Site, place: str, element: str) -> Tensor:
        """The value of a site in the shape in which another one of `place` reads it."""
        if place == "event" and parent.place != "event":
            return value.unsqueeze(-1)
        if place != "event" and parent.place == "event":
            return value[..., 0]
        if place == "datum" and parent.place == "plate":
            if element == "select" and self.inner_dim == -2:
                return value[..., 0, :]  # right in a plain run; a particle axis would now stand where the plate stood
            return value.narrow(self.inner_dim, 0, 1)
        return value


def build(case: Case) -> tuple[Callable, Callable, tuple[Tensor, ...]]:
    """Model, guide, and the arguments of both: the observations, what is hidden replaced by what the program has there."""
    shapes = Shapes(case)
    model = model_of(case, shapes)
    arguments = tuple(observation(case, shapes, site) for site in case.program.observed)
    if case.program.guide.auto:
        return model, auto_guide(case, shapes, model, arguments), arguments
    return model, guide_of(case, shapes), arguments


def observation(case: Case, shapes: Shapes, site: Observed) -> Tensor:
    x = torch.where(case.masks[site.name], case.x[site.name], torch.full_like(case.x[site.name], site.hole))
    return shapes.place(x, site.place)


def mask_style(case: Case, site: Site) -> str:
    """How a mask is written: what an element alone can be hidden by lies below to_event."""
    mask = case.masks[site.name]
    if bool(mask.all()):
        return "none"
    if bool((mask != mask[:, :1]).any()):
        return "elements"
    if site.mask == "guide" and case.program.guide.auto:
        return "model"  # an autoguide has no masks of its own
    return "plate" if site.mask in ("none", "elements") else site.mask


def model_of(case: Case, shapes: Shapes) -> Callable:
    program = case.program

    def model(*observations: Tensor) -> None:
        values: dict[str, Tensor] = {}
        plates = shapes.plates()
        for latent in program.latents:
            fn = distribution_of(case, shapes, latent, values)
            values[latent.name] = sample(case, shapes, plates, latent, fn, "model")
        for site, x in zip(program.observed, observations, strict=True):
            sample(case, shapes, plates, site, distribution_of(case, shapes, site, values), "model", obs=x)

    return model


def guide_of(case: Case, shapes: Shapes) -> Callable:
    def guide(*observations: Tensor) -> None:
        values: dict[str, Tensor] = {}
        plates = shapes.plates()
        for site in case.guide:
            fn = guide_distribution_of(case, shapes, site, values)
            values[site.name] = sample(case, shapes, plates, case.program.site(site.name), fn, "guide")

    return guide


def base_location(case: Case, site: Site) -> Tensor:
    """(B, width), the location of a site but for what it reads."""
    covariate = case.covariate.unsqueeze(1) * DATUM_STEP * site.varies
    return site.shift + covariate + ELEMENT_STEP * torch.arange(site.width)


def distribution_of(case: Case, shapes: Shapes, site: Site, values: dict[str, Tensor]) -> Any:
    location = shapes.bases[site.name]
    if site.parent is not None:
        parent = case.program.site(site.parent)
        real = real_value(parent.family, values[site.parent], shapes.dtype)
        read = shapes.read(real, parent, site.place, "narrow")
        location = location + site.slope * bent(site.bend, with_quirk(case, shapes, read, site))
    return distribution(dist, site, location)


def with_quirk(case: Case, shapes: Shapes, read: Tensor, site: Site) -> Tensor:
    """What a program does that it should not, to the value that it reads."""
    plain = (1 if shapes.dim == -1 and site.place != "plate" else 2) + (site.place == "event")
    match case.program.quirk:
        case "coupled" if isinstance(site, Observed):
            total = read.sum(shapes.dim - (site.place == "event"), keepdim=True)
            return read + 0.5 * (total - read)
        case "moved axis" if read.ndim > plain:
            return read.flip(0)
        case "reshaped" if isinstance(site, Observed) and site.place == "datum" and shapes.dim == -1:
            return read.reshape(-1)[: shapes.num_data]
    return read


def guide_distribution_of(case: Case, shapes: Shapes, site: GuideSite, values: dict[str, Tensor]) -> Any:
    place, site = case.program.site(site.name).place, shapes.guides[site.name]
    centre, width = site.centre, site.width
    discrete = site.family in DISCRETE
    if site.read is not None:
        source = case.program.site(site.read)
        real = real_value(source.family, values[site.read], shapes.dtype)
        real = shapes.read(real, source, place, case.program.guide.element)
        moved = reading(real - site.middle, discrete) * site.slope
        centre = centre + (on_values_above_zero(moved, centre.shape[-1]) if discrete else moved)
    return guide_distribution(dist, site.family, centre, width)


def sample(case: Case, shapes: Shapes, plates: Plates, site: Site, fn: Any, side: str, obs: Tensor | None = None) -> Tensor:
    """One sample statement within its plates, mask and scale."""
    style = shapes.styles[site.name]
    if style in ("model", "guide"):
        style = "plate" if style == side else "none"
    mask = shapes.masks[site.name]
    infer = {}
    if isinstance(site, Latent) and site.enumerated == side:
        infer = {"enumerate": "parallel"}
    if style == "elements":
        fn = fn.mask(mask)
    if site.place == "event":
        fn = fn.to_event(1)
        mask = mask[..., 0]
    if style == "fn.mask":
        fn = fn.mask(mask)
    with ExitStack() as stack:
        stack.enter_context(plates.data)
        if site.place == "plate":
            stack.enter_context(plates.inner)
        if style in ("plate", "both"):
            stack.enter_context(poutine.mask(mask=mask))
        if site.scale != 1:
            stack.enter_context(poutine.scale(scale=site.scale))
        if style == "obs_mask":
            return pyro.sample(site.name, fn, obs=obs, obs_mask=mask)
        return pyro.sample(site.name, fn, obs=obs, infer=infer)


def auto_guide(case: Case, shapes: Shapes, model: Callable, arguments: tuple[Tensor, ...]) -> AutoNormal:
    """AutoNormal with the centres and widths of the guide."""
    hidden = [s.name for s in case.program.latents if s.enumerated == "model"]
    hidden += [f"{s.name}_unobserved" for s in case.program.observed]
    guide = AutoNormal(poutine.block(model, hide=hidden))
    guide(*arguments)
    for site in case.guide:
        place = case.program.site(site.name).place
        for parameters, values in ((guide.locs, within(site.family, site.centre)), (guide.scales, site.width)):
            setattr(parameters, site.name, shapes.place(values, place).clone())
    return guide
