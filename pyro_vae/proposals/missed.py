"""Whether a posterior has modes that its fitted proposal lacks: points near other modes, compared with the proposal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian import GaussianProposal, unchecked_gradient
from .mixture import MixtureProposal
from .space import LatentSpace

EXCESS = 5.0  # nats by which the posterior is above the proposal at a mode that was missed
SMALLEST_MODE = math.log(0.02)  # of p(x); what is smaller does not matter
FEWEST_DRAWS = 3.0  # at a mode, expected, below which the draws may have missed it
NUM_REFINED, NUM_STEPS, LONGEST_STEP = 2, 2, 3.0  # points that move uphill, their Newton steps, and how long, in sd
APART = 3.0  # standard deviations between two values of a latent, from which on they may belong to two modes


@dataclass(frozen=True)
class Witnesses:
    """Points that may lie near other modes: `u` (W, B, D), `log_joint` (W, B), `log_mass` (W, B) of a mode there."""

    u: Tensor
    log_joint: Tensor
    log_mass: Tensor

    def select(self, kept: Tensor) -> "Witnesses":
        """Those of some of the data, by their indices."""
        return Witnesses(self.u[:, kept], self.log_joint[:, kept], self.log_mass[:, kept])


def witnesses(
    space: LatentSpace,
    components: Sequence[GaussianProposal],
    u: Tensor,
    log_joint: Tensor,
    proposal: MixtureProposal,
    donors: Tensor,
) -> Witnesses:
    """The climbed starts, (S, B, D) and (S, B), and each component with one latent moved to where another point has it.

    The other point is another component, a start, or one of `donors`, (N, B, D).

    A posterior over several things with two explanations each has a mode for every combination. A few starts reach few of
    these modes, but exchanges between two of them lead to others. One decoder evaluation per latent and component. The
    points that are highest above the proposal move uphill, because the place of a mode depends on the other latents.
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
        u = torch.where(moved.isfinite().all(-1, keepdim=True), moved, u)  # a gradient so steep that its length overflows
    return u, torch.cat([space.log_joint(u[first : first + n]) for first, n in space.call.chunks(len(u))])


def missed_modes(
    found: Witnesses, proposal: MixtureProposal, log_evidence: Tensor, lightest: Tensor | float, num_draws: float
) -> Tensor:
    """(B,), where a witness is far above the proposal and its mode would hold a part of p(x) that matters.

    Where the proposal has found a mode, p(x, u) / r(u) is p(x), up to the shape of the mode. Where it is lower by a factor,
    the mode of mass m gets K m / factor of the draws. Of a few expected draws there may be none, and no weight tells.

    :param lightest: the share of p(x), (B,), from which on a mode matters that a few draws are expected at.
    :param num_draws: K from the proposal; infinite where draws move on from there, as in chains.
    """
    above = found.log_joint - proposal.log_prob(found.u) - log_evidence
    log_mass = found.log_mass - log_evidence
    far = (above > EXCESS) & (log_mass > SMALLEST_MODE)
    log_mass = log_mass.clamp(max=0.0)
    rare = math.log(num_draws) + log_mass - above < math.log(FEWEST_DRAWS)
    return (far | (rare & (log_mass.exp() > lightest))).any(0)


def exchanged(component: GaussianProposal, donors: Tensor) -> Tensor:
    """(D, B, D): the centre with one latent as the first donor, (S, B, D), that has it elsewhere; the others follow it.

    They go to their mean given that latent, under the component. Where no donor has the latent elsewhere, the centre stays.
    """
    covariance = component.tril @ component.tril.mT
    variance = covariance.diagonal(dim1=-2, dim2=-1)  # (B, D)
    shift = donors - component.loc
    elsewhere = shift.abs() > APART * variance.sqrt()
    first = elsewhere.to(torch.uint8).argmax(0, keepdim=True)  # the first of the largest
    shift = torch.where(elsewhere.any(0), shift.gather(0, first)[0], 0.0)
    return component.loc + ((shift / variance).unsqueeze(-1) * covariance).movedim(1, 0)


def log_volume(component: GaussianProposal) -> Tensor:
    """(B,), log of the mass of a mode of that width and height one."""
    return component.log_det() + 0.5 * component.loc.shape[-1] * math.log(2 * math.pi)
