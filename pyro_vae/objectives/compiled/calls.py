"""The arguments of a call: the tensors in them, and everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...autocast import autocast_around


class Arguments(NamedTuple):
    """:ivar tensors: the tensors of the arguments; `leaves` has None in their places; `spec` is None for tensors alone."""

    tensors: list[Tensor]
    leaves: list[Any]
    spec: Any

    def replaced(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with other tensors."""
        if self.spec is None:
            return tuple(tensors), {}
        rest = iter(tensors)
        args, kwargs = tree_unflatten([next(rest) if leaf is None else leaf.value for leaf in self.leaves], self.spec)
        return args, kwargs

    def signature(self) -> tuple:
        """The arguments that a graph is valid for: shapes and kinds of tensors, and the values of everything else."""
        tensors = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in self.tensors]
        return tensors, self.leaves, self.spec


class Other:
    """An argument that is not a tensor: equal to others of its type and value, or only to itself where it is an object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Other):
            return False
        mine, theirs = self.value, other.value
        return mine is theirs or (type(mine) is type(theirs) and isinstance(mine, PLAIN) and mine == theirs)


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def arguments_of(args: tuple, kwargs: Mapping[str, Any]) -> Arguments:
    if not kwargs and all(type(arg) is Tensor for arg in args):
        return Arguments(list(args), [], None)
    leaves, spec = tree_flatten((args, dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return Arguments(tensors, [None if isinstance(leaf, Tensor) else Other(leaf) for leaf in leaves], spec)


def settings_now() -> tuple:
    """The settings of torch that change the result of a step."""
    return autocast_around(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def is_rough() -> bool:
    """Whether torch may compute in lower precision than that of the tensors."""
    return bool(autocast_around()) or torch.get_float32_matmul_precision() != "highest"
