"""Join the records of several batches, warn about them, and turn them into plain Python."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import ArgumentError, described
from .doubts import CATEGORIES


def concatenated(records: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Join the per-datum fields of records of several batches, in their order.

    NaN where only some batches have a field; integers, which have no NaN, are then `None` for all.
    """
    joined: dict[str, Any] = {}
    for name in names:
        parts = [getattr(record, name) for record in records]
        like = next((part for part in parts if part is not None), None)
        if like is not None and not like.is_floating_point() and any(part is None for part in parts):
            like = None
        if like is not None:
            parts = [like.new_full((len(r),), torch.nan) if p is None else p for r, p in zip(records, parts, strict=True)]
        joined[name] = None if like is None else torch.cat(parts)
    return joined


def with_loader_index(record: Any, index: Tensor | None) -> Any:
    """The record with the positions of its data in the loader, if it or its inner records have a field for them."""
    changed: dict[str, Any] = {}
    for field in fields(record) if is_dataclass(record) else ():
        value = getattr(record, field.name)
        if field.name == "loader_index":
            changed[field.name] = index
        elif is_dataclass(value) and hasattr(value, "cat"):  # about the same data
            changed[field.name] = with_loader_index(value, index)
    return replace(record, **changed) if changed else record


def to_plain(record: Any) -> dict[str, Any]:
    """The fields of a record for JSON: tensors as lists, also inside mappings and inner records."""
    return {field.name: plain_value(getattr(record, field.name)) for field in fields(record)}


def plain_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain_value(part) for key, part in value.items()}
    return to_plain(value) if is_dataclass(value) else value


def check_records(kind: type, records: Any) -> None:
    """Raise unless `records` is a list of records of one class."""
    listed = isinstance(records, Sequence) and not isinstance(records, str)
    strange = [type(record).__name__ for record in records if not isinstance(record, kind)] if listed else []
    if not listed or strange:
        got = f"one that holds a {strange[0]}" if strange else f"a {type(records).__name__}"
        raise ArgumentError(
            f"{kind.__name__}.cat joins a list of {kind.__name__}, got {got}: pass what one estimator returned for several "
            "batches"
        )
    if not records:
        raise ValueError("cat needs at least one record, got none: did the loader yield any batch?")


def places(kept: Any, num_data: int) -> Tensor:
    """Check a mask (B,) or indices of data, of torch, NumPy or a list.

    A number, or None, would index too, but give a record whose fields have other shapes.
    """
    if isinstance(kept, (list, tuple, numpy.ndarray)) and all(isinstance(one, (int, numpy.generic)) for one in kept):
        kept = torch.as_tensor(kept) if len(kept) else torch.zeros(0, dtype=torch.long)
    if isinstance(kept, Tensor) and kept.ndim == 1 and not kept.is_meta:
        if kept.dtype == torch.bool and len(kept) == num_data:
            return kept
        whole = kept.dtype != torch.bool and not kept.is_floating_point() and not kept.is_complex()
        if whole and bool(((kept >= -num_data) & (kept < num_data)).all()):
            return kept.long()
    raise ArgumentError(
        f"expected a mask of {num_data} data, or a vector of indices from 0 to {num_data - 1}, got {described(kept)}: pass "
        "record.reliable, or torch.tensor([0, 2])"
    )


def check_same(records: Sequence[Any], names: Sequence[str]) -> None:
    for name in names:
        values = {getattr(record, name) for record in records}
        if len(values) > 1:
            raise ValueError(f"records differ in {name} ({values}): only results of one estimator can be joined")


def mean_cost(records: Sequence[Any]) -> float:
    sizes = [len(record) for record in records]
    return sum(r.cost * n for r, n in zip(records, sizes, strict=True)) / sum(sizes)


@contextmanager
def without_warnings(*others: type[Warning]) -> Iterator[None]:
    """Silence the warnings about doubts, and others, where the doubts are reported in another way."""
    with warnings.catch_warnings():
        for category in (*CATEGORIES, *others):
            warnings.simplefilter("ignore", category)
        yield


def warn_about(record: Any, stacklevel: int) -> None:
    """Issue the warnings of a record; `stacklevel` counts from the caller, as in `warnings.warn`."""
    for warning in getattr(record, "warnings", tuple)():  # a user's record may have no warnings()
        warnings.warn(warning, stacklevel=stacklevel + 1)
