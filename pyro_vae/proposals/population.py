"""A second estimate of log p(x) without gradients, also for discrete latents: draws around particles, in two rounds.

Population Monte Carlo (Cappe et al., 2004, https://doi.org/10.1198/106186004X12803): importance sampling from a mixture of
kernels around particles drawn by weight. The first round is wide, to reach regions that the proposal does not; the second
starts from the particles of both.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LocalFitError
from .defensive import defensive_draws
from .gaussian import GaussianProposal
from .resampling import Resampled
from .space import LatentSpace

MOST_LATENTS = 15  # kernels around a few particles do not fill more dimensions
ROUNDS = ((120, 2.0), (156, 1.3))  # draws, and the factor by which standard deviations are widened
PULL = 0.5  # share of its distance from the mean that the centre of a kernel keeps
CHANGES = 1.0  # number of discrete latents that a kernel changes on average
FIRST_NOISE, ROUND_NOISE = 2**20, 100  # blocks of noise, beyond those of the particles


def population_log_weights(space: LatentSpace, particles: Resampled, num_particles: int) -> Tensor:
    """Log-weights, (K, B), of a second proposal.

    :raises LocalFitError: for more latents than the kernels can fill.
    """
    check_number(space)
    for i, (size, width) in enumerate(ROUNDS):
        kernels = Kernels.around(particles, space, width)
        u, log_weight = defensive_draws(space, kernels, size, FIRST_NOISE + ROUND_NOISE * i)
        # Their total weight equals that of the particles of the estimate.
        particles.add(u, log_weight + math.log(num_particles / len(u)))
    return log_weight


def check_number(space: LatentSpace) -> None:
    if space.dim > MOST_LATENTS:
        raise LocalFitError(f"more than {MOST_LATENTS} latents, some of them discrete or without gradients")


@dataclass(frozen=True)
class Kernels:
    """1/C sum_c k(u given particle c). A kernel changes each discrete latent with a small probability, to any other value.

    Continuous latents are normal around a point between the particle and the mean. The kernel adds the variance that these
    points lack, so that the mixture has the mean and the covariance of the particles (West, 1993,
    https://doi.org/10.1111/j.2517-6161.1993.tb01911.x).

    :ivar codes: (C, B, discrete latents), the discrete latents of the particles, as whole numbers.
    :ivar num_values: the number of values of each discrete latent.
    :ivar components: C Gaussians over the continuous latents.
    :ivar discrete: (D,), true for discrete latents.
    """

    codes: Tensor
    num_values: Tensor
    components: tuple[GaussianProposal, ...]
    discrete: Tensor

    @classmethod
    def around(cls, particles: Resampled, space: LatentSpace, width: float) -> "Kernels":
        chosen = particles.chosen
        counts = space.num_values if space.num_values is not None else chosen.new_zeros(space.dim, dtype=torch.long)
        discrete = counts > 0
        whole = particles.gaussian(~discrete)
        centres = torch.lerp(whole.loc, chosen[..., ~discrete], PULL)
        tril = width * math.sqrt(1 - PULL**2) * whole.tril
        return cls(chosen[..., discrete], counts[discrete], tuple(GaussianProposal(loc, tril) for loc in centres), discrete)

    @property
    def change(self) -> Tensor:
        """Probability that a discrete latent changes; zero where it has one value."""
        return (self.num_values > 1) * min(CHANGES / max(len(self.num_values), 1), 0.5)

    def draw(self, num_particles: int) -> Tensor:
        """(K, B, D)."""
        num_kernels, num_data = self.codes.shape[:2]
        rows = torch.arange(num_data, device=self.codes.device)
        chosen = torch.arange(num_particles, device=rows.device).unsqueeze(-1).expand(-1, num_data) % num_kernels
        codes = self.codes[chosen, rows]
        # 1 to n - 1: to each other value with the same probability
        steps = 1 + (torch.rand_like(codes) * (self.num_values - 1)).floor()
        changed = torch.rand_like(codes) < self.change
        loc = torch.stack([component.loc for component in self.components])[chosen, rows]
        noise = GaussianProposal(torch.zeros_like(loc[0]), self.components[0].tril).draw(num_particles)
        u = loc.new_empty(num_particles, num_data, len(self.discrete))
        u[..., self.discrete] = torch.where(changed, (codes + steps) % self.num_values, codes)
        u[..., ~self.discrete] = loc + noise
        return u

    def log_prob(self, u: Tensor) -> Tensor:
        """(K, B)."""
        stays, to_each = torch.log1p(-self.change), (self.change / (self.num_values - 1).clamp(min=1)).log()
        codes, rest = u[..., self.discrete], u[..., ~self.discrete]
        terms = [
            torch.where(codes == own, stays, to_each).sum(-1) + component.log_prob(rest)
            for own, component in zip(self.codes, self.components, strict=True)
        ]
        return torch.stack(terms).logsumexp(0) - math.log(len(terms))
