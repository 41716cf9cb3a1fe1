"""Autocast around a call applies to the user's programs only: densities are computed in full precision."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import COERCIONS
from pyro.distributions.hmm import HiddenMarkovModel
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

DEVICES = ("cpu", "cuda")
HALF = (torch.bfloat16, torch.float16)
# Their draws and densities multiply matrices, which autocast would do in half precision.
WITH_MATRICES = (
    torch.distributions.MultivariateNormal,
    torch.distributions.LowRankMultivariateNormal,
    torch.distributions.Wishart,
    dist.MultivariateStudentT,
    dist.GaussianMRF,
    HiddenMarkovModel,
)
Autocast = tuple[tuple[str, torch.dtype], ...]  # the types of devices for which it is on, and the precision of each

NOTHING = nullcontext()  # one object for all uses: every training step enters it several times
_around: ContextVar[Autocast] = ContextVar("_around", default=())


def autocast_around() -> Autocast:
    """The autocast with which programs run: the current one, or the one that `for_programs_alone` has switched off."""
    now = [(device, torch.get_autocast_dtype(device)) for device in DEVICES if torch.is_autocast_enabled(device)]
    return tuple(now) or _around.get()


def for_programs_alone() -> AbstractContextManager[None]:
    """Switch autocast off, except inside `for_program`. Distributions in programs get their parameters in float32."""
    around = autocast_around()
    return kept_for_programs(around) if around else NOTHING


@contextmanager
def kept_for_programs(around: Autocast) -> Iterator[None]:
    token = _around.set(around)
    COERCIONS.append(in_full_precision)
    try:
        with switched_off():
            yield
    finally:
        COERCIONS.remove(in_full_precision)
        _around.reset(token)


def for_program() -> AbstractContextManager[None]:
    """Switch autocast on again as the user had it."""
    around = _around.get()
    return switched_on(around) if around else NOTHING


@contextmanager
def switched_on(around: Autocast) -> Iterator[None]:
    # torch caches weights in half precision until the outermost autocast ends. Weights cached in a run without gradients
    # would have no gradient in later runs.
    torch.clear_autocast_cache()
    with ExitStack() as stack:
        for device, dtype in around:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield


@contextmanager
def off_for_programs() -> Iterator[None]:
    """Inside `for_programs_alone`: programs run without autocast too."""
    token = _around.set(())
    try:
        yield
    finally:
        _around.reset(token)


@contextmanager
def switched_off() -> Iterator[None]:
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def full(raw: Any) -> Any:
    """The output of a network under autocast, in float32: a tensor, or a transform or list of tensors."""
    if isinstance(raw, Tensor):
        return raw.float() if raw.dtype in HALF else raw
    if isinstance(raw, (list, tuple)):
        items = [full(item) for item in raw]
        return raw if all(new is old for new, old in zip(items, raw, strict=True)) else type(raw)(items)
    if isinstance(raw, _InverseTransform):
        own = full(raw.inv)
        return raw if own is raw.inv else own.inv
    if isinstance(raw, Transform) and not isinstance(raw, torch.nn.Module):
        # A transform caches its inverse, which refers to the transform. The copy creates a new one.
        attributes = {name: full(value) for name, value in vars(raw).items() if name != "_inv"}
        if any(new is not vars(raw)[name] for name, new in attributes.items()):
            raw = copy(raw)
            vars(raw).update(attributes)
    return raw


def full_under_autocast(raw: Tensor) -> Tensor:
    """A tensor in float32 if autocast is on; without autocast, half precision is kept."""
    return raw.float() if raw.dtype in HALF and autocast_around() else raw


def in_full_precision(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Create a distribution of Pyro with its parameters in float32: one of its `COERCIONS`.

    The parameters are cast before they are used. Later would be too late: `Normal(loc, 0.2)` gives its scale the precision
    of `loc`, and a `Categorical` normalises its logits.
    """
    if not _around.get():  # of another thread
        return None
    cast = tuple(map(full, args)), {name: full(value) for name, value in kwargs.items()}
    made = without_autocast(cls) if issubclass(cls, WITH_MATRICES) else cls
    with switched_off():  # some multiply matrices when they are created
        return ABCMeta.__call__(made, *cast[0], **cast[1])


@cache
def without_autocast(cls: Any) -> Any:
    """A class of the same name that draws and scores with autocast off."""
    methods = {name: off(getattr(cls, name)) for name in ("__call__", "sample", "rsample", "log_prob") if hasattr(cls, name)}
    return type(cls)(cls.__name__, (cls,), methods)


def off(method: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with switched_off():
            return method(*args, **kwargs)

    return run
