"""The record of an estimator from its log-weights, and the check for rounding."""

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import quoted
from ..kernel import Call, LogDensities, Record, movement
from ..noise import Noise
from ..ops import effective_sample_size, log_mean_exp, log_mean_exp_std_error, pareto_smooth
from .evidence import Evidence

ELBO_PARTICLES = 20

# Tolerated rounding: half of the third decimal that records print, and the rounding of float32 sums, eps |log p(x)|.
UNSEEN, SCATTER = 5e-4, 3.0


def guide_draws(call: Call) -> tuple[Record, Record, LogDensities]:
    """Draw from the guide and score the draws under guide and model: for the ELBO, and as the start of fits."""
    call.set_noise(Noise.GUIDE, 0)
    guide = call.draw(ELBO_PARTICLES)
    model = call.score(call.latent_values(guide), ELBO_PARTICLES)
    weights = call.weigh(guide, model, ELBO_PARTICLES)
    call.check_finite(weights.elbo)
    return guide, model, weights


def summed_draws(call: Call, guide: Record, model: Record) -> tuple[Record, Record]:
    """The same draws, or new ones where latents depend on sites that the guide enumerates.

    Fits need draws of q(z given x).
    """
    if call.structure.depend_on_enumerated:
        call.set_noise(Noise.GUIDE, 2)
        guide = call.draw_latents(ELBO_PARTICLES)
        model = call.score(call.latent_values(guide), ELBO_PARTICLES)
    return guide, model


def summarise(call: Call, log_weight: Tensor, elbo: Tensor, cost: float, method: str) -> Evidence:
    """Make the record from log-weights (K, B) and ELBO terms (K', B) of the guide; `method` names the estimator."""
    smoothed, pareto_k = pareto_smooth(log_weight)
    evidence = Evidence(
        log_evidence=log_mean_exp(log_weight, 0),
        std_error=log_mean_exp_std_error(log_weight),
        elbo=elbo.mean(0),
        elbo_std_error=mean_std_error(elbo),
        ess=effective_sample_size(log_weight),
        pareto_k=pareto_k,
        smoothed=log_mean_exp(smoothed, 0),
        bound="lower",
        num_particles=len(log_weight),
        cost=cost,
        index=call.index,
        fingerprint=call.fingerprint(),
        measure=call.measure(),
        stripped_scales=call.structure.stripped_scales,
        given=call.structure.given,
        left_out=call.structure.left_out,
        looped=call.structure.looped,
        support_checked=call.check_support,
        method=method,
        unchecked=unknown_supports(call),
    )
    return check_precision(call, evidence)


def unknown_supports(call: Call) -> dict[str, str]:
    """The entry of `unchecked` where the support of a latent is unknown."""
    names = call.structure.unknown_supports
    return {"support": f"the support of {quoted(names)} is unknown and was taken for the reals"} if names else {}


def check_precision(call: Call, evidence: Evidence) -> Evidence:
    """Add the check "precision": whether float64 changes log p(x) by more than a tenth of its error."""
    before = call.cost
    shift, why = movement(call)
    evidence = replace(evidence, cost=evidence.cost + call.cost - before)
    if shift is None:
        return replace(evidence, unchecked={**evidence.unchecked, "precision": why})
    value = evidence.log_evidence
    size = value.abs().nan_to_num(posinf=0.0)  # a change from an infinite value to a finite one counts as a doubt
    usual = UNSEEN + SCATTER * torch.finfo(value.dtype).eps * size
    doubted = shift.abs().amax(0) > torch.fmax(0.1 * evidence.std_error, usual)
    return replace(evidence, checks={**evidence.checks, "precision": doubted})


def mean_std_error(terms: Tensor) -> Tensor:
    """Monte Carlo error of the mean over K terms, (K, B) to (B,); nan for K = 1."""
    if len(terms) == 1:
        return torch.full_like(terms[0], torch.nan)
    return terms.std(0) / len(terms) ** 0.5
