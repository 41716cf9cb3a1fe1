"""Any estimator over a whole data set."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tqdm import tqdm

from .errors import ConvergenceWarning, EmptyBatchError, UnreliableEvidenceWarning
from .estimates import warn_about
from .kernel import batch_noise, kept_random_state


def first_element(batch: Any) -> tuple[Any, ...]:
    """The arguments of the model from a batch: its first element, or the batch itself where it is a tensor."""
    return (batch,) if isinstance(batch, torch.Tensor) else (batch[0],)


def evaluate(
    estimator: Callable[..., Any],
    loader: Iterable[Any],
    *,
    args: Callable[[Any], tuple[Any, ...]] = first_element,
    progress: bool = True,
    seed: int | None = None,
) -> Any:
    """Run an estimator over a loader and join the results in the order of the data.

    :param estimator: called with the model's arguments; returns a record with a class method `cat`
        (`Evidence`, `Gaps`). Every batch gets noise of its own, also where the estimator was built with a seed.
    :param loader: an iterable of batches, such as a `DataLoader` with `shuffle=False`; the last one may be smaller.
    :param args: maps a batch to the tuple of the model's arguments; by default its first element, as in
        `TensorDataset(x)` or `TensorDataset(x, label)`.
    :param progress: show a progress bar, data per batch as its unit.
    :param seed: fixes all noise and leaves the caller's random state alone; for an estimator without a seed of its own.

    :returns: one record for all data, fields (N,).
    :raises EmptyBatchError: if the loader yields nothing.

    Example::

        result = pv.evaluate(pv.InferenceGaps(vae.model, vae.guide), DataLoader(TensorDataset(x), 100), seed=0)
        print(result)
    """
    kept = nullcontext if seed is None else kept_random_state
    results = []
    with kept():  # a DataLoader draws too when it is iterated
        for number, batch in enumerate(tqdm(loader, desc=type(estimator).__name__, unit="batch", disable=not progress)):
            with batch_noise(number), quiet(), kept():
                if seed is not None:
                    torch.manual_seed(seed)
                results.append(estimator(*args(batch)))
    if not results:
        raise EmptyBatchError("the loader yielded no batch: pass one with at least one datum")
    joined = type(results[0]).cat(results)
    warn_about(joined, stacklevel=2)
    return joined


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the warnings about single batches; the joined record speaks for all."""
    with warnings.catch_warnings():
        for category in (UnreliableEvidenceWarning, ConvergenceWarning):
            warnings.simplefilter("ignore", category)
        yield
