"""Positive parameters of heads: from the network, given, or learned; and the log link."""

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
    """The logarithm of exp(raw) where raw is below 10; from there on exp(raw) goes on as a straight line.

    Counts and positive numbers span orders of magnitude, which the log link of generalised linear models covers with small
    raw numbers: log2(1 + 2^raw) would need raw = 1000 for a mean of 1000. The line keeps exp from overflowing.
    """
    above = F.relu(raw - LARGEST_EXPONENT)
    return raw.clamp(max=LARGEST_EXPONENT) + above.log1p()


def exp_link(raw: Tensor) -> Tensor:
    """exp of `log_link`, bounded away from zero."""
    return log_link(raw).exp() + SMALLEST_SCALE


class PositiveParameter(nn.Module):
    """A positive parameter that a head has beside its mean or location: from the network, given, or learned.

    :param option: `None` for the network's, a number that is given, or `"learned"`: `exp(log_value)`, which starts at one.
    :param shape: of what is learned: () is one for all numbers, (X,) one for each number of a vector.
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
        """:param raw: the `num_params` chunks of it, `(..., *event)`. :param like: another parameter's chunk."""
        if self.option is None:
            return self.link(raw[0])
        if isinstance(self.option, float):
            return like.new_full((), self.option)  # exact in any dtype, as no buffer is
        event = like.shape[-event_dim:]
        sizes = zip(self.shape[::-1], event[::-1], strict=False)
        if len(self.shape) > len(event) or any(mine not in (1, size) for mine, size in sizes):
            raise ArgumentError(
                f"the learned {self.name} has shape {self.shape}, which does not fit events of shape {tuple(event)}: build "
                f"the head with {self.name}_shape=() for one number, or the shape of an event for one each"
            )
        return self.log_value.exp()

    def extra_repr(self) -> str:
        return repr(self.option)
