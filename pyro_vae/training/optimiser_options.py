"""The options of an optimiser for Pyro's SVI: fused where possible, clipping of gradients, errors with a remedy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import OptionError
from ..options import is_real, plain_float

Options = dict[str, Any]
HOW = ("fused", "foreach")  # options that choose an implementation and do not change the numbers


def split_scheduler(constructor: Any, arguments: Any) -> tuple[Any, Any, partial[LRScheduler] | None]:
    """From a class of schedulers as in Pyro: the optimiser's class, its options, and a function that adds the scheduler."""
    if not (isinstance(constructor, type) and issubclass(constructor, LRScheduler)):
        return constructor, arguments, None
    if not isinstance(arguments, dict) or not {"optimizer", "optim_args"} <= arguments.keys():
        raise OptionError(
            f"optim_args of the scheduler {constructor.__name__} must be a dict with 'optimizer', a class of torch.optim, "
            f"'optim_args', its options, and the scheduler's own options; got {arguments!r}"
        )
    own = dict(arguments)
    optimizer, options = own.pop("optimizer"), own.pop("optim_args")
    return optimizer, options, partial(constructor, **own)


def check_kinds(constructor: Any, optim_args: Any, clip_args: Any) -> None:
    if isinstance(constructor, type) and issubclass(constructor, LBFGS):
        raise OptionError("LBFGS needs a closure, which SVI does not have: use a first-order class such as torch.optim.Adam")
    if not callable(constructor):
        raise OptionError(f"optim_constructor must be a class such as torch.optim.Adam, got {constructor!r}")
    for name, value in (("optim_args", optim_args), ("clip_args", clip_args)):
        if not (isinstance(value, dict) or callable(value)):
            raise OptionError(f"{name} must be a dict of options or a function that returns one, got {value!r}")


def with_fused(constructor: Callable[..., Optimizer], options: Options, param: Tensor) -> Options:
    """The options with `fused=True` where the optimiser supports it for tensors like this one.

    It is tested on two numbers, of which the second has its first gradient later, since fused SGD with momentum fails for
    that. Fused code ignores strides, and torch does not check that a gradient has the same layout, so only contiguous
    parameters use it.
    """
    if not options.keys().isdisjoint(HOW) or not param.is_contiguous():
        return options
    shape, kind = (1,) * param.dim(), {"dtype": param.dtype, "device": param.device}
    numbers = [torch.zeros(shape, **kind, requires_grad=True) for _ in range(2)]  # type: ignore[call-overload]
    try:
        if "fused" not in inspect.signature(constructor).parameters:
            return options
        trial = constructor(numbers, **options, fused=True)
        for number in numbers:
            number.grad = torch.zeros_like(number)
            trial.step()
    except (RuntimeError, TypeError, ValueError):
        return options
    return {**options, "fused": True}


def checked_clips(clips: Any) -> Options:
    """Bounds of the gradient of one parameter: `clip_norm` and `clip_value`, or none."""
    if not isinstance(clips, dict) or not clips.keys() <= {"clip_norm", "clip_value"}:
        raise OptionError(f"clip_args must be a dict with 'clip_norm', 'clip_value' or both, got {clips!r}")
    for name, value in clips.items():
        if value is not None and not (is_real(value) and plain_float(value) >= 0):
            raise OptionError(f"{name} must be a number >= 0 or None, got {value!r}")
    return clips


def clip_gradients(params: list[Tensor], clip_norm: float | None = None, clip_value: float | None = None) -> None:
    """Clip each gradient separately, like Pyro's loop over `clip_grad_norm_` and `clip_grad_value_`, but in a few calls."""
    grads = [param.grad for param in params if param.grad is not None]
    if clip_norm is not None and grads:
        factors = torch._foreach_norm(grads)
        torch._foreach_add_(factors, 1e-6)  # the constant that torch adds against a norm of zero
        torch._foreach_reciprocal_(factors)
        torch._foreach_mul_(factors, plain_float(clip_norm))
        torch._foreach_clamp_max_(factors, 1.0)
        torch._foreach_mul_(grads, factors)
    if clip_value is not None:
        torch.nn.utils.clip_grad_value_(params, plain_float(clip_value))


@contextmanager
def refused(constructor: Any, label: str) -> Iterator[None]:
    """Turn errors of torch and Pyro about options into named errors with a remedy."""
    try:
        yield
    except OptionError:
        raise
    except (AssertionError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        made = getattr(constructor, "func", constructor)  # the class of a scheduler with its options
        raise OptionError(
            f"cannot make {getattr(made, '__name__', made)} for {label}: {error}. Pass a class of torch.optim, not its "
            "wrapper in pyro.optim, and a dict of options that it has, or a function that returns one"
        ) from error
