"""The rank of a true value among draws."""

import torch
from torch import Tensor

from ..kernel import Layout

FEWEST = 20  # fewest draws from which a median and a spread are computed


class Ranks:
    """Counts the draws below true values, (B, U), and those equal to them.

    :param near: (B, U) or a number, the largest difference of values that count as equal.
    """

    def __init__(self, truth: Tensor, near: Tensor | float = 0.0) -> None:
        self.truth, self.near = truth, near
        self.below = torch.zeros_like(truth, dtype=torch.float64)
        self.equal = torch.zeros_like(self.below)
        self.num_draws = 0

    def add(self, draws: Tensor) -> None:
        """Add draws (K, B, U)."""
        equal = (draws == self.truth) | ((draws - self.truth).abs() <= self.near)
        self.below += ((draws < self.truth) & ~equal).sum(0)
        self.equal += equal.sum(0)
        self.num_draws += len(draws)

    def uniform(self) -> Tensor:
        """(B, U), uniform on (0, 1) if the true values have the distribution of the draws.

        Equal values are ordered at random.
        """
        noise = torch.rand(self.below.shape, dtype=torch.float64).to(self.below.device)
        return (self.below + noise * (self.equal + 1)) / (self.num_draws + 1)


def units(value: Tensor, layout: Layout, event_dim: int) -> Tensor:
    """The units of one site, (K, *plates, *event) to (K, B, U), floating point; plates inside a datum count as units."""
    if not value.is_floating_point():
        value = value.double()
    if layout.datum_dim is None:
        return value.reshape(len(value), 1, -1)
    moved = value.movedim(layout.datum_dim - event_dim, 1)
    return moved.reshape(*moved.shape[:2], -1).expand(-1, layout.batch_size, -1)


def misfit(draws: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Signed and absolute distance of the true value from the median of draws, (K, B, U) to (B, U) each.

    The first is median minus truth, in standard deviations of the draws. The second is in units of the distance within which
    half of the draws are, so its median over data is one if the spread is right. NaN where draws do not vary or are few.
    """
    centre = middle(draws)
    reach = middle((draws - centre).abs())
    spread = draws.std(0) if len(draws) > 1 else torch.zeros_like(centre)
    unknown = (spread == 0) | (reach == 0) | (len(draws) < FEWEST)
    above = ((centre - truth) / spread).masked_fill(unknown, torch.nan)
    return above, ((truth - centre).abs() / reach).masked_fill(unknown, torch.nan)


def middle(values: Tensor) -> Tensor:
    """The median over the first axis; for an even number, the mean of the two middle values."""
    ordered = values.sort(0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
