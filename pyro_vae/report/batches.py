"""Choose a part of a data set, and show one progress bar over several passes."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..batches import NO_BATCH, ToArguments, arguments_of
from ..errors import EmptyBatchError


def picked(loader: Iterable[Any], num_data: int, args: ToArguments, datum_plate: str | None) -> tuple[list[Any], int]:
    """Whole batches with about `num_data` data, spread evenly over the loader, which may be sorted; and how many it has.

    In one pass, keeping fewer than about twice as many data: of the batches kept so far every other one is dropped when
    the rest would do.
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
    """By the first tensor with an axis: only a budget hangs on it."""
    positional, named = arguments
    return next((len(arg) for arg in (*positional, *named.values()) if isinstance(arg, Tensor) and arg.ndim), 1)


class Stages:
    """One progress bar over the batches of several passes, which says which pass it is."""

    def __init__(self, total: int, progress: bool) -> None:
        self._bar = tqdm(total=total, unit="batch", disable=not progress)

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def __call__(self, name: str, batches: Iterable[Any]) -> Iterator[Any]:
        self._bar.set_description(name)
        for batch in batches:
            yield batch
            self._bar.update()
