"""The gaps of a guide that enumerates all its latents: exact sums over all values."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..densities import innermost
from ..errors import LocalFitError, quoted
from ..evidence import exact_record, guide_draws
from ..kernel import Call, LogDensities, Record
from .gaps import Gaps

SWEEPS, STARTS = 200, 8  # steps of coordinate ascent; starts of which the best is kept
FAMILY = "the guide's own family, all values summed"
ANY_DISTRIBUTION = (  # over their values
    torch.distributions.Bernoulli,
    torch.distributions.Categorical,
    torch.distributions.OneHotCategorical,
)


def enumerated_gaps(call: Call, num_particles: int) -> Gaps:
    guide, _, weights = guide_draws(call)
    check_families(guide, call.structure.guide_enumerated)
    elbo, log_evidence = weights.elbo[0], weights.log_weight[0]
    optimal_elbo = torch.maximum(best_elbo(weights, log_evidence), elbo)  # the guide is in the family too
    zero = torch.zeros_like(elbo)
    names = ("elbo", "optimal_elbo", "log_evidence", "amortization", "approximation", "inference", "contrast")
    return Gaps(
        elbo=elbo,
        optimal_elbo=optimal_elbo,
        log_evidence=log_evidence,
        std_errors=dict.fromkeys(names, zero),
        converged=torch.ones_like(elbo, dtype=torch.bool),
        evidence=exact_record(call, log_evidence, weights.elbo),
        family=FAMILY,
        num_particles=num_particles,
        cost=call.cost,
    )


def check_families(guide: Record, names: Collection[str]) -> None:
    """Raise for families that do not contain all distributions over their values.

    A binomial, for instance, has one parameter for many values.
    """
    narrow = [name for name in names if not isinstance(innermost(guide[name].fns[0]), ANY_DISTRIBUTION)]
    if narrow:
        raise LocalFitError(
            f"the optimum of the family of the enumerated site {quoted(narrow)} is not known: use Categorical, "
            "OneHotCategorical or Bernoulli in the guide"
        )


def best_elbo(weights: LogDensities, log_evidence: Tensor) -> Tensor:
    """L[q*], (B,).

    If every site of the guide depends on all sites before it, the guide can be any distribution, so q* is the posterior. If
    no site depends on another, the guide is a product, and q* is the best product.
    """
    names = weights.structure.guide_enumerated
    log_q = [weights.log_guide_by_site[name] for name in names]
    depend = [[j for j in range(len(names)) if j != i and has_axis(log_q[i], j)] for i in range(len(names))]
    if all(others == list(range(i)) for i, others in enumerate(depend)):
        return log_evidence
    if not any(depend):
        return best_product(weights.log_joint_of_values[..., 0, :])
    raise LocalFitError(
        f"the guide enumerates {quoted(names)}, and some of these depend on some of the others: the optimum of such a "
        "family is not known. Let each site depend on all sites before it, or on none"
    )


def has_axis(log_q: Tensor, place: int) -> bool:
    """Whether log q, (*E, K, B), depends on the enumerated site of this place; the axes run from right to left."""
    axis = -(3 + place)
    return log_q.ndim >= -axis and log_q.shape[axis] > 1


def best_product(log_joint: Tensor) -> Tensor:
    """max over products of sum_e q(e) [log p(x, e) - log q(e)], (B,), from log p(x, e), (*E, B), by coordinate ascent.

    Each step sets one factor to exp of the mean of log p under the others, normalised, which never lowers the bound. It
    starts at several products near the likeliest values, because there may be several optima.
    """
    num_axes = log_joint.ndim - 1
    found = []
    flat = log_joint.flatten(0, -2)
    for start in flat.topk(min(STARTS, len(flat)), 0).indices:  # (B,)
        places = torch.unravel_index(start, log_joint.shape[:-1])
        factors = [
            torch.nn.functional.one_hot(place, log_joint.shape[axis]).T.to(log_joint) * 0.9 + 0.1 / log_joint.shape[axis]
            for axis, place in enumerate(places)
        ]
        for _ in range(SWEEPS):
            for axis in range(num_axes):
                factors[axis] = expected(log_joint, factors, axis).softmax(0)
        entropy = sum(-torch.xlogy(q, q).sum(0) for q in factors)
        found.append((factors[0] * expected(log_joint, factors, 0)).sum(0) + entropy)
    return torch.stack(found).amax(0)


def expected(log_joint: Tensor, factors: list[Tensor], axis: int) -> Tensor:
    """The mean of log p(x, e) over all axes but one, (E, B); values of probability zero do not count."""
    total = log_joint.movedim(axis, 0)
    for q in reversed([q for i, q in enumerate(factors) if i != axis]):
        weight = q.reshape((1,) * (total.ndim - 2) + q.shape)
        total = torch.where(weight > 0, weight * total, torch.zeros_like(total)).sum(-2)
    return total
