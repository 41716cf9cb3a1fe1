"""Geometric paths from a start that can be drawn from to the joint density of a datum."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import StructureError
from ..proposals import GaussianProposal, LatentSpace, MixtureProposal, check_gradients, differentiable
from .hmc import ChosenPart, State

Start = Literal["fitted", "guide", "prior"]


class Path:
    """start^(1 - t) joint^t for t from 0 to 1, in unconstrained space, for all data of a call.

    :param start: "fitted" (the proposals fitted to each datum), "guide" or "prior".
    :param fitted: the mixture that a search has found, or one Gaussian. With another start it is still the reference of the
        transitions near the end of the path.
    :param moments: mean and standard deviation, (B, D), of draws of the start, the reference of the transitions near its
        beginning.
    :param with_prior: start at the mixture of "fitted" and the prior with equal weights, which also covers heavy tails.
    """

    def __init__(
        self,
        space: LatentSpace,
        start: Start,
        fitted: GaussianProposal | MixtureProposal,
        moments: tuple[Tensor, Tensor],
        *,
        with_prior: bool = False,
    ) -> None:
        self.space, self.start, self.fitted, self.moments = space, start, fitted, moments
        self.with_prior = with_prior

    def draw(self, num_chains: int) -> State:
        if self.start == "fitted":
            u = self.fitted.draw(num_chains)
            if self.with_prior:
                u = torch.where(torch.rand_like(u[..., :1]) < 0.5, u, self.space.draw_prior(num_chains)[0])
            return self.evaluate(u)
        if self.start == "prior":
            return self.evaluate(self.space.draw_prior(num_chains)[0])
        call = self.space.call
        return self.evaluate(self.space.filled(self.space.pack(call.latent_values(call.draw_latents(num_chains)))[0]))

    def evaluate(self, u: Tensor) -> State:
        """The densities at both ends of the path at u, (C, B, D), with gradients, in pieces of bounded memory."""
        pieces = []
        for first, length in self.space.call.chunks(len(u)):
            piece = u[first : first + length].detach().requires_grad_()
            with differentiable():
                log_start, log_joint = self._ends(piece)
                if piece.dtype == torch.float32 and log_joint.dtype == torch.float64:
                    raise StructureError(
                        "the guide draws its latents in float32, and log p(x, z) is in float64, but chains move in one "
                        "precision: convert guide, model and data to the same, guide.double(), or use "
                        "AdaptiveImportanceSampling"
                    )
                joint_gradient = torch.autograd.grad(log_joint.sum(), piece, retain_graph=True)[0]
                start_gradient = torch.autograd.grad(log_start.sum(), piece)[0]
            check_gradients(log_joint, joint_gradient)
            check_gradients(log_start, start_gradient)
            pieces.append((piece.detach(), log_start.detach(), log_joint.detach(), start_gradient, joint_gradient))
        return State(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    def reference(self, t: Tensor, u: Tensor) -> GaussianProposal | ChosenPart:
        """The reference Gaussian of transitions at t, (B,): between the moments of the start and the fit.

        On a path from a mixture, it is one of the components for each chain, drawn given the state of the chain, u, (C, B,
        D).
        """
        if isinstance(self.fitted, MixtureProposal):
            return ChosenPart.at(self.fitted, u)
        if self.start == "fitted":
            return self.fitted
        mean, scale = self.moments
        t = t.reshape(-1, 1, 1)
        ends = torch.diag_embed(scale.square().reciprocal()), torch.cholesky_inverse(self.fitted.tril)
        first, last = (p @ m.unsqueeze(-1) for p, m in zip(ends, (mean, self.fitted.loc), strict=True))
        precision, shift = torch.lerp(*ends, t), torch.lerp(first, last, t)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        return GaussianProposal((covariance @ shift).squeeze(-1), torch.linalg.cholesky(covariance))

    def _ends(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(log-density of the start, log p(x, u)), (C, B) each."""
        if self.start == "fitted":
            log_joint, log_prior = self.space.log_joint_and_prior(u)
            log_fitted = self.fitted.log_prob(u)
            return torch.logaddexp(log_fitted, log_prior) - math.log(2) if self.with_prior else log_fitted, log_joint
        if self.start == "prior":
            log_joint, log_prior = self.space.log_joint_and_prior(u)
            return log_prior, log_joint
        return self.space.log_guide(u), self.space.log_joint(u)
