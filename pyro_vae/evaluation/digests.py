"""Digests that identify a call, by name: options, parameters, buffers, closures, code, and the data of a batch."""

import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from ..isolation import stored_parameters

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
# The code of these is identified by the versions of packages.
PACKAGES = {"pyro", "pyro_vae", "torch", "numpy"} | sys.stdlib_module_names
# Left by an earlier run: the trace of an autoguide's first call contains that batch and its draws.
PASSING = {"pyro.poutine.trace_struct"}
# Not part of what a module is: its mode, and the name of a VAE in the store, which numbers the VAEs of its process.
NOT_DESCRIBED = {"training", "store_name"}
DEPTH = 12  # of objects within objects


def about_call(of: Any) -> dict[str, str]:
    """Digests of everything that the results of an estimator depend on; short values are given as they are.

    `of` is an estimator or any function. Included are the code and closures of functions, the globals that they read, and
    parameters in Pyro's store that belong to no module.
    """
    found = Description()
    found.add("", of)
    stored = {name: p for name, p in stored_parameters().items() if id(p) not in found.tensors}
    found.add("parameter store", stored)
    return found.found


def about_ranks(of: Any) -> dict[str, str]:
    """The parts of `about_call` that must be the same in all processes of a group: the class, the options, tensors.

    Plain values that model and guide read may differ, such as the rank.
    """
    options = {f.name for f in dataclasses.fields(of)} if dataclasses.is_dataclass(of) else set()
    told = {"class", *options} - {"model", "guide"}
    return {name: text for name, text in about_call(of).items() if name.split(".")[0] in told or is_digest(text)}


def is_digest(text: str) -> bool:
    return len(text) == 64


def digest_of(value: Any) -> str:
    """One digest of data: of tensors, arrays and plain values in any nest of containers and objects."""
    found = Description()
    found.add("", value)
    return hexadecimal(*(f"{name}={text}\n".encode() for name, text in found.found.items()))


class Description:
    """Names and digests of the parts of a value."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.tensors: set[int] = set()  # ids of those that were seen
        self._seen: dict[int, Any] = {}  # objects by id; they are kept, so that their ids are not used again

    def add(self, name: str, value: Any, depth: int = 0) -> None:
        if isinstance(value, PLAIN):
            self.found[name] = repr(value) if len(repr(value)) < 100 else hexadecimal(repr(value).encode())
        elif isinstance(value, (Tensor, numpy.ndarray, numpy.generic)):
            self.tensors.add(id(value))
            self.found[name] = of_numbers(value)
        elif id(value) not in self._seen and depth < DEPTH:
            self._seen[id(value)] = value
            for part, inner in self._parts(name, value).items():
                self.add(f"{name}{part}" if name else part.lstrip("."), inner, depth + 1)

    def _parts(self, name: str, value: Any) -> Mapping[str, Any]:
        """The parts of a value, by a suffix to its name."""
        if isinstance(value, types.ModuleType) or type(value).__module__ in PASSING:
            return {}
        if isinstance(value, Mapping):
            return {f"[{key}]": part for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            return {f"[{place}]": part for place, part in enumerate(value)}
        if isinstance(value, (set, frozenset)):
            return {"": repr(sorted(map(repr, value)))}
        if isinstance(value, types.MethodType):
            return {".function": value.__func__, "": value.__self__}
        if isinstance(value, functools.partial):
            return {".func": value.func, ".args": value.args, **{f".{n}": part for n, part in value.keywords.items()}}
        if isinstance(value, types.FunctionType):
            return of_function(value)
        if isinstance(value, type):
            return {"": f"{value.__module__}.{value.__qualname__}", **of_class(value)}
        kind = {".class": type(value)}
        if isinstance(value, torch.nn.Module):
            return {**kind, **{f".{n}": part for n, part in parts_of_module(value).items()}}
        if dataclasses.is_dataclass(value):
            return {**kind, **{f".{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}}
        return {**kind, **{f".{n}": part for n, part in getattr(value, "__dict__", {}).items()}}


def parts_of_module(module: torch.nn.Module) -> dict[str, Any]:
    """Parameters, buffers, modules and public attributes; the mode is not included, because everything runs in eval mode."""
    state = vars(module)
    own = {name: value for name, value in state.items() if not name.startswith("_") and name not in NOT_DESCRIBED}
    return {**state["_parameters"], **state["_buffers"], **state["_modules"], **own}


def is_of_package(value: Any) -> bool:
    return (value.__module__ or "").partition(".")[0] in PACKAGES


def of_class(kind: type) -> dict[str, Any]:
    """The functions that a user's class defines or inherits from another user's class."""
    own = [parent for parent in reversed(kind.__mro__) if not is_of_package(parent)]
    functions = {n: part for parent in own for n, part in vars(parent).items() if isinstance(part, types.FunctionType)}
    return {f".{name}": part for name, part in functions.items()}


def of_function(function: types.FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closure = {name: contents for name, cell in cells for contents in contents_of(cell)}
    parts = {"": f"{function.__module__}.{function.__qualname__}", **{f".{n}": part for n, part in closure.items()}}
    parts |= {".defaults": function.__defaults__, ".kwdefaults": function.__kwdefaults__}
    if is_of_package(function):
        return parts
    read = {name: function.__globals__[name] for name in names_in(function.__code__) if name in function.__globals__}
    return {**parts, ".code": of_code(function.__code__), **{f".{n}": part for n, part in read.items()}}


def contents_of(cell: types.CellType) -> list[Any]:
    """The contents of a closure's variable; none for a variable that is not yet set."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def inner_codes(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def names_in(code: types.CodeType) -> list[str]:
    """The names of globals and attributes that a code object reads, including inner functions."""
    return list(dict.fromkeys([*code.co_names, *(name for inner in inner_codes(code) for name in names_in(inner))]))


def of_code(code: types.CodeType) -> str:
    """The digest of a code object, without line numbers and file names."""
    constants = [repr(c) for c in code.co_consts if not isinstance(c, (types.CodeType, frozenset))]
    sets = [repr(sorted(map(repr, c))) for c in code.co_consts if isinstance(c, frozenset)]
    text = repr((code.co_names, code.co_varnames, constants, sets, [of_code(inner) for inner in inner_codes(code)]))
    return hexadecimal(code.co_code, text.encode())


def of_numbers(value: Any) -> str:
    """The digest of a tensor or an array: type, shape and bytes."""
    with torch._C.DisableTorchFunction():
        if not isinstance(value, Tensor):
            array = numpy.ascontiguousarray(value)
            return hexadecimal(repr((array.dtype, array.shape)).encode(), array.tobytes())
        tensor = value.detach()
        tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
        plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        return hexadecimal(repr((plain.dtype, tuple(plain.shape))).encode(), plain.reshape(-1).view(torch.uint8).numpy())


def hexadecimal(*pieces: Any) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
