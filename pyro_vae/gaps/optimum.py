"""The optimum q* of the guide's family for each datum, and the ELBO terms of q* and of the guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evidence import Fitted
from ..kernel import Call, Record
from ..noise import Noise
from ..proposals import GaussianProposal
from .adam import TOLERANCE, check_terms, fit_offsets
from .controls import Quadratic, controlled, entropy
from .gaussian_family import GaussianFamily, gaussian_family
from .natural_gradients import AT_MOST, NEARLY_ALL, best_gaussian
from .offsets import GuideOffsets
from .restart import restarted
from .targets import antithetic, cholesky, elbo_of

COMPARED = 16  # pairs of draws by which components are compared
HOPELESS = 25  # most tolerances left to gain for which Adam finishes a fit
SIGMAS, WORSE = 3.0, 0.02  # errors and nats below L[q] at which a fit counts as failed


@dataclass(frozen=True)
class Optimum:
    """Offsets at q*; for a Gaussian family also q*, and the quadratic near log p(x, u) used as control variate."""

    offsets: GuideOffsets
    gaussian: tuple[GaussianFamily, GaussianProposal, Quadratic] | None = None


def find_optimum(call: Call, fitted: Fitted | None, tolerance: float, effort: float) -> Optimum:
    """Find q* by natural gradients for a Gaussian family, by Adam for others.

    :param effort: the most rounds of a fit, in units of the default.
    """
    if fitted is not None:
        offsets = GuideOffsets(call)
        family = gaussian_family(call, fitted.space, offsets)
        if family is not None and (found := gaussian_optimum(call, fitted, family, tolerance, effort)) is not None:
            return found
    offsets = fit_offsets(call, effort=effort)
    if fitted is not None:
        offsets = restarted(call, offsets, fitted.space, fitted.proposal, effort)
    return Optimum(offsets)


def gaussian_optimum(call: Call, fitted: Fitted, family: GaussianFamily, tolerance: float, effort: float) -> Optimum | None:
    """The optimum of a Gaussian family; `None` where the guide turns out to be of another family."""
    start, quadratic = best_start(call, fitted, family)
    q, left = best_gaussian(fitted.space, start, quadratic, family.blocks, tolerance, effort)
    if not family.place(call, q):
        return None
    family.offsets.converged = left <= AT_MOST * tolerance
    if bool(family.offsets.converged.float().mean() < NEARLY_ALL) and AT_MOST * tolerance >= TOLERANCE:
        return Optimum(by_adam(call, family.offsets, left <= HOPELESS * tolerance, effort))
    return Optimum(family.offsets, (family, q, quadratic))


def by_adam(call: Call, found: GuideOffsets, near: Tensor, effort: float) -> GuideOffsets:
    """Continue by Adam for the data that have not converged, from the better of the current q* and the guide.

    :param near: (B,), where Adam may report convergence. Where the guide is far too narrow, steps in its units hardly move.
    """

    def start(offsets: GuideOffsets) -> None:
        guide, own = offsets.state(), check_terms(call, offsets).mean(0)
        offsets.set_state(found.state())
        offsets.restore(guide, ~(check_terms(call, offsets).mean(0) > own))  # ~ rather than <=, so that NaN is put back too

    offsets = fit_offsets(call, start=start, effort=effort)
    offsets.restore(found.state(), found.converged)
    offsets.converged = offsets.converged & near | found.converged
    return offsets


def best_start(call: Call, fitted: Fitted, family: GaussianFamily) -> tuple[GaussianProposal, Quadratic]:
    """The component of the proposal whose projection on the family has the highest ELBO, and its quadratic."""
    components = fitted.proposal.components
    starts = [member(component, family.blocks) for component in components]
    if len(components) == 1:
        return starts[0], Quadratic(components[0])
    elbos = []
    for start, component in zip(starts, components, strict=True):
        call.set_noise(Noise.WITNESSES, 1)
        u = antithetic(start, COMPARED)[1]
        elbos.append(elbo_of(start, Quadratic(component), u, fitted.space.log_joint(u))[0])
    best = torch.stack(elbos).nan_to_num(nan=-torch.inf).argmax(0)
    start, component = starts[0], components[0]
    for i in range(1, len(components)):
        start, component = starts[i].where(best == i, start), components[i].where(best == i, component)
    return start, Quadratic(component)


def member(component: GaussianProposal, blocks: Tensor) -> GaussianProposal:
    """The member of the family that is best if the component is the posterior: it has the blocks of its precision."""
    precision = torch.cholesky_inverse(component.tril) * blocks
    return GaussianProposal(component.loc, cholesky(torch.cholesky_inverse(cholesky(precision))))


def elbo_terms(call: Call, num_particles: int, optimum: Optimum) -> tuple[Tensor, Tensor]:
    """Terms (K, B) whose means are L[q] and L[q*], on the same noise.

    For a Gaussian family the quadratic is a control variate, which makes errors two to six times smaller. The number of
    draws is not lowered for that, because few draws would miss events that happen once in a hundred draws.
    """
    adjust = optimum.offsets.adjust
    if optimum.gaussian is None:
        bound, optimal = (call.log_weights(num_particles, Noise.GAPS, adjust=a)[1] for a in (None, adjust))
        return bound, optimal
    family, q, quadratic = optimum.gaussian
    bound = controlled_terms(call, num_particles, family, family.guide, quadratic)
    return bound, controlled_terms(call, num_particles, family, q, quadratic, adjust)


def controlled_terms(
    call: Call,
    num_particles: int,
    family: GaussianFamily,
    q: GaussianProposal,
    quadratic: Quadratic,
    adjust: Callable[[str, Any], tuple[Any, Any]] | None = None,
) -> Tensor:
    """Terms (K, B) of mean L[q], with Q - log q as control variate."""
    controls = []

    def watch(guide: Record, model: Record, log_weight: Tensor) -> None:
        u = family.space.pack(call.latent_values(guide))[0]
        controls.append(quadratic.at(u) - q.log_prob(u))

    terms = call.log_weights(num_particles, Noise.GAPS, adjust=adjust, watch=watch)[1]
    return controlled(terms, torch.cat(controls), quadratic.mean(q) + entropy(q))


def at_least(bound: Tensor, optimal: Tensor, converged: Tensor) -> tuple[Tensor, Tensor]:
    """Terms of q* and whether it converged. Where a fit has diverged, the guide is used as q*, since it is in the family."""
    gain = optimal - bound
    worse = ~(gain.mean(0) > -SIGMAS * gain.std(0) / len(gain) ** 0.5 - WORSE) & bound.isfinite().all(0)
    return torch.where(worse, bound, optimal), converged & ~worse
