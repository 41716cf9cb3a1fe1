"""Base class of likelihood heads: number of parameters, chunking of a network's output, support of the data."""

from typing import Any

from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ..autocast import full_under_autocast
from ..errors import ArgumentError, described
from ..options import MOST_DIMS, amount, whole_number
from .checked import Accepts, CheckedIndependent, checked, finite_numbers


class Head(nn.Module):
    """Base class of heads: a module from the raw numbers of a network to a distribution, as in `nn.Sequential(body, head)`.

    The parameters of an event of shape `(S, ...)` are chunked along its first dimension. The network gives `(..., num_params
    * S, ...)`: first all S values of the first parameter, then those of the second.

    :ivar num_params: raw numbers that the network gives for each number of the event.
    :ivar event_dim: dimensions of an event: 1 for vectors (X,), 3 for images (C, H, W), whose channels are chunked.
    """

    num_params = 1

    def __init__(self, accepts: Accepts, *, event_dim: int = 1) -> None:
        super().__init__()
        self.accepts = accepts
        self.event_dim = whole_number("event_dim", event_dim, lowest=1, highest=MOST_DIMS)

    @property
    def support(self) -> Constraint:
        """The constraint that one event satisfies."""
        return constraints.independent(self.accepts.support, self.event_dim)

    def num_outputs(self, event_size: int) -> int:
        """The width of the network's last layer for events of this size; for images, the number of channels."""
        return self.num_params * amount("event_size", event_size)

    def input_layer(self) -> nn.Module:
        """The layer that should be applied to such data before an encoder."""
        return nn.Identity()

    def chunks(self, raw: Tensor) -> tuple[Tensor, ...]:
        """The raw numbers by parameter, `num_params` tensors `(..., *event)`.

        :raises ArgumentError: if their number is not divisible by `num_params`.
        """
        self.check_raw(raw)
        raw = full_under_autocast(raw)
        if raw.ndim < self.event_dim or raw.shape[-self.event_dim] % self.num_params:
            raise ArgumentError(
                f"the {self.accepts.head} head needs {self.num_params} numbers per number of an event, chunked along "
                f"dimension {-self.event_dim}, but its network gives shape {tuple(raw.shape)}: give its last layer "
                "head.num_outputs(event size) outputs"
            )
        return raw.chunk(self.num_params, -self.event_dim)

    def check_raw(self, raw: Any) -> None:
        if not isinstance(raw, Tensor) or not raw.is_floating_point() or not raw.ndim:
            raise ArgumentError(
                f"the {self.accepts.head} head takes the floating-point numbers of a network, a tensor (..., numbers), "
                f"got {described(raw)}: call it on the output of a network, nn.Sequential(network, head)"
            )

    def checked(self, base: Any) -> CheckedIndependent:
        return checked(base, self.event_dim, self.accepts)


class Family(Head):
    """A head for latents only: real vectors whose numbers depend on one another."""

    def __init__(self) -> None:
        super().__init__(finite_numbers(type(self).__name__))

    @property
    def support(self) -> Constraint:
        return constraints.real_vector
