"""The optimum of a Gaussian family as estimated by one round of draws, with a quadratic as control variate.

The fit of proposals has found a quadratic Q(u) = -(u - a)' A (u - a) / 2 that approximates log p(x, u). Under a Gaussian q
the means of the gradient and the curvature of Q are known. Only those of log p - Q must be estimated. They are small where Q
is a good approximation, so that some hundred gradients are as good as thousands without Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..proposals import GaussianProposal, LatentSpace, eigh, values_and_gradient
from .controls import Quadratic, entropy

NUM_PAIRS = 32  # antithetic draws in a round
LONGEST_STEP = 2.0  # largest move of the mean in one round, in standard deviations
PRECISION_RANGE = (0.2, 5.0)  # largest factor by which a precision changes in one round


@dataclass(frozen=True)
class Target:
    """The optimum as estimated by a round that draws from q, in coordinates whitened by q: u = loc + tril e.

    :ivar step: (B, D), from the mean of q to the new mean.
    :ivar precision: (B, D, D).
    :ivar elbo: (B,) of q; `error` is its standard error.
    :ivar gain: (B,), nats gained from q to the target, if log p is quadratic.
    :ivar noise: (B,), nats by which the target is below the optimum because of its noise.
    :ivar narrow: (B,), whether q is far too narrow in a direction, by more than one round may correct.
    """

    step: Tensor
    precision: Tensor
    elbo: Tensor
    error: Tensor
    gain: Tensor
    noise: Tensor
    narrow: Tensor

    def approached(self, q: GaussianProposal, weight: Tensor) -> GaussianProposal:
        """The average of q, of weight 1 - w, and of the target, of weight w: of their means, and of their precisions."""
        w = weight.reshape(-1, 1, 1)
        identity = torch.eye(q.loc.shape[-1], dtype=q.loc.dtype, device=q.loc.device)
        root = cholesky(identity + w * (self.precision - identity))
        tril = cholesky(torch.cholesky_inverse(root))
        found = GaussianProposal(q.loc + (q.tril @ (w * self.step.unsqueeze(-1))).squeeze(-1), q.tril @ tril)
        finite = found.loc.isfinite().all(-1) & found.tril.isfinite().flatten(1).all(-1)
        return found.where(finite, q)


def target_of(space: LatentSpace, q: GaussianProposal, quadratic: Quadratic, blocks: Tensor, damped: Tensor) -> Target:
    """The target, from one round of draws.

    :param damped: (B,), where the correlations of Q are not used.
    """
    e, u = antithetic(q, NUM_PAIRS)
    log_joint, _, gradient = values_and_gradient(space, u)
    gradient = torch.where(gradient.isfinite(), gradient, torch.zeros_like(gradient))  # where log p is not finite either
    # 1. The gradient of log p - Q. That of Q is minus its curvature times (e + distance of the means).
    curvature = q.tril.mT @ quadratic.precision @ q.tril
    distance = torch.linalg.solve_triangular(q.tril, (q.loc - quadratic.gaussian.loc).unsqueeze(-1), upper=False)
    plus, minus = q.pulled(gradient).split(NUM_PAIRS, -1)
    even = 0.5 * (plus + minus) + curvature @ distance
    odd = 0.5 * (plus - minus) + curvature @ e
    # 2. The mean curvature of log p: that of Q, and Stein's identity E[slope] = E[gradient e'] for the rest.
    beyond = -0.5 * (odd @ e.mT + e @ odd.mT) * blocks / NUM_PAIRS
    factors, axes, _ = eigh(curvature * blocks + beyond)
    lowest, factors = factors.amin(-1), factors.clamp(*PRECISION_RANGE)
    precision = axes @ (factors.unsqueeze(-1) * axes.mT)
    # 3. The mean: a Newton step. The metric has the correlations of Q and, in its blocks, the precision of q, which is one
    # here. That is the mean curvature of all rounds before, which does not depend on the noise of this round.
    scales, bases, _ = eigh(curvature * blocks)
    scaled = bases @ (scales.clamp(min=1e-12).rsqrt().unsqueeze(-1) * bases.mT)
    identity = torch.eye(len(blocks), dtype=e.dtype, device=e.device)
    root = cholesky(torch.where(damped.reshape(-1, 1, 1), identity, scaled @ curvature @ scaled))
    mean_gradient = even.mean(-1, keepdim=True) - curvature @ distance
    step = torch.cholesky_solve(mean_gradient, root)
    length = (root.mT @ step).norm(dim=1, keepdim=True)
    # 4. The gain of both if log p is quadratic, and the loss by their noise: half its variance in the metric of each.
    gain = 0.5 * length.flatten().square() + 0.5 * (factors - 1 - factors.log()).sum(-1)
    whitened = torch.linalg.solve_triangular(root, even - even.mean(-1, keepdim=True), upper=False)
    squares = 0.5 * (odd.square() * (blocks.to(e) @ e.square()) + (odd * e) * (blocks.to(e) @ (odd * e))).sum(1)
    of_mean = 0.5 * whitened.square().sum((1, 2)) / (NUM_PAIRS - 1)
    of_precision = 0.25 * (squares.mean(-1) - beyond.square().sum((1, 2))) * NUM_PAIRS / (NUM_PAIRS - 1)
    elbo, error = elbo_of(q, quadratic, u, log_joint)
    return Target(
        step=(step * (LONGEST_STEP / length.clamp(min=1e-12)).clamp(max=1)).squeeze(-1),
        precision=precision,
        elbo=elbo,
        error=error,
        gain=gain,
        noise=(of_mean + of_precision) / NUM_PAIRS,
        narrow=lowest + 4 * (of_precision / NUM_PAIRS).sqrt() < PRECISION_RANGE[0],  # two standard errors
    )


def elbo_of(q: GaussianProposal, quadratic: Quadratic, u: Tensor, log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """L[q] and its error, (B,) each, from antithetic draws u of q, (K, B, D), and log p(x, u)."""
    num_pairs = len(u) // 2
    terms = 0.5 * sum((log_joint - quadratic.at(u)).split(num_pairs))
    return terms.mean(0) + quadratic.mean(q) + entropy(q), terms.std(0) / num_pairs**0.5


def antithetic(q: GaussianProposal, num_pairs: int) -> tuple[Tensor, Tensor]:
    """Standard normal noise, (B, D, pairs), and the draws of q from it and from its negative, (2 pairs, B, D)."""
    e = torch.randn(*q.loc.shape, num_pairs, dtype=q.loc.dtype, device=q.loc.device)
    return e, q.coloured(torch.cat([e, -e], -1))


def cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factors; NaN for a datum whose matrix has none, in place of an error for all data."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where((failed > 0).reshape(-1, 1, 1), torch.nan, factor)


def gain_between(start: GaussianProposal, q: GaussianProposal, quadratic: Quadratic) -> Tensor:
    """(B,), nats gained from the start to q, if q is the best Gaussian and log p has the curvature of Q."""
    moved = torch.linalg.solve_triangular(quadratic.gaussian.tril, (q.loc - start.loc).unsqueeze(-1), upper=False)
    spread = torch.linalg.solve_triangular(q.tril, start.tril, upper=False)
    log_ratio = q.log_det() - start.log_det()
    return 0.5 * moved.square().sum((1, 2)) + 0.5 * (spread.square().sum((1, 2)) - q.loc.shape[-1]) + log_ratio
