"""Angles as numbers on the line, so that Gaussians can be fitted to them.

All numbers u = a + 2 pi k are the same angle a. They get the density p(a) w(u), with weights w that sum to one over k. w is
a normal window around a centre c, divided by its sum over all turns. This leaves p(x) unchanged, and the density is smooth,
without an end at pi.
"""

import math

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

WIDTH = 1.2  # radians, width of the window: two radians from the centre, all but 1/100 is on one turn, and edges are smooth
TURNS = 3  # beyond these a term is below 1e-30


class Wrapped(Transform):
    """From the line to (-pi, pi]."""

    domain, codomain = constraints.real, constraints.real

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wrapped)

    def _call(self, x: Tensor) -> Tensor:
        return wrapped(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return y


def wrapped(u: Tensor) -> Tensor:
    return u - 2 * math.pi * torch.floor((u.detach() + math.pi) / (2 * math.pi))


def mean_direction(angles: Tensor, weights: Tensor) -> Tensor:
    """Over the first axis; any weights of the shape of the angles."""
    return torch.atan2((weights * angles.sin()).sum(0), (weights * angles.cos()).sum(0))


def log_terms(u: Tensor, centre: Tensor) -> Tensor:
    """(..., 2 TURNS + 1): the logarithms of the window at the same angle, a few turns to both sides of the centre."""
    turns = 2 * math.pi * torch.arange(-TURNS, TURNS + 1, dtype=u.dtype, device=u.device)
    return -0.5 * ((wrapped(u - centre).unsqueeze(-1) + turns) / WIDTH).square()


def log_window(u: Tensor, centre: Tensor) -> Tensor:
    return -0.5 * ((u - centre) / WIDTH).square() - log_terms(u, centre).logsumexp(-1)


def some_turn(u: Tensor, centre: Tensor) -> Tensor:
    """The same angle plus a multiple of 2 pi, drawn by the weights."""
    chosen = torch.distributions.Categorical(logits=log_terms(u, centre)).sample()
    return centre + wrapped(u - centre) + 2 * math.pi * (chosen - TURNS).to(u)
