"""Detects programs that read the value of a tensor into Python: with many particles, one decision would apply to all."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...arguments import tensors_in
from ...errors import StructureError
from ..programs import Program

READS = {"__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__", "__contains__"}
READS |= {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
COUNTS = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"}
SIZES = (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]


class ValueWatch(TorchFunctionMode):
    """Raises where a program reads a tensor into Python: with a particle axis, an `if` decides once for all particles.

    The few particles of the check may agree by chance. (`torch.vmap` raises automatically, but only for drawn values.) A
    shape that depends on values is such a read too, if the tensor has an axis of particles.

    :param num_particles: a size that no other axis has; `None` allows everything.
    """

    def __init__(self, num_particles: int | None) -> None:
        super().__init__()
        self.num_particles = num_particles

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.num_particles is not None:
            name = getattr(func, "__name__", "")
            counted = tensors_in(values_behind_shape(name, args, kwargs or {}))
            if name in READS or any(self.num_particles in tensor.shape for tensor in counted):
                raise StructureError("the program reads the value of a tensor")
        return func(*args, **(kwargs or {}))


def values_behind_shape(name: str, args: Any, kwargs: Any) -> Any:
    """The tensors whose values determine the shape of a result: all of `nonzero` and the like, bools of an index."""
    if name in COUNTS or (name == "where" and len(args) + len(kwargs) == 1):
        return [args, kwargs]
    if name == "__getitem__":
        return [t for t in tensors_in(args[1:]) if t.dtype in (torch.bool, torch.uint8)]
    return ()


class Sizes(TorchFunctionMode):
    """A shape with `numel()`: provenance tensors return plain tuples, but networks may call `x.shape.numel()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return torch.Size(found) if type(found) is tuple and func in SIZES else found


class LostProvenance(Sizes):
    """Records the names of draws that are read into Python or written into another tensor, where provenance ends.

    :ivar names: draws on which any later value may depend.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: frozenset[str] = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in (kwargs or {})
        if in_place or name in READS or name == "tensor":
            self.names |= get_provenance([args, kwargs])
        self.names |= get_provenance(list(tensors_in(values_behind_shape(name, args, kwargs or {}))))
        return super().__torch_function__(func, types, args, kwargs)


class DrawsWatch(LostProvenance):
    """Raises where a draw is read, or any value once provenance is lost. Values that depend only on data may be read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        counted = list(tensors_in(values_behind_shape(name, args, kwargs or {})))
        if (name in READS and (self.names or get_provenance([args, kwargs]))) or get_provenance(counted):
            raise StructureError("the program reads the value of a draw")
        return super().__torch_function__(func, types, args, kwargs)


def refuse_read_draws(program: Program, values: Mapping[str, Tensor]) -> None:
    """Raise where a plain run at given values of particles reads a draw."""
    with DrawsWatch():
        plain = program.plain_values(values, 0)
        program.run(values={name: track_provenance(value, frozenset({name})) for name, value in plain.items()})
