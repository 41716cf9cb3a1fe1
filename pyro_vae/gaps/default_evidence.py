"""log p(x) for gaps: from fitted proposals, or from draws of the guide where the latents cannot be fitted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import LocalFitError, NonFiniteError
from ..evidence import (
    Evidence,
    Fitted,
    ImportanceSampling,
    fit_proposals,
    fitted_log_weights,
    guide_draws,
    summarise,
    summed_draws,
    with_search,
)
from ..kernel import Call
from ..records import FITTED_PROPOSALS

FEWEST = 1000  # weights of draws from the guide: the fewest for which the check by a second estimate is made


def default_evidence(call: Call, num_particles: int) -> tuple[Evidence, Fitted | None]:
    """The record, and the fitted proposals where there are any."""
    before = call.cost
    try:
        log_weight, elbo, fitted = fitted_log_weights(call, num_particles, None, "auto")
    except LocalFitError:  # discrete latents, masks that depend on draws
        sampling: Any = ImportanceSampling(call.model.fn, call.guide.fn, num_particles=max(num_particles, FEWEST))
        return replace(sampling.estimate(call), cost=call.cost - before), None
    evidence = summarise(call, log_weight, elbo, call.cost - before, FITTED_PROPOSALS)
    return with_search(evidence, fitted), fitted


def proposals_of(call: Call, num_particles: int) -> Fitted | None:
    """The proposals alone, where log p(x) comes from another estimator; `None` where there are none."""
    try:
        guide, model, weights = guide_draws(call)
        guide, model = summed_draws(call, guide, model)
        return fit_proposals(call, guide, model, weights.elbo, num_particles, None, "auto")
    except (LocalFitError, NonFiniteError):  # the fit reaches latents that the guide does not draw
        return None
