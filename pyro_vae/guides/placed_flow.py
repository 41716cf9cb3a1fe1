"""The head of a flow for one latent site."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ConditionalAffineAutoregressive, conditional_spline
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform

from ..autocast import full_under_autocast
from ..nn import Flow
from ..nn.gaussian import positive

CONTEXT = 16  # numbers from which the transforms compute their parameters


class PlacedFlow(nn.Module):
    """A spline per number, for its shape; autoregressive layers in both orders, for dependence; then loc and scale.

    Call it with raw numbers (..., 2 size + CONTEXT). It returns a distribution of vectors (size,).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        transforms: list[Any] = [conditional_spline(size, CONTEXT)]
        order: Any
        for order in (torch.arange(size), torch.arange(size).flip(0)) if size > 1 else ():
            network = ConditionalAutoRegressiveNN(size, CONTEXT, [max(16, 4 * size)], permutation=order)
            transforms.append(ConditionalAffineAutoregressive(network))
        self.flow = Flow(size, CONTEXT, transforms)

    def num_outputs(self, event_size: int) -> int:
        return 2 * event_size + CONTEXT

    def forward(self, raw: Tensor) -> Any:
        loc, scale, context = full_under_autocast(raw).split([self.size, self.size, CONTEXT], -1)
        # otherwise the inverse of a draw is not cached
        place = AffineTransform(loc, positive(scale), event_dim=1, cache_size=1)
        return dist.TransformedDistribution(self.flow(context), [place], validate_args=False)
