"""L[q] of a random program by sums over grids: E_q of every density, whatever order the guide draws in.

The guide is a forest like the model, maybe another one. The joint probabilities of any two nodes are a product of matrices
along it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import F64, Case, guide_fn, guide_read, lead, log_p, parent_of, sample_guide
from .description import DISCRETE, Node
from .oracle import AGREED, FINE, Box, Truth, around, continuous, grid_of, hidden

SAMPLES = 2000  # behind the standard deviation of one draw
SEEN = 0.5  # of the standard deviation on the grid that the draws must have: else rare draws decide, here and on the grid


@dataclass(frozen=True)
class Factor:
    """One density of log p(x, z) - log q(z) with the nodes of the guide that it reads, at most two."""

    node: Node
    nodes: tuple[Node, ...]
    kind: str  # "prior", "guide", "observed", or "summed": all that a site enumerated in the model takes part in


def factors_of(case: Case) -> list[Factor]:
    program = case.program
    summed = {latent.name for latent in program.latents if latent.enumerated == "model"}
    factors = []
    for latent in program.latents:
        for node in latent.nodes:
            parent = parent_of(program, node)
            if latent.name in summed:
                below = [n for c in program.latents if c.parent == latent.name for n in c.nodes]
                factors.append(Factor(node, (*below, *([parent] if parent else [])), "summed"))
                continue
            read = guide_read(case, node)
            factors.append(Factor(node, (node, read) if read else (node,), "guide"))
            if latent.parent not in summed:
                factors.append(Factor(node, (node, parent) if parent else (node,), "prior"))
    for site in program.observed:
        if site.parent not in summed:
            factors += [Factor(n, (p,), "observed") for n in site.nodes if (p := parent_of(program, n)) is not None]
    return factors


def log_factor(case: Case, factor: Factor, values: Mapping[Node, Tensor]) -> Tensor:
    """Its logarithm where the nodes have these values, (B, ...), which broadcast; -log q for one of the guide."""
    node = factor.node
    if factor.kind == "summed":
        return log_summed(case, node, values)
    if factor.kind == "guide":
        read = guide_read(case, node)
        fn = guide_fn(case, node, None if read is None else values[read], values[node].ndim)
        return -hidden(case, node, fn.log_prob(values[node]))
    parent = parent_of(case.program, node)
    given = None if parent is None else values[parent]
    if factor.kind == "prior":
        return hidden(case, node, log_p(case, node, values[node], given))
    assert given is not None
    x = lead(case.x[node.site][:, node.index], given.ndim)
    return hidden(case, node, log_p(case, node, x, given))


def log_summed(case: Case, node: Node, values: Mapping[Node, Tensor]) -> Tensor:
    """The logarithm of the sum over the values of a site that the model enumerates, of all densities it takes part in."""
    program, family = case.program, case.program.site(node.site).family
    ndim = 1 + max((v.ndim for v in values.values()), default=1)
    s = torch.arange(DISCRETE[family], dtype=F64).expand((case.num_data,) + (1,) * (ndim - 2) + (-1,))
    wide = {n: v.unsqueeze(-1) for n, v in values.items()}
    parent = parent_of(program, node)
    total = log_p(case, node, s, None if parent is None else wide[parent])
    for child in program.children(node.site):
        for below in child.nodes:
            given = s
            value = wide[below] if below in wide else lead(case.x[child.name][:, below.index], ndim)
            total = total + hidden(case, below, log_p(case, below, value, given))
    return total.logsumexp(-1)


class GuideGrid:
    """The guide's probabilities on a grid: marginals (B, G) and joint ones of two nodes (B, G, G)."""

    def __init__(self, case: Case, boxes: Mapping[Node, Box], num: int, offset: float) -> None:
        self.case = case
        self.order = [n for site in case.guide for n in case.program.site(site.name).nodes]
        self.grids = {n: grid_of(case, n, boxes.get(n), num, offset) for n in self.order}
        self.given: dict[Node, Tensor] = {}  # (B, G) or (B, G of what it reads, G)
        self.marginal: dict[Node, Tensor] = {}
        for node in self.order:
            read, grid = guide_read(case, node), self.grids[node]
            if read is None:
                self.given[node] = (guide_fn(case, node, None, 2).log_prob(grid.value) + grid.log_cell).exp()
                self.marginal[node] = self.given[node]
            else:
                fn = guide_fn(case, node, self.grids[read].value.unsqueeze(-1))
                self.given[node] = (fn.log_prob(grid.value.unsqueeze(1)) + grid.log_cell.unsqueeze(1)).exp()
                self.marginal[node] = torch.einsum("bi,bij->bj", self.marginal[read], self.given[node])

    def joint(self, first: Node, second: Node) -> Tensor:
        if self.order.index(first) > self.order.index(second):
            return self.joint(second, first).mT
        read = guide_read(self.case, second)
        if read is None:
            return self.marginal[first].unsqueeze(-1) * self.marginal[second].unsqueeze(1)
        if read == first:
            return self.marginal[first].unsqueeze(-1) * self.given[second]
        return self.joint(first, read) @ self.given[second]

    def moments(self, factor: Factor) -> tuple[Tensor, Tensor]:
        """E_q of a factor and its standard deviation, (B,) each."""
        nodes = factor.nodes
        if not nodes:
            value = log_factor(self.case, factor, {}).reshape(self.case.num_data)
            return value, torch.zeros_like(value)
        if len(nodes) == 1:
            probability = self.marginal[nodes[0]]
            values = {nodes[0]: self.grids[nodes[0]].value}
        else:
            probability = self.joint(*nodes)
            values = {nodes[0]: self.grids[nodes[0]].value.unsqueeze(-1), nodes[1]: self.grids[nodes[1]].value.unsqueeze(1)}
        logs = log_factor(self.case, factor, values)
        logs = torch.where(probability > 0, logs, torch.zeros_like(probability))
        mean, square = ((probability * power).flatten(1).sum(-1) for power in (logs, logs.square()))
        return mean, (square - mean.square()).clamp(min=0).sqrt()

    @property
    def missing_mass(self) -> Tensor:
        return torch.stack([(1 - m.sum(-1)).abs() for m in self.marginal.values()]).amax(0)


