"""A few particles resampled by weight, and the weighted moments of all, in one pass over blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian import GaussianProposal
from .gradients import finite_rows

SHRINKAGE = 5.0  # effective particles, plus one per latent, as which the covariance of the proposal counts


@dataclass(frozen=True)
class Moments:
    """Mean (B, D) and mean of u u' (B, D, D) of weighted points."""

    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, u: Tensor, share: Tensor) -> "Moments":
        """The moments of points (K, B, D) with normalised weights (K, B)."""
        weighted = u * share.unsqueeze(-1)
        return cls(weighted.sum(0), weighted.permute(1, 2, 0) @ u.permute(1, 0, 2))

    def mixed(self, other: "Moments", share: Tensor) -> "Moments":
        """The moments mixed with a share, (B,), of others."""
        return Moments(
            torch.lerp(self.mean, other.mean, share.unsqueeze(-1)),
            torch.lerp(self.square, other.square, share.reshape(-1, 1, 1)),
        )

    def covariance(self) -> Tensor:
        return self.square - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)


class Resampled:
    """C particles per datum resampled in proportion to their weights, and the moments of all, in one pass over blocks.

    :ivar chosen: (C, B, D).
    """

    def __init__(self, u: Tensor, num_chosen: int) -> None:
        """`u`, (K, B, D), is the first block; its mean is used as the origin, to avoid cancellation in the moments."""
        self._origin = u.nan_to_num(0.0, posinf=0.0, neginf=0.0).mean(0)
        self.chosen = self._origin.expand(num_chosen, *self._origin.shape).clone()
        self._log_total = torch.full_like(u[0, :, 0], -torch.inf)
        self._log_squares = self._log_total.clone()
        zero = torch.zeros_like(self._origin)
        self._weighted = self._plain = Moments(zero, zero.unsqueeze(-1) * zero.unsqueeze(-2))
        self._count = torch.zeros_like(self._log_total)

    def add(self, u: Tensor, log_weight: Tensor) -> None:
        """Add one block, (K, B, D), with its log-weights, (K, B). Values of u that are not finite are ignored."""
        usable = finite_rows(u)
        u = torch.where(usable.unsqueeze(-1), u - self._origin, torch.zeros_like(u))
        log_weight = log_weight.masked_fill(~usable, -torch.inf).to(u.dtype)
        log_block = log_weight.logsumexp(0)
        share = (log_weight - log_block).exp().nan_to_num(nan=0.0)  # (K, B) of the block; zero where no weight is positive
        log_total = torch.logaddexp(self._log_total, log_block)
        new = (log_block - log_total).exp().nan_to_num(nan=0.0)  # (B,), the share of the block among all so far
        # Systematic resampling within the block, then a choice between the block and those before it.
        num_chosen, num_data = self.chosen.shape[:2]
        order = torch.arange(num_chosen, dtype=u.dtype, device=u.device).unsqueeze(-1)
        position = (order + torch.rand(1, num_data, dtype=u.dtype, device=u.device)) / num_chosen
        index = torch.searchsorted(share.cumsum(0).T.contiguous(), position.T.contiguous()).T.clamp(max=len(u) - 1)
        drawn = u.gather(0, index.unsqueeze(-1).expand(-1, -1, u.shape[-1])) + self._origin
        replaced = torch.rand(num_chosen, num_data, dtype=u.dtype, device=u.device) < new
        self.chosen = torch.where(replaced.unsqueeze(-1), drawn, self.chosen)
        self._weighted = self._weighted.mixed(Moments.of(u, share), new)
        count = usable.sum(0).to(u.dtype)
        self._count = self._count + count
        self._plain = self._plain.mixed(Moments.of(u, usable / count.clamp(min=1)), count / self._count.clamp(min=1))
        self._log_squares = torch.logaddexp(self._log_squares, (2 * log_weight).logsumexp(0))
        self._log_total = log_total

    def gaussian(self, kept: Tensor | slice = slice(None)) -> GaussianProposal:
        """The weighted mean, and the weighted covariance shrunk towards that of the proposal if few weights dominate.

        :param kept: the latents to use, by default all.
        """
        dim = self.chosen[..., kept].shape[-1]
        ess = (2 * self._log_total - self._log_squares).exp().nan_to_num(nan=0.0).reshape(-1, 1, 1)
        prior = SHRINKAGE + dim
        covariance = torch.lerp(self._plain.covariance(), self._weighted.covariance(), ess / (ess + prior))
        covariance = covariance[:, kept][:, :, kept]
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        eps = torch.finfo(covariance.dtype).eps
        covariance = covariance + torch.diag_embed(10 * dim * eps * variance)
        tril, failed = torch.linalg.cholesky_ex(covariance)
        tril = torch.where(failed.reshape(-1, 1, 1) == 0, tril, torch.diag_embed(variance.sqrt()))
        return GaussianProposal((self._weighted.mean + self._origin)[:, kept], tril)
