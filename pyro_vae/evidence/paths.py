"""Geometric paths from a start that can be drawn from to the joint density of a datum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..local import GaussianProposal, LatentSpace
from ..local.space import check_gradients, differentiable
from .hmc import State

STARTS = ("fitted", "guide", "prior")


class Path:
    """start^(1 - t) joint^t for t from 0 to 1, in unconstrained space, for all data of a call.

    :param start: "fitted" (the Gaussian fitted to each datum), "guide" or "prior".
    :param fitted: that Gaussian, which also shapes the motion near the end of any path.
    :param moments: mean and standard deviation, (B, D), of draws of the start, which shape it near the beginning.
    """

    def __init__(self, space: LatentSpace, start: str, fitted: GaussianProposal, moments: tuple[Tensor, Tensor]) -> None:
        self.space, self.start, self.fitted, self.moments = space, start, fitted, moments

    def draw(self, num_chains: int) -> State:
        if self.start == "fitted":
            loc = self.fitted.loc
            noise = torch.randn(*loc.shape, num_chains, dtype=loc.dtype, device=loc.device)
            return self.evaluate(self.fitted.coloured(noise))
        if self.start == "prior":
            return self.evaluate(self.space.draw_prior(num_chains)[0])
        call = self.space.call
        return self.evaluate(self.space.filled(self.space.pack(call.latent_values(call.draw(num_chains)))[0]))

    def evaluate(self, u: Tensor) -> State:
        """Both ends of the path at u, (C, B, D), with gradients, in pieces of bounded memory."""
        pieces = []
        for first, length in self.space.call.chunks(len(u)):
            piece = u[first : first + length].detach().requires_grad_()
            with differentiable():
                log_start, log_joint = self._ends(piece)
                joint_gradient = torch.autograd.grad(log_joint.sum(), piece, retain_graph=log_start is not None)[0]
                start_gradient = None if log_start is None else torch.autograd.grad(log_start.sum(), piece)[0]
            check_gradients(log_joint, joint_gradient)
            if log_start is not None and start_gradient is not None:
                check_gradients(log_start, start_gradient)
            piece, log_joint = piece.detach(), log_joint.detach()
            if log_start is None or start_gradient is None:
                log_start = self.fitted.log_prob(piece)
                whitened = self.fitted.whitened(piece)
                upper = self.fitted.tril.mT
                start_gradient = -torch.linalg.solve_triangular(upper, whitened, upper=True).permute(2, 0, 1)
            pieces.append((piece, log_start.detach(), log_joint, start_gradient, joint_gradient))
        return State(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    def reference(self, t: Tensor) -> GaussianProposal:
        """The Gaussian around which motion at t, (B,), is split: between the start's moments and the fit."""
        if self.start == "fitted":
            return self.fitted
        mean, scale = self.moments
        t = t.reshape(-1, 1, 1)
        ends = torch.diag_embed(scale.square().reciprocal()), torch.cholesky_inverse(self.fitted.tril)
        first, last = (p @ m.unsqueeze(-1) for p, m in zip(ends, (mean, self.fitted.loc), strict=True))
        precision, shift = torch.lerp(*ends, t), torch.lerp(first, last, t)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        return GaussianProposal((covariance @ shift).squeeze(-1), torch.linalg.cholesky(covariance))

    def _ends(self, u: Tensor) -> tuple[Tensor | None, Tensor]:
        """(log-density of the start, None where it is the fitted Gaussian; log p(x, u)), (C, B) each."""
        if self.start == "fitted":
            return None, self.space.log_joint(u)
        if self.start == "prior":
            log_joint, log_prior = self.space.log_joint_and_prior(u)
            return log_prior, log_joint
        return self.space.log_guide(u), self.space.log_joint(u)
