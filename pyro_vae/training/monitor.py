"""A monitor of the terms of an objective during training, without synchronising the device at every step."""

from __future__ import annotations

import time
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import DatumPlateError, OptionError, ScheduleWarning, described
from ..options import flag, whole_number
from .schedules import unfinished
from .training_history import TrainingHistory

__all__ = ["Monitor"]

FLUSH_STEPS = 1000  # number of steps kept on the device, then copied to the host in one transfer
REFRESH_SECONDS = 0.5  # seconds between two refreshes of the progress line, each of which is a transfer too
# The numbers fit into 80 columns with the count and the time; the bar has the remaining width.
BAR = "{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
COUNT = "{n_fmt} steps [{elapsed}]{postfix}"
LINE_STEPS = 100  # the progress line shows means over so many steps
PATIENCE = 100  # iterations of a loop without a call of the objective, after which this raises

Batch = TypeVar("Batch")
Key = tuple[str, ...]  # ("elbo",), ("kl", site), ("beta",) or ("beta", site)


class Monitor:
    """Record the terms of an objective in every training step: distortion, rate, ELBO, loss and beta.

    Wrap the loader in `watch` and train as before::

        objective = pv.BetaTrace_ELBO(beta=pv.LinearAnnealing(1000))
        svi = SVI(model, guide, Adam({"lr": 1e-3}), objective)
        monitor = pv.Monitor(objective, num_updates=10 * len(loader))
        for epoch in range(10):
            for (x,) in monitor.watch(loader):
                svi.step(x)
        print(monitor.history())
        pv.plots.plot_training(monitor.history())

    A step keeps one small tensor on the device. They are copied to the host 1000 at a time, or when the history is read.
    Values are in nats per datum. Where no plate defines a datum, totals over the batch are recorded and labelled as such;
    the first step decides.

    The last call of the objective in a step is recorded. If a step makes several calls (gradient accumulation), call
    `record()` after each of them to record each. An evaluation on test data must not be the last call of a step. A call is
    never recorded twice, and calls from before the monitor was built are not recorded.

    A monitor can be pickled for a checkpoint, with its numbers but without the objective. Set `objective` after loading, and
    recording continues.

    :param objective: an objective of `pyro_vae`, or any object with their attribute `terms`; not the module that
        `objective(model, guide)` returns.
    :param num_updates: planned number of updates in all epochs. With it, the monitor warns at once if one of
        `objective.schedules` will not be finished by then (see `warn_if_unfinished`), and shows one progress bar for all
        loops.
    :param progress: show a progress bar in `watch`.
    :raises OptionError: if the objective has no `terms`, or if `num_updates` is out of range.

    Example::

        monitor = pv.Monitor(objective)
        for (x,) in monitor.watch(train_loader):
            svi.step(x)
        print(monitor.history())
    """

    def __init__(self, objective: Any, *, num_updates: int | None = None, progress: bool = True) -> None:
        self.objective = objective
        self.num_updates = None if num_updates is None else whole_number("num_updates", num_updates)
        self.progress = flag("progress", progress)
        self._per_datum: bool | None = None  # set by the first step
        self._pending: list[_Row] = []
        self._columns: dict[Key, array[float]] = {}
        self._num_flushed = 0
        self._num_bodies = 0
        self._line = ""
        self._due = 0.0  # time of the next refresh of the line
        self._start: tuple[int, float] | None = None  # of the progress bar: iterations and time
        if num_updates is not None:
            _warn_about_schedules(getattr(objective, "schedules", {}), num_updates)

    @property
    def objective(self) -> Any:
        """The objective that is recorded; `None` after the monitor was unpickled, until it is set again."""
        return self._objective

    @objective.setter
    def objective(self, objective: Any) -> None:
        if not hasattr(objective, "terms"):
            hint = ": pass the objective, not the module that it returns" if hasattr(objective, "elbo") else ""
            raise OptionError(
                f"a Monitor records the `terms` of an objective of pyro_vae, such as pv.BetaTrace_ELBO(), but "
                f"{type(objective).__name__} has none{hint}"
            )
        self._objective = objective
        self._seen = objective.terms

    def record(self) -> None:
        """Record the last call of the objective, unless it was recorded before.

        `watch` does this automatically. In a loop without `watch`, call it after each step.

        :raises OptionError: if the objective was never called, or if an unpickled monitor has none.
        """
        self._check_objective()
        terms = self.objective.terms
        if terms is None:
            raise OptionError(self._not_called("yet"))
        if terms is self._seen:
            return
        self._seen = terms
        self._pending.append(_packed(self._numbers(terms)))
        if len(self._pending) >= FLUSH_STEPS:
            self._flush()

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and record after every iteration of the loop, also after one that ends in `break` or an error.

        An iteration that does not call the objective, for instance because of a `continue`, is skipped. The progress line
        shows distortion, rate, ELBO (means over the last 100 steps, as in `history`) and the current beta. With
        `num_updates` there is one line for the whole training, which counts the iterations of all loops; without it, there
        is one line per loop.

        :param batches: a `DataLoader` or any other iterable.
        :returns: an iterator over the same batches.
        :raises OptionError: if none of the first 100 iterations called the objective, or none at all in a shorter loop: then
            it is not the objective that is trained.
        """
        self._check_objective()
        check_batches(batches)
        bodies, first = 0, self._num_steps
        with self._new_bar(batches) as bar:
            for batch in batches:
                self._seen = self.objective.terms
                try:
                    yield batch
                finally:  # also after an iteration that breaks
                    self._record_if_called()
                bodies += 1
                if bodies == PATIENCE and self._num_steps == first:
                    raise OptionError(self._not_called(f"by any of {bodies} bodies of the loop"))
                self._num_bodies += 1
                bar.update()
                if time.monotonic() >= self._due:
                    self._show(bar)
            bar.leave = self.num_updates is None or self._num_bodies >= self.num_updates
            if bar.leave:
                self._show(bar)
        if bodies and self._num_steps == first:
            raise OptionError(self._not_called(f"by any of {bodies} bodies of the loop"))

    def history(self) -> TrainingHistory:
        """Everything recorded so far."""
        self._flush()
        columns = {key: torch.tensor(values, dtype=torch.float64, device="cpu") for key, values in self._columns.items()}
        none = torch.zeros(0, dtype=torch.float64, device="cpu")
        return TrainingHistory(
            step=torch.arange(self._num_steps, device="cpu"),
            loss=columns.get(("loss",), none),
            elbo=columns.get(("elbo",), none),
            distortion=-columns.get(("reconstruction",), none),
            rate=columns.get(("kl_sum",), none),
            kl={key[1]: values for key, values in columns.items() if key[0] == "kl"},
            beta=_betas(columns),
            per_datum=self._per_datum is not False,
        )

    def __getstate__(self) -> dict[str, Any]:
        self._flush()
        # the clocks of two processes differ
        return {**self.__dict__, "_objective": None, "_seen": None, "_due": 0.0, "_start": None}

    @property
    def _num_steps(self) -> int:
        return self._num_flushed + len(self._pending)

    def _check_objective(self) -> None:
        if self.objective is None:
            raise OptionError("an unpickled Monitor has no objective: set monitor.objective first")

    def _not_called(self, by_whom: str) -> str:
        return (
            f"expected calls of the objective, but this {type(self.objective).__name__} was not called {by_whom}: give the "
            "Monitor the same object that SVI, or the loss, was built with"
        )

    def _record_if_called(self) -> None:
        if self.objective.terms is not None:
            self.record()

    def _numbers(self, terms: Any) -> dict[Key, float | Tensor]:
        if self._per_datum is not False:
            try:
                terms = terms.per_datum()
                self._per_datum = True
            except DatumPlateError:
                if self._per_datum:
                    raise
                self._per_datum = False
        numbers: dict[Key, float | Tensor] = {(n,): getattr(terms, n) for n in ("loss", "elbo", "reconstruction", "kl_sum")}
        numbers |= {("kl", site): value for site, value in terms.kl.items()}
        if isinstance(terms.beta, Mapping):
            return numbers | {("beta", site): value for site, value in terms.beta.items()}
        return numbers | {("beta",): terms.beta}

    def _flush(self) -> None:
        """Copy the pending steps to the host, in one transfer per device."""
        steps = _unpacked(self._pending)
        for key in {key: None for step in steps for key in step}:
            column = self._columns.setdefault(key, array("d", [float("nan")]) * self._num_flushed)
            column.extend(step.get(key, float("nan")) for step in steps)
        self._num_flushed += len(steps)
        for column in self._columns.values():
            column.extend([float("nan")] * (self._num_flushed - len(column)))
        self._pending = []

    def _new_bar(self, batches: Iterable[Any]) -> Any:
        """A bar for one loop. With `num_updates` it continues the bar and the clock of the last loop."""
        total, done = self.num_updates, self._num_bodies
        if self.num_updates is None:
            done = 0
            with suppress(TypeError):  # no length; for a DataLoader of an IterableDataset, len() raises
                total = len(batches)  # type: ignore[arg-type]
        bar = tqdm(
            total=total,
            initial=done,
            postfix=self._line,
            disable=not self.progress,
            mininterval=REFRESH_SECONDS,
            bar_format=BAR if total is not None else COUNT,
            delay=1e-9 if self._start else 0.0,  # nothing is shown before the time is set
        )
        if self.num_updates is not None and self.progress:
            self._start = self._start or (done, bar.start_t)
            bar.initial, bar.start_t = self._start
            bar.refresh()
        return bar

    def _show(self, bar: Any) -> None:
        if self.progress:
            self._flush()
            self._line = _line(self._columns) if self._num_steps else ""
            self._due = time.monotonic() + REFRESH_SECONDS
            bar.set_postfix_str(self._line)


def check_batches(batches: Any) -> None:
    walkable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if not walkable or isinstance(batches, type) or isinstance(batches, Tensor) and not batches.ndim:
        raise OptionError(
            f"watch expects an iterable of batches, got {described(batches)}: pass a DataLoader, or a list of batches"
        )


def _line(columns: Mapping[Key, array[float]]) -> str:
    shown = {"distortion": ("reconstruction", -1), "rate": ("kl_sum", 1), "ELBO": ("elbo", 1)}
    parts = []
    for title, (name, sign) in shown.items():
        recent = columns[(name,)][-LINE_STEPS:]
        parts.append(f"{title} {sign * sum(recent) / len(recent):.4g}")
    betas = sorted({f"{column[-1]:.3g}" for key, column in columns.items() if key[0] == "beta"}, key=float)
    if betas:
        parts.append("beta " + "..".join(dict.fromkeys([betas[0], betas[-1]])))
    return " ".join(parts)


class _Row(NamedTuple):
    """One step: the plain numbers, and one tensor per device for the others."""

    floats: dict[Key, float]
    tensors: dict[torch.device, tuple[tuple[Key, ...], Tensor]]


def _packed(numbers: dict[Key, float | Tensor]) -> _Row:
    by_device: dict[torch.device, dict[Key, Tensor]] = {}
    floats: dict[Key, float] = {}
    for key, value in numbers.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, {})[key] = value
        else:
            floats[key] = value
    with torch.no_grad():  # stack copies, so later changes of a tensor in place do not change the record
        return _Row(floats, {d: (tuple(named), torch.stack([*named.values()])) for d, named in by_device.items()})


def _unpacked(rows: list[_Row]) -> list[dict[Key, float]]:
    """The numbers of every step as Python floats, with one transfer per device."""
    steps = [dict(row.floats) for row in rows]
    for device in {device: None for row in rows for device in row.tensors}:
        places = [(step, *row.tensors[device]) for step, row in zip(steps, rows, strict=True) if device in row.tensors]
        values = iter(torch.cat([tensor for _, _, tensor in places]).tolist())
        for step, keys, _ in places:
            step.update(zip(keys, values, strict=False))
    return steps


def _betas(columns: dict[Key, Tensor]) -> Tensor | dict[str, Tensor]:
    common = columns.get(("beta",))
    by_site = {key[1]: values for key, values in columns.items() if key[0] == "beta" and len(key) == 2}
    if common is None:
        return by_site
    if not by_site:
        return common
    return {site: values.where(~values.isnan(), common) for site, values in by_site.items()}


def _warn_about_schedules(schedules: Mapping[str, Any], num_updates: int) -> None:
    for name, schedule in schedules.items():
        if (message := unfinished(schedule, num_updates, name)) is not None:
            warnings.warn(ScheduleWarning(message), stacklevel=3)
