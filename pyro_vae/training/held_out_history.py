"""The record of an early stopping: the held-out ELBO, look by look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..records import FEW, Result, page, to_plain


@dataclass(frozen=True, eq=False, repr=False)
class HeldOutHistory(Result):
    """What an `EarlyStopping` saw: T looks at the same held-out data; float64, on the CPU, nats per datum.

    :ivar step: (T,) the number of the update at each look, as it was told.
    :ivar elbo: (T,) the mean held-out ELBO, its KL weighted by `beta`; minus infinity where that of any datum is.
    :ivar sampling_error: (T,) of that mean over the data. Those of two looks are nearly the same noise: `gain_error` is the
        error of their difference.
    :ivar gain: (T,) the rise above the look that was compared with; NaN where there was none, infinite where more data, or
        fewer, have an ELBO of minus infinity; data that have it at both looks are left out.
    :ivar gain_error: (T,) the sampling error of `gain`, from paired differences.
    :ivar improved: (T,) bool, whether the interval of `gain` lies above zero; also true for the first look that counts.
    :ivar at_rest: (T,) bool, whether beta had reached its end. Other looks do not count.
    :ivar beta: (T,) the weight of the KL.
    :ivar num_data: held-out data.
    :ivar num_coarse: data for which floats are too coarse, at the worst look: draws that they do not tell apart, or an ELBO
        that float64 moves by more than a tenth of its Monte Carlo error.
    """

    _rows_are = "looks"
    _derived = ("reliable",)

    step: Tensor
    elbo: Tensor
    sampling_error: Tensor
    gain: Tensor
    gain_error: Tensor
    improved: Tensor
    at_rest: Tensor
    beta: Tensor
    num_data: int
    num_coarse: int = 0

    @property
    def best(self) -> int | None:
        """The look with the highest held-out ELBO, finite, of those that count; `None` where none does."""
        counts = self.at_rest & self.elbo.isfinite()
        return int(self.elbo.where(counts, -torch.inf).argmax()) if bool(counts.any()) else None

    @property
    def reliable(self) -> Tensor:
        """(T,) bool: false where the ELBO is minus infinity, since draws for some datum have no density under the model;
        at all looks where floats are too coarse for the draws of more than 5% of the data."""
        return self.elbo.isfinite() & (self.num_coarse <= FEW * self.num_data)

    def __len__(self) -> int:
        return len(self.step)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {**to_plain(self), "best": self.best}

    def __str__(self) -> str:
        if not len(self):
            return "Held-out history without a look"
        title = f"Held-out ELBO of {self.num_data} data, nats per datum"
        lines = [title, f"{'update':>10}{'ELBO':>12}{'gain':>10}{'its error':>12}"]
        for number, step in enumerate(self.step.tolist()):
            gain, error = float(self.gain[number]), float(self.gain_error[number])
            change = f"{gain:>10.3f}{error:>12.3f}" if gain == gain else " " * 22
            marks = [] if bool(self.at_rest[number]) else [f"beta {float(self.beta[number]):.3g}, not yet at its end"]
            marks += ["improved"] if gain == gain and bool(self.improved[number]) else []
            marks += [] if bool(self.reliable[number]) else ["in doubt"]
            marks += ["best"] if number == self.best else []
            lines.append(f"{step:>10}{float(self.elbo[number]):>12.3f}{change}  {', '.join(marks)}".rstrip())
        return page(lines)
