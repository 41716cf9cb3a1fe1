"""Errors of the user's own program: which of the two failed, on what arguments, and what looks wrong about them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...arguments import tensors_in
from ...errors import ArgumentError, ProgramError
from ...isolation import modules_of
from ..programs import Program

OF_TORCH = (RuntimeError, TypeError, IndexError, ValueError)
OF_DTYPES = ("dtype", "scalar type", "Long", "Double", "Float")


def check_forward(side: str, program: Any) -> None:
    """Refuse a module that is no program: `vae` in the place of `vae.model`."""
    if not isinstance(program, torch.nn.Module) or type(program).__call__ is not torch.nn.Module.__call__:
        return  # messengers of Pyro are modules with a call of their own
    if getattr(program.forward, "__func__", None) is torch.nn.Module.forward:
        methods = [name for name in ("model", "guide") if callable(getattr(program, name, None))]
        remedy = f"pass its method, {' or '.join(f'.{name}' for name in methods)}" if methods else "write its forward"
        raise ArgumentError(f"the {side} is a {type(program).__name__}, a module that cannot be called: {remedy}")


@contextmanager
def named_failure(side: str, program: Program) -> Iterator[None]:
    """Put one line of ours before an error of torch. Errors of other classes are the user's own, or ours."""
    try:
        yield
    except Exception as error:
        if type(error) not in OF_TORCH:
            raise
        text = str(error).strip() or "no message"
        raise ProgramError(
            f"the {side} fails on its arguments ({described(program.args, program.kwargs)}): {type(error).__name__}: {text}"
            f"{hint(program, text)}"
        ) from error


def described(args: tuple, kwargs: Mapping[str, Any]) -> str:
    named = {**{str(number): value for number, value in enumerate(args, start=1)}, **kwargs}
    return ", ".join(f"{name}: {kind(value)}" for name, value in named.items()) or "none"


def kind(value: Any) -> str:
    return f"{named(value.dtype)} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hint(program: Program, text: str) -> str:
    """What to do where the numbers of data and parameters are of different kinds."""
    dtypes = {p.dtype for module in modules_of(program.fn) for p in module.parameters() if p.is_floating_point()}
    others = {t.dtype for t in tensors_in((program.args, program.kwargs))} - dtypes
    if len(dtypes) != 1 or not others or not any(word in text for word in OF_DTYPES):
        return ""
    own = named(dtypes.pop())
    return f". Its parameters are {own}: pass data of that kind (x.to(torch.{own})), or convert model and guide (.double())"
