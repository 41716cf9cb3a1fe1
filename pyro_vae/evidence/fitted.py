"""Proposals fitted to each datum, with a search for modes, and log-weights from them."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..kernel import Call, Record
from ..noise import Noise
from ..ops import MIN_PARTICLES_FOR_K
from ..proposals import (
    SEARCHED_DIM,
    LatentSpace,
    MixtureProposal,
    Witnesses,
    fit_with_points,
    missed_modes,
    num_gradients_for,
    num_starts_for,
    proposal_log_weights,
    search,
)
from ..records import FITTED_PROPOSALS
from .evidence import Evidence
from .second_look import SecondLook
from .summary import guide_draws, mean_std_error, summed_draws

START_PARTICLES = 100  # draws of the guide for the start of the fit; they cost no decoder evaluation
NEGLIGIBLE = 20.0  # nats below log p(x) at which a density must be at the ends of the range of floats
BENT = 2e-3  # share of p(x) by which a linear continuation beyond the range of floats may be wrong
RECENTRED = 2  # further fits where latents are angles
SIGMAS, ROUNDING = 5.0, 0.05  # errors and nats by which log p(x) may lie below the ELBO
CERTAIN = 3.0  # errors of log p(x) that a missed mode is measured against
# smallest share of p(x) for which a mode counts, besides the number of errors above, where few draws are expected in it
LIGHT_MODE = 0.05
LIGHT_FOR_MEANS = 0.015  # the same where the draws are for the mean of a function, independent of the error of log p(x)
Proposal = Literal["auto", "gaussian", "student", "mixture"]


@dataclass(frozen=True)
class Fitted:
    """The proposals fitted to each datum.

    :ivar moments: mean and standard deviation, (B, D), of the draws of the guide at which the fit starts.
    :ivar witnesses: points that test the search, or `None` where there was no search; `why_not` says why.
    """

    space: LatentSpace
    proposal: MixtureProposal
    moments: tuple[Tensor, Tensor]
    witnesses: Witnesses | None = None
    why_not: str = ""

    def for_part(self, part: Call, kept: Tensor) -> "Fitted":
        """The proposals of the data with these indices, in a call for them."""
        space = self.space.for_part(part, kept)
        mean, scale = self.moments
        witnesses = None if self.witnesses is None else self.witnesses.select(kept)
        return replace(
            self, space=space, proposal=self.proposal.select(kept), moments=(mean[kept], scale[kept]), witnesses=witnesses
        )

    def misses_mode(self, log_evidence: Tensor, std_error: Tensor, num_draws: float, *, of_mean: bool) -> Tensor:
        """(B,), whether the search found a mode that the proposal lacks, judged by an estimate of log p(x) from its draws.

        :param of_mean: whether the draws are for the mean of a function of the latents. A mode with a small share of p(x)
            can change that mean by many of its errors where it changes log p(x) by one error.
        """
        assert self.witnesses is not None
        lightest = LIGHT_FOR_MEANS if of_mean else LIGHT_MODE + CERTAIN * std_error
        return missed_modes(self.witnesses, self.proposal, log_evidence + CERTAIN * std_error, lightest, num_draws)


def with_search(evidence: Evidence, fitted: Fitted | None, *, of_mean: bool = False) -> Evidence:
    """The record with the results of the checks of the fits; `fitted` is `None` where no proposal was needed.

    :param of_mean: as in `Fitted.misses_mode`.
    """
    if fitted is None:
        return evidence
    checks = {
        "end of support": fitted.space.end_in_doubt(evidence.log_evidence, NEGLIGIBLE, BENT),
        "below the ELBO": below_elbo(evidence),
    }
    evidence = replace(
        evidence, checks={**evidence.checks, **{n: flags for n, flags in checks.items() if bool(flags.any())}}
    )
    why_not = fitted.why_not
    if evidence.method == FITTED_PROPOSALS and evidence.num_particles < MIN_PARTICLES_FOR_K:
        why_not = f"K < {MIN_PARTICLES_FOR_K}"  # a mode is judged by its share of the estimate, which is noise here
    if fitted.witnesses is None or why_not:
        return replace(evidence, unchecked={**evidence.unchecked, "search": why_not})
    if evidence.num_particles == 1:
        return replace(evidence, unchecked={**evidence.unchecked, "search": "the error of one particle is not known"})
    num_draws = evidence.num_particles if evidence.method == FITTED_PROPOSALS else math.inf
    missed = fitted.misses_mode(evidence.log_evidence, evidence.std_error, num_draws, of_mean=of_mean)
    return replace(evidence, checks={**evidence.checks, "search": missed})


def below_elbo(evidence: Evidence) -> Tensor:
    """(B,): the ELBO is at most log p(x), so an estimate far below the ELBO has missed a mode."""
    highest = evidence.log_evidence + SIGMAS * evidence.std_error + ROUNDING
    return highest < evidence.elbo - SIGMAS * evidence.elbo_std_error


def fitted_log_weights(
    call: Call, num_particles: int, num_gradients: int | None, proposal: Proposal, look: SecondLook | None = None
) -> tuple[Tensor, Tensor, Fitted | None]:
    """(Log-weights of the fitted proposals, (K, B); ELBO terms of the guide, (K', B); the proposals, if any were needed)."""
    guide, model, weights = guide_draws(call)
    elbo = weights.elbo
    if not call.structure.latents:  # all latents are summed out: every weight equals p(x), and there is nothing to fit
        return weights.log_weight, elbo, None
    guide, model = summed_draws(call, guide, model)
    fitted = fit_proposals(call, guide, model, elbo, num_particles, num_gradients, proposal)
    watch = None if look is None else functools.partial(look.watch_proposal, fitted.space)
    return proposal_log_weights(fitted.space, fitted.proposal, num_particles, watch), elbo, fitted


def fit_proposals(
    call: Call,
    guide: Record,
    model: Record,
    elbo: Tensor,
    num_particles: int,
    num_gradients: int | None,
    proposal: Proposal,
) -> Fitted:
    """Fit proposals, starting from draws of the guide, the model's scores of them and their ELBO terms."""
    space = LatentSpace(call, guide, model)
    call.set_noise(Noise.GUIDE, 1)
    packed = space.pack(call.latent_values(call.draw_latents(START_PARTICLES)))[0]
    moments = moments_of(space.filled(packed))
    floor = elbo.mean(0) - 3 * mean_std_error(elbo) - 1
    num_gradients = num_gradients or num_gradients_for(num_particles, space.dim)
    component, points = fit_with_points(space, *moments, num_gradients, floor)
    for _ in range(0 if space.centre is None else RECENTRED):  # until the posterior of an angle lies within one turn
        highest = points.log_joint.nan_to_num(nan=-math.inf).argmax(0)
        best = points.u[highest, torch.arange(len(highest), device=highest.device)]
        space.centre_at(best)
        moments = moments_of(space.filled(packed))
        spread = component.tril.square().sum(-1).sqrt()
        component, points = fit_with_points(space, space.near_centre(best), spread, num_gradients, floor)
    why_not = why_not_searched(proposal, space.dim)
    if why_not:
        return Fitted(space, MixtureProposal.of(component, student=proposal == "student"), moments, why_not=why_not)
    u, log_det = space.pack(call.latent_values(guide))
    u = space.filled(u)
    starts = u, space.densities(model, u, log_det)[0]
    chosen, found = search(space, component, points, starts, num_starts_for(num_particles))
    return Fitted(space, chosen, moments, found)


def moments_of(u: Tensor) -> tuple[Tensor, Tensor]:
    return u.mean(0), u.std(0)


def why_not_searched(proposal: Proposal, dim: int) -> str:
    """Why there is no search for modes; empty where there is one."""
    if proposal == "auto" and dim > SEARCHED_DIM:
        return f"no search for modes beyond {SEARCHED_DIM} latents"
    return f"no search for modes with proposal='{proposal}'" if proposal in ("gaussian", "student") else ""
