"""The record of a refit: the gaps before and after, and the parts of the amortization gap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..gaps import GAPS, Gaps
from ..plots import plot_gaps_side_by_side
from ..records import Estimate, Result, counted, difference, page
from ..training import HeldOutHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = ("elbo", "log_evidence", "amortization", "approximation", "inference")
Stopped = Literal["held-out", "epochs", "interrupted"]
ENDED = {
    "held-out": "ended because the held-out ELBO no longer rose by more than its error",
    "epochs": "ended after the last epoch",
    "interrupted": "was interrupted",
}


@dataclass(frozen=True, eq=False, repr=False)
class Refit(Result):
    r"""The result of `refit_guide`: the gaps of a guide before and after training with a frozen model; nats per datum.

    With A the mean amortization gap L[q*] - L[q], on training or on test data, before or after::

        A_test before = optimisation + capacity + generalisation before
        A_test after  =                capacity + generalisation after

        optimisation    A_train before - A_train after    closed by further training, on training data
        capacity        A_train after                     lost by this encoder on its training data
        generalisation  A_test - A_train                  lost in addition on new data

    Each part has a Monte Carlo and a sampling error (`parts`). Their limits:

    - *Optimisation* is a lower bound: better training may gain more.
    - *Capacity* is an upper bound for the same reason. It includes what training that has not converged, or an optimiser
      with too large a step, has left. A guide that overfits training data moves nats from capacity to generalisation.
    - *Generalisation* is a difference between two sets of data, so only its sampling error matters. It also includes a
      difference in how hard the data are.

    If another guide was trained (`took_over`), the first part includes the loss of the old guide by its capacity, and each
    gap is relative to the optimum of the family of its guide.

    :ivar test_before: the `Gaps` of test data with the guide before training.
    :ivar test_after: the `Gaps` of the same data with the trained guide.
    :ivar train_before: the `Gaps` of training data before training.
    :ivar train_after: the `Gaps` of the same training data after training.
    :ivar history: the looks at held-out data, or None.
    :ivar stopped: why training ended: "held-out", "epochs" or "interrupted".
    :ivar num_updates: updates of the guide, including those on simulated data.
    :ivar num_epochs: number of passes over the loader, including a last unfinished one.
    :ivar trained: names of the parameters that were trained.
    :ivar shared: names of parameters of the guide that stayed frozen, because the model depends on them too.
    :ivar took_over: whether another guide was trained (option `other`).
    :ivar seconds: the time of training, in seconds.

    References: Cremer, Li and Duvenaud (2018), "Inference Suboptimality in Variational Autoencoders",
    https://arxiv.org/abs/1801.03558; Zhang, Hayes and Barber (2022), "Generalization Gap in Amortized Inference",
    https://arxiv.org/abs/2205.11640; Margossian and Blei (2024), "Amortized Variational Inference: When and Why?",
    https://arxiv.org/abs/2307.11018, on when a guide that is a function of x can have no amortization gap at all. That is
    where the optimal parameters of a datum are a function of that datum alone, as in every model whose data are independent
    given the model.

    Example::

        optim = pyro.optim.Adam({"lr": 1e-3})
        refit = pv.refit_guide(vae.model, vae.guide, train_loader, optim, test=test_loader, num_epochs=200)
        refit.parts, refit.changes, refit.verdict()
    """

    test_before: Gaps
    test_after: Gaps
    train_before: Gaps
    train_after: Gaps
    history: HeldOutHistory | None
    stopped: Stopped
    num_updates: int
    num_epochs: int
    trained: tuple[str, ...]
    shared: tuple[str, ...]
    took_over: bool
    seconds: float

    @property
    def parts(self) -> dict[str, Estimate]:
        """Optimisation, capacity, and generalisation before and after; empty where no gap is split (`Gaps.unsplit`)."""
        if self.test_before.unsplit or self.test_after.unsplit:
            return {}
        test_before, test_after, _, train_after = (g.summary()["amortization"] for g in self._records.values())
        return {
            "optimisation": change(self.train_after, self.train_before, "amortization"),
            "capacity": train_after,
            "generalisation before": difference(test_before, self.train_before.summary()["amortization"]),
            "generalisation after": difference(test_after, train_after),
        }

    @property
    def changes(self) -> dict[str, Estimate]:
        """After minus before on the same test data, by the names of `Gaps.summary`; paired by datum.

        The change of log p(x) is zero up to the errors of its two estimates, because the model has not changed.
        """
        known = self.test_before.summary().keys() & self.test_after.summary().keys()
        return {name: change(self.test_before, self.test_after, name) for name in SHOWN if name in known}

    def verdict(self) -> str:
        """Sentences about what was gained, what is left, and the call to try next."""
        test = self.changes
        if not self.parts:
            why = self.test_before.unsplit or self.test_after.unsplit
            gain = test["elbo"].with_error(sampling=True, unit=" nats")
            return f"The ELBO of test data rose by {gain} (sampling error); its gap is not split: {why}."
        before, after = (side.summary()["amortization"] for side in (self.test_before, self.test_after))
        repaired = (
            f"The amortization gap of test data went from {before.with_error()} to {after.with_error(unit=' nats')} "
            f"(Monte Carlo errors), a change of {test['amortization'].with_error(sampling=True)} (sampling error)."
        )
        return f"{repaired} {self._next()}"

    def warnings(self) -> list[Warning]:
        """Warnings about the gaps after training."""
        return [*self.test_after.warnings(), *self.train_after.warnings()]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The gaps of all four, side by side."""
        titles = {name.replace("_", "\n"): gaps for name, gaps in self._records.items()}
        return plot_gaps_side_by_side(titles, ax)

    def to_dict(self) -> dict[str, Any]:
        """Every field and every part as plain Python, for JSON."""
        return {
            **{name: gaps.to_dict() for name, gaps in self._records.items()},
            "history": None if self.history is None else self.history.to_dict(),
            **{n: getattr(self, n) for n in ("stopped", "num_updates", "num_epochs", "took_over", "seconds")},
            "trained": list(self.trained),
            "shared": list(self.shared),
            "parts": {name: plain(part) for name, part in self.parts.items()},
            "changes": {name: plain(part) for name, part in self.changes.items()},
            "verdict": self.verdict(),
        }

    def _columns(self) -> dict[str, list[Any]]:
        """A row for each part, and one for each change on test data."""
        found = {**self.parts, **{f"change of {name}": change for name, change in self.changes.items()}}
        errors = ("value", "std_error", "sampling_error")
        return {"part": [*found], **{n: [float(getattr(e, n)) for e in found.values()] for n in errors}}

    def _num_rows(self) -> int:
        return len(self.parts) + len(self.changes)

    def _in_short(self) -> str:
        return f"test ELBO {self.changes['elbo'].with_error(sampling=True, unit=' nats')}, {self.num_updates} updates"

    def __str__(self) -> str:
        title = f"Refit, nats per datum{'; another guide took over' if self.took_over else ''}"
        lines = [f"{title:<44}{'before':>12}{'after':>12}{'change':>12}{'Monte Carlo':>14}{'sampling':>12}"]
        for data, before, after in (
            ("test", self.test_before, self.test_after),
            ("training", self.train_before, self.train_after),
        ):
            lines.append(f"{len(after)} {data} data")
            lines += [row(name, before, after) for name in SHOWN if name in before.summary() and name in after.summary()]
        lines += self._lines_of_parts()
        for name, gaps in self._records.items():
            if count := int((~gaps.reliable).sum()):
                lines.append(f"in doubt, {name.replace('_', ' ')}: {counted(gaps.doubts, gaps.unchecked)} ({count} data)")
        if self.shared:
            lines.append(f"frozen, because the model depends on them too: {', '.join(self.shared)}")
        kept = "" if self.history is None or self.history.best is None else self._kept(self.history, self.history.best)
        lines.append(
            f"Training {ENDED[self.stopped]}: {self.num_updates} updates in {self.num_epochs} epochs, "
            f"{self.seconds:.0f} s{kept}"
        )
        return page([*lines, self.verdict()])

    @property
    def _records(self) -> Mapping[str, Gaps]:
        return {n: getattr(self, n) for n in ("test_before", "test_after", "train_before", "train_after")}

    @staticmethod
    def _kept(history: HeldOutHistory, best: int) -> str:
        return f"; kept: update {int(history.step[best])}, held-out ELBO {float(history.elbo[best]):.3f}"

    def _lines_of_parts(self) -> list[str]:
        parts = self.parts
        if not parts:
            return []
        first = "optimisation, and capacity of the old guide" if self.took_over else "optimisation"
        titles = {"optimisation": first, "capacity": "capacity, or training that has not converged"}
        lines = [f"{'The amortization gap of test data is made of':<56}{'':>24}{'Monte Carlo':>14}{'sampling':>12}"]
        for name, part in parts.items():
            lines.append(f"  {titles.get(name, name):<54}{float(part.value):>24.3f}{errors_of(part)}")
        return lines

    def _next(self) -> str:
        """The call for the largest part that is left."""
        parts, family = self.parts, self.test_after.summary()["approximation"]
        left = {n: float(e.value) for n, e in (("capacity", parts["capacity"]), ("family", family))}
        left["generalisation"] = float(parts["generalisation after"].value)
        largest = max(left, key=left.__getitem__)
        if left[largest] < SMALL:
            return "What is left is below 0.1 nats in each part."
        error = parts["generalisation after"]
        if largest == "generalisation" and not error.value > 2 * error.sampling_error:
            return "Most of what is left is on new data, by no more than chance: take more test data (num_data=)."
        return f"Most of what is left, {left[largest]:.2f} nats, is {NEXT[largest]}."


