"""The record of the use of each latent unit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..records import Estimate, Result, page, to_plain

ROWS = 20  # units shown when printed


@dataclass(frozen=True, eq=False, repr=False)
class UnitActivity(Result):
    """The activity of each latent unit, as returned by `ActiveUnits`. D units (single numbers of a latent); nats.

    :ivar names: D names, `'z[3]'` for the fourth number of the latent site `'z'` (plates inside a datum and event dimensions
        flattened), `'z'` where it is the only one.
    :ivar variance_of_means: (D,) variance over the data of the posterior mean E_q[z given x] (n - 1), minus the Monte Carlo
        noise of that mean, so it may be a little below zero. NaN for one datum, and where no mean is defined (Categorical).
    :ivar kl: (D,) mean over the data of KL(q(z_d given x) to p(z_d)). NaN for a site whose q or p does not factorise over
        units, see `site_kl`. Where the prior of a site depends on draws that the guide makes later given this site, it is
        the mean of log q - log p: a part of the KL of all latents, which may be negative.
    :ivar fraction_at_prior: (D,) the share of the data whose KL in this unit is below `epsilon`; NaN where `kl` is NaN or
        only such a part.
    :ivar std_errors: Monte Carlo errors (D,) of these three by name; zero where only formulas were used.
    :ivar sampling_errors: their sampling errors, over data drawn from a population, (D,) by name.
    :ivar site_kl: mean KL of each latent site, an `Estimate` by name; masked latents count as zero here. The sum over sites
        is the KL of all latents.
    :ivar counts: (D,) the number of data in which the site of the unit is not masked.
    :ivar num_data: N.
    :ivar threshold: a unit is active above this variance of means.
    :ivar epsilon: a unit is at the prior for a datum below this KL, in nats.
    :ivar delta: a unit is collapsed if it is at the prior for a share of at least 1 - delta of the data.
    :ivar num_particles: K, draws of the guide per datum; used where no formula is known.
    :ivar cost: decoder evaluations per datum.

    Example::

        units = pv.ActiveUnits(vae.model, vae.guide)(loader)
        units.num_active, units.kl, units.verdict()
    """

    _rows_are = "units"
    _derived = ("active", "collapsed")

    names: tuple[str, ...]
    variance_of_means: Tensor
    kl: Tensor
    fraction_at_prior: Tensor
    std_errors: Mapping[str, Tensor]
    sampling_errors: Mapping[str, Tensor]
    site_kl: Mapping[str, Estimate]
    counts: Tensor
    num_data: int
    threshold: float
    epsilon: float
    delta: float
    num_particles: int
    cost: float

    @property
    def active(self) -> Tensor:
        """(D,) true where the posterior mean varies over the data by more than `threshold`."""
        return self.variance_of_means > self.threshold

    @property
    def num_active(self) -> int:
        """How many units are active."""
        return int(self.active.sum())

    @property
    def collapsed(self) -> Tensor:
        """(D,) true where the KL is below `epsilon` for a share of at least 1 - `delta` of the data; false where NaN."""
        return self.fraction_at_prior >= 1 - self.delta

    @property
    def num_collapsed(self) -> int:
        """How many units are collapsed."""
        return int(self.collapsed.sum())

    @property
    def order(self) -> Tensor:
        """(D,) the units in the order of falling KL; then those without a KL, in the order of falling variance of means."""
        by_variance = self.variance_of_means.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
        by_kl = self.kl.nan_to_num(nan=-torch.inf)[by_variance].argsort(descending=True, stable=True)
        return by_variance[by_kl]

    def __len__(self) -> int:
        return len(self.names)

    def verdict(self) -> str:
        """One sentence: how many units are active, and how many at the prior."""
        parts = [f"{self.num_active} of {len(self)} units active", f"{self.num_collapsed} at the prior"]
        unknown = int(self.kl.isnan().sum())
        if unknown:
            parts.append(f"{unknown} without a separate KL (their site does not factorise over units)")
        incomplete = int((self.fraction_at_prior.isnan() & ~self.kl.isnan()).sum())
        if incomplete:
            reason = "the guide draws them before latents on which their prior depends"
            parts.append(f"{incomplete} with only a part of the KL of all latents ({reason})")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {
            **to_plain(self),
            "names": list(self.names),
            "active": self.active.tolist(),
            "collapsed": self.collapsed.tolist(),
            "order": self.order.tolist(),
        }

    def __str__(self) -> str:
        width = max(len("unit"), *(len(name) for name in self.names))
        lines = [
            f"Units of {self.num_data} data, largest KL first (+-: sampling error)",
            f"{'unit':<{width}}{'KL, nats':>20}{'variance of means':>22}{'at the prior':>14}",
        ]
        order = self.order.tolist()
        lines += [self._row(d, width) for d in order[:ROWS]]
        if len(order) > ROWS:
            largest = float(self.kl[order[ROWS]])
            more = "" if largest != largest else f", KL {largest:.4f} nats and less"
            lines.append(f"... {len(order) - ROWS} more{more}")
        lines += [f"KL of site '{name}': {estimate}" for name, estimate in self.site_kl.items()]
        lines += [
            f"Active: variance of means above {self.threshold:g}. At the prior: KL below {self.epsilon:g} nats for at least "
            f"{1 - self.delta:.4g} of the data.",
            f"{self.verdict()}.",
        ]
        return page(lines)

    def _row(self, d: int, width: int) -> str:
        kl, variance = (
            f"{float(getattr(self, name)[d]):.4f} +- {float(self.sampling_errors[name][d]):.4f}"
            for name in ("kl", "variance_of_means")
        )
        return f"{self.names[d]:<{width}}{kl:>20}{variance:>22}{float(self.fraction_at_prior[d]):>14.3f}"


@dataclass(frozen=True, eq=False, repr=False)
class CollapseHistory(Result):
    """The measurements of a `CollapseMonitor`, T of them, of D units; float64, on the CPU, nats.

    :ivar names: the D units.
    :ivar step: (T,) the calls of the monitor at which it measured, counted from one.
    :ivar num_active: (T,) units whose variance of means in that batch was above the threshold.
    :ivar num_collapsed: (T,) units that were collapsed in that batch.
    :ivar kl: (T, D) mean KL per unit.
    :ivar fraction_at_prior: (T, D) the share of the batch whose KL is below epsilon.
    :ivar variance_of_means: (T, D).

    Example::

        monitor = pv.CollapseMonitor(vae.model, vae.guide, every=1)
        monitor(x)
        monitor.history().num_active        # (T,)
    """

    _rows_are = "looks"
    _hidden = ("names",)

    names: tuple[str, ...]
    step: Tensor
    num_active: Tensor
    num_collapsed: Tensor
    kl: Tensor
    fraction_at_prior: Tensor
    variance_of_means: Tensor

    def __len__(self) -> int:
        return len(self.step)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {**to_plain(self), "names": list(self.names)}
