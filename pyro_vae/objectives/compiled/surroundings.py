"""The state in which a graph was traced, besides its inputs: modes, plain attributes, the identity of parameters."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import pyro
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ...arguments import unwrapped
from ...isolation import modules_of

PLAIN = (bool, int, float, str, type(None))
OF_EVERY_MODULE = set(vars(nn.Module())) - {"training"}

# Attributes of an objective that change with each call, and its weights, which are inputs.
OF_A_CALL = {"_num_updates", "_calls_since_update", "_complete", "_terms", "_pass", "_given", "_betas", "_recorded", "_beta"}


@contextmanager
def modules_inside(*programs: Callable) -> Iterator[list[nn.Module]]:
    """Yields a list of the modules of the programs and of those that ran inside them; it is complete on exit."""
    found: dict[int, nn.Module] = {}

    def add(module: nn.Module, inputs: Any = ()) -> None:
        found.setdefault(id(module), module)

    listed: list[nn.Module] = []
    hook = register_module_forward_pre_hook(add)
    try:
        yield listed
    finally:
        hook.remove()
        for owner in modules_of(*programs):  # lazy modules have their final class by now
            for module in owner.modules():
                add(module)
        listed.extend(found.values())


class Surroundings:
    """Stores plain attributes, parameters and buffers of the modules, entries of Pyro's store and the kinds of tensors.

    `hold` is called at every step, so it compares prepared tuples.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        programs: Iterable[Callable],
        names: Iterable[str],
        tensors: Iterable[Tensor],
        objective: Any,
    ) -> None:
        modules = list(modules)
        self._values = [taken(vars(m), OF_EVERY_MODULE) for m in modules]
        self._values += [taken(scope, set(), names) for program in programs for scope, names in scopes(program)]
        self._values.append(taken(vars(objective), {*OF_A_CALL, *objective._weights()}))
        self._values = [known for known in self._values if known is not None]
        self._sizes = [(vars(m), len(vars(m))) for m in modules]  # an attribute that is added later
        tables = [table for m in modules for table in (m._parameters, m._buffers, m._modules)]
        self._owned = [(table, [*map(id, table.values())]) for table in tables]
        store: dict[str, Tensor] = pyro.get_param_store()._params
        self._entries = [(name, store[name]) for name in names if name in store]
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._kinds = [*map(kind, self._tensors)]

    def hold(self) -> bool:
        try:
            same_values = all(get(scope) == values for scope, get, values in self._values)
        except KeyError:  # an attribute was removed
            return False
        if any(len(attributes) != size for attributes, size in self._sizes):
            return False
        return same_values and not self.replaced() and [*map(kind, self._tensors)] == self._kinds

    def replaced(self) -> bool:
        """Whether a module or the store has other tensors now: then this graph is never valid again."""
        store = pyro.get_param_store()._params
        if any(store.get(name) is not tensor for name, tensor in self._entries):
            return True
        return any([*map(id, table.values())] != ids for table, ids in self._owned)


def kind(tensor: Tensor) -> tuple:
    return tensor.requires_grad, tensor.dtype, tensor.shape, tensor.stride(), tensor.device, has_hooks(tensor)


def has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def taken(scope: dict[str, Any], without: set[str], names: Iterable[str] | None = None) -> Any:
    """The plain values in a scope, and how to read them again; None where there are none."""
    asked = scope if names is None else names
    plain = tuple(n for n in asked if n in scope and n not in without and type(scope[n]) in PLAIN)
    if not plain:
        return None
    get = itemgetter(*plain)
    return scope, get, get(scope)


class Cells(Mapping[str, Any]):
    """The variables of a closure by name."""

    def __init__(self, function: Any) -> None:
        self.cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def __getitem__(self, name: str) -> Any:
        try:
            return self.cells[name].cell_contents
        except ValueError:  # not assigned yet
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)


def scopes(program: Callable) -> Iterator[tuple[Any, Iterable[str] | None]]:
    """The scopes of a Python program: globals and closure of its function, attributes of its object."""
    core, bound = unwrapped(program)
    owner = getattr(core, "__self__", bound[0] if bound else None)
    if owner is not None and not isinstance(owner, nn.Module) and hasattr(owner, "__dict__"):
        yield vars(owner), None
    function = core.forward if isinstance(core, nn.Module) else core
    function = getattr(function, "__func__", function)
    if hasattr(function, "__code__"):
        yield function.__globals__, {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
        if function.__closure__:
            yield Cells(function), None
