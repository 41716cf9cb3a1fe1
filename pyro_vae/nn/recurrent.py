"""A recurrent network that reads sequences of unequal lengths backwards."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import ArgumentError, described
from ..options import amount, check_function


class BackwardGRU(nn.Module):
    r"""A recurrent network (GRU) that reads each sequence from its last step to its first, without the padding.

    Feature t depends on x_t and all later steps. Together with z_{t-1}, that is what the posterior of z_t in a Markov model
    depends on (Krishnan, Shalit and Sontag, 2017, https://arxiv.org/abs/1609.09869).

    :param data_dim: X, the numbers of a step.
    :param hidden_dim: H, the width of the features.
    :param first: module that is applied to x first, such as a head's `input_layer()`, from (B, T, \*event) to (B, T, X).
    :raises OptionError: for a dimension below 1, or a `first` that cannot be called.
    :raises ArgumentError: when called, if x is not a tensor (B, T, X) after `first`, or for invalid lengths.

    Call it with x and lengths, (B,), whole numbers from 1 to T. It returns features (B, T, H). Those of a real step do not
    depend on the values or the length of the padding; those of the padding have no meaning. Sequences are not packed, so
    estimators can run all particles at once.

    >>> BackwardGRU(3, 16)(torch.zeros(5, 7, 3), torch.tensor([7, 7, 4, 2, 1])).shape
    torch.Size([5, 7, 16])
    """

    def __init__(self, data_dim: int, hidden_dim: int, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Identity() if first is None else first
        check_function("first", self.first, "a module from (B, T, *event) to (B, T, X)")
        self.gru = nn.GRU(amount("data_dim", data_dim), amount("hidden_dim", hidden_dim), batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.first(x)
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.gru.input_size or not x.is_floating_point():
            raise ArgumentError(
                f"expected sequences of floating-point numbers (B, T, {self.gru.input_size}), got {described(x)}: put "
                "the steps on the second dimension, and pass first= for data of another type or shape"
            )
        lengths = checked_lengths(lengths, len(x), x.shape[1])
        steps = torch.arange(x.shape[1], device=x.device)
        # Step s of the reversed sequence is step L - 1 - s; after its end it is the first step again, which is not padding.
        back = (lengths.unsqueeze(-1) - 1 - steps).clamp(min=0).unsqueeze(-1)
        h, _ = self.gru(x.gather(1, back.expand(-1, -1, x.shape[-1])))
        features: Tensor = h.gather(1, back.expand(-1, -1, h.shape[-1]))
        return features


def checked_lengths(lengths: Any, size: int, num_steps: int) -> Tensor:
    """The lengths of padded sequences, (B,), after a check."""
    whole = isinstance(lengths, Tensor) and not (lengths.is_floating_point() or lengths.is_complex())
    if not whole or lengths.dtype is torch.bool or lengths.shape != (size,):
        raise ArgumentError(
            f"lengths must be a tensor of whole numbers, one per sequence, ({size},), got {described(lengths)}: pass "
            "torch.tensor([len(sequence) for sequence in sequences])"
        )
    if size and not lengths.is_meta and not isinstance(lengths, FakeTensor):  # of a step that is traced after it ran
        with torch._C.DisableTorchFunction():  # this check reads the lengths, not the program
            shortest, longest = map(int, lengths.aminmax())
        if shortest < 1 or longest > num_steps:
            raise ArgumentError(
                f"lengths must lie between 1 and the {num_steps} steps of x, got {shortest} to {longest}: cut lengths "
                "together with x, and drop empty sequences"
            )
    return lengths
