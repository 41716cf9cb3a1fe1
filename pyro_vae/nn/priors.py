"""Priors as modules: calling one gives the distribution."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..options import amount
from .checked import checked, finite_numbers


class StandardNormal(nn.Module):
    """The prior p(z) = N(0, I_D). Its buffers follow `.to()` and `.double()`.

    :param latent_dim: D, the number of latents of a datum.
    :returns: when called, a distribution with event shape (D,) and no batch shape; plates expand it.
    :raises OptionError: if `latent_dim` is below 1.

    >>> StandardNormal(3)().event_shape
    torch.Size([3])
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.loc: Tensor
        self.scale: Tensor
        size = amount("latent_dim", latent_dim, lowest=1)
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.accepts = finite_numbers("StandardNormal")

    def forward(self) -> Any:
        return checked(dist.Normal(self.loc, self.scale, validate_args=False), 1, self.accepts)
