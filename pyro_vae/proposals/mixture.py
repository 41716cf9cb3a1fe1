"""Mixture proposals, for some data with Student t tails, and log-weights of draws from them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..noise import NOISE_BLOCK, Noise
from .gaussian import GaussianProposal
from .space import LatentSpace

PRIOR_BLOCK = 10  # draws of the prior run the decoder, so their noise blocks are small
PRIOR_SHARE = 0.02  # bounds the weights by max likelihood / share
GAUSSIAN_WIDTH, STUDENT_WIDTH = 0.35, 0.15  # standard deviations grow by 1 + width / sqrt(D)


@dataclass(frozen=True)
class MixtureProposal:
    """sum_c shares_c N(loc_c, f^2 S_c), or the multivariate t of 5 + D degrees with f^2 S_c in place of the normal.

    S_c = tril_c tril_c' and f = 1 + 0.35 / sqrt(D) for Gaussians, 1 + 0.15 / sqrt(D) for t. Degrees that grow with D keep
    the spread of the radius near that of the Gaussian.

    :ivar components: C Gaussians, not yet widened.
    :ivar mixture_weights: (B, C), mixture weights; rows sum to one.
    :ivar student: (B,), true where the components are Student t.
    :ivar heavy: (B,), true where t components are clearly better than Gaussians, `None` where that is not known.
    :ivar widened: whether the Gaussians are widened by f as above, or f = 1.
    """

    components: tuple[GaussianProposal, ...]
    mixture_weights: Tensor
    student: Tensor
    heavy: Tensor | None = None
    widened: bool = True

    @classmethod
    def of(cls, component: GaussianProposal, *, student: bool = False) -> "MixtureProposal":
        """A proposal with one component for every datum."""
        mixture_weights = torch.ones_like(component.loc[:, :1])
        return cls((component,), mixture_weights, torch.full_like(mixture_weights[:, 0], student, dtype=torch.bool))

    def select(self, kept: Tensor) -> "MixtureProposal":
        """The proposals of some of the data, by their indices."""
        components = tuple(component.select(kept) for component in self.components)
        heavy = None if self.heavy is None else self.heavy[kept]
        weights, student = self.mixture_weights[kept], self.student[kept]
        return replace(self, components=components, mixture_weights=weights, student=student, heavy=heavy)

    def as_fitted(self) -> "MixtureProposal":
        """The components without widening, for chains: weights need wide tails, chains do only where the posterior's are."""
        student = torch.zeros_like(self.student) if self.heavy is None else self.heavy
        return replace(self, student=student, widened=False)

    def with_component(self, component: GaussianProposal, mixture_weights: Tensor) -> "MixtureProposal":
        return replace(self, components=(*self.components, component), mixture_weights=mixture_weights)

    @property
    def dim(self) -> int:
        return self.components[0].loc.shape[-1]

    @cached_property
    def _any_student(self) -> bool:
        return bool(self.student.any())

    @property
    def width(self) -> float:
        """f of the Gaussians."""
        return widening(GAUSSIAN_WIDTH, self.dim) if self.widened else 1.0

    def draw(self, num_particles: int) -> Tensor:
        """Draws (K, B, D). By systematic sampling, each component has its share of K, up to one draw at random."""
        return self.draw_by_component(num_particles)[0]

    def draw_by_component(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """The draws, (K, B, D), and the index of the component of each, (K, B)."""
        like, nu = self.components[0].loc, degrees(self.dim)
        noise = torch.randn(*like.shape, num_particles, dtype=like.dtype, device=like.device)  # (B, D, K)
        chi2 = torch.distributions.Chi2(like.new_tensor(nu)).sample(torch.Size((len(like), 1, num_particles)))
        student = widening(STUDENT_WIDTH, self.dim) * (nu / chi2).sqrt()
        noise = noise * torch.where(self.student.reshape(-1, 1, 1), student, self.width)
        drawn = self.components[0].coloured(noise)
        number = torch.zeros(num_particles, len(like), dtype=torch.long, device=like.device)
        if len(self.components) == 1:
            return drawn, number
        order = torch.arange(num_particles, dtype=like.dtype, device=like.device)
        position = (order + torch.rand(len(like), 1, dtype=like.dtype, device=like.device)) / num_particles  # (B, K)
        ends = self.mixture_weights.cumsum(-1)
        for i, component in enumerate(self.components[1:]):
            beyond = (position >= ends[:, i : i + 1]) & (self.mixture_weights[:, i + 1 : i + 2] > 0)
            drawn = torch.where(beyond.T.unsqueeze(-1), component.coloured(noise), drawn)
            number = torch.where(beyond.T, i + 1, number)
        return drawn, number

    def log_prob(self, u: Tensor) -> Tensor:
        """(K, B)."""
        return torch.logsumexp(self.log_terms(u), -1)

    def log_terms(self, u: Tensor) -> Tensor:
        """(K, B, C), the log-density of each component including its weight."""
        return (
            torch.stack([self._component_log_prob(component, u) for component in self.components], -1)
            + self.mixture_weights.log()
        )

    def _component_log_prob(self, component: GaussianProposal, u: Tensor) -> Tensor:
        squared, log_det, dim, nu = component.squared_distance(u), component.log_det(), self.dim, degrees(self.dim)
        gaussian = -0.5 * squared / self.width**2 - dim * (math.log(self.width) + 0.5 * math.log(2 * math.pi))
        if not self._any_student:
            return gaussian - log_det
        width = widening(STUDENT_WIDTH, dim)
        constant = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - dim * (math.log(width) + 0.5 * math.log(nu * math.pi))
        student = constant - 0.5 * (nu + dim) * torch.log1p(squared / (nu * width**2))
        return torch.where(self.student, student, gaussian) - log_det

    def log_prob_with_prior(self, u: Tensor, log_prior: Tensor, prior_share: float) -> Tensor:
        """(K, B), the log-density of the mixture with a share of the prior, which bounds the weights."""
        log_fitted = self.log_prob(u)
        return with_prior(log_fitted, log_prior, prior_share) if prior_share else log_fitted


def with_prior(log_fitted: Tensor, log_prior: Tensor, prior_share: float) -> Tensor:
    """The log-density of a mixture of a proposal and the prior, from the log-densities of both."""
    return torch.logaddexp(log_fitted + math.log1p(-prior_share), log_prior + math.log(prior_share))


def degrees(dim: int) -> float:
    return 5.0 + dim


def widening(width: float, dim: int) -> float:
    return 1 + width / math.sqrt(dim)


def proposal_log_weights(
    space: LatentSpace,
    proposal: MixtureProposal,
    num_particles: int,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """(K, B) log-weights from the proposal and a share of the prior.

    The numbers of draws from each of the two are fixed. All have weights relative to the whole mixture, so their mean is
    unbiased for p(x). `watch` is called with each noise block, u (K, B, D) and log-weights (K, B).
    """
    num_prior = draws_of_prior(num_particles)
    num_fitted = num_particles - num_prior
    weighed = []

    def weigh(u: Tensor, log_joint: Tensor, log_prior: Tensor) -> Tensor:
        return log_joint - proposal.log_prob_with_prior(u, log_prior, num_prior / num_particles)

    def keep(u: Tensor, log_weight: Tensor) -> None:
        weighed.append(log_weight)
        if watch is not None:
            watch(u, log_weight)

    for block, start in enumerate(range(0, num_fitted, NOISE_BLOCK)):
        size = min(NOISE_BLOCK, num_fitted - start)
        space.call.set_noise(Noise.PROPOSAL, block)
        u = proposal.draw(size)
        pieces = [u[first : first + length] for first, length in space.call.chunks(size)]
        keep(u, torch.cat([weigh(piece, *space.log_joint_and_prior(piece)) for piece in pieces]))
    for u, log_joint, log_prior in prior_blocks(space, num_prior, Noise.PROPOSAL, first_block=num_fitted):
        keep(u, weigh(u, log_joint, log_prior))
    log_weight = torch.cat(weighed)
    space.call.check_finite(log_weight)
    return log_weight


def proposal_draws(space: LatentSpace, proposal: MixtureProposal, num_particles: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The draws of `proposal_log_weights` again, block by block: u (K, B, D) and the origin of each (K, B).

    The origin is the index of a component; the prior counts as a further one. Only draws of the prior are scored, because
    drawing and scoring are one run there.
    """
    num_fitted = num_particles - draws_of_prior(num_particles)
    for block, start in enumerate(range(0, num_fitted, NOISE_BLOCK)):
        space.call.set_noise(Noise.PROPOSAL, block)
        yield proposal.draw_by_component(min(NOISE_BLOCK, num_fitted - start))
    for u in prior_draws(space, num_particles - num_fitted, first_block=num_fitted):
        yield u, torch.full_like(u[..., 0], len(proposal.components), dtype=torch.long)


def prior_draws(space: LatentSpace, num_particles: int, first_block: int) -> Iterator[Tensor]:
    """The draws of the `prior_blocks` of a proposal again."""
    for block, start in enumerate(range(0, num_particles, PRIOR_BLOCK), start=first_block):
        space.call.set_noise(Noise.PROPOSAL, block)
        yield space.draw_prior(min(PRIOR_BLOCK, num_particles - start))[0]


def draws_of_prior(num_particles: int) -> int:
    """The number of the K draws that come from the prior."""
    return math.ceil(PRIOR_SHARE * num_particles) if num_particles > 1 else 0


def prior_blocks(
    space: LatentSpace, num_particles: int, stream: int, first_block: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Draws of the prior, (K, B, D), with log p(x, u) and log p(u), (K, B) each, in blocks of bounded memory."""
    for block, start in enumerate(range(0, num_particles, PRIOR_BLOCK), start=first_block):
        space.call.set_noise(stream, block)
        yield space.draw_prior(min(PRIOR_BLOCK, num_particles - start))