@dataclass(frozen=True)
class Terms:
    """E_q of every factor: its mean (B,), the difference of two grids, and the standard deviation of one draw."""

    factors: Sequence[Factor]
    mean: Tensor  # (F, B)
    error: Tensor  # (F, B)
    draws: Tensor  # (F, B, S)

    def of(self, weights: Sequence[float]) -> tuple[Truth, Tensor]:
        """A weighted sum of the factors, and the standard deviation of one draw of it, (B,)."""
        w = torch.tensor(weights, dtype=F64)
        value, error = w @ self.mean, w.abs() @ self.error
        return Truth(value, error), torch.einsum("f,fbs->bs", w, self.draws).std(-1)


def elbo_terms(case: Case) -> Terms:
    """The parts of L[q] per datum."""
    factors = factors_of(case)
    z = sample_guide(case, SAMPLES, torch.Generator().manual_seed(case.program.seed + 3))
    boxes = {n: around(case, n, values, 2.0) for n, values in z.items() if continuous(case, n)}
    draws = torch.stack([samples_of(case, f, z) for f in factors])
    for num in FINE:
        grids = [GuideGrid(case, boxes, num, offset) for offset in (0.5, 0.0)]
        (first, deviation), (second, _) = (
            tuple(torch.stack(each) for each in zip(*(grid.moments(f) for f in factors), strict=True)) for grid in grids
        )
        missing = torch.maximum(*(g.missing_mass for g in grids)) if case.guide else torch.zeros(case.num_data)
        error = ((first - second).abs() + missing).nan_to_num(nan=torch.inf)
        if bool((error < AGREED).all()):
            break
    error = error.masked_fill(draws.std(-1) < SEEN * deviation, torch.inf)
    return Terms(factors, first, error, draws)


def samples_of(case: Case, factor: Factor, z: Mapping[Node, Tensor]) -> Tensor:
    logs = log_factor(case, factor, {n: z[n] for n in factor.nodes})
    return logs.reshape(case.num_data, -1).expand(-1, SAMPLES)
