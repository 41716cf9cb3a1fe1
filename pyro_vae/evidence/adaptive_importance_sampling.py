"""Importance sampling from proposals fitted to each datum first."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ..kernel import GUIDE, INFER, Call, Pair, Record
from ..ops import MIN_PARTICLES_FOR_K
from ..options import one_of, seed_or_none, whole_number
from ..proposals import (
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
from ..records import FITTED_PROPOSALS, warn_about
from .evidence import Evidence
from .importance_sampling import mean_std_error, summarise
from .second_look import SecondLook

ELBO_PARTICLES = 20
START_PARTICLES = 100  # draws of the guide, which cost no decoder evaluation, behind the start of the fit
CERTAIN = 3.0  # errors of log p(x) that a missed mode is measured against
SEARCHED_DIM = 10  # latents up to which "auto" searches: beyond, starts find few modes and t tails gain nothing
Proposal = Literal["auto", "gaussian", "student", "mixture"]


class AdaptiveImportanceSampling:
    r"""log p(x) by importance sampling from proposals fitted to the posterior of each datum.

    Starting at the guide, a full-covariance Gaussian over all latents of a datum, in unconstrained space, is fitted by
    regressing gradients of log p(x, z) on the points where they were taken (an averaged Newton step, see
    `pyro_vae.proposals`). Then::

        log p(x) ~ log 1/K sum_k p(x, z_k) / r(z_k),    z_k ~ r = 0.98 N(m, 1.05^2 S) + 0.02 p(z)

    (the factor is 1 + 0.35 / sqrt(D)). Unbiased for p(x), so a lower bound on log p(x) in expectation; the share of the
    prior keeps the weights bounded. On amortized guides this is more than a nat nearer to log p(x) than
    `ImportanceSampling` at ten times the cost.

    One Gaussian misses what is not near it, with good diagnostics. Up to ten latents the default therefore looks for more.
    Four spread draws of the prior are moved uphill, and two further fits start from them or from other draws: one where
    p(x, z) is highest outside the first fit, one where it is highest above both. The fits share the draws by their estimated
    masses. Per datum, one to three parts and Gaussian or Student t tails, whichever measures the largest effective sample
    size on the points of search and fits. These points only choose: no weight is made of them, so the estimate stays
    unbiased. A mode can still be missed, less and less often the more latents there are, see :doc:`/evidence`. A posterior
    with more modes than three parts can hold is doubted: `doubts["search"]` is true where the search has seen a mode that
    holds 2% of p(x) or more and that the proposal lacks.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites; the start of the fits, and what `elbo` is about.
    :param num_particles: K, weights per datum.
    :param num_gradients: gradients per datum for the fit, each counted as three decoder evaluations; by default
        `max(20 + 3 D, min(0.35 K, 40 + 5 D))` for D latents.
    :param proposal: "gaussian", "student" (a multivariate t of 5 + D degrees, the factor 1 + 0.15 / sqrt(D)), "mixture" (the
        search, which costs another 20 + min(K / 10, 500) + 3 D decoder evaluations and 32 + 2 (12 + 3 D) gradients), or
        "auto": "mixture" up to ten latents, "gaussian" beyond.
    :param check: look from the posterior's side too, as `ImportanceSampling` does, for another 344 decoder evaluations; from
        100 particles on. The proposals come from such a fit already, so it seldom finds anything.
    :param seed: fixes the noise and leaves the caller's random state alone; `None` draws from that state.
    :param datum_plate: the plate of the data; found by itself where only one is common to all sites; `None` makes the
        whole call one datum.
    :param prior_sites: latent sites of the model without a counterpart in the guide, to be drawn from the prior.
    :param check_support: raise on observations outside the support of their likelihood.

    Called with the model's own arguments; returns `Evidence` for the B data of the call.

    :raises LocalFitError: for latents that cannot be fitted; `ImportanceSampling` needs no fit.
    :raises StructureError: (and its kinds, see `pyro_vae.errors`) for a program without known weights per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.
    :raises OptionError: for counts that are too small and for another `proposal`.

    References: fitting local proposals, Cremer, Li and Duvenaud, 2018, https://arxiv.org/abs/1801.03558; defensive
    mixtures, Hesterberg, 1995, https://doi.org/10.1080/00401706.1995.10484303; parts added where weights are high, Raftery
    and Bao, 2010, https://doi.org/10.1111/j.1541-0420.2010.01399.x.

    Example::

        evidence = pv.AdaptiveImportanceSampling(model, guide, num_particles=500)(x)
        print(evidence)
        evidence.log_evidence       # (B,)
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        *,
        num_particles: int = 500,
        num_gradients: int | None = None,
        proposal: Proposal = "auto",
        check: bool = False,
        seed: int | None = None,
        datum_plate: str | None = INFER,
        prior_sites: Collection[str] = (),
        check_support: bool = True,
    ) -> None:
        self.num_particles = whole_number("num_particles", num_particles)
        self.num_gradients = None if num_gradients is None else whole_number("num_gradients", num_gradients, lowest=2)
        self.proposal = checked_proposal(proposal)
        self.check = check
        self.seed = seed_or_none(seed)
        self._pair = Pair(model, guide, datum_plate=datum_plate, prior_sites=prior_sites, check_support=check_support)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Evidence:
        with self._pair.open(args, kwargs, self.seed) as call:
            look = SecondLook(call, self.num_particles, self.check, fewest=MIN_PARTICLES_FOR_K)
            log_weight, elbo, fitted = fitted_log_weights(call, self.num_particles, self.num_gradients, self.proposal, look)
            evidence = look.add_to(summarise(call, log_weight, elbo, call.cost, FITTED_PROPOSALS), log_weight)
            evidence = with_search(evidence, fitted)
        warn_about(evidence, stacklevel=3)  # past torch.no_grad, to the caller
        return evidence


