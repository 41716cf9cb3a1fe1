"""Any estimator over a whole data set."""

from collections.abc import Callable, Iterable
from typing import Any

from .batches import ToArguments, first_element, over_loader
from .evaluation.processes import rank_and_size
from .records import warn_about, without_warnings


def evaluate(
    estimator: Callable[..., Any],
    loader: Iterable[Any],
    *,
    args: ToArguments = first_element,
    progress: bool = True,
    seed: int | None = None,
) -> Any:
    """Run an estimator over a loader and join the results in the order of the data.

    :param estimator: called with the model's arguments; returns a record with a class method `cat`
        (`Evidence`, `Gaps`). Every batch gets noise of its own, also where the estimator was built with a seed.
    :param loader: an iterable of batches, such as a `DataLoader` with `shuffle=False`; the last one may be smaller.
    :param args: maps a batch to the tuple of the model's arguments, or to a dict of keywords; by default its first
        element, as in `TensorDataset(x)` or `TensorDataset(x, label)`. A batch that is a dict is one of keywords.
    :param progress: show a progress bar, data per batch as its unit.
    :param seed: fixes all noise and leaves the caller's random state alone; for an estimator without a seed of its own.

    :returns: one record for all data, fields (N,).
    :raises EmptyBatchError: if the loader yields nothing.
    :raises ArgumentError: if the loader is a tensor or a data set of single data, or if `args` returns no tuple.

    Example::

        result = pv.evaluate(pv.InferenceGaps(vae.model, vae.guide), DataLoader(TensorDataset(x), 100), seed=0)
        print(result)
    """

    def quietly(*arguments: Any, **named: Any) -> Any:
        with without_warnings():  # the joined record speaks for all batches
            return estimator(*arguments, **named)

    results = list(over_loader(quietly, loader, args, of=estimator, seed=seed, progress=progress))
    joined = type(results[0]).cat(results)
    if rank_and_size()[0] == 0:
        warn_about(joined, stacklevel=2)
    return joined
