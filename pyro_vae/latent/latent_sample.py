"""The record of a sample from the aggregated posterior."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import quoted
from ..records import Result, page, to_plain

ROWS = 20  # units shown when printed
COLUMNS = ("mean", "std", "prior_mean", "prior_std", "std_of_means")


@dataclass(frozen=True, eq=False, repr=False)
class LatentSample(Result):
    """The latents of N data and as many draws of the prior, as returned by `AggregatedPosterior`.

    D units (single numbers of a latent), each on the scale of its latent. NaN where the site of a unit is masked for a
    datum.

    :ivar draws: (N, D) one draw of q(z given x) per datum: a sample from the aggregated posterior q(z).
    :ivar means: (N, D) the posterior means E_q[z given x] where `analytic`, elsewhere the draws.
    :ivar prior: (N, D) draws from the prior p(z), one per datum, given the arguments of the model for it.
    :ivar names: D names, `'z[3]'` for the fourth number of the latent site `'z'`, `'z'` where it is the only one.
    :ivar analytic: (D,) true where the mean has a formula: that of the guide's distribution, if it depends on no other
        latent.
    :ivar labels: (N,) the labels of the data, or `None`.

    Example::

        sample = pv.AggregatedPosterior(vae.model, vae.guide)(loader)
        sample.draws, sample.prior      # (N, D) each
    """

    _hidden = ("names", "analytic")

    draws: Tensor
    means: Tensor
    prior: Tensor
    names: tuple[str, ...]
    analytic: Tensor
    labels: Tensor | None = None

    @property
    def num_data(self) -> int:
        """N."""
        return len(self.draws)

    def _num_rows(self) -> int:
        return self.num_data

    def summary(self) -> dict[str, Tensor]:
        """Means and standard deviations (n - 1), (D,) each.

        `mean` and `std` are those of q(z_d), `prior_mean` and `prior_std` those of the prior. `mean_of_means` and
        `std_of_means` are those of the posterior means over the data.

        `std_of_means` is zero for a unit that does not depend on the data. Both are NaN where not `analytic`.
        """
        sides = {"{}": self.draws, "prior_{}": self.prior, "{}_of_means": self.means.where(self.analytic, torch.nan)}
        summary = {}
        for name, values in sides.items():
            summary[name.format("mean")], summary[name.format("std")] = moments(values)
        return summary

    @property
    def order(self) -> Tensor:
        """(D,) the units in the order of falling spread of their posterior means, in standard deviations of the prior.

        Units without such means come last.
        """
        summary = self.summary()
        spread = (summary["std_of_means"] / summary["prior_std"]).nan_to_num(nan=-torch.inf)
        return spread.argsort(descending=True, stable=True)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {**to_plain(self), "names": list(self.names), "num_data": self.num_data}

    def __str__(self) -> str:
        width = max(len("unit"), *(len(name) for name in self.names))
        summary, order = self.summary(), self.order.tolist()
        lines = [
            f"Latents of {self.num_data} data, widest spread of posterior means first",
            f"{'':<{width}}{'q(z)':>20}{'prior':>20}{'posterior means':>18}",
            f"{'unit':<{width}}{'mean':>10}{'sd':>10}{'mean':>10}{'sd':>10}{'sd':>18}",
        ]
        for d in order[:ROWS]:
            *moments_of_unit, spread = (float(summary[name][d]) for name in COLUMNS)
            lines.append(f"{self.names[d]:<{width}}{''.join(f'{m:>10.3f}' for m in moments_of_unit)}{spread:>18.3f}")
        if len(order) > ROWS:
            lines.append(f"... {len(order) - ROWS} more")
        if drawn := [name for name, known in zip(self.names, self.analytic.tolist(), strict=True) if not known]:
            shown = quoted(drawn[:ROWS]) + (f" and {len(drawn) - ROWS} more" if len(drawn) > ROWS else "")
            lines.append(f"Posterior mean not known, a draw is used in its place: {shown}.")
        return page(lines)


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) over the data, (D,) each, of values that are not NaN."""
    present = ~values.isnan()
    count = present.sum(0)
    mean = values.nanmean(0)
    squares = torch.where(present, (values - mean).square(), torch.zeros_like(values)).sum(0)
    variance = squares / (count - 1).clamp(min=1)
    return mean, torch.where(count > 1, variance.sqrt(), torch.full_like(variance, torch.nan))
