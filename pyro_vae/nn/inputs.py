"""Input layers: whole numbers scaled, classes one-hot, logarithms of counts and of positive numbers."""

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """`factor * x + shift`, in the floating point type of the module: integer data come out as what a network takes.

    >>> pixels = torch.tensor([0, 255], dtype=torch.uint8)
    >>> Scale(2 / 255, shift=-1.0)(pixels)
    tensor([-1.,  1.])
    """

    def __init__(self, factor: float, *, shift: float = 0.0) -> None:
        super().__init__()
        self.factor: Tensor
        self.register_buffer("factor", torch.tensor(factor), persistent=False)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


class OneHot(nn.Module):
    """Class indices (..., X) as zeros and ones (..., num_classes * X), class by class along the first event dimension.

    :param num_classes: classes are the whole numbers from 0 to `num_classes` - 1.
    :param event_dim: 3 for images (C, H, W), which come out as (num_classes * C, H, W).

    >>> OneHot(3)(torch.tensor([2, 0]))
    tensor([0., 1., 0., 0., 1., 0.])
    """

    def __init__(self, num_classes: int, *, event_dim: int = 1) -> None:
        super().__init__()
        self.classes: Tensor
        self.register_buffer("classes", torch.arange(num_classes).to(torch.get_default_dtype()), persistent=False)
        self.event_dim = event_dim

    def forward(self, x: Tensor) -> Tensor:
        matches = (x.unsqueeze(-1) == self.classes).to(self.classes.dtype).movedim(-1, -self.event_dim - 1)
        return matches.flatten(-self.event_dim - 1, -self.event_dim)


class Log1p(nn.Module):
    """log(1 + x), for counts: 0 stays 0, and counts of all sizes are numbers that a network can take.

    >>> Log1p()(torch.tensor([0.0, 99.0]))
    tensor([0.0000, 4.6052])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.log1p()


class Log(nn.Module):
    """log(x), for positive numbers.

    >>> Log()(torch.tensor([1.0, 100.0]))
    tensor([0.0000, 4.6052])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.log()
