"""A second start of the fit of q*, at a mode of the posterior that is better than the one near the guide."""

import math

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..kernel import Call
from ..noise import Noise
from ..proposals import GaussianProposal, LatentSpace, MixtureProposal
from .adam import CHECK_PARTICLES, SMALL_GAIN, TOLERANCE, check_terms, fit_offsets
from .offsets import GuideOffsets

SIGMAS = 3.0


def restarted(
    call: Call, offsets: GuideOffsets, space: LatentSpace, proposal: MixtureProposal, effort: float
) -> GuideOffsets:
    """The same offsets, improved for the data whose optimum is at another mode than the one near the guide.

    Candidates are Gaussians with independent latents at the components of the proposal. Where the ELBO of a candidate is
    significantly higher than that of the fit, the fit starts again from its centre. The better of both fits is kept for each
    datum. The guide's locations cannot always be moved there (a joint autoguide, a flow), and moving them may not help.
    Where a candidate is still better by more than half a nat, the optimum was not found, and the datum has not converged.
    """
    own = check_terms(call, offsets)
    witnesses = torch.stack([witness_terms(call, space, component) for component in proposal.components])  # (C, K, B)
    best = (witnesses - own).mean(1).nan_to_num(-torch.inf).argmax(0)
    rows = torch.arange(len(best), device=best.device)
    witness = witnesses[best, :, rows].T
    beaten = is_gain(witness - own, TOLERANCE)
    if not bool(beaten.any()):
        return offsets
    centres = torch.stack([component.loc for component in proposal.components])[best, rows]
    values, unconstrained = space.by_site(centres)
    try:
        second = fit_offsets(call, start=lambda new: new.move_to(values, unconstrained, beaten), effort=effort)
        terms = check_terms(call, second)
    except (NonFiniteError, ValueError):  # the requested location cannot be expressed by the parameters of this guide
        terms = own
    else:
        better = beaten & is_gain(terms - own, 0.0)
        offsets.restore(second.state(), better)
        offsets.converged = torch.where(better, second.converged, offsets.converged)
        terms = torch.where(better, terms, own)
    offsets.converged = offsets.converged & ~is_gain(witness - terms, SMALL_GAIN)
    return offsets


def is_gain(terms: Tensor, least: float) -> Tensor:
    """Where the mean of terms (K, B) is significantly above `least`, (B,)."""
    return terms.mean(0) > least + SIGMAS * terms.std(0) / len(terms) ** 0.5


def witness_terms(call: Call, space: LatentSpace, component: GaussianProposal) -> Tensor:
    """ELBO terms, (K, B), of a Gaussian with independent latents and the best scales for these."""
    scale = torch.cholesky_inverse(component.tril).diagonal(dim1=-2, dim2=-1).rsqrt()
    call.set_noise(Noise.WITNESSES, 0)
    noise = torch.randn(CHECK_PARTICLES, *scale.shape, dtype=scale.dtype, device=scale.device)
    log_q = -(0.5 * noise.square() + scale.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
    return space.log_joint(component.loc + scale * noise) - log_q
