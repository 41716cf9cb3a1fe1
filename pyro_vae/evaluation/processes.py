"""Several processes under an initialised `torch.distributed` group: the batches of a loader are shared out among them.

Every rank goes through the whole loader, in rounds of as many batches as there are ranks. Rank r computes batch r of a
round; then all tell one another what they saw and found. So every rank has all results, in the order of the data, and after
each round all know whether one has failed, has other data, or is gone.
"""

import io
import itertools
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import ProcessesError
from ..noise import checked_seed

T = TypeVar("T")
ALONE = "For a job of its own on each rank, or on one rank alone, make the call inside `with pyro_vae.single_process():`"
SAME_LOADER = (
    "Pass the same loader on every rank, without a DistributedSampler, a generator of its own or random augmentation: its "
    "batches are shared out here"
)
SAME = "Pass the same options, and load the same state on every rank or send it from one (torch.distributed.broadcast)"

_alone = False


@contextmanager
def single_process() -> Iterator[None]:
    """Inside, this process computes everything itself, whatever process group is initialised.

    For ranks that each have a model or data of their own, and for an evaluation on one rank while the others wait.

    Example::

        with pv.single_process():  # on rank 0, say
            result = pv.evaluate(pv.ImportanceSampling(vae.model, vae.guide), loader)
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank_and_size() -> tuple[int, int]:
    """The number of this process in the default group and how many it has; (0, 1) where nothing is shared out."""
    if _alone or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def exchanged(what: str, value: T) -> list[T]:
    """What each rank passed, by rank.

    :param what: the occasion, in words, the same on all ranks.
    :raises ProcessesError: where another rank is gone, or makes another call or none within the timeout of the group.
    """
    rank, size = rank_and_size()
    if size == 1:
        return [value]
    said: list[Any] = [None] * size
    mine = packed((what, value))
    try:
        dist.all_gather_object(said, mine)  # by way of the GPU where the backend has no other, as nccl
    except RuntimeError as error:
        raise ProcessesError(
            f"rank {rank} of {size} waited for the others at {what} and got no answer: one of them has ended, or has not "
            f"made the same call within the timeout of the process group. Look at what the others printed. {ALONE}. From "
            f"torch.distributed: {error}"
        ) from error
    found = [unpacked(one) for one in said]
    for other, (came, _) in enumerate(found):
        if came != what:
            raise ProcessesError(
                f"rank {rank} is at {what}, rank {other} at {came}: make the same calls on all ranks. {ALONE}"
            )
    return [one for _, one in found]


def of_rank_0(what: str, value: T) -> T:
    """What rank 0 passed, on all ranks."""
    return exchanged(what, value)[0]


def shared_seed(seed: int | None) -> int:
    """The seed, or where there is none a fresh one: that of rank 0 on all ranks."""
    fresh = checked_seed(seed)
    return of_rank_0("the seed", fresh) if seed is None else fresh


def check_agreed(about: Mapping[str, Any]) -> None:
    """Refuse ranks that differ in any of these: the name of something, and a string or number that tells it."""
    said = exchanged("the start of a pass over the data", dict(about))
    for rank, one in enumerate(said):
        names = [name for name in {**said[0], **one} if said[0].get(name) != one.get(name)]
        if names:
            which = ", ".join(in_words(name, said[0].get(name), one.get(name), rank) for name in names[:3])
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            raise ProcessesError(
                f"all ranks of a process group must make the same call with the same parameters, but {which}{more}. {SAME}. "
                f"{ALONE}"
            )


def in_words(name: str, mine: Any, other: Any, rank: int) -> str:
    if isinstance(mine, str) and isinstance(other, str) and len(mine) == len(other) == 64:  # digests
        return f"'{name}' of rank {rank} is another one than that of rank 0"
    return f"'{name}' is {mine} on rank 0 and {other} on rank {rank}"


def gathered(what: str, compute: Callable[[], T]) -> list[T]:
    """What each rank computes, by rank. An exception on one comes up on all."""
    if rank_and_size()[1] == 1:
        return [compute()]
    found, failure = None, None
    try:
        found = packed(compute())
    except Exception as error:
        failure = failure_of(error)
    said = exchanged(what, (found, failure))
    raise_first([failed for _, failed in said])
    return [unpacked(one) for one, _ in said if one is not None]


def rank_0_first(what: str, compute: Callable[[], T]) -> T:
    """`compute()` on rank 0, and then on the others. An exception on one comes up on all."""
    rank, size = rank_and_size()
    if size == 1:
        return compute()
    found: list[T] = []
    for turn in (True, False):
        failure = None
        if (rank == 0) == turn:
            try:
                found.append(compute())
            except Exception as error:
                failure = failure_of(error)
        raise_first(exchanged(what, failure))
    return found[0]


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank; `error` can be sent, and says where it comes from."""

    error: Exception
    traceback: str


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


def raise_first(failures: Sequence[Failure | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise failure.error from ProcessesError(failure.traceback)


def failure_of(error: Exception) -> Failure:
    """The exception in a form that all ranks can raise; of the same class where that can be sent."""
    rank, size = rank_and_size()
    where = f"on rank {rank} of {size}"
    told = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
        copy.args = (f"{copy} ({where})",)
        same = type(copy) is type(error) and where in str(copy)
    except Exception:
        same = False
    if not same:
        notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        copy = ProcessesError(f"{type(error).__name__}: {error}{notes} ({where})")
    return Failure(copy, f"on rank {rank}:\n{told}")


def packed(result: Any) -> bytes:
    file = io.BytesIO()
    try:
        torch.save(result, file)
    except (AttributeError, TypeError, pickle.PicklingError) as error:  # as pickle words it by the kind of object
        raise ProcessesError(
            f"what was found for a batch ({type(result).__name__}) cannot be sent to the other ranks: {error}. Return a "
            f"record of numbers and tensors. {ALONE}"
        ) from error
    return file.getvalue()


def unpacked(result: bytes) -> Any:
    """From a rank of the same job. What lay on its GPU lies on this rank's current one."""
    return torch.load(io.BytesIO(result), map_location=own_device, weights_only=False)


def own_device(storage: Any, location: str) -> Any:
    return storage.cuda() if location.startswith("cuda") else storage
