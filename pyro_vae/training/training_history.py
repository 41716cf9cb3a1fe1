"""The record of a training run: the terms of the objective at each call."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..records import Result, page, text_file, to_plain

WINDOW = 100  # steps of the mean at the end


@dataclass(frozen=True, eq=False, repr=False)
class TrainingHistory(Result):
    """The terms recorded by a `Monitor`, one value per call of the objective. S calls; float64, on the CPU.

    Values are in nats per datum. Where no plate defines a datum, they are totals over the batch in nats, and `per_datum` is
    `False`. A NaN or infinite value of a step is recorded as it is.

    :ivar step: (S,) number of the recorded call, from 0.
    :ivar loss: (S,) the loss that was minimised.
    :ivar elbo: (S,) the ELBO without beta, equal to -(distortion + rate).
    :ivar distortion: (S,) -E_q log p(x given z).
    :ivar rate: (S,) KL(q(z given x) to p(z)) of all latent sites.
    :ivar kl: the rate (S,) by latent site; NaN where a step did not have the site.
    :ivar beta: (S,) weight of the rate in the loss, or such weights by site.
    :ivar per_datum: whether the values are per datum.

    Example::

        monitor = pv.Monitor(objective)
        for (x,) in monitor.watch(train_loader):
            svi.step(x)
        monitor.history().elbo, monitor.history().rate      # (S,) each
    """

    _rows_are = "steps"

    step: Tensor
    loss: Tensor
    elbo: Tensor
    distortion: Tensor
    rate: Tensor
    kl: Mapping[str, Tensor]
    beta: Tensor | Mapping[str, Tensor]
    per_datum: bool

    @property
    def unit(self) -> str:
        """The unit of all values except beta and step: nats per datum, or nats for totals."""
        return "nats per datum" if self.per_datum else "nats, totals"

    @property
    def not_finite(self) -> Tensor:
        """(S,) bool: steps with a NaN or infinite loss, ELBO, distortion or rate."""
        return ~torch.stack([self.loss, self.elbo, self.distortion, self.rate]).isfinite().all(0)

    def __len__(self) -> int:
        return len(self.step)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return to_plain(self)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write one row per step.

        The columns are `step`, `loss`, `elbo`, `distortion`, `rate`, `kl[site]` for every site, and `beta` or `beta[site]`,
        in nats per datum. Totals have other names: `loss_total`, `kl_total[site]` and so on.
        """
        columns = self._columns()
        with text_file(path) as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    def _columns(self) -> dict[str, list[Any]]:
        return {name: values.tolist() for name, values in self._series().items()}

    def _series(self) -> dict[str, Tensor]:
        total = "" if self.per_datum else "_total"
        columns = {"step": self.step}
        columns |= {f"{name}{total}": getattr(self, name) for name in ("loss", "elbo", "distortion", "rate")}
        columns |= {f"kl{total}[{site}]": values for site, values in self.kl.items()}
        beta = {"beta": self.beta} if isinstance(self.beta, Tensor) else {f"beta[{s}]": b for s, b in self.beta.items()}
        return columns | beta

    def __str__(self) -> str:
        if not len(self):
            return "Training history without a step"
        window = min(WINDOW, len(self))
        title = f"Training history of {len(self)} steps, {self.unit}"
        lines = [f"{title:<44}{'first':>12}{'last':>12}{f'mean of last {window}':>22}"]
        for name, values in self._rows().items():
            mean = values[-window:].mean()
            lines.append(f"{name:<44}{float(values[0]):>12.3f}{float(values[-1]):>12.3f}{float(mean):>22.3f}")
        if count := int(self.not_finite.sum()):
            first = int(self.step[self.not_finite][0])
            lines.append(f"{count} of {len(self)} steps have values that are not finite; the first is step {first}")
        return page(lines)

    def _rows(self) -> dict[str, Tensor]:
        rows = {"ELBO": self.elbo, "  distortion": self.distortion, "  rate": self.rate}
        if len(self.kl) > 1:
            rows |= {f"    of {site}": values for site, values in self.kl.items()}
        beta = {"beta": self.beta} if isinstance(self.beta, Tensor) else {f"beta of {s}": b for s, b in self.beta.items()}
        return rows | {"loss": self.loss} | beta
