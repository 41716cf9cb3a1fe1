"""One loop over numbered batches: it serves all that takes a loader."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from ..batches import NO_BATCH, ToArguments, check_loader, num_rows, run_on_batch
from ..errors import EmptyBatchError
from ..noise import batch_noise, kept_random_state

T = TypeVar("T")
OnError = Literal["raise", "skip"]


class Batch(NamedTuple):
    """A batch of the loader: its number and the place of its first datum, both from 0, and how many data it has."""

    number: int
    first: int
    size: int
    data: Any

    def __str__(self) -> str:
        return f"batch {self.number} (data {self.first} to {self.first + self.size - 1}, counted from 0)"


@dataclass(frozen=True)
class Found(Generic[T]):
    """What came of a batch: a result, or in its place the words of the error for which it was skipped."""

    number: int
    first: int
    size: int
    result: T | None
    error: str = ""


def over_loader(
    run: Callable[..., T], loader: Iterable[Any], args: ToArguments, *, seed: int | None, progress: bool, title: str
) -> list[T]:
    """`over_batches` of a checked loader, behind a progress bar with this title."""
    check_loader(loader)
    return over_batches(run, tqdm(loader, desc=title, unit="batch", disable=not progress), args, seed=seed)


def over_batches(run: Callable[..., T], loader: Iterable[Any], args: ToArguments, *, seed: int | None) -> list[T]:
    """Call `run` on the arguments of every batch and return the results in order. Every batch has noise of its own.

    With a seed the caller's random state is restored, even where the loader draws from it.

    :raises EmptyBatchError: if the loader yields nothing.
    :raises ArgumentError: if `args` returns no tuple and no dict.
    """
    with closing(outcomes(run, loader, args, seed=seed)) as found:
        results = [one.result for one in found]
    if not results:
        raise EmptyBatchError(NO_BATCH)
    return results  # type: ignore[return-value]


def outcomes(
    run: Callable[..., T], loader: Iterable[Any], args: ToArguments, *, seed: int | None
) -> Generator[Found[T], None, None]:
    """What comes of every batch, in their order."""
    kept = nullcontext if seed is None else kept_random_state

    def compute(batch: Batch) -> Found[T]:
        with batch_noise(batch.number), kept():
            if seed is not None:
                torch.manual_seed(seed)
            result = run_on_batch(run, batch.data, args)
        return Found(batch.number, batch.first, batch.size, result)

    with kept():
        yield from map(compute, numbered(loader))  # where processes share the batches out


def numbered(loader: Iterable[Any]) -> Iterator[Batch]:
    first = 0
    for number, data in enumerate(loader):
        batch = Batch(number, first, num_rows(data), data)
        yield batch
        first += batch.size
