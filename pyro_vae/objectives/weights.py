"""The values that beta may take: numbers, tensors without dimensions, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import OptionError
from ..kernel import Beta, Betas

Schedule = Callable[[int], Beta]
Weight = Beta | Schedule


def snapshot(betas: Betas) -> Betas:
    if isinstance(betas, Mapping):
        return {name: kept(beta) for name, beta in betas.items()}
    return kept(betas)


def kept(beta: Beta) -> Beta:
    return beta.detach().clone() if isinstance(beta, Tensor) else beta


def value_of(weight: Weight, num_updates: int, name: str = "beta") -> Beta:
    """The weight at this update; `name` is what errors call it."""
    if isinstance(weight, Tensor) or not callable(weight):
        return weight
    value: Beta = weight(num_updates)
    if isinstance(value, Tensor) and not value.dim():
        return value  # taken on trust: to look at it would stop the device at every step
    check_number(value, name)
    return value


def check_weight(weight: Weight, name: str = "beta") -> None:
    if isinstance(weight, Tensor) or not callable(weight):
        check_number(weight, name)


def check_number(value: Any, name: str = "beta") -> None:
    if isinstance(value, Tensor):
        if value.dim():
            raise OptionError(f"{name} must be a number or a tensor without dimensions, got shape {tuple(value.shape)}")
        value = float(value.detach())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{name} must be a number, a tensor without dimensions or a schedule step -> float, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise OptionError(f"{name} must be finite and >= 0, got {value}")
