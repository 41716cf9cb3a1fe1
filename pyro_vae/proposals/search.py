"""Add mixture components to a proposal, and choose the mixture by the ESS estimated from the points of the fits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..noise import Noise
from ..ops import log_mean_exp
from .gaussian import FitPoints, GaussianProposal, fit_with_points
from .missed import Witnesses, witnesses
from .mixture import PRIOR_SHARE, MixtureProposal, prior_blocks
from .space import LatentSpace
from .starts import climbed_starts

SEARCHED_DIM = 10  # most latents for which "auto" searches: with more, starts find few modes and t tails gain nothing
MAX_COMPONENTS = 3
SEARCH_GRADIENTS = 12  # and three per latent, for each further component
WIDE = 3.0  # factor by which components are widened when a start is searched where the posterior is high above them
OUTSIDE = 3.0  # a point is outside a component beyond sqrt(D) + 3 standard deviations
SMALLEST_WEIGHT = 0.01  # smallest mixture weight of a component that is kept
NUM_DONORS = 20  # draws of the prior whose latents take part in exchanges
NOISE_OF_A_FIT = 1000  # blocks of noise, more than any fit uses
COMPONENT_GAIN = math.log(1.05)  # a further component must measure 5% more ESS
HEAVY_GAIN = math.log(1.1)  # with heavy tails, t components measure 10% more ESS than Gaussians


@dataclass(frozen=True)
class Pool:
    """Points with known densities: `num_prior` draws of the prior first, then the last batch of each fit.

    They cost nothing more. Their importance weights measure how good a proposal is before anything is drawn from it.
    """

    u: Tensor
    log_joint: Tensor
    log_prior: Tensor
    num_prior: int
    fits: tuple[tuple[GaussianProposal, int], ...]

    @classmethod
    def of_prior(cls, space: LatentSpace, num_prior: int) -> "Pool":
        drawn = list(prior_blocks(space, num_prior, Noise.SEARCH))
        u, log_joint, log_prior = (torch.cat(column) for column in zip(*drawn, strict=True))
        return cls(u, log_joint, log_prior, num_prior, ())

    def with_fit(self, points: FitPoints) -> "Pool":
        return Pool(
            torch.cat([self.u, points.u]),
            torch.cat([self.log_joint, points.log_joint]),
            torch.cat([self.log_prior, points.log_prior]),
            self.num_prior,
            (*self.fits, (points.source, len(points.u))),
        )

    def log_weight(self) -> Tensor:
        """(K, B), weights relative to the mixture of all distributions that drew the points (the balance heuristic)."""
        terms = [source.log_prob(self.u) + math.log(size) for source, size in self.fits]
        if self.num_prior:
            terms.append(self.log_prior + math.log(self.num_prior))
        return self.log_joint - torch.logsumexp(torch.stack(terms), 0)

    def log_second_moments(self, proposals: Sequence[MixtureProposal]) -> Tensor:
        """(proposals, B), log of the mean square of the weights of each proposal, up to a constant: log K / ESS."""
        log_weight = self.log_weight() + self.log_joint
        moments = [
            torch.logsumexp(log_weight - proposal.log_prob_with_prior(self.u, self.log_prior, PRIOR_SHARE), 0)
            for proposal in proposals
        ]
        return torch.stack(moments).nan_to_num(torch.inf)


def num_starts_for(num_particles: int) -> int:
    """The number of draws of the prior from which a search may start; more than 500 would cost memory for little gain."""
    return 20 + min(num_particles // 10, 500)


def search(
    space: LatentSpace, first: GaussianProposal, points: FitPoints, guide: tuple[Tensor, Tensor], num_starts: int
) -> tuple[MixtureProposal, Witnesses]:
    """Fit up to two more components where the posterior is high and the others are low, and choose among the mixtures.

    The second component starts at the highest point outside the first, the third where the posterior is highest above both.
    A few of the points are draws of the prior that were moved uphill. It also returns points that may be near further modes,
    with which `missed_modes` tests the proposal.

    It follows incremental mixture importance sampling (Raftery and Bao, 2010,
    https://doi.org/10.1111/j.1541-0420.2010.01399.x), which finds modes that diagnostics of the first component do not show.

    :param points: the last batch of the fit of `first`.
    :param guide: u, (K, B, D), and log p(x, u), (K, B), of draws of the guide: starts that cost nothing.
    :param num_starts: draws of the prior to start from, one decoder evaluation each.
    """
    pool = Pool.of_prior(space, num_starts).with_fit(points)
    climbed = climbed_starts(space, pool.u[:num_starts], pool.log_joint[:num_starts])
    masses = [log_mass(points)]
    scale = first.tril.square().sum(-1).sqrt()
    mixtures = [MixtureProposal.of(first)]
    for i in range(1, MAX_COMPONENTS):
        start = outside_start if i == 1 else best_start
        loc = start(
            mixtures[-1], torch.cat([guide[0], pool.u, climbed[0]]), torch.cat([guide[1], pool.log_joint, climbed[1]])
        )
        num_gradients = SEARCH_GRADIENTS + 3 * space.dim
        component, points = fit_with_points(space, loc, scale, num_gradients, first_block=i * NOISE_OF_A_FIT)
        pool = pool.with_fit(points)
        masses.append(log_mass(points))
        mixtures.append(mixtures[-1].with_component(component, weights_of(torch.stack(masses, -1))))
    chosen = choose(pool, mixtures)
    return chosen, witnesses(space, mixtures[-1].components, *climbed, chosen, highest_of_prior(pool))


def highest_of_prior(pool: Pool) -> Tensor:
    """(N, B, D), the draws of the prior in the pool with the highest posterior, in this order."""
    log_joint = pool.log_joint[: pool.num_prior].nan_to_num(nan=-torch.inf)
    best = log_joint.topk(min(NUM_DONORS, len(log_joint)), 0).indices
    return pool.u[best, torch.arange(pool.u.shape[1], device=best.device)]


def log_mass(points: FitPoints) -> Tensor:
    """(B,), log p(x) as estimated by the last batch of a fit."""
    return log_mean_exp(points.log_joint - points.source.log_prob(points.u), 0)


def weights_of(log_masses: Tensor) -> Tensor:
    """(B, C); components with a negligible share get zero, and the first component gets one where nothing is known."""
    mixture_weights = log_masses.softmax(-1)
    mixture_weights = torch.where(mixture_weights < SMALLEST_WEIGHT, 0.0, mixture_weights)
    alone = torch.zeros_like(mixture_weights)
    alone[:, 0] = 1
    return torch.where(
        mixture_weights.isfinite().all(-1, keepdim=True), mixture_weights / mixture_weights.sum(-1, keepdim=True), alone
    )


def best_start(mixture: MixtureProposal, u: Tensor, log_joint: Tensor) -> Tensor:
    """(B, D), the point of (K, B, D) where the posterior is highest above the components, made `WIDE` times as wide."""
    wide = tuple(GaussianProposal(component.loc, component.tril * WIDE) for component in mixture.components)
    terms = torch.stack([component.log_prob(u) for component in wide], -1) + mixture.mixture_weights.log()
    best = (log_joint - torch.logsumexp(terms, -1)).nan_to_num(-torch.inf).argmax(0)
    return u[best, torch.arange(len(best), device=u.device)]


def outside_start(mixture: MixtureProposal, u: Tensor, log_joint: Tensor) -> Tensor:
    """(B, D), the point of (K, B, D) where the posterior is highest outside all components, or `best_start`.

    A point in the tail of a known component may be farther above it than another mode is.
    """
    nearest = torch.stack([component.squared_distance(u) for component in mixture.components]).amin(0).sqrt()
    outside = (nearest > math.sqrt(mixture.dim) + OUTSIDE) & (log_joint > -torch.inf)  # false for nan
    best = torch.where(outside, log_joint, -torch.inf).argmax(0)
    start = u[best, torch.arange(len(best), device=u.device)]
    return torch.where(outside.any(0).unsqueeze(-1), start, best_start(mixture, u, log_joint))


def choose(pool: Pool, mixtures: Sequence[MixtureProposal]) -> MixtureProposal:
    """For each datum, the proposal with the largest ESS on the pool: Gaussian or t, with one or more components.

    The points of the pool are not used in the estimate, so the choice leaves it unbiased. All candidates have the same cost
    per draw, so the largest ESS is also the largest ESS per cost.

    :param mixtures: each with one component more than the one before.
    """
    tails = (False, True)
    candidates = [replace(m, student=torch.full_like(m.student, student)) for student in tails for m in mixtures]
    handicap = [i * COMPONENT_GAIN for _ in tails for i in range(len(mixtures))]
    moments = pool.log_second_moments(candidates)
    best = (moments + moments.new_tensor(handicap).unsqueeze(-1)).argmin(0)  # (B,)
    most = mixtures[-1].mixture_weights.shape[-1]
    mixture_weights = torch.stack([pad(m.mixture_weights, (0, most - m.mixture_weights.shape[-1])) for m in mixtures])
    rows = torch.arange(len(best), device=best.device)
    gaussian, student = (part.amin(0) for part in moments.chunk(len(tails)))
    return replace(
        mixtures[-1],
        mixture_weights=mixture_weights[best % len(mixtures), rows],
        student=best >= len(mixtures),
        heavy=gaussian - student > HEAVY_GAIN,
    )
