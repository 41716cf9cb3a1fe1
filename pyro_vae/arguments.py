"""The arguments of model and guide: checks against signatures, shapes and devices."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy
import torch
from pyro.poutine.messenger import _bound_partial, _context_wrap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import ArgumentError


def unwrapped(program: Callable) -> tuple[Callable, tuple]:
    """The function inside handlers of Pyro, and the arguments that are bound to it: `self` of a decorated method."""
    core: Any = program
    bound: tuple = ()
    while isinstance(core, partial):
        if isinstance(core, _bound_partial):
            core = core.func
        elif core.func is _context_wrap:
            core, bound = core.args[1], (*core.args[2:], *bound)
        else:
            break
    return core, bound


def check_signature(name: str, program: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    try:
        core, bound = unwrapped(program)
        signature = inspect.signature(core.forward if isinstance(core, torch.nn.Module) else core)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*bound, *args, **kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"the {name} takes {signature} but was called with {len(args)} positional and {sorted(kwargs)} keyword "
            f"arguments ({error}): model and guide must accept the same arguments"
        ) from error


def devices_of(tree: Any, modules: Sequence[torch.nn.Module]) -> list[torch.device]:
    """Devices of arguments and parameters, the arguments first."""
    found = [t.device for t in tensors_in(tree)] + [p.device for m in modules for p in m.parameters()]
    return list(dict.fromkeys(found)) or [torch.get_default_device()]


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, Mapping):
        yield from tensors_in(list(tree.values()))


def signature_of(tree: Any, floats: bool = True) -> Any:
    """A hashable description of arguments: shapes of arrays, other objects themselves, floats where `floats` is true."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype, tree.device
    if isinstance(tree, (tuple, list)):
        return tuple(signature_of(item, floats) for item in tree)
    if isinstance(tree, Mapping):
        return tuple((key, signature_of(value, floats)) for key, value in tree.items())
    if isinstance(tree, numpy.ndarray):
        return tree.shape, tree.dtype
    if isinstance(tree, float) and not floats:
        return float
    try:
        hash(tree)
    except TypeError:
        return id(tree)
    return type(tree), tree


def remedy_for(value: Any) -> str:
    """The remedy for objects that are passed in place of a batch."""
    if isinstance(value, DataLoader):
        return "pass one batch, or run over all of them with pv.evaluate(estimator, loader)"
    if isinstance(value, Dataset):
        return "wrap it, DataLoader(dataset, batch_size=100), and run over it with pv.evaluate(estimator, loader)"
    if isinstance(value, numpy.ndarray):
        return "if the program takes tensors, pass torch.as_tensor(x)"
    if isinstance(value, Tensor):
        return "" if value.layout == torch.strided else "if the program takes dense tensors, pass x.to_dense()"
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (float, list, tuple)) for item in value):
        return "if the program takes tensors, pass torch.tensor(x)"
    return "unpack it into the arguments of the program" if isinstance(value, (tuple, Mapping)) else ""


def repeated(tree: Any, size: int, times: int) -> Any:
    """Arguments with K copies of their data."""

    def copies(array: Any, axis: int) -> Any:
        times_per_axis = [times if i == axis else 1 for i in range(array.ndim)]
        return array.repeat(times_per_axis) if isinstance(array, Tensor) else numpy.tile(array, times_per_axis)

    return along_data(tree, size, copies, lambda items: items * times)


def selected(tree: Any, size: int, kept: Tensor) -> Any:
    """Arguments with the data of these indices."""

    def some(array: Any, axis: int) -> Any:
        return (
            array.index_select(axis, kept.to(array.device))
            if isinstance(array, Tensor)
            else array.take(kept.cpu().numpy(), axis)
        )

    return along_data(tree, size, some, lambda items: type(items)(items[i] for i in kept.tolist()))


def along_data(tree: Any, size: int, of_array: Callable[[Any, int], Any], of_items: Callable[[Any], Any]) -> Any:
    """Change every argument along its data: arrays along their first axis of that size, and lists of plain items."""
    if isinstance(tree, (Tensor, numpy.ndarray)):
        axes = [axis for axis, length in enumerate(tree.shape) if length == size]
        return of_array(tree, axes[0]) if axes else tree
    if isinstance(tree, Mapping):
        return {key: along_data(value, size, of_array, of_items) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        if len(tree) == size and not any(isinstance(item, (Tensor, numpy.ndarray, list, tuple, Mapping)) for item in tree):
            return of_items(tree)  # lengths, one per datum
        return type(tree)(along_data(item, size, of_array, of_items) for item in tree)
    return tree