def checked_proposal(proposal: Proposal) -> Proposal:
    return cast(Proposal, one_of("proposal", proposal, get_args(Proposal)))


@dataclass(frozen=True)
class Fitted:
    """The proposals fitted to each datum.

    :ivar moments: mean and standard deviation, (B, D), of the draws of the guide behind the start of the fit.
    :ivar witnesses: points that judge the search, or `None` where nothing was searched; `why_not` says why.
    """

    space: LatentSpace
    proposal: MixtureProposal
    moments: tuple[Tensor, Tensor]
    witnesses: Witnesses | None = None
    why_not: str = ""


def with_search(evidence: Evidence, fitted: Fitted | None) -> Evidence:
    """The record with what the search has found about itself; `None` where no proposal was needed."""
    if fitted is None:
        return evidence
    why_not = fitted.why_not
    if evidence.method == FITTED_PROPOSALS and evidence.num_particles < MIN_PARTICLES_FOR_K:
        why_not = f"K < {MIN_PARTICLES_FOR_K}"  # a mode is judged by its share of the estimate, which is noise here
    if fitted.witnesses is None or why_not:
        return replace(evidence, unchecked={**evidence.unchecked, "search": why_not})
    if evidence.num_particles == 1:
        return replace(evidence, unchecked={**evidence.unchecked, "search": "the error of one particle is not known"})
    highest = evidence.log_evidence + CERTAIN * evidence.std_error
    missed = missed_modes(fitted.witnesses, fitted.proposal, highest)
    return replace(evidence, checks={**evidence.checks, "search": missed})


def fitted_log_weights(
    call: Call, num_particles: int, num_gradients: int | None, proposal: Proposal, look: SecondLook | None = None
) -> tuple[Tensor, Tensor, Fitted | None]:
    """(Log-weights of the fitted proposals, (K, B); ELBO terms of the guide, (K', B); the proposals, if any were needed)."""
    call.set_noise(GUIDE, 0)
    guide = call.draw(ELBO_PARTICLES)
    model = call.score(call.latent_values(guide), ELBO_PARTICLES)
    weights = call.weigh(guide, model, ELBO_PARTICLES)
    elbo = weights.elbo
    call.check_finite(elbo)
    if not call.structure.latents:  # all latents are summed out: every weight is p(x) itself, and there is nothing to fit
        return weights.log_weight, elbo, None
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
    """From draws of the guide, what the model made of them and their ELBO terms."""
    space = LatentSpace(call, guide, model)
    call.set_noise(GUIDE, 1)
    u = space.filled(space.pack(call.latent_values(call.draw(START_PARTICLES)))[0])
    moments = u.mean(0), u.std(0)
    floor = elbo.mean(0) - 3 * mean_std_error(elbo) - 1
    num_gradients = num_gradients or num_gradients_for(num_particles, space.dim)
    part, points = fit_with_points(space, *moments, num_gradients, floor)
    why_not = why_not_searched(proposal, space.dim)
    if why_not:
        return Fitted(space, MixtureProposal.of(part, student=proposal == "student"), moments, why_not=why_not)
    u, log_det = space.pack(call.latent_values(guide))
    u = space.filled(u)
    starts = u, space.densities(model, u, log_det)[0]
    chosen, found = search(space, part, points, starts, num_starts_for(num_particles))
    return Fitted(space, chosen, moments, found)


def why_not_searched(proposal: Proposal, dim: int) -> str:
    """Nothing where it is searched."""
    if proposal == "auto" and dim > SEARCHED_DIM:
        return f"no search for modes beyond {SEARCHED_DIM} latents"
    return f"no search for modes with proposal='{proposal}'" if proposal in ("gaussian", "student") else ""
