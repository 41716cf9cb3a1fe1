"""The record of early stopping: the held-out ELBO at each look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..records import FEW, Result, page, to_plain


@dataclass(frozen=True, eq=False, repr=False)
class HeldOutHistory(Result):
    """The measurements of an `EarlyStopping`: T looks at the same held-out data; float64, on the CPU, nats per datum.

    :ivar step: (T,) the number of the update at each look, as passed by the caller.
    :ivar elbo: (T,) the mean held-out ELBO, with its KL weighted by `beta`; minus infinity if that of any datum is.
    :ivar sampling_error: (T,) the sampling error of that mean. The errors of two looks are strongly dependent: use
        `gain_error` for their difference.
    :ivar gain: (T,) the rise above the reference look; NaN where there was none. Plus or minus infinity where fewer, or
        more, data have an ELBO of minus infinity. Data that have it at both looks are left out.
    :ivar gain_error: (T,) the sampling error of `gain`, from paired differences.
    :ivar improved: (T,) bool, whether the interval of `gain` is above zero; also true for the first look that counts.
    :ivar at_rest: (T,) bool, whether beta had its final value. Other looks do not count.
    :ivar beta: (T,) the weight of the KL.
    :ivar num_data: number of held-out data.
    :ivar num_coarse: number of data for which floats are too coarse, at the worst look: they do not distinguish draws, or
        float64 changes the ELBO by more than a tenth of its Monte Carlo error.

    Example::

        stopping = pv.EarlyStopping(model, guide, loader)
        stopping(0)
        stopping.history().elbo, stopping.history().gain        # (T,) each
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
        """The index of the look with the highest finite held-out ELBO, of those that count; `None` if none counts."""
        counts = self.at_rest & self.elbo.isfinite()
        return int(self.elbo.where(counts, -torch.inf).argmax()) if bool(counts.any()) else None

    @property
    def reliable(self) -> Tensor:
        """(T,) bool, whether the ELBO is reliable.

        False where the ELBO is minus infinity, because draws for some datum have no density under the model. False at all
        looks if floats are too coarse for the draws of more than 5% of the data.
        """
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
