"""Several processes in an initialised `torch.distributed` group: their communication, and checks that they agree."""

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
ALONE = "For a separate job on each rank, or a job on one rank only, make the call inside `with pyro_vae.single_process():`"
SAME = "Pass the same options, and load the same state on every rank or broadcast it from one (torch.distributed.broadcast)"

_alone = False


@contextmanager
def single_process() -> Iterator[None]:
    """Context in which this process computes everything alone, also if a process group is initialised.

    Use it where each process has a different model or different data, and for an evaluation in one process while the others
    wait.

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
    """The rank of this process in the default group and the size of the group; (0, 1) without sharing."""
    if _alone or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def exchanged(what: str, value: T) -> list[T]:
    """The values passed by all processes, by rank.

    :param what: the occasion, in words, the same in all processes.
    :raises ProcessesError: if another process has ended, makes another call, or makes none within the timeout of the group.
    """
    rank, size = rank_and_size()
    if size == 1:
        return [value]
    said: list[Any] = [None] * size
    mine = packed((what, value))
    try:
        dist.all_gather_object(said, mine)  # through the GPU where the backend requires it, as nccl does
    except RuntimeError as error:
        raise ProcessesError(
            f"rank {rank} of {size} waited for the others at {what} and got no answer: one of them has ended, or has "
            f"not made the same call within the timeout of the process group. Check the output of the others. {ALONE}. "
            f"From torch.distributed: {error}"
        ) from error
    found = [unpacked(one) for one in said]
    for other, (came, _) in enumerate(found):
        if came != what:
            raise ProcessesError(
                f"rank {rank} is at {what}, rank {other} at {came}: make the same calls on all ranks. {ALONE}"
            )
    return [one for _, one in found]


def of_rank_0(what: str, value: T) -> T:
    """The value passed by rank 0, on all ranks."""
    return exchanged(what, value)[0]


def shared_seed(seed: int | None) -> int:
    """The seed, or a fresh one of rank 0 on all ranks if there is none."""
    fresh = checked_seed(seed)
    return of_rank_0("the seed", fresh) if seed is None else fresh


def check_agreed(about: Mapping[str, Any]) -> None:
    """Raise if processes differ in any of these: names, with a string or number that identifies each."""
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
    """The results computed by all processes, by rank. An exception in one is raised in all."""
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
    """`compute()` on rank 0, and then on the others. An exception in one is raised in all."""
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
    """An error of one process; `error` can be sent, and its message has the rank."""

    error: Exception
    traceback: str


def raise_first(failures: Sequence[Failure | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise failure.error from ProcessesError(failure.traceback)


def failure_of(error: Exception) -> Failure:
    """The exception in a form that all processes can raise; of the same class if that can be sent."""
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
    except (AttributeError, TypeError, pickle.PicklingError) as error:  # pickle's errors depend on the type of object
        raise ProcessesError(
            f"the result of a batch ({type(result).__name__}) cannot be sent to the other ranks: {error}. Return a "
            f"record of numbers and tensors. {ALONE}"
        ) from error
    return file.getvalue()


def unpacked(result: bytes) -> Any:
    """An object from another process. Tensors on its GPU are moved to the current GPU of this process."""
    return torch.load(io.BytesIO(result), map_location=own_device, weights_only=False)


def own_device(storage: Any, location: str) -> Any:
    return storage.cuda() if location.startswith("cuda") else storage
