"""Checks of arguments. Every message says what was expected and what came."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_floats(name: str, value: Any, remedy: str = "Pass torch.as_tensor(x, dtype=torch.float64).") -> None:
    """Raise for a value that is not a tensor of real floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        raise TypeError(f"expected {name} as a tensor of floating-point numbers, but got {kind_of(value)}. {remedy}")


def check_size(name: str, value: Any) -> None:
    """Raise for a value that is neither a real number nor a tensor of one."""
    if isinstance(value, Tensor):
        right = value.dim() == 0 and not value.is_complex() and not value.is_meta
    else:
        right = not isinstance(value, bool) and isinstance(value, Real) and is_float(value)
    if not right:
        raise TypeError(
            f"expected {name} as a number or a tensor without dimensions, but got {kind_of(value)}. Pass a float."
        )


def check_like(name: str, value: Any, x: Tensor) -> None:
    """Raise for a value that is neither a finite number nor a tensor that broadcasts with `x`, or if `x` is not finite."""
    if not (isinstance(value, Tensor) and value.dim()):
        check_size(name, value)
    else:
        check_floats(name, value)
        if any(a != b and 1 not in (a, b) for a, b in zip(value.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(
                f"expected {name} as a number or like x {tuple(x.shape)}, but got {tuple(value.shape)}. Expand it."
            )
    if not bool(x.isfinite().all()) or not bool(torch.as_tensor(value).isfinite().all()):
        raise ValueError(f"expected finite numbers in x and {name}, but got NaN or infinity. Remove them.")


def check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected {name} as a whole number, but got {kind_of(value)}. Pass an int.")


def check_function(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"expected {name} as a function of the latents, but got {kind_of(value)}. Pass the function itself.")


def is_float(value: Real) -> bool:
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{place}"
    return f"{value!r:.60} ({type(value).__name__})"


def promoted(value: float | Tensor, like: Tensor) -> Tensor:
    """A tensor in the dtype of `like`, which is passed explicitly: as_tensor alone would first round a float to float32."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
