"""Control variates: a quadratic near log p(x, u), whose mean under a Gaussian is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..proposals import GaussianProposal

FEWEST = 50  # draws with a control variate; they do as well as ten times as many without one


@dataclass(frozen=True)
class Quadratic:
    """Q(u) = -(u - a)' A (u - a) / 2 per datum, from `gaussian` = N(a, A^-1)."""

    gaussian: GaussianProposal

    @property
    def precision(self) -> Tensor:
        """A, (B, D, D)."""
        return torch.cholesky_inverse(self.gaussian.tril)

    def at(self, u: Tensor) -> Tensor:
        """(K, B)."""
        return -0.5 * self.gaussian.squared_distance(u)

    def mean(self, q: GaussianProposal) -> Tensor:
        """E_q[Q], (B,): one term for the distance of the means, one for the covariance."""
        spread = torch.linalg.solve_triangular(self.gaussian.tril, q.tril, upper=False)
        return self.at(q.loc.unsqueeze(0))[0] - 0.5 * spread.square().sum((-1, -2))


def entropy(q: GaussianProposal) -> Tensor:
    """(B,)."""
    return q.log_det() + 0.5 * q.loc.shape[-1] * (1 + math.log(2 * math.pi))


def controlled(terms: Tensor, control: Tensor, mean: Tensor) -> Tensor:
    """Terms (K, B) of the same mean with less noise: terms - b (control - its mean, (B,)), with the best b per datum.

    Each half of the draws uses the b estimated from the other half, since a b from the same draws would bias the mean. With
    few draws b cannot be estimated, and the terms are returned as they are.
    """
    if len(terms) < FEWEST:
        return terms
    halves = len(terms) // 2
    parts = ((terms[:halves], control[:halves]), (terms[halves:], control[halves:]))
    slopes = [slope(*part) for part in reversed(parts)]
    return torch.cat([t - b * (c - mean) for (t, c), b in zip(parts, slopes, strict=True)])


def slope(terms: Tensor, control: Tensor) -> Tensor:
    """The slope of terms over the control, both (K, B), by least squares; zero where it cannot be estimated."""
    centred = control - control.mean(0)
    found = (centred * (terms - terms.mean(0))).sum(0) / centred.square().sum(0)
    return torch.where(found.isfinite(), found, torch.zeros_like(found))
