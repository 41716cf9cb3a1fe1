"""A program with its data: the observed values, the masks, and densities of its sites in plain torch.

Everything has the data first, (B, ...), in float64. None of it is Pyro's or the kernel's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .description import (
    DISCRETE,
    Node,
    Program,
    Site,
    bent,
    distribution,
    guide_distribution,
    read_node,
    real_value,
)

F64 = torch.float64
ELEMENT_STEP, DATUM_STEP = 0.3, 0.4  # by which the locations of elements and of data differ


@dataclass(frozen=True)
class GuideSite:
    """One sample statement of the guide: centre + slope * (what the site that it reads stands for - middle)."""

    name: str
    family: str
    read: str | None
    centre: Tensor  # (B, width), of discrete ones (B, width, values)
    width: Tensor  # (B, width)
    slope: Tensor  # (B, width)
    middle: Tensor  # (B, width)


@dataclass
class Case:
    program: Program
    covariate: Tensor  # (B,)
    masks: dict[str, Tensor]  # (B, width), false where nothing counts
    x: dict[str, Tensor] = field(default_factory=dict)  # (B, width), whole also where a mask hides
    guide: tuple[GuideSite, ...] = ()

    @property
    def num_data(self) -> int:
        return self.program.num_data

    def guide_site(self, name: str) -> GuideSite:
        return next(s for s in self.guide if s.name == name)


def lead(per_datum: Tensor, ndim: int) -> Tensor:
    """(B,) to (B, 1, ..., 1)."""
    return per_datum.reshape((-1,) + (1,) * (ndim - 1))


def parent_of(program: Program, node: Node) -> Node | None:
    site = program.site(node.site)
    return None if site.parent is None else read_node(site.width, node.index, program.site(site.parent))


def fn_of(case: Case, node: Node, parent_value: Tensor | None, ndim: int = 1) -> Any:
    """The distribution of a node given the values of its parent, (B, ...); of a root, with `ndim` dimensions."""
    site = case.program.site(node.site)
    return distribution(torch.distributions, site, location(case, site, node.index, parent_value, ndim))


def location(case: Case, site: Site, index: int, parent_value: Tensor | None, ndim: int) -> Tensor:
    shift = site.shift + ELEMENT_STEP * index + DATUM_STEP * case.covariate * site.varies
    if parent_value is None:
        return lead(shift, ndim)
    real = real_value(case.program.site(site.parent or "").family, parent_value, F64)
    return lead(shift, real.ndim) + site.slope * bent(site.bend, real)


def log_p(case: Case, node: Node, value: Tensor, parent_value: Tensor | None) -> Tensor:
    """log p(node given its parent); values (B, ...) that broadcast."""
    return fn_of(case, node, parent_value, value.ndim).log_prob(value)


def guide_fn(case: Case, node: Node, read_value: Tensor | None, ndim: int = 1) -> Any:
    """The guide's distribution of a node given the value that it reads, (B, ...); `ndim` dimensions where it reads none."""
    site, k = case.guide_site(node.site), node.index
    ndim = ndim if read_value is None else read_value.ndim
    discrete = site.family in DISCRETE
    centre, width = site.centre[:, k], lead(site.width[:, k], ndim)
    centre = centre.reshape(centre.shape[:1] + (1,) * (ndim - 1) + centre.shape[1:])
    if read_value is not None and site.read is not None:
        real = real_value(case.program.site(site.read).family, read_value, F64)
        moved = lead(site.slope[:, k], ndim) * reading(real - lead(site.middle[:, k], ndim), discrete)
        centre = centre + (on_values_above_zero(moved, centre.shape[-1]) if discrete else moved)
    return guide_distribution(torch.distributions, site.family, centre, width)


def reading(difference: Tensor, discrete: bool) -> Tensor:
    return difference.tanh() if discrete else difference


def on_values_above_zero(moved: Tensor, num_values: int) -> Tensor:
    """A move of the logits of all values but the first."""
    moved = moved.unsqueeze(-1)
    return torch.cat([torch.zeros_like(moved), moved.expand(moved.shape[:-1] + (num_values - 1,))], -1)


def guide_read(case: Case, node: Node) -> Node | None:
    site = case.guide_site(node.site)
    if site.read is None:
        return None
    return read_node(case.program.site(node.site).width, node.index, case.program.site(site.read))


def sample_model(case: Case, num: int, generator: torch.Generator) -> dict[Node, Tensor]:
    """Draws of all latents from the prior, (B, num) each."""
    values: dict[Node, Tensor] = {}
    for node in case.program.nodes:
        parent = parent_of(case.program, node)
        fn = fn_of(case, node, None if parent is None else values[parent])
        values[node] = seeded(fn, generator, num if parent is None else 0)
    return values


def sample_guide(case: Case, num: int, generator: torch.Generator) -> dict[Node, Tensor]:
    """Draws of the guide, (B, num) each."""
    values: dict[Node, Tensor] = {}
    for site in case.guide:
        for node in case.program.site(site.name).nodes:
            read = guide_read(case, node)
            fn = guide_fn(case, node, None if read is None else values[read])
            values[node] = seeded(fn, generator, num if read is None else 0)
    return values


def seeded(fn: Any, generator: torch.Generator, num: int) -> Tensor:
    """`num` draws in a dimension on the right, or one; the random state is as before."""
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = fn.sample((num,) if num else ()).to(F64)
    return drawn.movedim(0, -1) if num else drawn


def make_case(program: Program) -> Case:
    """The data of a program, drawn from its own prior, with an outlier if it wants one."""
    generator = torch.Generator().manual_seed(program.seed)
    covariate = torch.randn(program.num_data, generator=generator, dtype=F64).to(program.dtype).to(F64)
    case = Case(program, covariate, make_masks(program, generator))
    z = sample_model(case, 1, generator)
    for site in program.observed:
        drawn = []
        for node in site.nodes:
            parent = parent_of(program, node)
            assert parent is not None
            drawn.append(seeded(fn_of(case, node, z[parent]), generator, 0).squeeze(-1))
        x = torch.stack(drawn, -1)
        if site.family in ("normal", "student"):
            x[0] += program.outlier
        if site.family in ("lognormal", "gamma"):
            x = x.clamp(min=1e-3)
        case.x[site.name] = x.to(program.dtype).to(F64)
    return case


def make_masks(program: Program, generator: torch.Generator) -> dict[str, Tensor]:
    """What is hidden, at least one place of each masked site; what reads a hidden place is hidden, but for one quirk."""
    masks: dict[str, Tensor] = {}
    for site in (*program.latents, *program.observed):
        shape = (program.num_data, site.width)
        mask = torch.ones(shape, dtype=torch.bool)
        if site.mask == "elements" and site.place == "event":
            mask = torch.rand(shape, generator=generator) < 0.6
        elif site.mask != "none":
            mask = (torch.rand(shape[0], 1, generator=generator) < 0.6).expand(shape).clone()
        if site.mask != "none" and bool(mask.all()):
            mask[-1] = False
        broken = program.quirk == "masked read" and site is program.observed[0]
        if site.parent is not None and not broken:
            read = [read_node(site.width, k, program.site(site.parent)).index for k in range(site.width)]
            mask = mask & masks[site.parent][:, read]
        masks[site.name] = mask
    return masks
