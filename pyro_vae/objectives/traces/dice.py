"""Expectations under enumerated draws as in Pyro's Dice, but without reading values, so that they can be traced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.infer.util import Dice, shared_intermediates
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import MarginalRing, SampleRing
from pyro.poutine import Trace
from torch import Tensor


class WholeDice(Dice):
    """Pyro's Dice, with costs of probability zero replaced by zero; Pyro tests whether there are any and drops them."""

    def compute_expectation(self, costs: Mapping[frozenset[str], list[Any]]) -> Any:
        with shared_intermediates() as cache:
            ring = MarginalRing(cache=cache)
            expected: Any = 0.0
            for ordinal, terms in costs.items():
                log_factors = self._get_log_factors(ordinal)
                scale = math.exp(sum(x for x in log_factors if not isinstance(x, Tensor)))
                probs = marginals(ring, [x for x in log_factors if isinstance(x, Tensor)], ordinal, terms)
                for cost in terms:
                    cost, prob = packed.broadcast_all(cost, probs[frozenset(cost._pyro_dims)])
                    expected = expected + scale * (prob * torch.where(prob > 0, cost, torch.zeros_like(cost))).sum()
        return expected


def marginals(
    ring: MarginalRing, log_factors: list[Any], ordinal: frozenset[str], costs: list[Any]
) -> dict[frozenset[str], Tensor]:
    """The probabilities of the draws that each cost depends on, by its axes."""
    queries: dict[frozenset[str], Any] = {frozenset(cost._pyro_dims): None for cost in costs}
    for factor in log_factors:
        key = frozenset(factor._pyro_dims)
        if queries.get(key, False) is None:
            queries[key] = factor
    for cost in costs:
        key = frozenset(cost._pyro_dims)
        if queries[key] is None:
            query: Any = torch.zeros_like(cost)
            query._pyro_dims = cost._pyro_dims
            log_factors.append(query)
            queries[key] = query
    sum_dims = set().union(*(x._pyro_dims for x in log_factors)) - ordinal
    for query in queries.values():
        require_backward(query)
    ring.sumproduct(log_factors, sum_dims)._pyro_backward()
    found = {}
    for key, query in queries.items():
        found[key] = query._pyro_backward_result.exp()
        found[key]._pyro_dims = query._pyro_dims
    return found


def dice_elbo(model_trace: Trace, guide_trace: Trace) -> Tensor:
    """The ELBO of one particle, differentiable: as Pyro's TraceEnum_ELBO, with `WholeDice`."""
    costs, log_factors, ordering, sum_dims, scale = _compute_model_factors(model_trace, guide_trace)
    if log_factors:
        sizes = {d: n for fs in log_factors.values() for f in fs for d, n in zip(f._pyro_dims, f.shape, strict=True)}
        with shared_intermediates() as cache:
            log_factors = contract_tensor_tree(log_factors, sum_dims, ring=SampleRing(cache=cache, dim_to_size=sizes))
        for ordinal, terms in log_factors.items():
            costs.setdefault(ordinal, []).extend(packed.scale_and_mask(term, scale=scale) for term in terms)
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample":
            costs.setdefault(ordering[name], []).append(packed.neg(site["packed"]["log_prob"]))
    return torch.as_tensor(WholeDice(guide_trace, ordering).compute_expectation(costs))
