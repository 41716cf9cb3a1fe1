"""Starts of the search for further components: spread draws of the prior, moved uphill."""

import torch
from torch import Tensor

from .gaussian import unchecked_gradient
from .gradients import check_gradients
from .space import LatentSpace

NUM_CLIMBED = 4
# The powers of the prior, one gradient each, on the way of half of the starts: to where x is likely, and then uphill.
PRIOR_POWERS = (0.01,) * 5 + (0.03, 0.1, 0.3) + (1.0,) * 3
FIRST_STEP = 1.0  # standard deviations of the prior
GROWTH, SHRINKAGE = 1.5, 0.5  # factors of a step per latent, while its gradient keeps its sign and when it changes
TINY = 1e-6  # a scale where all draws of the prior agree


def climbed_starts(space: LatentSpace, u: Tensor, log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """Choose spread draws of the prior from (K, B, D) with (K, B), and move them uphill: (S, B, D) and (S, B).

    A draw of the prior is rarely near a narrow mode, so the highest draw alone would always lead to the same mode. Half of
    the starts go to where x is likely first: under a prior with heavy tails, a mode may be where no draw of it is.
    """
    scale = u.std(0, correction=0).clamp(min=TINY)
    starts = spread(u, log_joint, scale)
    powers = u.new_ones(len(PRIOR_POWERS), len(starts))
    powers[:, len(starts) - len(starts) // 2 :] = u.new_tensor(PRIOR_POWERS).unsqueeze(-1)
    return climb(space, starts, FIRST_STEP * scale, powers)


def spread(u: Tensor, log_joint: Tensor, scale: Tensor) -> Tensor:
    """The point with the highest log joint, then repeatedly the one farthest from those chosen: (S, B, D)."""
    rows = torch.arange(u.shape[1], device=u.device)
    usable = log_joint > -torch.inf  # false for nan
    chosen = [torch.where(usable, log_joint, -torch.inf).argmax(0)]
    distance = torch.full_like(log_joint, torch.inf)
    for _ in range(min(NUM_CLIMBED, len(u)) - 1):
        distance = torch.minimum(distance, ((u - u[chosen[-1], rows]) / scale).square().sum(-1))
        chosen.append(torch.where(usable, distance, -1.0).argmax(0))
    return u[torch.stack(chosen), rows]


def climb(space: LatentSpace, u: Tensor, step: Tensor, prior_powers: Tensor) -> tuple[Tensor, Tensor]:
    """The highest points of Rprop from u, (S, B, D), with their log joint: only the signs of a gradient count.

    Hence no scale has to be known (Riedmiller and Braun, 1993, https://doi.org/10.1109/ICNN.1993.298623).

    :param prior_powers: (steps, S). A step climbs log p(x given u) + power log p(u). Points count at power one alone.
    """
    step, sign = step.expand_as(u), torch.zeros_like(u)
    best, highest = u, torch.full_like(u[..., 0], -torch.inf)
    for powers in prior_powers:
        log_joint, _, gradient = unchecked_gradient(space, u, powers)
        check_gradients(log_joint[powers == 1], gradient[powers == 1], space.index)  # far from the posterior it may overflow
        higher = (log_joint > highest) & (powers == 1).unsqueeze(-1)  # false for nan
        best, highest = torch.where(higher.unsqueeze(-1), u, best), torch.where(higher, log_joint, highest)
        before, sign = sign, gradient.nan_to_num(nan=0.0).sign()
        agreement = sign * before
        step = step * torch.where(agreement > 0, GROWTH, torch.where(agreement < 0, SHRINKAGE, 1.0))
        u = u + sign * step
    return best, highest
