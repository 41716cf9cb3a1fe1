"""Results of batches in order, kept until they are joined; a joined record replaces its parts in memory."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from mmap import ACCESS_COPY, mmap
from typing import Any

import torch
from torch import Tensor

STEP = 100  # results that are joined at a time


class Parts:
    """Results of batches, in their order, for one `cat`.

    Thousands of small tensors fragment memory, by half as much again as their size. Results are therefore joined by the
    hundred, and these by the hundred again, if their class states that this gives the same record
    (`Result._joins_in_steps`). The joined record and its parts are never in memory together: each tensor is released once it
    is copied.
    """

    def __init__(self) -> None:
        self._levels: list[list[Any]] = [[]]  # results, records joined of a hundred results, of a hundred of those, ...

    def add(self, result: Any) -> None:
        level, held = 0, self._levels[0]
        held.append(result)
        while len(held) == STEP and joins_in_steps(held[0]):
            whole, level = joined(held, in_own_pages), level + 1
            if level == len(self._levels):
                self._levels.append([])
            held = self._levels[level]
            held.append(whole)

    def joined(self) -> Any:
        """One record of all; the parts are released."""
        results = [result for held in reversed(self._levels) for result in held]
        self._levels = [[]]
        return joined(results, torch.empty) if joins_in_steps(results[0]) else type(results[0]).cat(results)


def joins_in_steps(result: Any) -> bool:
    """Whether the class that defines `cat` states it. A subclass that overrides `cat` must state it again."""
    owner = next((kind for kind in type(result).__mro__ if "cat" in vars(kind)), object)
    return vars(owner).get("_joins_in_steps", False)


def joined(results: list[Any], empty: Callable[..., Tensor]) -> Any:
    """`cat` of the results, which are used up: the list is empty afterwards.

    :param empty: function that allocates the tensors of the joined record, like `torch.empty`.
    """
    kind, parts = type(results[0]), []
    while results:
        parts.append(with_changed(results.pop(), Tensor, lambda tensor: Part(tensor, empty)))
    return with_changed(kind.cat(parts[::-1]), Part, lambda part: part.tensor)


def with_changed(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A copy of a record with all values of this type changed, also inside mappings and inner records."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Mapping):
        return {key: with_changed(part, kind, change) for key, part in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return value
    new = copy(value)
    for field in fields(value):
        object.__setattr__(new, field.name, with_changed(getattr(value, field.name), kind, change))
    return new


class Part:
    """A tensor of a part, for one `torch.cat`, released once it is copied. Its length is kept."""

    def __init__(self, tensor: Tensor, empty: Callable[..., Tensor]) -> None:
        self.tensor: Any = tensor
        self.empty = empty
        self._length = len(tensor) if tensor.ndim else 0

    def __len__(self) -> int:
        return self._length

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        return used_up(*args, **(kwargs or {})) if function is torch.cat else NotImplemented


def used_up(parts: list[Any], dim: int = 0) -> Tensor:
    """`torch.cat`, one part after the other. A large new tensor takes memory as it is filled, not before."""
    tensors = [part.tensor if isinstance(part, Part) else part for part in parts]
    first = tensors[0]
    about = {(type(t), t.layout, t.dtype, t.device, t.requires_grad, t.shape[:dim], t.shape[dim:][1:]) for t in tensors}
    if about != {(Tensor, torch.strided, first.dtype, first.device, False, first.shape[:dim], first.shape[dim:][1:])}:
        return torch.cat(tensors, dim)
    sizes = [tensor.shape[dim] for tensor in tensors]
    empty = next(part.empty for part in parts if isinstance(part, Part))
    whole = empty((*first.shape[:dim], sum(sizes), *first.shape[dim:][1:]), dtype=first.dtype, device=first.device)
    del tensors, first
    for part, place in zip(parts, whole.split(sizes, dim), strict=True):
        if isinstance(part, Part):
            place.copy_(part.tensor)
            part.tensor = None
        else:
            place.copy_(part)
    return whole


def in_own_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty` in separate memory pages, which go back to the system when it is freed; malloc may keep pages."""
    size = torch.Size(shape).numel()
    if device.type != "cpu" or not size:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap(-1, size * dtype.itemsize, access=ACCESS_COPY), dtype=dtype).view(shape)
