"""A second estimate of log p(x), from a fit to the posterior: it finds mass near the guide's draws that these do not reach.

Weights of a guide that is narrower than the posterior look good, because the missed region is never drawn. The gradients of
log p(x, z) at and near the particles show it. A few particles are drawn by weight and moved along one Hamiltonian
trajectory. A Gaussian is fitted to the gradients along it. Importance sampling from this Gaussian, and from a few draws of
the prior, gives the second estimate. Without gradients, `population` draws around the particles instead.

With many particles the check can afford a search for modes where the guide does not draw at all.
"""

import torch
from torch import Tensor

from ..errors import LocalFitError, NonFiniteError
from ..noise import Noise
from ..ops import log_mean_exp, log_mean_exp_std_error
from .defensive import defensive_draws
from .gaussian import FitPoints, GaussianProposal, newton_step, values_and_gradient
from .gradients import finite_rows
from .mixture import MixtureProposal
from .population import check_number, population_log_weights
from .resampling import Resampled
from .search import SEARCHED_DIM, search
from .space import LatentSpace

MOST_LATENTS = 100  # with more latents, the few gradients do not determine a covariance, and its D x D numbers take memory
# 3 x 12 x (1 + 3) + 156 and 24 draws of the prior: 324 decoder evaluations, 348 where the prior draws what is enumerated.
NUM_CHAINS, NUM_STEPS, NUM_DRAWS = 12, 3, 156
STEP_SIZE = 0.7  # step size in standard deviations of the metric: a trajectory of a third of a turn, which is stable
FEWEST_SEARCHED = 3000  # particles, so that check and search together cost at most a third of the run
NUM_POINTS, NUM_STARTS = 40, 120  # draws of the Gaussian, and of the prior, for the search
SPACE, TRAJECTORY, RESAMPLING = range(3)  # noise blocks; each block of particles has one, from RESAMPLING on
POINTS, DRAWS = 2**20 - 1, 2**20  # and those after it


class PosteriorSide:
    """The check of one call: it is given every block of particles, and then computes the second estimate.

    :raises LocalFitError: for more latents than the gradients can determine.
    """

    def __init__(self, space: LatentSpace, *, searched: bool) -> None:
        """`searched` says that the particles come from a search already, which is not made again."""
        if space.dim > MOST_LATENTS:
            raise LocalFitError(f"more than {MOST_LATENTS} latents")
        if space.num_values is not None:
            check_number(space)
        self._space, self._searched = space, searched
        self._particles: Resampled | None = None
        self._num_blocks = self._num_particles = 0

    def add(self, u: Tensor, log_weight: Tensor) -> None:
        """Add one noise block of particles, (K, B, D), with their log-weights, (K, B)."""
        self._space.call.set_noise(Noise.CHECK, RESAMPLING + self._num_blocks)
        self._num_blocks += 1
        self._num_particles += len(u)
        u = self._space.filled(u)
        if self._particles is None:
            self._particles = Resampled(u, NUM_CHAINS)
        self._particles.add(u, log_weight)

    def estimate(self) -> tuple[Tensor, Tensor]:
        """(log p(x), its standard error), (B,) each."""
        assert self._particles is not None
        log_weight = None if self._space.num_values is not None else self._from_gradients(self._particles)
        if log_weight is None:
            log_weight = population_log_weights(self._space, self._particles, self._num_particles)
        return log_mean_exp(log_weight, 0), log_mean_exp_std_error(log_weight)

    def _from_gradients(self, particles: Resampled) -> Tensor | None:
        """(K, B) log-weights; `None` where log p(x, z) has no gradients, or some that are not finite."""
        metric = particles.gaussian()
        try:
            points, gradients = trajectory(self._space, particles.chosen, metric)
        except (LocalFitError, NonFiniteError):
            return None
        scale = metric.tril.square().sum(-1).sqrt()
        fitted = newton_step(metric, points, gradients, torch.ones_like(points[:, 0, 0]), scale)
        proposal = MixtureProposal.of(fitted, student=True)
        if self._num_particles >= FEWEST_SEARCHED and self._space.dim <= SEARCHED_DIM and not self._searched:
            proposal = with_modes(self._space, fitted, particles.chosen) or proposal
        return defensive_draws(self._space, proposal, NUM_DRAWS, DRAWS)[1]


def with_modes(space: LatentSpace, fitted: GaussianProposal, particles: Tensor) -> MixtureProposal | None:
    """The Gaussian and what a search finds beside it; `None` where gradients on the way are not finite."""
    space.call.set_noise(Noise.CHECK, POINTS)
    u = torch.cat([fitted.draw(NUM_POINTS), particles])
    pieces = [space.log_joint_and_prior(u[first : first + length]) for first, length in space.call.chunks(len(u))]
    log_joint, log_prior = (torch.cat(column) for column in zip(*pieces, strict=True))
    points = FitPoints(u[:NUM_POINTS], log_joint[:NUM_POINTS], log_prior[:NUM_POINTS], fitted)
    try:
        return search(space, fitted, points, (particles, log_joint[NUM_POINTS:]), NUM_STARTS)[0]
    except (LocalFitError, NonFiniteError):
        return None


def trajectory(space: LatentSpace, u: Tensor, metric: GaussianProposal) -> tuple[Tensor, Tensor]:
    """All points, (K, B, D), of a Hamiltonian trajectory from u, (C, B, D), and the gradients there. No move is rejected.

    A point far below the starts has diverged, as in the neck of a funnel. It is replaced by its start.
    """
    space.call.set_noise(Noise.CHECK, TRAJECTORY)
    momentum = torch.randn(*u.shape[1:], len(u), dtype=u.dtype, device=u.device)  # (B, D, C), whitened
    start_value, _, start_gradient = values_and_gradient(space, u)
    lowest = start_value.nan_to_num(nan=-torch.inf).amin(0) - 20 - 2 * space.dim
    start, gradient = u, start_gradient
    points, gradients = [u], [gradient]
    for _ in range(NUM_STEPS):
        momentum = momentum + 0.5 * STEP_SIZE * metric.tril.mT @ gradient.permute(1, 2, 0)
        u = u + STEP_SIZE * (metric.tril @ momentum).permute(2, 0, 1)
        value, _, gradient = values_and_gradient(space, u)
        fine = ((value > lowest) & finite_rows(gradient) & finite_rows(u)).unsqueeze(-1)
        u, gradient = torch.where(fine, u, start), torch.where(fine, gradient, start_gradient)
        momentum = momentum + 0.5 * STEP_SIZE * metric.tril.mT @ gradient.permute(1, 2, 0)
        points.append(u)
        gradients.append(gradient)
    return torch.cat(points), torch.cat(gradients)
