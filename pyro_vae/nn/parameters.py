"""Positive parameters of heads (predicted by the network, fixed, or learned), and the log link."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, OptionError
from ..options import is_real, plain_float, widths_of
from .gaussian import SMALLEST_SCALE, positive

LARGEST_EXPONENT = 10.0  # exp(10) = 22,026


def log_link(raw: Tensor) -> Tensor:
    """The log of the mean: raw below 10; above, the log of the line that continues exp(raw).

    Counts and positive numbers span orders of magnitude, which the log link of generalised linear models covers with small
    raw numbers: log2(1 + 2^raw) would need raw = 1000 for a mean of 1000. The line prevents overflow of exp.
    """
    above = F.relu(raw - LARGEST_EXPONENT)
    return raw.clamp(max=LARGEST_EXPONENT) + above.log1p()


def exp_link(raw: Tensor) -> Tensor:
    """exp of `log_link`, bounded away from zero."""
    return log_link(raw).exp() + SMALLEST_SCALE


class PositiveParameter(nn.Module):
    """A positive parameter of a head, besides its mean or location: predicted by the network, fixed, or learned.

    :param option: `None` if the network predicts it, a fixed number, or `"learned"`: `exp(log_value)`, which starts at one.
    :param shape: shape of a learned parameter: () for one for all numbers, (X,) for one for each number of a vector.
    :param link: from raw numbers of the network to the parameter.
    :ivar num_params: raw numbers that it needs for each number of the data, 1 or 0.
    """

    def __init__(
        self,
        name: str,
        option: float | str | None,
        *,
        shape: Sequence[int] = (),
        link: Callable[[Tensor], Tensor] = positive,
    ) -> None:
        super().__init__()
        if is_real(option):
            option = plain_float(option)
        known = option is None or isinstance(option, str) and option == "learned"
        if not (0 < option < math.inf if isinstance(option, float) else known):
            raise OptionError(f"{name} must be None, a positive number or 'learned', got {option!r}")
        self.name, self.option, self.link = name, option, link
        self.shape = widths_of(f"{name}_shape", shape)
        if self.shape and option != "learned":
            raise OptionError(f'a shape is for a {name} that is learned, but {name} is {option!r}: pass {name}="learned"')
        self.num_params = int(option is None)
        if option == "learned":
            self.log_value = nn.Parameter(torch.zeros(self.shape))

    def forward(self, raw: Sequence[Tensor], like: Tensor, event_dim: int) -> Tensor:
        """The parameter, from its `num_params` chunks of raw numbers, `(..., *event)`; `like` is another chunk."""
        if self.option is None:
            return self.link(raw[0])
        if isinstance(self.option, float):
            return like.new_full((), self.option)  # exact in any dtype, unlike a buffer
        event = like.shape[-event_dim:]
        sizes = zip(self.shape[::-1], event[::-1], strict=False)
        if len(self.shape) > len(event) or any(mine not in (1, size) for mine, size in sizes):
            raise ArgumentError(
                f"the learned {self.name} has shape {self.shape}, which does not fit events of shape {tuple(event)}: "
                f"build the head with {self.name}_shape=() for one number, or with the shape of an event for one each"
            )
        return self.log_value.exp()

    def extra_repr(self) -> str:
        return repr(self.option)
