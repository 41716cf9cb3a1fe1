"""Proposals over the latents outside the plate, where the data also have latents, which are integrated out."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from ..evidence import fit_proposals, guide_draws, summed_draws
from ..kernel import Call, LogDensities, Outside, Record
from ..noise import Noise, noise_seed
from ..ops import log_mean_exp
from ..proposals import GaussianProposal, LatentSpace, MixtureProposal, fit_with_points, num_gradients_for

START_DRAWS = 100  # draws of the guide for the start of the fit
INNER_DRAWS = 20  # draws of the latents of each datum, from a proposal fitted to it, for one gradient
FIRST_SEED = 10**6  # first noise block of the calls of a fit; those of the estimate count from 0

AtDraws = Callable[[dict[str, Tensor], int, int], Call]  # values, their number, the seed


class MarginalSpace(LatentSpace):
    """The unconstrained space of the latents theta outside the plate, with log p(x, theta) for log p(x, z, theta).

    p(x_n given theta) of each datum is a mean of weights from a Gaussian fitted to its latents given theta. The gradient by
    theta is that of the weights, with fixed draws.
    """

    def __init__(self, call: Call, outside: Outside, guide: Record, model: Record, inside: dict[str, Tensor], at: AtDraws):
        alone = copy(call)
        alone.structure = replace(
            call.structure, latents=outside.latents, guide_enumerated=(), model_enumerated=(), depend_on_enumerated=()
        )
        kept = {n: site for n, site in guide.items() if n not in outside.inside}
        super().__init__(alone, kept, model)
        self._first_cost = call.cost
        self._spent = 0  # decoder evaluations per datum of the calls given theta
        self._outside, self._inside, self._at, self._calls = outside, inside, at, 0

    def log_joint_and_prior(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, log_det = self.unpack(u)
        model = self.call.score({**self._inside, **values}, len(u))
        log_prior = self.densities(model, u, log_det)[1]
        observed = self._outside.log_densities(LogDensities(self.call.structure, {}, model, len(u)))[1]
        log_likelihood = self._log_likelihood(values, len(u)).sum(-1)
        return log_prior + (observed + log_likelihood).unsqueeze(-1), log_prior

    def _log_likelihood(self, values: dict[str, Tensor], num_draws: int) -> Tensor:
        """log p(x_n given theta_s), (S, N), differentiable in theta."""
        seed = noise_seed(self.call.seed, Noise.LEAVE_ONE_OUT, FIRST_SEED + self._calls)
        self._calls += 1
        with torch.no_grad():
            call = self._at({n: v.detach() for n, v in values.items()}, num_draws, seed)
            guide, model, weights = guide_draws(call)
            guide, model = summed_draws(call, guide, model)
            found = fit_proposals(call, guide, model, weights.elbo, INNER_DRAWS, None, "gaussian")
            call.set_noise(Noise.PROPOSAL, 0)
            z = found.proposal.draw(INNER_DRAWS)
            log_density = found.proposal.log_prob(z)
        space = copy(found.space)
        space.call = self._at(values, num_draws, seed)
        log_weight = space.log_joint(z) - log_density
        self._spent += (call.cost + space.call.cost) * num_draws
        return log_mean_exp(log_weight, 0).reshape(num_draws, -1)

    @property
    def spent(self) -> int:
        """Decoder evaluations per datum so far."""
        return self.call.cost - self._first_cost + self._spent


def fit_outside(space: MarginalSpace, call: Call) -> MixtureProposal:
    """A multivariate t around the Gaussian fitted to p(theta given all data)."""
    call.set_noise(Noise.GUIDE, 1)
    u = space.filled(space.pack(call.latent_values(call.draw_latents(START_DRAWS)))[0])
    component: GaussianProposal = fit_with_points(space, u.mean(0), u.std(0), num_gradients_for(START_DRAWS, space.dim))[0]
    return MixtureProposal.of(component, student=True)
