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


def value_of(weight: Weight, num_updates: int) -> Beta:
    if isinstance(weight, Tensor) or not callable(weight):
        return weight
    value: Beta = weight(num_updates)
    if isinstance(value, Tensor) and not value.dim():
        return value  # taken on trust: to look at it would stop the device at every step
    check_number(value)
    return value


def check_weight(weight: Weight) -> None:
    if isinstance(weight, Tensor) or not callable(weight):
        check_number(weight)


def check_number(beta: Any) -> None:
    if isinstance(beta, Tensor):
        if beta.dim():
            raise OptionError(f"beta must be a number or a tensor without dimensions, got shape {tuple(beta.shape)}")
        beta = float(beta.detach())
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise OptionError(f"beta must be a number, a tensor without dimensions or a schedule step -> float, got {beta!r}")
    if not (math.isfinite(beta) and beta >= 0):
        raise OptionError(f"beta must be finite and >= 0, got {beta}")
