"""A full-covariance Gaussian fitted to each datum's posterior.

The fit needs no Hessian and no learning rate. Near its centre m, a log joint has gradients g(u) ~ c - H (u - m). A
regression of the gradients on the points where they were taken gives the precision H, averaged over the proposal. The
maximum of the fitted quadratic is the next centre.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import Noise
from .gradients import check_gradients, differentiable, finite_rows
from .space import LatentSpace

FADE = 0.95  # weight of a gradient per round of age
RIDGE, ANCHOR_RIDGE = 1.0, 2.0  # pseudo-gradients of the anchor, and of the starting precision in it
PRECISION_RANGE = (0.2, 5.0)  # largest factor by which a precision changes in one round


@dataclass(frozen=True)
class GaussianProposal:
    """N(loc, tril tril') per datum over the unconstrained latents; `loc` (B, D), `tril` (B, D, D)."""

    loc: Tensor
    tril: Tensor

    def whitened(self, u: Tensor) -> Tensor:
        """(K, B, D) to standard coordinates, (B, D, K)."""
        return torch.linalg.solve_triangular(self.tril, (u - self.loc).permute(1, 2, 0), upper=False)

    def coloured(self, noise: Tensor) -> Tensor:
        """(B, D, K) standard coordinates to u, (K, B, D)."""
        return (self.loc.unsqueeze(-1) + self.tril @ noise).permute(2, 0, 1)

    def pulled(self, gradient: Tensor) -> Tensor:
        """Gradients with respect to u, (K, B, D), to those with respect to standard coordinates, (B, D, K)."""
        return self.tril.mT @ gradient.permute(1, 2, 0)

    def draw(self, num_particles: int) -> Tensor:
        """(K, B, D)."""
        noise = torch.randn(*self.loc.shape, num_particles, dtype=self.loc.dtype, device=self.loc.device)
        return self.coloured(noise)

    def squared_distance(self, u: Tensor) -> Tensor:
        """(K, B), squared Mahalanobis distance from `loc`."""
        return self.whitened(u).square().sum(1).T

    def log_det(self) -> Tensor:
        """(B,), log |tril|."""
        return self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_prob(self, u: Tensor) -> Tensor:
        """(K, B)."""
        return -0.5 * self.squared_distance(u) - self.log_det() - 0.5 * self.loc.shape[-1] * math.log(2 * math.pi)

    def select(self, kept: Tensor) -> "GaussianProposal":
        """The proposals of some of the data, by their indices."""
        return GaussianProposal(self.loc[kept], self.tril[kept])

    def where(self, chosen: Tensor, other: "GaussianProposal") -> "GaussianProposal":
        """This proposal for data where `chosen`, (B,), is true, the other elsewhere."""
        return GaussianProposal(
            torch.where(chosen.unsqueeze(-1), self.loc, other.loc),
            torch.where(chosen.reshape(-1, 1, 1), self.tril, other.tril),
        )


@dataclass(frozen=True)
class FitPoints:
    """The last batch of a fit: `u` (K, B, D) with `log_joint` and `log_prior`, (K, B), drawn from `source`."""

    u: Tensor
    log_joint: Tensor
    log_prior: Tensor
    source: GaussianProposal


def num_gradients_for(num_particles: int, dim: int) -> int:
    """Enough gradients for a full covariance of `dim` latents; more than 40 + 5 `dim` gained nothing."""
    return max(20 + 3 * dim, min(round(0.35 * num_particles), 40 + 5 * dim))


def fit_with_points(
    space: LatentSpace,
    loc: Tensor,
    scale: Tensor,
    num_gradients: int,
    floor: Tensor | float = -math.inf,
    first_block: int = 0,
) -> tuple[GaussianProposal, FitPoints]:
    """Fit from the start N(loc, scale^2), (B, D) each: half of the gradients in antithetic pairs, half in a last batch.

    `floor`, (B,), is a lower bound on log p(x) by the guide. A datum whose fit ends clearly below it has diverged and keeps
    the start. `first_block` gives the fits of one call different noise.
    """
    proposal = start = source = GaussianProposal(loc, torch.diag_embed(scale))
    last = num_gradients // 2
    first = num_gradients - last
    # Two pairs per round if there are many gradients, because the linear algebra of a round takes longer than a gradient.
    step = 2 * max(2 if first >= 60 else 1, round(first / 120))
    sizes = [step] * (first // step) + [last + first % step]
    points = gradients = ages = None
    for round_, size in enumerate(sizes):
        space.call.set_noise(Noise.FIT, first_block + round_)
        noise = torch.randn(*loc.shape, (size + 1) // 2, dtype=loc.dtype, device=loc.device)
        u = proposal.coloured(torch.cat([noise, -noise], -1)[..., :size])
        log_joint, log_prior, g = values_and_gradient(space, u)
        age = torch.full((size,), float(round_), dtype=loc.dtype, device=loc.device)
        points = u if points is None else torch.cat([points, u])
        gradients = g if gradients is None else torch.cat([gradients, g])
        ages = age if ages is None else torch.cat([ages, age])
        source = proposal
        proposal = newton_step(proposal, points, gradients, FADE ** (round_ - ages), scale)
    bound = log_joint - source.log_prob(u)
    highest = bound.mean(0) + 3 * bound.std(0, correction=0) / size**0.5
    return start.where(highest < floor, proposal), FitPoints(u, log_joint, log_prior, source)


def values_and_gradient(space: LatentSpace, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x, u) and log p(u), (K, B) each, and the gradient of the first per particle, (K, B, D).

    In pieces of bounded memory.

    :raises NonFiniteError: for a gradient that is not finite where log p(x, u) is.
    """
    log_joint, log_prior, gradient = unchecked_gradient(space, u)
    check_gradients(log_joint, gradient, space.index)
    return log_joint, log_prior, gradient


def unchecked_gradient(space: LatentSpace, u: Tensor, prior_powers: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same without the check, for callers that handle gradients that are not finite.

    :param prior_powers: (K,), for the gradient of log p(x given u) + power log p(u) instead.
    """
    joints: list[Tensor] = []
    priors: list[Tensor] = []
    gradients: list[Tensor] = []
    for first, length in space.call.chunks(len(u)):
        with differentiable():
            piece = u[first : first + length].detach().requires_grad_()
            log_joint, log_prior = space.log_joint_and_prior(piece)
            target = log_joint
            if prior_powers is not None:
                target = log_joint - (1 - prior_powers[first : first + length]).unsqueeze(-1) * log_prior
            gradients += torch.autograd.grad(target.sum(), piece)
        joints.append(log_joint.detach())
        priors.append(log_prior.detach())
    return torch.cat(joints), torch.cat(priors), torch.cat(gradients)


def newton_step(
    proposal: GaussianProposal, points: Tensor, gradients: Tensor, weights: Tensor, start_scale: Tensor
) -> GaussianProposal:
    """Regress gradients on points, (K, B, D) each, and move to the Gaussian that explains them.

    Coordinates are whitened by the current proposal: u = tril^-1 (z - loc), with gradients v = tril' g. The regression
    minimises sum_k w_k |v_k - c + H u_k|^2 + ridge |H - anchor|^2 over c and symmetric H. The anchor is diagonal, from a
    regression per coordinate; without one the fit can diverge. The new centre is where c - H u is zero, the new precision H.
    """
    dim = proposal.loc.shape[-1]
    # 1. Points and gradients, original and whitened, and their weights.
    usable = finite_rows(gradients).T.unsqueeze(1)  # (B, 1, K); elsewhere log p is not finite either
    z = (points - proposal.loc).permute(1, 2, 0)  # (B, D, K)
    g = torch.where(usable, gradients.permute(1, 2, 0), torch.zeros_like(z))
    u, v = proposal.whitened(points), proposal.tril.mT @ g
    far = (u.square().mean(1, keepdim=True) - 1).clamp(min=0)  # gradients far from the current proposal have little weight
    w = weights * usable / (1 + far) ** 2
    total = w.sum(-1, keepdim=True).clamp(min=1e-6)

    def centred(a: Tensor) -> tuple[Tensor, Tensor]:
        mean = (a * w).sum(-1, keepdim=True) / total
        return mean, a - mean

    # 2. Subtract weighted means, which removes c from the regression: v_mean = c - H u_mean.
    (_, z), (_, g), (u_mean, u), (v_mean, v) = centred(z), centred(g), centred(u), centred(v)
    # 3. The anchor: minus the slope of g_d in z_d, as a multiple of the starting precision, shrunk towards one by
    #    ANCHOR_RIDGE pseudo-gradients and clamped; then turned into the whitened coordinates.
    start_variance = start_scale.square()
    ratio = (ANCHOR_RIDGE - (w * g * z).sum(-1)) / ((w * z * z).sum(-1) / start_variance + ANCHOR_RIDGE)
    anchor = (proposal.tril.mT * (ratio.clamp(0.01, 100) / start_variance).unsqueeze(1)) @ proposal.tril
    # 4. The normal equations of a symmetric H are a Lyapunov equation, H A + A H = R + R' with A = sum_k w_k u_k u_k'.
    #    In the eigenbasis of A each entry of H is one division.
    second_moment = (u * w) @ u.mT + RIDGE * torch.eye(dim, dtype=u.dtype, device=u.device)
    right = RIDGE * anchor - (v * w) @ u.mT
    a, basis, known = eigh(second_moment)
    rotated = basis.mT @ (right + right.mT) @ basis
    precision = basis @ (rotated / (a.unsqueeze(-1) + a.unsqueeze(-2))) @ basis.mT
    factors, axes, precise = eigh(0.5 * (precision + precision.mT))
    # 5. Limit the change of the precision along an axis, and of the centre, in one round.
    factors = factors.clamp(*PRECISION_RANGE)
    step = axes @ ((axes.mT @ v_mean) / factors.unsqueeze(-1)) + u_mean
    longest = max(0.5 * math.sqrt(dim), 2.5)
    step = step * (longest / step.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    # 6. Covariance tril H^-1 tril'; QR gives its Cholesky factor without squaring, up to the signs of its columns.
    upper = torch.linalg.qr((proposal.tril @ (axes * factors.rsqrt().unsqueeze(-2))).mT)[1]
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(u.dtype)
    loc = proposal.loc + (proposal.tril @ step).squeeze(-1)
    tril = upper.mT * signs.unsqueeze(-2)
    # 7. A datum with a value that is not finite keeps its proposal.
    good = known & precise & loc.isfinite().all(-1) & tril.isfinite().all(-1).all(-1)
    return GaussianProposal(loc, tril).where(good, proposal)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.eigh` of (B, D, D), and a mask, (B,), of valid matrices; invalid ones are replaced by the identity.

    One matrix that is not finite, or too badly scaled for float32, would raise for the whole batch.
    """
    known = matrix.isfinite().all(-1).all(-1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(known.reshape(-1, 1, 1), matrix, identity)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = (found.to(matrix.dtype) for found in torch.linalg.eigh(matrix.double()))
    return values, vectors, known
