"""Join the records of several batches, warn about them, and turn them into plain Python."""

import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor


def concatenated(records: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Join the per-datum fields of records of several batches, in their order; NaN where only some batches have one."""
    joined: dict[str, Any] = {}
    for name in names:
        parts = [getattr(record, name) for record in records]
        like = next((part for part in parts if part is not None), None)
        if like is not None:
            parts = [like.new_full((len(r),), torch.nan) if p is None else p for r, p in zip(records, parts, strict=True)]
        joined[name] = None if like is None else torch.cat(parts)
    return joined


def to_plain(record: Any) -> dict[str, Any]:
    """Tensors as lists, for JSON."""
    return {
        f.name: value.tolist() if isinstance(value := getattr(record, f.name), Tensor) else value for f in fields(record)
    }


def check_same(records: Sequence[Any], names: Sequence[str]) -> None:
    if not records:
        raise ValueError("cat needs at least one record, got none: did the loader yield any batch?")
    for name in names:
        values = {getattr(record, name) for record in records}
        if len(values) > 1:
            raise ValueError(f"records differ in {name} ({values}): only results of one estimator can be joined")


def mean_cost(records: Sequence[Any]) -> float:
    sizes = [len(record) for record in records]
    return sum(r.cost * n for r, n in zip(records, sizes, strict=True)) / sum(sizes)


def warn_about(record: Any, stacklevel: int) -> None:
    """Issue the warnings of a record; `stacklevel` counts from the caller, as in `warnings.warn`."""
    for warning in record.warnings():
        warnings.warn(warning, stacklevel=stacklevel + 1)
