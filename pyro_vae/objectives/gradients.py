"""Gradients of a bound that is a log-mean-exp over particles: by autograd, along the draws, and by score functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from pyro.distributions.rejector import Rejector
from torch import Tensor

from ..densities import innermost
from ..errors import StructureError
from ..kernel import Cut, Record
from ..ops import log_mean_exp
from .weighing import total

UNUSED: Any = {"allow_unused": True, "materialize_grads": True}  # zero for a leaf that is not used


def normalised(log_weight: Tensor) -> Tensor:
    """Weights that sum to one over K, detached; zero for a datum without any usable particle."""
    weights: Tensor = log_weight.detach().softmax(0)
    return weights.nan_to_num(0.0)


def weighed(weights: Tensor, log_density: Tensor) -> Tensor:
    """The product, with 0 x -inf = 0."""
    return torch.where(weights != 0, weights * log_density, torch.zeros_like(log_density))


def score_surrogate(log_weight: Tensor, log_q: Tensor) -> Tensor:
    """A surrogate whose gradient is the score-function gradient of the bound, for draws with log q, (B,).

    The bound of the other particles is subtracted as a baseline. It does not depend on the draw, so the mean of the gradient
    is unchanged and its variance is lower (VIMCO with the arithmetic mean; Mnih and Rezende, 2016,
    https://arxiv.org/abs/1602.06725). With K = 1 there is no baseline.
    """
    log_weight = log_weight.detach()
    learning = log_mean_exp(log_weight, 0) - bounds_of_others(log_weight)
    return (learning.nan_to_num(0.0, 0.0, 0.0) * log_q).sum(0)


def score_of_bound(bound: Callable[[Tensor], Tensor], log_weight: Tensor, log_q: Tensor) -> Tensor:
    """The same for any bound from log-weights (K, B) to (B,), which is called once for each particle left out."""
    log_weight = log_weight.detach()
    others = torch.zeros_like(log_weight)
    if len(log_weight) > 1:
        left_out = (torch.cat([log_weight[:k], log_weight[k + 1 :]]) for k in range(len(log_weight)))
        others = torch.stack([bound(rest).detach() for rest in left_out])
    return ((bound(log_weight).detach() - others).nan_to_num(0.0, 0.0, 0.0) * log_q).sum(0)


def bounds_of_others(log_weight: Tensor) -> Tensor:
    """The bound without each particle in turn, (K, B); zero for K = 1."""
    num_particles = len(log_weight)
    if num_particles == 1:
        return torch.zeros_like(log_weight)
    nothing = torch.full_like(log_weight[:1], -torch.inf)
    before = torch.cat([nothing, log_weight[:-1].logcumsumexp(0)])
    after = torch.cat([log_weight[1:].flip(0).logcumsumexp(0).flip(0), nothing])
    return torch.logaddexp(before, after) - math.log(num_particles - 1)


def scored_sites(guide: Record, enumerated: Collection[str]) -> list[str]:
    """The draws of the guide that need a score-function gradient."""
    found = []
    for name, site in guide.items():
        if site.is_observed or name in enumerated:
            continue
        fn = innermost(site.fns[0])
        if isinstance(fn, Rejector):
            raise StructureError(
                f"the guide's site '{name}' ({type(fn).__name__}) is drawn by rejection sampling and only partly "
                "reparameterised: use a distribution of torch, such as pyro.distributions.Gamma without rejection"
            )
        if not fn.has_rsample:
            found.append(name)
    return found


def path_surrogate(weighted: Tensor, cuts: Sequence[Sequence[Cut]]) -> Tensor | float:
    """A surrogate with the gradient of `weighted` along the draws only, as if the densities had no parameters.

    `weighted`, without dimensions, depends on the leaves that replaced the draws. Its gradient at a leaf is propagated
    through the draw, to parameters and to the leaves drawn before, where it is added.
    """
    chains = [chain for chain in cuts if chain]
    if not chains:
        return 0.0
    at_leaves = torch.autograd.grad(weighted, [leaf for chain in chains for _, leaf in chain], retain_graph=True, **UNUSED)
    gradients = iter(at_leaves)
    return total(along_chain(chain, [next(gradients) for _ in chain]) for chain in chains)


def along_chain(chain: Sequence[Cut], gradients: list[Tensor]) -> Tensor:
    leaves = [leaf for _, leaf in chain]
    for i in range(len(chain) - 1, 0, -1):
        parts = torch.autograd.grad(chain[i][0], leaves[:i], gradients[i], retain_graph=True, **UNUSED)
        gradients[:i] = [gradient + part for gradient, part in zip(gradients[:i], parts, strict=True)]
    return total((gradient * draw).sum() for gradient, (draw, _) in zip(gradients, chain, strict=True))


class GradientOf(torch.autograd.Function):
    """The value of one tensor with the gradient of another.

    `loss + (surrogate - surrogate.detach())` would be NaN where both are infinite, so that one datum without a usable
    particle would make the gradients of all data NaN.
    """

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def with_gradient_of(surrogate: Tensor, loss: Tensor) -> Tensor:
    """The value of `loss` with the gradient of `surrogate`, both of one shape."""
    return GradientOf.apply(surrogate, loss)


def leaves_behind(numbers: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that a backward pass from these would reach."""
    numbers = list(numbers)
    found = {id(number): number for number in numbers if number.is_leaf and number.requires_grad}
    seen, waiting = set(), [number.grad_fn for number in numbers]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and node.variable.requires_grad:  # a draw that has been fixed since does not
            found.setdefault(id(node.variable), node.variable)
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())
