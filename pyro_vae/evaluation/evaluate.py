"""Run any estimator over a whole data set."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..batches import ToArguments, first_element
from ..errors import ArgumentError, OptionError
from ..options import check_function, real_number, seed_or_none
from ..records import warn_about, with_loader_index, without_warnings
from .found import Found
from .loop import OnError, over, warn_skipped
from .parts import Parts
from .processes import rank_and_size
from .progress import RunningMean


def evaluate(
    estimator: Callable[..., Any],
    loader: Iterable[Any],
    *,
    args: ToArguments = first_element,
    progress: bool = True,
    seed: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    on_error: OnError = "raise",
    tolerance: float | None = None,
) -> Any:
    r"""Run an estimator over a loader and join the results in the order of the data.

    The noise of a batch depends only on the seed and the number of the batch. A run that was interrupted and continued from
    a checkpoint therefore gives exactly the same numbers as an uninterrupted one. In an initialised `torch.distributed`
    group, the batches are distributed over the processes, and each gets the whole record, with the same numbers as a single
    process.

    With `tolerance` it stops after the first batch at which the error of the mean of the main number (log p(x) of
    `Evidence`, the inference gap of `Gaps`) is small enough::

        standard deviation of the N estimates so far / sqrt(N) <= tolerance

    This is the full error of a mean over the population, since the spread includes the Monte Carlo noise. It is right only
    for data in random order (`shuffle=True`); with a sorted data set, the run would stop within the first class. It is
    tested with at least five batches and a hundred data, and only while at most 5% of the data are in doubt. The length of
    the record is the number of data used.

    :param estimator: function of the model's arguments that returns a record with a class method `cat` (`Evidence`, `Gaps`).
        Each batch has different noise, also if the estimator was built with a seed.
    :param loader: an iterable of batches, such as a `DataLoader` with `shuffle=False`; the last one may be smaller.
    :param args: function from a batch to the tuple of the model's arguments, or to a dict of keywords. By default it takes
        the batch's first element, as for `TensorDataset(x)` or `TensorDataset(x, label)`. A batch that is a dict is taken as
        keywords.
    :param progress: show a progress bar with batches, the mean so far with the error above, and the share of data in doubt.
    :param seed: fixes all noise, including that of a loader that shuffles, for an estimator without a seed. The caller's
        random state is unchanged. With a checkpoint, `None` draws a seed, which the checkpoint stores.
    :param checkpoint: a folder for finished results. It is written about every second, and when the run ends, also by Ctrl-C
        or an error. The same call with the same folder continues from there; if it is complete, it returns the record
        without running the model. The folder contains results, and digests of options, parameters, versions and data.
    :param on_error: what to do if a batch raises: "raise", or "skip" to leave the batch out with a `SkippedBatchWarning`.
        `loader_index` of the record has the positions of its rows in the loader.
    :param tolerance: stop early at this error of the mean, in the units of the main number.

    :returns: one record for all data, fields (N,).
    :raises EmptyBatchError: if the loader has no batch, or all batches were skipped.
    :raises ArgumentError: if the loader is a tensor or a data set of single data, if `args` does not return a tuple or a
        dict, or if the estimator does not return a record.
    :raises CheckpointError: if the checkpoint was made by another call (estimator, options, parameters, seed, versions),
        from other data or in another order; if one of its files is damaged, in use by another process, or cannot be written.
        The message says what differs, and names the file.
    :raises ProcessesError: if the processes of a group differ in loader, options or parameters, or one of them has ended.
    :raises OptionError: for a tolerance that is not positive, or a record without a number per datum for it.

    An error raised in a batch keeps its class; its message has the number of the batch and its data.

    Example::

        result = pv.evaluate(pv.InferenceGaps(vae.model, vae.guide), DataLoader(TensorDataset(x), 100), seed=0)
        print(result)
    """
    check_function("estimator", estimator, "an estimator, such as pv.ImportanceSampling(model, guide)")
    seed = seed_or_none(seed)
    if tolerance is not None:
        tolerance = real_number("tolerance", tolerance, ends="()")

    def quietly(*arguments: Any, **named: Any) -> Any:
        with without_warnings():  # the warnings of the joined record cover all batches
            record = estimator(*arguments, **named)
        if not callable(getattr(type(record), "cat", None)):
            raise ArgumentError(
                "expected an estimator that returns a record with a class method cat, which joins those of several batches; "
                f"got a {type(record).__name__}: pass an estimator such as pv.ImportanceSampling(model, guide)"
            )
        return record

    mean = RunningMean()
    parts, rows = Parts(), Rows()
    skipped: list[Found] = []
    shown: Any = {"progress": progress, "title": type(estimator).__name__, "mean": mean}
    kept: Any = {"checkpoint": checkpoint, "on_error": on_error, "of": estimator, "seed": seed}
    with over(quietly, loader, args, **kept, **shown) as found:
        for one in found:
            rows.add(one)
            if one.error:
                skipped.append(one)
            else:
                parts.add(one.result)
                mean.add(one.result)
                if tolerance is not None:
                    check_has_mean(mean, one.result)
            if tolerance is not None and mean.is_within(tolerance):
                break
    joined = with_loader_index(parts.joined(), rows.index(skipped))
    if rank_and_size()[0] == 0:
        warn_about(joined, stacklevel=2)
    warn_skipped(skipped, stacklevel=2)
    return joined


def check_has_mean(mean: RunningMean, record: Any) -> None:
    if not mean.name:
        raise OptionError(
            f"tolerance is an error of the mean over data, but a {type(record).__name__} has no number per datum of "
            "which to take the mean: omit tolerance"
        )


class Rows:
    """Tracks whether the rows of a record are data, or batches, of the loader so far."""

    def __init__(self) -> None:
        self.are_data = self.are_batches = True
        self._num_data = self._num_batches = 0

    def add(self, one: Found) -> None:
        self._num_data, self._num_batches = one.first + one.size, one.number + 1
        if not one.error:
            number = len(one.result) if hasattr(one.result, "__len__") else 0  # type: ignore[arg-type]
            self.are_data &= number == one.size
            self.are_batches &= number == 1

    def index(self, skipped: Sequence[Found]) -> Tensor | None:
        """(N,) the position in the loader, from 0, of each datum with a row; `None` where rows are not data.

        Where all batches have one row each, as with `datum_plate=None`, a batch is a datum.
        """
        if self.are_data:
            return all_but(self._num_data, [slice(one.first, one.first + one.size) for one in skipped])
        if self.are_batches:
            return all_but(self._num_batches, [slice(one.number, one.number + 1) for one in skipped])
        return None


def all_but(number: int, skipped: Sequence[slice]) -> Tensor:
    index, kept = torch.arange(number), torch.ones(number, dtype=torch.bool)
    for some in skipped:
        kept[some] = False
    return index[kept] if skipped else index
