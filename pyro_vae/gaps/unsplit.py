"""Gaps of guides with draws that are not reparameterised: only log p(x) - L[q], because q* cannot be fitted."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..densities import innermost
from ..errors import quoted
from ..evidence import Evidence, mean_std_error
from ..kernel import Call
from ..noise import Noise
from .default_evidence import default_evidence
from .gaps import Gaps


def why_not_split(call: Call) -> str:
    """Why the gap is not split, with the guide's draws that are not reparameterised; empty where there are none."""
    call.set_noise(Noise.PROBE, 2)
    drawn = {n: s for n, s in call.draw(1).items() if not s.is_observed and n not in call.layout.enumerated}
    names = [name for name, site in drawn.items() if not innermost(site.fns[0]).has_rsample]
    order = call.structure.guide_sites
    late = [name for name in call.structure.indicators if any(n in drawn for n in order[: order.index(name)])]
    if late:
        return (
            f"the guide draws {quoted(late)} after continuous latents on which its probabilities depend; the draws are not "
            "reparameterised, so the guide cannot be fitted per datum"
        )
    if not names:
        return ""
    return f"draws of {quoted(names)} are not reparameterised, so the guide cannot be fitted per datum"


def unsplit_gaps(call: Call, num_particles: int, estimator: Callable[..., Evidence] | None, why_not: str) -> Gaps:
    before = call.cost
    if estimator is None:
        evidence, _ = default_evidence(call, num_particles)
    else:
        evidence = estimator(*call.model.args, **call.model.kwargs)
    terms = call.log_weights(num_particles, Noise.GAPS)[1]
    elbo, elbo_std_error = terms.mean(0), mean_std_error(terms)
    unknown = torch.full_like(elbo, torch.nan)
    errors = dict.fromkeys(("optimal_elbo", "amortization", "approximation", "contrast"), unknown)
    inference = (elbo_std_error**2 + evidence.std_error**2).sqrt()
    return Gaps(
        elbo=elbo,
        optimal_elbo=unknown,
        log_evidence=evidence.log_evidence,
        std_errors={**errors, "elbo": elbo_std_error, "log_evidence": evidence.std_error, "inference": inference},
        converged=torch.ones_like(elbo, dtype=torch.bool),
        evidence=evidence,
        family="not fitted",
        num_particles=num_particles,
        cost=call.cost - before + (0 if estimator is None else evidence.cost),
        unsplit=why_not,
    )
