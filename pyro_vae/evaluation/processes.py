"""Several processes under an initialised `torch.distributed` group: what they tell one another, and must agree in."""

import io
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import ProcessesError
from ..noise import checked_seed

T = TypeVar("T")
ALONE = "For a job of its own on each rank, or on one rank alone, make the call inside `with pyro_vae.single_process():`"
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
            which = ", ".join(difference_in_words(name, said[0].get(name), one.get(name), rank) for name in names[:3])
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            raise ProcessesError(
                f"all ranks of a process group must make the same call with the same parameters, but {which}{more}. {SAME}. "
                f"{ALONE}"
            )


def difference_in_words(name: str, mine: Any, other: Any, rank: int) -> str:
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
