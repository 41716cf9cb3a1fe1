"""The loop over numbered batches, used by everything that takes a loader."""

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from os import PathLike
from typing import Any, Literal, TypeVar

from ..batches import NO_BATCH, ToArguments, arguments_of, check_loader, num_rows, run_on_arguments
from ..errors import CheckpointError, EmptyBatchError, SkippedBatchWarning
from ..noise import batch_noise, kept_random_state, seed_torch
from ..options import flag, one_of
from .checkpoint import Checkpoint, checkpoint_at, storable
from .digests import about_ranks, digest_of
from .found import Batch, Found, add_words, in_words
from .processes import check_agreed, rank_and_size, shared_seed
from .progress import Bar, RunningMean
from .sharing import computed_everywhere, shared_out

T = TypeVar("T")
OnError = Literal["raise", "skip"]
Folder = str | PathLike[str]


def over_loader(
    run: Callable[..., T],
    loader: Iterable[Any],
    args: ToArguments,
    *,
    of: Any,
    seed: int | None,
    progress: bool,
    title: str = "",
    each: Callable[[T], None] | None = None,
    checkpoint: Folder | None = None,
    on_error: OnError | None = None,
    everywhere: bool = False,
) -> list[T]:
    """`over_batches` of a checked loader, with a progress bar, and with a checkpoint if requested.

    :param of: the estimator that `run` calls: its name is on the bar, and a checkpoint identifies its options and
        parameters.
    :param each: function that is called with the results one by one, in order, in place of a list.
    :param on_error: "skip" leaves out batches that raise, with a warning; `None` where the caller has no such option.
    :param everywhere: as in `over_batches`.
    """
    results: list[T] = []
    skipped: list[Found] = []
    shown: Any = {"title": title or type(of).__name__, "progress": progress}
    how: Any = {"of": of, "seed": seed, "checkpoint": checkpoint, "on_error": on_error, "everywhere": everywhere}
    with over(run, loader, args, **how, **shown) as found:
        for one in found:
            if one.error:
                skipped.append(one)
            else:
                (each or results.append)(one.result)  # type: ignore[arg-type]
    # stack level beyond the estimator and torch.no_grad, so that the warning points at the caller
    warn_skipped(skipped, stacklevel=4)
    return results


@contextmanager
def over(
    run: Callable[..., T],
    loader: Iterable[Any],
    args: ToArguments,
    *,
    of: Any,
    seed: int | None,
    progress: bool,
    title: str,
    checkpoint: Folder | None,
    on_error: OnError | None,
    mean: RunningMean | None = None,
    everywhere: bool = False,
) -> Iterator[Iterator[Found[T]]]:
    """`outcomes` of a checked loader, with a progress bar that shows `mean`. At the end, all results are in the checkpoint.

    In a process group the bar is on rank 0.
    """
    check_loader(loader)
    flag("progress", progress)
    if on_error is not None:
        one_of("on_error", on_error, OnError)
    rank, size = rank_and_size()
    if size > 1:
        check_agreed({"seed of the call": seed, "checkpoint": str(checkpoint), "on_error": on_error, **about_ranks(of)})
    with (
        checkpoint_at(checkpoint, of, seed) as kept,
        Bar(title, loader, progress and rank == 0, kept.num_batches if kept else 0) as bar,
        closing(outcomes(run, loader, args, seed=seed, checkpoint=kept, on_error=on_error, everywhere=everywhere)) as found,
    ):
        yield bar.behind(found, mean)


