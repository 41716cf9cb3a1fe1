"""What a random program is: sites, their parents and places, masks and scales; and what its densities are.

A program is a forest. Every latent has at most one parent, every observed site has one. A site in a plate inside the datum,
or with an event, has `WIDTH` elements. A node is one element of one site: a single number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDTH = 2  # elements of a plate inside the datum, and of an event
TABLE = (-1.2, 0.9, 2.0)  # what the values of a discrete latent stand for where another site reads it
REAL = ("normal", "student", "mixture", "funnel")
POSITIVE = ("lognormal", "gamma", "exponential")
UNIT = ("beta",)
FARTHEST = {"positive": 30.0, "gamma": 30.0, "unit": 15.0, "beta": 5.0}  # centres in guides, by family there
DISCRETE = {"bernoulli": 2, "categorical": 3}
NUM_TRIALS = 8


class Node(NamedTuple):
    site: str
    index: int


@dataclass(frozen=True)
class Site:
    """One sample statement of the model. Its location is shift + slope * bend(what the parent stands for)."""

    name: str
    family: str
    parent: str | None = None
    place: str = "datum"  # or "plate", inside the datum, or "event"
    shift: float = 0.0
    slope: float = 1.0
    spread: float = 1.0
    bend: str = "linear"
    varies: bool = False  # whether the location has a part of its own for each datum
    mask: str = "none"
    scale: float = 1.0

    @property
    def width(self) -> int:
        return 1 if self.place == "datum" else WIDTH

    @property
    def nodes(self) -> list[Node]:
        return [Node(self.name, k) for k in range(self.width)]


@dataclass(frozen=True)
class Latent(Site):
    """`mask`: "none", on "both" sides, in the "model" or the "guide" alone, or "elements" of an event on both sides."""

    enumerated: str = "no"  # or in the "guide", or in the "model"


@dataclass(frozen=True)
class Observed(Site):
    """`mask`: "none", by the "plate", by "fn.mask", of "elements" below to_event, or by "obs_mask"."""

    hole: float = math.nan  # what stands where the mask hides


@dataclass(frozen=True)
class GuidePlan:
    """How the guide is made from the posterior: its order, what its sites read, and how far it is off."""

    order: str = "own"  # of the sites: "own" is that of the model, or "reversed"
    reads: str = "parent"  # or "nothing", or "any" site that it drew before
    family: str = "unconstrained"  # or "matched": Gamma for a Gamma, Beta for a Beta, Student t for what is real
    widen: float = 1.0  # factor on the standard deviations
    miss: float = 0.0  # standard deviations by which the means are off
    auto: bool = False  # AutoNormal
    element: str = "narrow"  # how one element of a plate is read: "narrow", or "select", which moves the axes


@dataclass(frozen=True)
class Program:
    latents: tuple[Latent, ...]
    observed: tuple[Observed, ...]
    guide: GuidePlan = GuidePlan()
    num_data: int = 3
    data_dim: int = -1  # dim of the plate of the data; a plate inside the datum has the other one
    dtype: torch.dtype = torch.float64
    outlier: float = 0.0  # added to the first datum
    quirk: str = "none"
    seed: int = 0

    def site(self, name: str) -> Site:
        return next(s for s in (*self.latents, *self.observed) if s.name == name)

    def children(self, name: str) -> list[Site]:
        return [s for s in (*self.latents, *self.observed) if s.parent == name]

    @property
    def nodes(self) -> list[Node]:
        return [node for latent in self.latents for node in latent.nodes]


def read_node(reader_width: int, index: int, parent: Site) -> Node:
    """Which element of its parent an element reads: its own, the only one, or the first."""
    return Node(parent.name, index if parent.width > 1 and reader_width > 1 else 0)


def real_value(family: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """What a latent stands for where another site reads it: a real number."""
    if family in DISCRETE:
        return torch.tensor(TABLE, dtype=dtype)[value.long()]
    if family in POSITIVE:
        return value.log()
    if family in UNIT:
        return value.logit()
    return value


def bent(bend: str, real: Tensor) -> Tensor:
    if bend == "tanh":
        return 2 * real.tanh()
    if bend == "square":  # of two signs alike, and bounded: a square would have no variance under a Student t
        return 2 * real.tanh().square() - 0.5
    return real


def distribution(module: Any, site: Site, location: Tensor) -> Any:
    """A site of the model from distributions of `module`, torch's or Pyro's."""
    spread = torch.full_like(location, site.spread)
    match site.family:
        case "normal":
            return module.Normal(location, spread)
        case "funnel":  # the location is that of the logarithm of the scale
            return module.Normal(torch.full_like(location, site.shift), spread * (location.clamp(-8, 8) / 2).exp())
        case "student":
            return module.StudentT(torch.full_like(location, 4.0), location, spread)
        case "mixture":
            weights = torch.tensor([0.7, 0.3], dtype=location.dtype).expand(location.shape + (2,))
            centres = torch.stack([location - 2 * spread, location + 2 * spread], -1)
            parts = module.Normal(centres, (0.7 * spread).unsqueeze(-1).expand(centres.shape))
            return module.MixtureSameFamily(module.Categorical(weights), parts)
        case "lognormal":
            return module.LogNormal(location.clamp(-30, 30), spread)
        case "gamma":
            shape = spread**-2
            return module.Gamma(shape, shape * (-location.clamp(-8, 8)).exp())
        case "exponential":
            return module.Exponential((-location.clamp(-8, 8)).exp())
        case "beta":
            total, mean = spread**-2 + 1, location.clamp(-4, 4).sigmoid()
            return module.Beta(total * mean, total * (1 - mean))
        case "bernoulli":
            return module.Bernoulli(logits=location)
        case "categorical":
            return module.Categorical(logits=torch.stack([torch.zeros_like(location), location, -0.5 * location], -1))
        case "poisson":
            return module.Poisson(location.clamp(-8, 5).exp())
        case "binomial":
            return module.Binomial(NUM_TRIALS, logits=location)
    raise ValueError(site.family)


def within(family: str, centre: Tensor) -> Tensor:
    """Locations of what is not real, kept where their exponentials are numbers: they may follow a heavy tail."""
    limit = FARTHEST.get(family)
    return centre if limit is None else centre.clamp(-limit, limit)


def guide_distribution(module: Any, family: str, centre: Tensor, width: Tensor) -> Any:
    """A site of the guide. `centre` and `width` are those of the unconstrained value; of discrete ones, the logits."""
    centre = within(family, centre)
    match family:
        case "real":
            return module.Normal(centre, width)
        case "student":
            return module.StudentT(torch.full_like(centre, 5.0), centre, width)
        case "positive":
            return module.LogNormal(centre, width)
        case "gamma":
            shape = width**-2
            return module.Gamma(shape, shape * (-centre).exp())
        case "unit":
            return module.TransformedDistribution(module.Normal(centre, width), [torch.distributions.SigmoidTransform()])
        case "beta":
            mean = centre.sigmoid()
            total = width**-2 / (mean * (1 - mean)) + 1
            return module.Beta(total * mean, total * (1 - mean))
        case "bernoulli":
            return module.Bernoulli(logits=centre[..., 1] - centre[..., 0])
        case "categorical":
            return module.Categorical(logits=centre)
    raise ValueError(family)
