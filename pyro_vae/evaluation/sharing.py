"""The batches of a loader, shared out among the ranks of a process group.

Every rank goes through the whole loader, in rounds of as many batches as there are ranks. Rank r computes batch r of a
round; then all tell one another what they saw and found. So every rank has all results, in the order of the data, and after
each round all know whether one has failed, has other data, or is gone.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import ProcessesError
from .processes import ALONE, Failure, exchanged, failure_of, packed, raise_first, rank_and_size, single_process, unpacked

T = TypeVar("T")
SAME_LOADER = (
    "Pass the same loader on every rank, without a DistributedSampler, a generator of its own or random augmentation: its "
    "batches are shared out here"
)


@dataclass(frozen=True)
class Said:
    """What one rank says at the end of a round.

    :ivar seen: digests of the batches of the round, fewer than ranks where the loader has ended or failed.
    :ivar complete: whether there are no more of them than that.
    :ivar found: the result of its own batch, packed.
    :ivar failed: the number of the batch where it failed.
    :ivar skipped: why batches were left out, by their numbers.
    """

    seen: tuple[str, ...]
    complete: bool
    found: bytes | None = None
    failed: int = -1
    failure: Failure | None = None
    skipped: Mapping[int, str] = field(default_factory=dict)


def shared_out(batches: Iterable[Any], compute: Callable[[Any], T], digest: Callable[[Any], str]) -> Iterator[T]:
    """`compute(batch)` for all batches in their order, on every rank, each computed by one of them.

    All ranks must stop taking results at the same one. An exception comes up on all of them, and where one process alone
    would have raised it: after the results before.

    :param digest: tells a batch from others, so that ranks with other data are found.
    :raises ProcessesError: where ranks see other batches, or one of them is gone.
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
                with single_process():  # loops inside are this rank's own
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
    """As `shared_out`, but every rank computes all batches. Ranks with other batches are found at the end.

    :param why_not: why a batch was left out, or nothing.
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
                f"rank 0 left out the batches {said[0].skipped or 'none'}, rank {other} {one.skipped or 'none'}, but all "
                "ranks must go on with the same data: mend what they say, or leave those batches out of the loader"
            )


def check_same_batches(said: Sequence[Said], first: int) -> None:
    """Refuse ranks whose loaders have other batches, or end elsewhere."""
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
