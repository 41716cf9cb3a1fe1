"""Draws of a second proposal and a few of the prior, with weights relative to the mixture of both.

The proposal of a check starts from the particles of the estimate. It is not near a mode that these have missed completely,
but a draw of the prior may be.
"""

from typing import Protocol

import torch
from torch import Tensor

from ..noise import Noise
from .mixture import prior_blocks, with_prior
from .space import LatentSpace

NUM_PRIOR = 24


class Proposal(Protocol):
    def draw(self, num_particles: int, /) -> Tensor: ...

    def log_prob(self, u: Tensor, /) -> Tensor: ...


def defensive_draws(space: LatentSpace, proposal: Proposal, num_fitted: int, first_block: int) -> tuple[Tensor, Tensor]:
    """u, (K, B, D), and log-weights, (K, B). A weight that is not a number counts as zero, so that it raises no doubt."""
    share = NUM_PRIOR / (num_fitted + NUM_PRIOR)

    def weigh(u: Tensor, log_joint: Tensor, log_prior: Tensor) -> Tensor:
        return log_joint - with_prior(proposal.log_prob(u), log_prior, share)

    space.call.set_noise(Noise.CHECK, first_block)
    u = proposal.draw(num_fitted)
    drawn = [u[first : first + length] for first, length in space.call.chunks(num_fitted)]
    log_weight = [weigh(piece, *space.log_joint_and_prior(piece)) for piece in drawn]
    for u, log_joint, log_prior in prior_blocks(space, NUM_PRIOR, Noise.CHECK, first_block + 1):
        drawn.append(u)
        log_weight.append(weigh(u, log_joint, log_prior))
    return torch.cat(drawn), torch.cat(log_weight).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