SMALL = 0.1  # nats below which no call is proposed
NEXT = {
    "capacity": (
        "on training data: train longer (num_epochs=, a learning rate that falls), or hand over to a larger encoder "
        "(pv.refit_guide(..., other=larger_guide))"
    ),
    "family": "the family's: a richer one as another guide (pv.refit_guide(..., other=richer_guide))",
    "generalisation": (
        "on new data: train on data simulated from the model too (pv.refit_guide(..., simulated=1)), hold data out "
        "(held_out=), or get more data"
    ),
}


def change(before: Gaps, after: Gaps, name: str) -> Estimate:
    """After minus before, paired by datum."""
    sides = (before, after)
    errors: list[Tensor] = [side.std_errors[name].square() for side in sides]
    doubt = " and ".join(dict.fromkeys(d for side in sides if (d := side.summary()[name].doubt)))
    return Estimate.over_data(getattr(after, name) - getattr(before, name), (errors[0] + errors[1]).sqrt(), doubt=doubt)


def row(name: str, before: Gaps, after: Gaps) -> str:
    title = f"    {before.titles[name]}" if name in GAPS else f"  {before.titles[name]}"
    values = [float(side.summary()[name].value) for side in (before, after)]
    moved = change(before, after, name)
    return f"{title:<44}{values[0]:>12.3f}{values[1]:>12.3f}{float(moved.value):>12.3f}{errors_of(moved)}"


def errors_of(part: Estimate) -> str:
    if part.doubt:
        return f"   not to be trusted: {part.doubt}"
    return f"{float(part.std_error):>14.3f}{float(part.sampling_error):>12.3f}"


def plain(part: Estimate) -> dict[str, Any]:
    numbers = {n: float(getattr(part, n)) for n in ("value", "std_error", "sampling_error")}
    return {**numbers, "doubt": part.doubt}
