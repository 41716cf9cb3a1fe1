"""The values of beta: numbers, tensors without dimensions, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import OptionError
from ..options import is_real, plain_float
from .traces.matching import Beta, Betas

Schedule = Callable[[int], Beta]
Weight = Beta | Schedule


def snapshot(betas: Betas) -> Betas:
    if isinstance(betas, Mapping):
        return {name: kept(beta) for name, beta in betas.items()}
    return kept(betas)


def kept(beta: Beta) -> Beta:
    return beta.detach().clone() if isinstance(beta, Tensor) else beta


def value_of(weight: Weight, num_updates: int, name: str = "beta") -> Beta:
    """The weight at this update; `name` is its name in errors."""
    if isinstance(weight, Tensor) or not callable(weight):
        return weight
    value: Beta = weight(num_updates)
    if isinstance(value, Tensor) and not value.dim():
        return value  # not validated: reading it would synchronise the device at every step
    return checked_number(value, name)


def checked_weights(weights: Weight | Mapping[str, Weight], name: str = "beta") -> Weight | dict[str, Weight]:
    """The weight, or the weights by site, with NumPy numbers converted to plain ones."""
    if isinstance(weights, Mapping):
        by_site = name if name == "beta" else f"{name} of '{{}}'"
        return {site: checked_weight(weight, by_site.format(site)) for site, weight in weights.items()}
    return checked_weight(weights, name)


def checked_weight(weight: Weight, name: str = "beta") -> Weight:
    if isinstance(weight, Tensor) or not callable(weight):
        return checked_number(weight, name)
    return weight


def checked_number(value: Any, name: str = "beta") -> Beta:
    if isinstance(value, Tensor) and value.dim():
        raise OptionError(f"{name} must be a number or a tensor without dimensions, got shape {tuple(value.shape)}")
    plain = value.item() if isinstance(value, Tensor) else value
    if not is_real(plain):
        raise OptionError(f"{name} must be a number, a tensor without dimensions or a schedule step -> float, got {value!r}")
    number = plain_float(plain)
    if not (math.isfinite(number) and number >= 0):
        raise OptionError(f"{name} must be finite and >= 0, got {number}")
    return value if isinstance(value, Tensor) else number
