"""The batches of a loader, distributed over the processes of a group.

Every process iterates over the whole loader, in rounds of as many batches as there are processes. Rank r computes batch r of
a round; then all exchange digests and results. Every process therefore has all results, in the order of the data. After each
round all know whether one has failed, has other data, or has ended.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import ProcessesError
from .processes import ALONE, Failure, exchanged, failure_of, packed, raise_first, rank_and_size, single_process, unpacked

T = TypeVar("T")
SAME_LOADER = (
    "Pass the same loader on every rank, without a DistributedSampler, a separate generator or random augmentation: "
    "its batches are distributed here"
)


@dataclass(frozen=True)
class Said:
    """The message of one process at the end of a round.

    :ivar seen: digests of the batches of the round, fewer than processes if the loader has ended or failed.
    :ivar complete: whether the loader has ended.
    :ivar found: the result of the batch of this process, packed.
    :ivar failed: the index of the batch at which it failed.
    :ivar skipped: why batches were skipped, by index.
    """

    seen: tuple[str, ...]
    complete: bool
    found: bytes | None = None
    failed: int = -1
    failure: Failure | None = None
    skipped: Mapping[int, str] = field(default_factory=dict)


def shared_out(batches: Iterable[Any], compute: Callable[[Any], T], digest: Callable[[Any], str]) -> Iterator[T]:
    """`compute(batch)` for all batches in order, in every process, each computed by one of them.

    All processes must stop taking results at the same one. An exception is raised in all of them, after the results before
    it, as in a single process.

    :param digest: digest of a batch, with which processes with other data are found.
    :raises ProcessesError: if processes have other batches, or one of them has ended.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield from map(compute, batches)
        return
    iterator = iter(batches)
    for first in itertools.count(step=size):
        mine, seen, complete, found, failed, failure = None, [], True, None, -1, None
        try:
            for place, batch in enumerate(itertools.islice(iterator, size)):
                mine = batch if place == rank else mine
                seen.append(digest(batch))
        except Exception as error:
            complete, failed = False, first + len(seen)
            failure = failure_of(error)
        if rank < len(seen):
            try:
                with single_process():  # loops inside belong to this process only
                    found = packed(compute(mine))
            except Exception as error:
                failed = first + rank
                failure = failure_of(error)
        own = Said(tuple(seen), complete, found, failed, failure)
        said = exchanged(f"batches {first} to {first + size - 1}", own)
        check_same_batches(said, first)
        for number, one in enumerate(said, first):
            raise_first([other.failure for other in said if other.failed == number])
            if one.found is None:
                return
            yield unpacked(one.found)


def computed_everywhere(
    batches: Iterable[Any], compute: Callable[[Any], T], digest: Callable[[Any], str], why_not: Callable[[T], str]
) -> Iterator[T]:
    """As `shared_out`, but every process computes all batches. Processes with other batches are found at the end.

    :param why_not: why a batch was skipped, or empty.
    """
    rank, size = rank_and_size()
    seen: list[str] = []
    skipped: dict[int, str] = {}
    failure = None
    try:
        for number, batch in enumerate(batches):
            if size > 1:
                seen.append(digest(batch))
            with single_process():
                result = compute(batch)
            if reason := why_not(result):
                skipped[number] = reason
            yield result
    except Exception as error:
        if size == 1:
            raise
        failure = failure_of(error)
    own = Said(tuple(seen), failure is None, failure=failure, skipped=skipped)
    said = exchanged("the end of the batches", own)
    check_same_batches(said, 0)
    raise_first([one.failure for one in said])
    for other, one in enumerate(said):
        if one.skipped.keys() != said[0].skipped.keys():
            raise ProcessesError(
                f"rank 0 left out the batches {said[0].skipped or 'none'}, rank {other} {one.skipped or 'none'}, but "
                "all ranks must continue with the same data: fix the reported errors, or remove those batches from "
                "the loader"
            )


def check_same_batches(said: Sequence[Said], first: int) -> None:
    """Raise for processes whose loaders have other batches, or another length."""
    for rank, one in enumerate(said):
        pairs = zip(said[0].seen, one.seen, strict=False)
        bad = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if bad is not None:
            raise ProcessesError(
                f"batch {first + bad} of rank {rank} is another one than that of rank 0, but every rank must go through the "
                f"same batches. {SAME_LOADER}. {ALONE}"
            )
    ends = {rank: len(one.seen) for rank, one in enumerate(said) if one.complete}
    if len(set(ends.values())) > 1:
        short, long = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
        raise ProcessesError(
            f"the loader of rank {short} has {first + ends[short]} batches, that of rank {long} more, but every rank must "
            f"go through the same batches. {SAME_LOADER}. {ALONE}"
        )
