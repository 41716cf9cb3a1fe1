"""The record of the calibration of a guide on simulated data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnreliableEvidenceWarning
from ..ops import MIN_PARTICLES_FOR_K, pareto_k, pareto_k_threshold
from ..records import LEVEL, Estimate, Result, check_records, check_same, concatenated, mean_cost, page, places, to_plain
from .rows import CERTAIN, LOG_DENSITY, Row, row_of
from .uniformity import GRID, band

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FALSE_ALARM = 0.01  # probability that any row of a calibrated guide is reported as faulty
LEVELS = 0.5, 0.9  # levels of the intervals whose coverage is printed
ROWS = 20  # printed
FEW_DATA = 100  # number of data below which ranks show large faults only
GAP, ELBO = "symmetric gap", "ELBO"
NO_DENSITY = "where draws of the guide have no density under the model, or one that underflows"
PER_DATUM = ("ranks", "shift", "stretch", "at_latents", "elbo", "loader_index")


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(Result):
    """Ranks of true latents among draws of a guide, on simulated data, as returned by `GuideCalibration`.

    B data, D latents (single numbers of a latent site), R rows: the latents, and log q(z | x) where it is known. Nats.

    :ivar names: R names, `'z[3]'` for the fourth number of the latent site `'z'`, `'z'` where it is the only one, and
        `'log q(z | x)'` last.
    :ivar ranks: (B, R) between 0 and 1, uniform if the guide is the posterior; NaN where a latent is masked.
    :ivar shift: (B, D) the median of the guide's draws minus the latent, in standard deviations of the draws; NaN where they
        do not vary or are fewer than 20.
    :ivar stretch: (B, D) the distance of the latent from that median, in units of the distance within which half of the
        draws are. Its median over data is one if the spread of the guide is right.
    :ivar at_latents: (B,) log p(x, z) - log q(z | x) at the true latents; `None` where log q is not known there.
    :ivar elbo: (B,) the mean of the same at draws of the guide.
    :ivar num_particles: L, draws of the guide for each rank.
    :ivar cost: decoder evaluations per datum.
    :ivar blind: whether the draws of the guide for the simulated data are exactly those for your data.
    :ivar given: the sites outside the datum plate that have one value; all numbers here are conditional on these values.
    :ivar left_out: latents of the model without a rank, because the guide lacks them or they are summed out.
    :ivar unchecked: why the symmetric gap is not known.
    :ivar loader_index: (B,) the place of each datum in the loader of `evaluate`, from 0; `None` in a record of one call.

    Example::

        calibration = pv.GuideCalibration(model, guide, seed=0)(x)
        calibration.passed, calibration.verdict()
    """

    _hidden = ("names",)

    names: tuple[str, ...]
    ranks: Tensor
    shift: Tensor
    stretch: Tensor
    at_latents: Tensor | None
    elbo: Tensor
    num_particles: int
    cost: float
    blind: bool = False
    given: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unchecked: dict[str, str] = field(default_factory=dict)
    loader_index: Tensor | None = None

    @classmethod
    def cat(cls, records: Sequence[Calibration]) -> Calibration:
        """Join the results of several simulations; they must come from the same estimator, with the same latents."""
        check_records(cls, records)
        check_same(records, ("names", "num_particles", "given", "left_out"))
        joined: dict[str, Any] = {
            **concatenated(records, PER_DATUM),
            "cost": mean_cost(records),
            "blind": all(record.blind for record in records),
            "unchecked": {name: why for record in records for name, why in record.unchecked.items()},
        }
        return replace(records[0], **joined)

    def select(self, kept: Tensor) -> Calibration:
        """The record of some of the data: those where `kept`, (B,) bool, is true, or those with these indices."""
        kept = places(kept, len(self))
        some: dict[str, Any] = {n: None if (v := getattr(self, n)) is None else v[kept] for n in PER_DATUM}
        return replace(self, **some)

    def __len__(self) -> int:
        return len(self.ranks)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The result for the ranks of each row."""
        nothing = self.shift.new_full((len(self),), math.nan)
        shift, stretch = ([*part.unbind(1), nothing] for part in (self.shift, self.stretch))
        rate = FALSE_ALARM / len(self.names)  # by Bonferroni, for any dependence between rows
        columns = zip(self.names, self.ranks.unbind(1), shift, stretch, strict=False)
        return tuple(row_of(name, ranks, above, far, rate) for name, ranks, above, far in columns)

    @property
    def faulty(self) -> tuple[Row, ...]:
        """The rows outside their band, worst first. A calibrated guide has any with a probability of at most 1%."""
        return tuple(sorted((row for row in self.rows if row.faulty), key=lambda row: -row.largest))

    @property
    def passed(self) -> bool:
        """Whether the ranks show no fault. The symmetric gap is not used."""
        return not (self.faulty or self.blind)

    @property
    def symmetric_gap(self) -> Estimate | None:
        """KL(p(z | x) to q) + KL(q to p(z | x)), averaged over the model's data; `None` where it is not known.

        Its expectation is not negative. Both errors come from its spread over the data, which includes the draws of latents
        and guide; the population is that of data of the model.
        """
        if self.at_latents is None:
            return None
        terms = (self.at_latents - self.elbo).double()
        estimate = Estimate.over_data(terms, torch.zeros_like(terms), doubt=self.doubts.get(GAP, ""))
        return replace(estimate, std_error=estimate.sampling_error)

    @property
    def _gap_is_seen(self) -> bool:
        """Whether the symmetric gap is above zero by more than its error and rounding."""
        gap = self.symmetric_gap
        return gap is not None and not gap.doubt and float(gap.value) > max(CERTAIN * float(gap.std_error), self._rounding)

    @property
    def _rounding(self) -> float:
        """Nats by which the terms of the gap may differ by rounding."""
        return 200 * torch.finfo(self.elbo.dtype).eps * (1 + float(self.elbo.abs().max()))

    @property
    def doubts(self) -> dict[str, str]:
        """Why the error of the symmetric gap, or the ELBO, is not reliable; not judged where N < 100."""
        if ELBO in self.unchecked:
            return {ELBO: self.unchecked[ELBO]}
        if self.at_latents is None:
            lost = int((~self.elbo.isfinite()).sum())
            return {ELBO: f"it is infinite for {lost} of {len(self)} data, {NO_DENSITY}"} if lost else {}
        missed = int((self.at_latents == math.inf).sum())
        if missed:
            return {GAP: f"the guide gives no density to the latents of {missed} of {len(self)} data"}
        terms = (self.at_latents - self.elbo).double()
        if not bool(terms.isfinite().all()):
            return {GAP: f"its terms of {int((~terms.isfinite()).sum())} of {len(self)} data are infinite, {NO_DENSITY}"}
        if len(self) < MIN_PARTICLES_FOR_K or float(terms.max() - terms.min()) < self._rounding:
            return {}
        k, threshold = float(pareto_k((terms - terms.min()).log())), pareto_k_threshold(len(self))
        return {GAP: f"its terms have a Pareto k of {k:.2f}, above {threshold:.2f}"} if k > threshold else {}

    def band(self, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        """The band of the distribution function of a row.

        The points at which it is tested, and the smallest and the largest share of the data below each that is inside the
        band, (99,) each.
        """
        low, high = band(row.num_data, FALSE_ALARM / len(self.names))
        return GRID, low / row.num_data, high / row.num_data

    def verdict(self) -> str:
        """The result in one sentence: which fault of the guide was found."""
        data = f"on {len(self)} simulated data"
        if self.blind:
            return (
                f"The guide draws the same latents {data} as on yours: it does not depend on the data, or it has parameters "
                "for each of your data, which fit no others"
            )
        if not self.faulty:
            inside = f"the ranks of all {len(self.rows)} rows are as uniform as those of 99% of right guides"
            if self._gap_is_seen:
                return (
                    f"The symmetric gap shows a fault {data}: it is zero only for the posterior. The ranks show none "
                    f"({inside}), as for a guide that ignores a part of the data"
                )
            few = f". {len(self)} data show large faults only: use {FEW_DATA} or more" if len(self) < FEW_DATA else ""
            return f"No fault seen {data}: {inside}{few}"
        latents = [row for row in self.faulty if row.name != LOG_DENSITY]
        if not latents:
            return f"The guide is not calibrated {data}: each latent alone is, all together are not: {self.faulty[0].fault}"
        worst = latents[0]
        number = sum(row.name != LOG_DENSITY for row in self.rows)
        of = f"in {len(latents)} of {number} latents. The worst is {worst.name}" if number > 1 else f"in {worst.name}"
        return (
            f"The guide is not calibrated {data}, {of}: {worst.fault}. Its 90% intervals contain the true latent for "
            f"{worst.coverage(0.9):.0%} of the data"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The distribution functions of the ranks minus the diagonal, with their bands, see `pyro_vae.plots`."""
        from ..plots import plot_calibration  # imported here, so that importing the package does not import matplotlib

        return plot_calibration(self, ax)

    def warnings(self) -> list[Warning]:
        """A warning where the error of the symmetric gap, or the ELBO, is not reliable."""
        said = {GAP: "the error of the symmetric gap is too small", ELBO: "the ELBO is in doubt"}
        return [UnreliableEvidenceWarning(f"{said[name]}: {why}") for name, why in self.doubts.items()]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        gap = self.symmetric_gap
        return {
            **to_plain(self),
            "symmetric_gap": None if gap is None else to_plain(gap),
            "rows": [
                {"name": r.name, "faulty": r.faulty, "fault": r.fault, **{f"coverage {p}": r.coverage(p) for p in LEVELS}}
                for r in self.rows
            ],
            "passed": self.passed,
            "doubts": self.doubts,
            "verdict": self.verdict(),
        }

    def __str__(self) -> str:
        shown = [*self.faulty, *(row for row in self.rows if not row.faulty)][:ROWS]
        width = max(len("latent"), *(len(row.name) for row in shown))
        expected = [shown[0].expected_coverage(level, LEVEL) for level in LEVELS]
        heads = [f"{level:.0%} ({low:.2f}-{high:.2f})" for level, (low, high) in zip(LEVELS, expected, strict=True)]
        lines = [
            f"Calibration on {len(self)} simulated data, L = {self.num_particles} draws of the guide each, "
            f"cost {self.cost:g} decoder evaluations per datum",
            f"  {'latent':<{width}}{heads[0]:>18}{heads[1]:>18}  coverage of the guide's intervals (expected for 95 of 100)",
        ]
        for row in shown:
            numbers = "".join(f"{row.coverage(level):>18.2f}" for level in LEVELS)
            lines.append(f"  {row.name:<{width}}{numbers}  {row.fault}".rstrip())
        if len(self.rows) > len(shown):
            lines.append(f"  and {len(self.rows) - len(shown)} more without a fault")
        gap = self.symmetric_gap
        if gap is not None:
            error = f"(error not to be trusted: {gap.doubt})" if gap.doubt else f"+- {float(gap.std_error):.3f}"
            lines.append(f"  {GAP} {float(gap.value):.3f} {error} nats; the mean of log p(x) - ELBO is at most that")
        lines += [f"  {ELBO} in doubt: {why}" for name, why in self.doubts.items() if name == ELBO]
        lines += [f"  no {name}: {why}" for name, why in self.unchecked.items() if name != ELBO]
        if self.left_out:
            lines.append(f"  without a rank: {', '.join(self.left_out)}")
        if self.given:
            lines.append(f"  given: {', '.join(self.given)}")
        lines.append(f"{self.verdict()}. This is about data of the model; yours may be unlike them.")
        return page(lines)
