"""The arguments of the model from the batches of a loader."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy
import torch
from torch.utils.data import Dataset, IterableDataset

from .arguments import tensors_in
from .errors import ArgumentError, EmptyBatchError, StructureError

T = TypeVar("T")
NO_BATCH = "the loader has no batch: pass one with at least one datum"
# From a batch to the positional arguments of model and guide, or to a dict of their keyword arguments.
ToArguments = Callable[[Any], tuple[Any, ...] | Mapping[str, Any]]


def first_element(batch: Any) -> tuple[Any, ...] | Mapping[str, Any]:
    """The arguments of the model from a batch: its first element; all of it where it is a tensor, or a dict of keywords."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, torch.Tensor):
        return (batch,)
    try:
        if isinstance(batch, (str, bytes, numpy.ndarray)):
            raise TypeError  # the first element of these is a letter, or one datum
        return (batch[0],)
    except (IndexError, KeyError, TypeError):
        raise ArgumentError(
            f"the model gets the first element of a batch, or a batch that is a tensor, but this one is {batch!r:.60}, "
            f"a {type(batch).__name__}: use args= to say how to get the arguments, as in args=lambda batch: (batch.x,)"
        ) from None


def arguments_of(batch: Any, args: ToArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and keyword arguments."""
    check_to_arguments(args)
    arguments = args(batch)
    if isinstance(arguments, Mapping):
        return (), dict(arguments)
    if not isinstance(arguments, (tuple, list)):
        raise ArgumentError(
            f"args must map a batch to a tuple of the model's arguments, or to a dict of its keyword arguments, got "
            f"{type(arguments).__name__}: write args=lambda batch: (batch[0],)"
        )
    return tuple(arguments), {}


def check_to_arguments(args: Any) -> None:
    if not callable(args):
        raise ArgumentError(
            f"args must be a function from a batch to a tuple of the model's arguments, got {args!r}, which is not a "
            "function. Write args=lambda batch: (batch[0],)"
        )


def check_loader(loader: Any) -> None:
    kind = type(loader).__name__
    if isinstance(loader, (torch.Tensor, numpy.ndarray)):
        what = "a tensor" if isinstance(loader, torch.Tensor) else "an array"
        raise ArgumentError(f"expected an iterable of batches, got {what}: pass a DataLoader, or [x] for one batch x")
    walkable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if isinstance(loader, (str, bytes, Mapping, type)) or not walkable:
        raise ArgumentError(
            f"expected an iterable of batches, got {loader!r:.60}, a {kind}: pass a DataLoader, or [x] for one batch x"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ArgumentError(
            f"expected an iterable of batches, got a {type(loader).__name__} of single data: wrap it, "
            "DataLoader(dataset, batch_size=100)"
        )


def run_on_arguments(
    run: Callable[..., T], positional: tuple[Any, ...], named: dict[str, Any], batch: Any, args: ToArguments
) -> T:
    """Call `run` on the arguments of a batch. An error lists the other elements of the batch."""
    try:
        return run(*positional, **named)
    except (ArgumentError, StructureError) as error:
        if args is first_element and isinstance(batch, (tuple, list)) and len(batch) > 1:
            rest = f"The model got the first of the {len(batch)} elements of a batch; args=lambda batch: batch passes all"
            error.args = (f"{error}. {rest}",)
        raise


def picked(loader: Iterable[Any], num_data: int, args: ToArguments, datum_plate: str | None) -> tuple[list[Any], int]:
    """Whole batches with about `num_data` data, spread evenly over the loader, which may be sorted; and its number of data.

    It takes one pass, and keeps fewer than about twice as many data: every other batch is dropped when the rest are enough.
    """
    kept: list[tuple[Any, int]] = []
    stride, num_batches = 1, 0
    for batch in loader:
        if num_batches % stride == 0:
            kept.append((batch, 1 if datum_plate is None else num_data_in(arguments_of(batch, args))))
            while sum(size for _, size in kept[::2]) >= num_data and len(kept) > 1:
                kept, stride = kept[::2], 2 * stride
        num_batches += 1
    if not kept:
        raise EmptyBatchError(NO_BATCH)
    count = -(-len(kept) * num_data // max(sum(size for _, size in kept), 1))  # rounded up
    count = min(max(count, 1), len(kept))
    return [kept[place * len(kept) // count][0] for place in range(count)], num_batches


def num_data_in(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    """The number of data by the first tensor with an axis; used only for a budget."""
    positional, named = arguments
    return num_rows([*positional, *named.values()])


def num_rows(batch: Any) -> int:
    """The length of the first tensor with an axis in a batch; 1 where there is none."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 1)
