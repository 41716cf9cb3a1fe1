"""Distributions of rows of a table: independent numbers, with one distribution for each block of columns."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from .checked import Accepts, CheckedIndependent, check_shape, check_support


class CheckedColumns(CheckedIndependent):
    """`CheckedIndependent` for tables: errors name the columns whose data have no density."""

    parts: list[Accepts]
    widths: list[int]

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CheckedColumns":
        new: Any = super().expand(batch_shape, _instance)
        new.parts, new.widths = self.parts, self.widths
        return new

    def check(self, value: Tensor) -> None:
        check_shape(value, self.event_shape, self.accepts)
        for part, accepts in zip(value.split(self.widths, -1), self.parts, strict=True):
            check_support(part, 1, accepts)


class Columns(TorchDistribution):
    """Independent numbers, (..., X), with a separate distribution, (..., width), for each block of columns."""

    arg_constraints: dict[str, Constraint] = {}

    def __init__(self, fns: Sequence[Any], validate_args: bool | None = None) -> None:
        self.fns = list(fns)
        self.widths = [fn.batch_shape[-1] for fn in self.fns]
        leading = torch.broadcast_shapes(*(fn.batch_shape[:-1] for fn in self.fns))
        super().__init__(torch.Size((*leading, sum(self.widths))), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Columns":
        new = self._get_checked_instance(Columns, _instance)
        leading = torch.Size(batch_shape)[:-1]
        fns = [fn.expand(torch.Size((*leading, width))) for fn, width in zip(self.fns, self.widths, strict=True)]
        Columns.__init__(new, fns, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(event_dim=0)
    def support(self) -> Any:
        return ColumnSupport([fn.support for fn in self.fns], self.widths)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.cat([log_prob_of(fn, x) for fn, x in zip(self.fns, value.split(self.widths, -1), strict=True)], -1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  as in torch
        with torch.no_grad():
            return torch.cat([fn.sample(sample_shape) for fn in self.fns], -1)  # classes become numbers

    @property
    def mean(self) -> Tensor:
        return torch.cat([fn.mean for fn in self.fns], -1)

    @property
    def variance(self) -> Tensor:
        return torch.cat([fn.variance for fn in self.fns], -1)


class ColumnSupport(Constraint):
    """The supports of single numbers, by column along the last dimension."""

    def __init__(self, supports: Sequence[Any], widths: Sequence[int]) -> None:
        self.supports, self.widths = list(supports), list(widths)
        super().__init__()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return all(support.is_discrete for support in self.supports)

    def check(self, value: Tensor) -> Tensor:
        parts = zip(self.supports, value.split(self.widths, -1), strict=True)
        return torch.cat([support.check(part) for support, part in parts], -1)

    def __repr__(self) -> str:
        return f"ColumnSupport({self.supports}, {self.widths})"


def log_prob_of(fn: Any, x: Tensor) -> Tensor:
    """The log-density; NaN for an invalid class, which torch would use as an index."""
    if not isinstance(fn, dist.Categorical):
        return fn.log_prob(x)
    is_class = fn.support.check(x)
    return torch.where(is_class, fn.log_prob(torch.where(is_class, x, torch.zeros_like(x))), torch.nan)
