"""Any estimator over a whole data set."""

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

    Every batch has noise of its own, a function of the seed and of the number of the batch alone. So a run that was
    interrupted and goes on from a checkpoint gives the numbers of one that was not, bit for bit. Under an initialised
    `torch.distributed` group the batches are shared out among its ranks, and each gets the whole record, with the numbers of
    one process.

    With `tolerance` it stops after the first batch at which the mean of the headline number (log p(x) of `Evidence`, the
    inference gap of `Gaps`) is known well enough::

        standard deviation of the N estimates so far / sqrt(N) <= tolerance

    This is the whole error of a mean of the population: the spread holds the Monte Carlo noise too. It is only right for
    data in random order (`shuffle=True`); a sorted data set would be stopped within its first class. Looked at from the
    fifth batch and the hundredth datum on, and only while at most 5% of the data are in doubt. The length of the record says
    how many data of the loader were used.

    :param estimator: called with the model's arguments; returns a record with a class method `cat`
        (`Evidence`, `Gaps`). Every batch gets noise of its own, also where the estimator was built with a seed.
    :param loader: an iterable of batches, such as a `DataLoader` with `shuffle=False`; the last one may be smaller.
    :param args: maps a batch to the tuple of the model's arguments, or to a dict of keywords; by default its first
        element, as in `TensorDataset(x)` or `TensorDataset(x, label)`. A batch that is a dict is one of keywords.
    :param progress: show a progress bar: batches, the mean so far with the error above, the share of data in doubt.
    :param seed: fixes all noise, that of a loader that shuffles included, and leaves the caller's random state alone; for an
        estimator without a seed of its own. With a checkpoint `None` draws one, which the checkpoint keeps.
    :param checkpoint: a folder for what is finished, written about every second and whenever the run ends, by Ctrl-C or an
        error too. The same call with the same folder goes on from there; a finished one gives its record without running
        the model. Kept are results on the CPU, and digests of options, parameters, versions and data.
    :param on_error: what to do about a batch that raises: "raise", or "skip" to leave it out with a `SkippedBatchWarning`.
        `loader_index` of the record says which data the rows are.
    :param tolerance: stop early at this error of the mean, in the units of the headline number.

    :returns: one record for all data, fields (N,).
    :raises EmptyBatchError: if the loader yields nothing, or all batches were skipped.
    :raises ArgumentError: if the loader is a tensor or a data set of single data, if `args` returns no tuple, or if the
        estimator returns no record.
    :raises CheckpointError: if the checkpoint was made by another call (estimator, options, parameters, seed, versions) or
        from other data or another order of them, if a file of it is damaged, in use by another process, or cannot be
        written. The message says what differs and which file it is.
    :raises ProcessesError: if the ranks of a group differ in loader, options or parameters, or one of them is gone.
    :raises OptionError: for a tolerance that is not positive, or a record without a number per datum for it.

    An error that a batch raises keeps its class and says the number of the batch and the data in it.

    Example::

        result = pv.evaluate(pv.InferenceGaps(vae.model, vae.guide), DataLoader(TensorDataset(x), 100), seed=0)
        print(result)
    """
    check_function("estimator", estimator, "an estimator, such as pv.ImportanceSampling(model, guide)")
    seed = seed_or_none(seed)
    if tolerance is not None:
        tolerance = real_number("tolerance", tolerance, ends="()")

    def quietly(*arguments: Any, **named: Any) -> Any:
        with without_warnings():  # the joined record speaks for all batches
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
            f"tolerance is an error of the mean over data, but a {type(record).__name__} has no number per datum to take "
            "the mean of: leave tolerance out"
        )


class Rows:
    """What is known of the rows of a record: whether each is a datum, or a batch, of the loader so far."""

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
        """(N,) the place in the loader, from 0, of each datum with a row; `None` where rows are not the data of the batches.

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
