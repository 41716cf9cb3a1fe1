"""Input layers: scaling, one-hot classes, logarithms of counts and of positive numbers."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, OptionError, described
from ..options import MOST_DIMS, amount, real_number, whole_number


def check_input(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or x.is_complex():
        raise ArgumentError(f"{name} takes a tensor of real numbers, got {described(x)}: pass torch.as_tensor(x)")


class Scale(nn.Module):
    """Input layer `factor * x + shift`, in the floating point type of the module, also for integer data.

    >>> pixels = torch.tensor([0, 255], dtype=torch.uint8)
    >>> Scale(2 / 255, shift=-1.0)(pixels)
    tensor([-1.,  1.])
    """

    def __init__(self, factor: float, *, shift: float = 0.0) -> None:
        super().__init__()
        self.factor: Tensor
        factor, self.shift = (real_number(n, v, lowest=-math.inf) for n, v in (("factor", factor), ("shift", shift)))
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        check_input("Scale", x)
        return x * self.factor + self.shift


class OneHot(nn.Module):
    """Input layer of one-hot classes: indices (..., X) to zeros and ones (..., num_classes * X).

    The output is ordered class by class along the first event dimension.

    :param num_classes: classes are the whole numbers from 0 to `num_classes` - 1.
    :param event_dim: 1 for vectors, 3 for images (C, H, W), whose output is (num_classes * C, H, W).

    >>> OneHot(3)(torch.tensor([2, 0]))
    tensor([0., 1., 0., 0., 1., 0.])
    """

    def __init__(self, num_classes: int, *, event_dim: int = 1) -> None:
        super().__init__()
        self.classes: Tensor
        num_classes = amount("num_classes", num_classes)
        self.register_buffer("classes", torch.arange(num_classes).to(torch.get_default_dtype()), persistent=False)
        self.event_dim = whole_number("event_dim", event_dim, highest=MOST_DIMS)

    def forward(self, x: Tensor) -> Tensor:
        check_input("OneHot", x)
        if x.device != self.classes.device:
            raise ArgumentError(f"OneHot is on {self.classes.device} but got data on {x.device}: move one, x.to(device)")
        if x.ndim < self.event_dim:
            raise ArgumentError(f"expected classes (..., *event) with {self.event_dim} event dimensions, got {described(x)}")
        matches = (x.unsqueeze(-1) == self.classes).to(self.classes.dtype).movedim(-1, -self.event_dim - 1)
        return matches.flatten(-self.event_dim - 1, -self.event_dim)


class Log1p(nn.Module):
    """Input layer log(1 + x), for counts: 0 stays 0, and large counts become small numbers.

    >>> Log1p()(torch.tensor([0.0, 99.0]))
    tensor([0.0000, 4.6052])
    """

    def forward(self, x: Tensor) -> Tensor:
        check_input("Log1p", x)
        return x.log1p()


class Log(nn.Module):
    """Input layer log(x), for positive numbers.

    >>> Log()(torch.tensor([1.0, 100.0]))
    tensor([0.0000, 4.6052])
    """

    def forward(self, x: Tensor) -> Tensor:
        check_input("Log", x)
        return x.log()


class BesideMask(nn.Module):
    """Input layer for data with their mask: (B, 2 X) to (B, W + X), with `layer` from X to W numbers.

    The encoder of `MissingDataVAE` gets x with zeros for missing values, followed along the same dimension by ones where a
    number is observed. `layer` is applied to x, to each number separately, as in the `input_layer()` of the heads. Its
    output for a missing value is set to zero.

    :param layer: module, (B, X) to (B, W).
    :raises OptionError: for a layer that is not a module.
    :raises ArgumentError: when called, for an odd number of columns.

    >>> BesideMask(Log())(torch.tensor([[100.0, 0.0, 1.0, 0.0]]))
    tensor([[4.6052, 0.0000, 1.0000, 0.0000]])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise OptionError(f"layer must be an nn.Module, got {described(layer)}: pass likelihood.input_layer()")
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        check_input("BesideMask", x)
        if x.ndim < 2 or x.shape[1] % 2:
            raise ArgumentError(
                f"BesideMask takes data followed by their mask, (B, 2 X), got {described(x)}: pass torch.cat([x, mask], 1)"
            )
        values, seen = x.chunk(2, 1)
        if values.is_floating_point():  # integer tensors have no missing values
            values = values.masked_fill(seen == 0, math.nan)
        values = self.layer(values)
        return torch.cat([torch.where(values.isnan(), 0.0, values), seen.to(values.dtype)], 1)
