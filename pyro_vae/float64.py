"""Run code in float64 without changing tensors or modules of the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
ATTRIBUTES = {"__get__", "__set__", "__delete__"}  # of tensors, such as `x.shape`
TO_NUMPY = {"numpy", "__array__"}  # operations whose rounding cannot be followed


class InFloat64(TorchFunctionMode):
    """Makes programs compute in float64: tensors are cast before every operation, and literals follow.

    No tensor or parameter of the user is changed; see `kept_modules` for values that modules assign to themselves. Code
    compiled by `torch.jit.script` cannot be followed: it gets float64 inputs besides its float32 constants.

    :ivar lowered: an operation whose result was in lower precision nevertheless, or "".
    """

    def __init__(self) -> None:
        super().__init__()
        self.lowered = ""
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}  # by identity, so that a tensor is cast once and stays one tensor

    def __enter__(self) -> InFloat64:
        self._default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default_dtype)
        self._cast.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ATTRIBUTES:
            result = func(*args, **kwargs)
            return WIDER.get(result, result) if isinstance(result, torch.dtype) else result
        if func in CASTS:
            func = torch.Tensor.double
        args, kwargs = self._widened(args), {key: self._widened(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        is_low = name in TO_NUMPY or (isinstance(result, Tensor) and result.dtype in WIDER)
        if is_low and any(is_wide(arg) for arg in args):
            self.lowered = name
        return result

    def _widened(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._cast_once(tree) if tree.dtype in WIDER else tree
        if type(tree) in (tuple, list):
            return type(tree)(self._widened(item) for item in tree)
        return WIDER.get(tree, tree) if isinstance(tree, torch.dtype) else tree

    def _cast_once(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._cast:
            self._cast[id(tensor)] = tensor, tensor.to(WIDER[tensor.dtype])
        return self._cast[id(tensor)][1]


@contextmanager
def kept_modules() -> Iterator[None]:
    """Restore values that modules assign to themselves in a run: float64 buffers and caches would break the next forward."""
    saved: dict[int, tuple[torch.nn.Module, list[dict[str, Any]]]] = {}

    def look_at(module: torch.nn.Module, args: Any) -> None:
        if id(module) not in saved:
            saved[id(module)] = module, [dict(module._buffers), dict(module._parameters), dict(module.__dict__)]

    hook = register_module_forward_pre_hook(look_at)
    try:
        yield
    finally:
        hook.remove()
        for module, before in saved.values():
            contents: tuple[dict[str, Any], ...] = (module._buffers, module._parameters, module.__dict__)
            for content, old in zip(contents, before, strict=True):
                content.clear()
                content.update(old)


def is_wide(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.dtype in (torch.float64, torch.complex128)