def warn_skipped(skipped: Sequence[Found], stacklevel: int) -> None:
    """Name the batches that were left out, on rank 0 of a process group."""
    if skipped and rank_and_size()[0] == 0:
        said = "; ".join(f"{in_words(one)}: {one.error}" for one in skipped[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        num_data = sum(one.size for one in skipped)
        batches = "1 batch was" if len(skipped) == 1 else f"{len(skipped)} batches were"
        message = f"{batches} skipped, with {num_data} data that are not in the result: {said}{more}"
        warnings.warn(SkippedBatchWarning(message), stacklevel=stacklevel + 1)


def over_batches(
    run: Callable[..., T], loader: Iterable[Any], args: ToArguments, *, of: Any, seed: int | None, everywhere: bool = False
) -> list[T]:
    """Call `run` on the arguments of every batch and return the results in order. Each batch has different noise.

    With a seed the caller's random state is restored, also if the loader draws from it. In a process group the batches are
    distributed over the processes, and each gets all results; side effects of `run` happen in one process only.

    :param of: the objects on which `run` depends, which must be the same in all processes: an estimator, or programs.
    :param everywhere: let every process compute all batches.
    :raises EmptyBatchError: if the loader has no batch.
    :raises ArgumentError: if `args` does not return a tuple or a dict.
    """
    if rank_and_size()[1] > 1:
        check_agreed({"seed of the call": seed, **about_ranks(of)})
    with closing(outcomes(run, loader, args, seed=seed, everywhere=everywhere)) as found:
        return [one.result for one in found]  # type: ignore[misc]


def outcomes(
    run: Callable[..., T],
    loader: Iterable[Any],
    args: ToArguments,
    *,
    seed: int | None,
    on_error: OnError | None = None,
    checkpoint: Checkpoint | None = None,
    everywhere: bool = False,
) -> Generator[Found[T], None, None]:
    """The outcome of every batch, in order: read from the checkpoint if stored there, otherwise computed and stored.

    An error keeps its class, and its message has the number of the batch and its data. For a skipped batch, the message
    replaces the result.

    :raises EmptyBatchError: if the loader yields nothing.
    """
    seed = seed if checkpoint is None else checkpoint.seed
    if seed is None and rank_and_size()[1] > 1:
        seed = shared_seed(None)
    kept = nullcontext if seed is None else kept_random_state
    errors: list[Exception] = []

    def compute(batch: Batch) -> Found[T]:
        about: dict[str, Any] = {"number": batch.number, "first": batch.first, "size": batch.size}
        with batch_noise(batch.number), kept():
            if seed is not None:
                seed_torch(seed)
            try:
                positional, named = arguments_of(batch.data, args)
                if checkpoint is not None:
                    about["digest"] = digest_of((positional, named))
                    if (known := checkpoint.take(batch, about["digest"], on_error)) is not None:
                        return known
                result = run_on_arguments(run, positional, named, batch.data, args)
                return kept_in(checkpoint, Found(**about, result=result if checkpoint is None else storable(result)))
            except CheckpointError:
                raise
            except Exception as error:
                if on_error != "skip":
                    remedy = 'To leave such batches out, pass on_error="skip"' if on_error else ""
                    add_words(error, before=f"{in_words(batch)}: ", after=remedy)
                    raise
                errors.append(error)
                return kept_in(checkpoint, Found(**about, result=None, error=f"{type(error).__name__}: {error}"))

    num_batches = num_skipped = 0
    with kept():
        if seed is not None:
            seed_torch(seed)  # a loader that shuffles draws from this state
        share = partial(computed_everywhere, why_not=lambda one: one.error) if everywhere else shared_out
        for one in share(numbered(loader), compute, lambda batch: digest_of(batch.data)):
            if checkpoint is not None:
                checkpoint.set_known(one)
            num_batches, num_skipped = num_batches + 1, num_skipped + bool(one.error)
            yield one
    if checkpoint is not None:
        checkpoint.check_all_taken(num_batches)
    if not num_batches:
        raise EmptyBatchError(NO_BATCH)
    if num_skipped == num_batches:
        raise EmptyBatchError(
            f"all {num_skipped} batches were skipped, so there is no result. {in_words(one)}: {one.error}"
        ) from (errors[-1] if errors else None)


def kept_in(checkpoint: Checkpoint | None, found: Found[T]) -> Found[T]:
    if checkpoint is not None:
        checkpoint.add(found)
    return found


def numbered(loader: Iterable[Any]) -> Iterator[Batch]:
    """The batches of a loader; its errors have the position at which it stopped."""
    iterator, number, first = iter(loader), 0, 0
    while True:
        try:
            data = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            add_words(error, before=f"the loader failed at batch {number} (from datum {first} on, counted from 0): ")
            raise
        batch = Batch(number, first, num_rows(data), data)
        yield batch
        number, first = number + 1, first + batch.size
