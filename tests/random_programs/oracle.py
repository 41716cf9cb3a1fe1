"""log p(x) of a random program by sums over grids, contracted along its trees. No draw enters a right value.

Every continuous node has a grid in a coordinate in which the trapezoid rule converges exponentially: asinh for what is real,
logarithm for what is positive, logit in the unit interval. Two grids, shifted by half a cell, tell the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import F64, Case, lead, log_p, parent_of, sample_model
from .description import DISCRETE, POSITIVE, UNIT, Node

LIMITS = {"unit": 30.0, "positive": 300.0, "real": 20.0}  # of the coordinates
NEGLIGIBLE = 36.0  # nats below the highest point
SAMPLES = 2000
COARSE, ZOOMS, WIDENINGS = 200, 4, 6
FINE = (120, 480)  # cells per axis; the second where two shifted grids of the first do not agree
AGREED = 1e-4


@dataclass(frozen=True)
class Grid:
    value: Tensor  # (B, G)
    log_cell: Tensor  # (B, G), the logarithm of what a point stands for; zero for discrete values


Box = tuple[Tensor, Tensor]  # low and high, (B,) each, in the coordinate of a node


def kind_of(family: str) -> str:
    return "positive" if family in POSITIVE else "unit" if family in UNIT else "real"


def coordinate(kind: str, value: Tensor) -> Tensor:
    limit = LIMITS[kind]
    moved = value.log() if kind == "positive" else value.logit() if kind == "unit" else value.asinh()
    return moved.clamp(-limit, limit)


def grid_of(case: Case, node: Node, box: Box | None, num: int, offset: float) -> Grid:
    family = case.program.site(node.site).family
    if family in DISCRETE:
        values = torch.arange(DISCRETE[family], dtype=F64).expand(case.num_data, -1)
        return Grid(values, torch.zeros_like(values))
    assert box is not None
    low, high = (edge.unsqueeze(-1) for edge in box)
    step = (high - low) / num
    v = low + step * (torch.arange(-1, num + 1, dtype=F64) + offset)  # a cell more on either side
    kind = kind_of(family)
    if kind == "positive":
        return Grid(v.exp(), v + step.log())
    if kind == "unit":
        z = v.sigmoid()
        return Grid(z, torch.nn.functional.logsigmoid(v) + torch.nn.functional.logsigmoid(-v) + step.log())
    return Grid(v.sinh(), v.cosh().log() + step.log())


@dataclass(frozen=True)
class Posterior:
    """What one contraction leaves. `pair[node]` is log p(node given parent), (B, parent's grid, own grid), or (B, G)."""

    log_evidence: Tensor  # (B,)
    grids: Mapping[Node, Grid]
    own: Mapping[Node, Tensor]  # (B, G): cell, observations and all below
    pair: Mapping[Node, Tensor]
    up: Mapping[Node, Tensor]  # message to the parent, (B, parent's grid)

    def marginals(self, case: Case) -> dict[Node, Tensor]:
        """Log-posterior of each node up to a constant, (B, G)."""
        belief: dict[Node, Tensor] = {}
        for node in case.program.nodes:
            parent = parent_of(case.program, node)
            if parent is None:
                belief[node] = self.own[node] + self.pair[node]
            else:
                above = (belief[parent] - self.up[node]).nan_to_num(nan=-torch.inf)
                belief[node] = self.own[node] + (above.unsqueeze(-1) + self.pair[node]).logsumexp(1)
        return belief


def contract(case: Case, boxes: Mapping[Node, Box], num: int, offset: float) -> Posterior:
    """From the leaves to the roots."""
    program = case.program
    grids = {node: grid_of(case, node, boxes.get(node), num, offset) for node in program.nodes}
    own = {node: grid.log_cell.clone() for node, grid in grids.items()}
    for site in program.observed:
        for node in site.nodes:
            parent = parent_of(program, node)
            assert parent is not None
            value, x = grids[parent].value, case.x[site.name][:, node.index : node.index + 1]
            own[parent] = own[parent] + hidden(case, node, log_p(case, node, x, value))
    pair: dict[Node, Tensor] = {}
    up: dict[Node, Tensor] = {}
    total = torch.zeros(case.num_data, dtype=F64)
    for node in reversed(program.nodes):
        parent = parent_of(program, node)
        if parent is None:
            pair[node] = log_p(case, node, grids[node].value, None)
            total = total + hidden(case, node, (own[node] + pair[node]).logsumexp(-1))
        else:
            pair[node] = log_p(case, node, grids[node].value.unsqueeze(1), grids[parent].value.unsqueeze(-1))
            up[node] = hidden(case, node, (own[node].unsqueeze(1) + pair[node]).logsumexp(-1))
            own[parent] = own[parent] + up[node]
    return Posterior(total, grids, own, pair, up)


def hidden(case: Case, node: Node, log_prob: Tensor) -> Tensor:
    """Zero for the data in which a mask hides the node."""
    mask = lead(case.masks[node.site][:, node.index], log_prob.ndim)
    return torch.where(mask, log_prob, torch.zeros_like(log_prob))


def boxes_of(case: Case) -> dict[Node, Box]:
    """Where the posterior of each continuous node lies: from a wide grid over what the prior reaches, then closer."""
    generator = torch.Generator().manual_seed(case.program.seed + 1)
    boxes = {n: around(case, n, z, 3.0) for n, z in sample_model(case, SAMPLES, generator).items() if continuous(case, n)}
    for _ in range(WIDENINGS):  # until nothing is left at the edges
        belief = contract(case, boxes, COARSE, 0.5).marginals(case)
        open_boxes = {n: torch.maximum(b[:, 0], b[:, -1]) > b.amax(-1) - NEGLIGIBLE for n, b in belief.items() if n in boxes}
        wider = {n: limited(case, n, *stretched(boxes[n], 0.5)) for n in boxes}
        if not any(bool(flags.any()) for flags in open_boxes.values()):
            break
        boxes = {n: pick(open_boxes[n], wider[n], boxes[n]) for n in boxes}
    for _ in range(ZOOMS):
        belief = contract(case, boxes, COARSE, 0.5).marginals(case)
        boxes = {n: closer(boxes[n], belief[n]) for n in boxes}
    return boxes


def continuous(case: Case, node: Node) -> bool:
    return case.program.site(node.site).family not in DISCRETE


def around(case: Case, node: Node, values: Tensor, factor: float) -> Box:
    v = coordinate(kind_of(case.program.site(node.site).family), values)
    return limited(case, node, *stretched((v.amin(-1), v.amax(-1)), (factor - 1) / 2))


def stretched(box: Box, share: float) -> Box:
    low, high = box
    more = share * (high - low) + 0.1
    return low - more, high + more


def limited(case: Case, node: Node, low: Tensor, high: Tensor) -> Box:
    limit = LIMITS[kind_of(case.program.site(node.site).family)]
    return low.clamp(min=-limit), high.clamp(max=limit)


def pick(flags: Tensor, yes: Box, no: Box) -> Box:
    return torch.where(flags, yes[0], no[0]), torch.where(flags, yes[1], no[1])


def closer(box: Box, belief: Tensor) -> Box:
    """The cells that count, and one on either side."""
    low, high = box
    num = belief.shape[-1] - 2
    step = (high - low) / num
    near = belief > belief.amax(-1, keepdim=True) - NEGLIGIBLE
    index = torch.arange(num + 2, dtype=F64)
    first = torch.where(near, index, torch.inf).amin(-1) - 1  # of the cells, the first of which lies below `low`
    last = torch.where(near, index, -torch.inf).amax(-1) - 1
    return low + step * (first - 0.5).clamp(min=0.0), low + step * (last + 1.5).clamp(max=num)


@dataclass(frozen=True)
class Truth:
    """A right value per datum, and how far two shifted grids are apart. (B,)"""

    value: Tensor
    error: Tensor


def evidence(case: Case) -> tuple[Truth, Posterior]:
    """log p(x) per datum."""
    boxes = boxes_of(case)
    for num in FINE:
        first, second = (contract(case, boxes, num, offset) for offset in (0.5, 0.0))
        error = (first.log_evidence - second.log_evidence).abs() + edge_mass(case, first, boxes)
        error = error.nan_to_num(nan=torch.inf)
        if bool((error < AGREED).all()):
            break
    return Truth(first.log_evidence, error), first


def edge_mass(case: Case, posterior: Posterior, boxes: Mapping[Node, Box]) -> Tensor:
    """What may be left beyond a box, (B,): the mass of its outermost cells, times the number of cells."""
    belief = posterior.marginals(case)
    shares = [(belief[n] - belief[n].logsumexp(-1, keepdim=True)).exp() for n in boxes]
    edges = [torch.maximum(share[:, 0], share[:, -1]) * share.shape[-1] for share in shares]
    return torch.stack(edges).amax(0) if edges else torch.zeros(case.num_data, dtype=F64)


def sample_posterior(case: Case, posterior: Posterior, num: int) -> dict[Node, Tensor]:
    """Points of the grids, (B, num), drawn with the posterior's probabilities: to build guides with, not to judge."""
    generator = torch.Generator().manual_seed(case.program.seed + 2)
    index: dict[Node, Tensor] = {}
    for node in case.program.nodes:
        parent = parent_of(case.program, node)
        if parent is None:
            logits = (posterior.own[node] + posterior.pair[node]).unsqueeze(1).expand(-1, num, -1)
        else:
            rows = posterior.pair[node] + posterior.own[node].unsqueeze(1)
            logits = rows.gather(1, index[parent].unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        noise = -torch.rand(logits.shape, generator=generator, dtype=F64).log()
        index[node] = (logits - noise.log()).argmax(-1)
    return {node: posterior.grids[node].value.gather(1, i) for node, i in index.items()}
