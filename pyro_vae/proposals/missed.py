"""Test whether a posterior has modes that its fitted proposal lacks, at points near possible other modes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian import GaussianProposal, unchecked_gradient
from .mixture import MixtureProposal
from .space import LatentSpace

EXCESS = 5.0  # nats by which the posterior is above the proposal at a mode that was missed
SMALLEST_MODE = math.log(0.02)  # smallest share of p(x) of a mode that matters
FEWEST_DRAWS = 3.0  # expected draws at a mode, below which the draws may have missed it
# points that are moved uphill, the number of Newton steps, and their largest length in sd
NUM_REFINED, NUM_STEPS, LONGEST_STEP = 2, 2, 3.0
APART = 3.0  # distance of two values of a latent, in standard deviations, above which they may belong to two modes


@dataclass(frozen=True)
class Witnesses:
    """Points that may be near other modes: `u` (W, B, D), `log_joint` (W, B), `log_mass` (W, B) of a mode there."""

    u: Tensor
    log_joint: Tensor
    log_mass: Tensor

    def select(self, kept: Tensor) -> "Witnesses":
        """The points for some of the data, by their indices."""
        return Witnesses(self.u[:, kept], self.log_joint[:, kept], self.log_mass[:, kept])


def witnesses(
    space: LatentSpace,
    components: Sequence[GaussianProposal],
    u: Tensor,
    log_joint: Tensor,
    proposal: MixtureProposal,
    donors: Tensor,
) -> Witnesses:
    """The climbed starts, (S, B, D) and (S, B), and each component with one latent set to its value at another point.

    The other point is another component, a start, or one of `donors`, (N, B, D). If several latents each have two modes, the
    posterior has a mode for every combination. A few starts reach few of these modes, but exchanges between two of them
    reach others. This takes one decoder evaluation per latent and component. The points that are highest above the proposal
    are then moved uphill, because the position of a mode depends on the other latents.
    """
    tril = torch.stack([component.tril for component in components])  # (C, B, D, D)
    owner = torch.stack([component.squared_distance(u) for component in components]).argmin(0)  # (S, B)
    locs = torch.stack([component.loc for component in components])
    moved = torch.cat([exchanged(component, torch.cat([locs, u, donors])) for component in components])
    moved_joint = torch.cat([space.log_joint(moved[first : first + n]) for first, n in space.call.chunks(len(moved))])
    u, log_joint = torch.cat([u, moved]), torch.cat([log_joint, moved_joint])
    order = torch.arange(len(components), device=u.device).repeat_interleave(space.dim)
    owner = torch.cat([owner, order.unsqueeze(-1).expand(-1, u.shape[1])])  # (W, B)
    above = (log_joint - proposal.log_prob(u)).nan_to_num(nan=-torch.inf)
    best = above.topk(min(NUM_REFINED, len(u)), 0).indices  # (R, B)
    rows = torch.arange(u.shape[1], device=u.device)
    refined, refined_joint = uphill(space, u[best, rows], tril[owner[best, rows], rows])
    owner = torch.cat([owner, owner[best, rows]])
    volumes = torch.stack([log_volume(component) for component in components])  # (C, B)
    log_joint = torch.cat([log_joint, refined_joint])
    return Witnesses(torch.cat([u, refined]), log_joint, log_joint + volumes.gather(0, owner))


def uphill(space: LatentSpace, u: Tensor, tril: Tensor) -> tuple[Tensor, Tensor]:
    """Newton steps from u, (R, B, D), with the covariances tril tril', (R, B, D, D), and log p(x, u) at the end, (R, B)."""
    for _ in range(NUM_STEPS):
        gradient = unchecked_gradient(space, u)[2].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        whitened = (tril.mT @ gradient.unsqueeze(-1)).squeeze(-1)
        length = whitened.norm(dim=-1, keepdim=True)
        step = whitened * (LONGEST_STEP / length.clamp(min=LONGEST_STEP))
        moved = u + (tril @ step.unsqueeze(-1)).squeeze(-1)
        u = torch.where(moved.isfinite().all(-1, keepdim=True), moved, u)  # the norm of a steep gradient may overflow
    return u, torch.cat([space.log_joint(u[first : first + n]) for first, n in space.call.chunks(len(u))])


def missed_modes(
    found: Witnesses, proposal: MixtureProposal, log_evidence: Tensor, lightest: Tensor | float, num_draws: float
) -> Tensor:
    """(B,), where the posterior at a witness is far above the proposal, and its mode would matter.

    Where the proposal has found a mode, p(x, u) / r(u) is p(x), up to the shape of the mode. Where the proposal is lower by
    a factor, a mode of mass m gets K m / factor of the draws. If that is only a few, there may be none, and the weights do
    not show it.

    :param lightest: the smallest share of p(x), (B,), for which a mode with a few expected draws matters.
    :param num_draws: K draws from the proposal; infinite if the draws move afterwards, as in chains.
    """
    above = found.log_joint - proposal.log_prob(found.u) - log_evidence
    log_mass = found.log_mass - log_evidence
    far = (above > EXCESS) & (log_mass > SMALLEST_MODE)
    log_mass = log_mass.clamp(max=0.0)
    rare = math.log(num_draws) + log_mass - above < math.log(FEWEST_DRAWS)
    return (far | (rare & (log_mass.exp() > lightest))).any(0)


def exchanged(component: GaussianProposal, donors: Tensor) -> Tensor:
    """(D, B, D): the centre with one latent set to the value of the first donor, (S, B, D), that has a different value.

    The other latents are set to their mean given that latent, under the component. If no donor has a different value, the
    centre is unchanged.
    """
    covariance = component.tril @ component.tril.mT
    variance = covariance.diagonal(dim1=-2, dim2=-1)  # (B, D)
    shift = donors - component.loc
    elsewhere = shift.abs() > APART * variance.sqrt()
    first = elsewhere.to(torch.uint8).argmax(0, keepdim=True)  # the first of the largest
    shift = torch.where(elsewhere.any(0), shift.gather(0, first)[0], 0.0)
    return component.loc + ((shift / variance).unsqueeze(-1) * covariance).movedim(1, 0)


def log_volume(component: GaussianProposal) -> Tensor:
    """(B,), log of the mass of a mode with this covariance and height one."""
    return component.log_det() + 0.5 * component.loc.shape[-1] * math.log(2 * math.pi)
