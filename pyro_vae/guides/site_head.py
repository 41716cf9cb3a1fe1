"""The part of a guide that draws one latent site: from features of the data to a distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.transforms import ReshapeTransform, Transform, identity_transform

from ..nn import MLP, MultivariateNormal, Normal
from .placed_flow import PlacedFlow
from .rows import Rows

Family = Literal["diagonal", "full", "flow"]
HEADS: dict[str, Callable[[int], Any]] = {
    "diagonal": lambda size: Normal(),
    "full": lambda size: MultivariateNormal(),
    "flow": PlacedFlow,
}


@dataclass(frozen=True)
class SiteSpace:
    """The space of the values of a site, and their transform from unconstrained ones.

    :ivar rows: the layout of the values of all plates and of an event as rows.
    :ivar shape: of an unconstrained event, such as (D - 1,) for a point of a simplex.
    :ivar transform: from unconstrained values to the support.
    """

    rows: Rows
    shape: torch.Size
    transform: Transform

    @property
    def size(self) -> int:
        return self.shape.numel()

    @property
    def num_cells(self) -> int:
        return self.rows.cells.numel()

    @property
    def numbers(self) -> int:
        """The number of unconstrained numbers in a row."""
        return self.num_cells * self.size

    def unconstrained(self, value: Tensor) -> Tensor:
        return self.transform.inv(value)

    def placed(self, fn: Any) -> Any:
        """A distribution of vectors (size,) as one of events of the site."""
        transforms: list[Transform] = []
        if self.shape == (self.size,):
            pass
        elif isinstance(fn, dist.MultivariateNormal) and self.shape == ():
            fn = dist.Normal(fn.loc.squeeze(-1), fn.scale_tril.squeeze((-2, -1)), validate_args=False)
        elif isinstance(fn, dist.Independent):
            loc, scale = (t.reshape(t.shape[:-1] + self.shape) for t in (fn.base_dist.loc, fn.base_dist.scale))
            fn = dist.Normal(loc, scale, validate_args=False).to_event(len(self.shape))
        else:
            transforms.append(ReshapeTransform(torch.Size([self.size]), self.shape))
        if self.transform != identity_transform:
            transforms.append(self.transform)
        return dist.TransformedDistribution(fn, transforms, validate_args=False) if transforms else fn


class SiteHead(nn.Module):
    """Maps features (*particles, R, H), and earlier draws, to the distribution of a site.

    :param width: H.
    :param num_earlier: numbers that were drawn before, per row.
    :param conditioned: whether they are inputs of the network.
    """

    def __init__(self, name: str, space: SiteSpace, family: Family, width: int, num_earlier: int, conditioned: bool) -> None:
        super().__init__()
        self.name, self.space, self.conditioned = name, space, conditioned and num_earlier > 0
        self.head = HEADS[family](space.size)
        self.outputs = self.head.num_outputs(space.size)
        num_outputs = space.num_cells * self.outputs
        if self.conditioned:
            self.network: nn.Module = MLP(width + num_earlier, num_outputs, hidden=(max(width, num_earlier),))
        else:
            self.network = nn.Linear(width, num_outputs)
        # "full" across sites: the mean of a site is linear in the noise of those before it.
        self.slopes = nn.Linear(width, space.numbers * num_earlier) if family == "full" and num_earlier else None

    def extra_repr(self) -> str:
        return f"'{self.name}'"

    def forward(self, features: Tensor, earlier: Tensor, noise: Tensor) -> Any:
        """The distribution of unconstrained vectors (size,) by cell.

        :param earlier: unconstrained numbers of earlier sites, (*particles, R, num_earlier).
        :param noise: the standard normal noise of the earlier numbers, with the same shape.
        """
        raw = self.network(beside(features, earlier) if self.conditioned else features)
        numbers = self.space.rows.cells_of(raw, self.outputs)
        if self.slopes is not None:
            slopes = self.slopes(features).unflatten(-1, (self.space.numbers, -1))
            shift = self.space.rows.cells_of((slopes @ noise.unsqueeze(-1)).squeeze(-1), self.space.size)
            loc = numbers[..., : self.space.size] + shift
            numbers = torch.cat([loc, numbers[..., self.space.size :].expand(*loc.shape[:-1], -1)], -1)
        return self.head(numbers)

    def noise_of(self, fn: Any, unconstrained: Tensor) -> Tensor:
        """The standard normal noise of a draw of a normal with full covariance, as rows."""
        vector = unconstrained.flatten(-len(self.space.shape)) if self.space.shape else unconstrained.unsqueeze(-1)
        offset = (vector - fn.loc).unsqueeze(-1)
        tril = fn.scale_tril.expand(*offset.shape[:-2], -1, -1)
        return self.space.rows.of(torch.linalg.solve_triangular(tril, offset, upper=False).squeeze(-1), 1)


def beside(*parts: Tensor) -> Tensor:
    """Rows concatenated, repeated where one of them has more particles or data."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)
