"""The record of the gaps between ELBO and log p(x) per datum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..evidence import Evidence, well_known
from ..records import LEVEL, Estimate, Result, check_records, check_same, concatenated, mean_cost, page, places, to_plain
from ..records import doubts as table

PER_DATUM = ("elbo", "optimal_elbo", "log_evidence", "converged")
SIGMAS, ROUNDING = 4.5, 0.05  # errors, and nats, by which log p(x) must be below an ELBO to be in doubt
GAPS = ("amortization", "approximation", "inference")
OF_LOG_EVIDENCE = ("tails", "posterior side", "search", "precision", "end of support", "below the ELBO")
REASONS = {  # the doubts that concern each number
    "elbo": ("precision",),
    "optimal_elbo": ("precision", "not converged"),
    "log_evidence": OF_LOG_EVIDENCE,
    "amortization": ("precision", "not converged"),
    "approximation": (*OF_LOG_EVIDENCE, "not converged"),
    "inference": OF_LOG_EVIDENCE,
}


Part = Literal["encoder", "family", "undecided"]


@dataclass(frozen=True, eq=False, repr=False)
class Gaps(Result):
    """The gaps between ELBO and log p(x) per datum, as returned by `InferenceGaps`. B data, nats.

    :ivar elbo: (B,) L[q], the ELBO of the guide.
    :ivar optimal_elbo: (B,) L[q*], the ELBO of the best member q* of the guide's family for each datum, on fresh draws.
    :ivar log_evidence: (B,) log p(x), estimated from below.
    :ivar std_errors: Monte Carlo errors (B,) of the values above and of the gaps, by name; those of differences are paired.
        "contrast" is the error of amortization minus approximation.
    :ivar converged: (B,) whether the fit of q* converged; where it did not, amortization is too small.
    :ivar evidence: the `Evidence` that `log_evidence` comes from, with its effective sample size, Pareto k and doubts.
    :ivar family: the parameters that were optimised per datum.
    :ivar held: sites of the guide that were not optimised per datum, because the guide enumerates them and draws other
        latents. What they lose is counted in the approximation gap.
    :ivar unsplit: why L[q*] is not known. If it is not empty, `optimal_elbo` and the two parts of the gap are NaN.
    :ivar num_particles: K, draws for L[q] and for L[q*].
    :ivar cost: decoder evaluations per datum, all fits included; a gradient counts as three.

    Example::

        gaps = pv.InferenceGaps(model, guide)(x)
        gaps.amortization, gaps.approximation, gaps.inference       # (B,) each
    """

    _derived = (*GAPS, "doubts", "reliable", "loader_index")
    _headline = "inference"
    _joins_in_steps = True

    elbo: Tensor
    optimal_elbo: Tensor
    log_evidence: Tensor
    std_errors: Mapping[str, Tensor]
    converged: Tensor
    evidence: Evidence
    family: str
    num_particles: int
    cost: float
    held: tuple[str, ...] = ()
    unsplit: str = ""

    @property
    def amortization(self) -> Tensor:
        """(B,) L[q*] - L[q]."""
        return self.optimal_elbo - self.elbo

    @property
    def approximation(self) -> Tensor:
        """(B,) log p(x) - L[q*]; biased low, because log p(x) is estimated from below."""
        return self.log_evidence - self.optimal_elbo

    @property
    def inference(self) -> Tensor:
        """(B,) log p(x) - L[q]; biased low, because log p(x) is estimated from below."""
        return self.log_evidence - self.elbo

    @classmethod
    def cat(cls, records: Sequence["Gaps"]) -> "Gaps":
        """Join the results of several batches in their order; they must come from the same estimator."""
        check_records(cls, records)
        check_same(records, ("family", "held", "unsplit", "num_particles"))
        return cls(
            **concatenated(records, PER_DATUM),
            std_errors={n: torch.cat([r.std_errors[n] for r in records]) for n in records[0].std_errors},
            evidence=Evidence.cat([r.evidence for r in records]),
            family=records[0].family,
            held=records[0].held,
            unsplit=records[0].unsplit,
            num_particles=records[0].num_particles,
            cost=mean_cost(records),
        )

    def select(self, kept: Tensor) -> "Gaps":
        """The record of some of the data: those where `kept`, (B,) bool, is true, or those with these indices."""
        kept = places(kept, len(self))
        return replace(
            self,
            **{name: getattr(self, name)[kept] for name in PER_DATUM},
            std_errors={name: error[kept] for name, error in self.std_errors.items()},
            evidence=self.evidence.select(kept),
        )

    @property
    def loader_index(self) -> Tensor | None:
        """(B,) the place of each datum in the loader of `evaluate`, from 0; `None` in a record of one call."""
        return self.evidence.loader_index

    def __len__(self) -> int:
        return len(self.elbo)

    def summary(self) -> dict[str, Estimate]:
        """Means over the data: ELBO, optimal ELBO, log p(x) and the three gaps, as far as known (see `unsplit`).

        The errors of a mean are not reliable where more than 5% of the data are in doubt for a reason that concerns it.
        """
        doubts, found = self.doubts, {}
        for name, reasons in REASONS.items():
            if self.unsplit and name not in ("elbo", "log_evidence", "inference"):
                continue
            doubted = ~table.without_doubt({r: doubts[r] for r in reasons if r in doubts}, like=self.elbo)
            doubt = table.said_of_mean(doubted)
            found[name] = Estimate.over_data(getattr(self, name), self.std_errors[name], doubt=doubt)
        return found

    @property
    def titles(self) -> dict[str, str]:
        """The titles of the numbers of `summary`. Data outside the support have a score in place of log p(x)."""
        top = "log p(x)" if self.evidence.bound == "exact" else "log p(x), lower bound"
        top = top if self.evidence.support_checked else "score (data outside the support)"
        return {"elbo": "ELBO", "optimal_elbo": "optimal ELBO", "log_evidence": top, **{n: f"{n} gap" for n in GAPS}}

    def larger_part(self, level: float = LEVEL) -> Part:
        """The larger part of the mean gap: "encoder", "family", or "undecided", which `verdict` explains."""
        return self._decide(level)[0]

    def verdict(self, level: float = LEVEL) -> str:
        """One sentence that names the larger part of the mean gap, if the Monte Carlo interval decides it.

        Where log p(x) of more than 5% of the data is in doubt, the sentence is about the other data, and says so.
        """
        return self._decide(level)[1]

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where the numbers are in doubt: the doubts of `evidence` and two more.

        "not converged": the fit of q* ran out of steps. "below the ELBO": the estimate of log p(x) is significantly below
        L[q] or L[q*], so it has missed a mode and is too low.
        """
        names = ["inference"] if self.unsplit else ["approximation", "inference"]
        of_evidence = self.evidence.doubts
        below = of_evidence.get("below the ELBO", torch.zeros_like(self.converged))
        for name in names:  # one by one, and in place: there may be millions of data
            below = below | (getattr(self, name) < self.std_errors[name].mul(-SIGMAS).sub_(ROUNDING))
        of_fit = {} if self.unsplit else {"not converged": ~self.converged}
        return {**of_evidence, **of_fit, "below the ELBO": below}

    @property
    def unchecked(self) -> dict[str, str]:
        """Why a reason was not checked, by reason."""
        return {**self.evidence.unchecked, **({"not converged": "q* was not fitted"} if self.unsplit else {})}

    @property
    def reliable(self) -> Tensor:
        """(B,) true where there is no doubt at all."""
        return table.without_doubt(self.doubts, like=self.elbo)

    def _decide(self, level: float) -> tuple[Part, str]:
        """The larger part, and the sentence about it, from the interval of amortization minus approximation.

        Where log p(x) is in doubt, it is too low, and so is the approximation gap. The answer "encoder" is therefore based
        on the data whose log p(x) is reliable. The answer "family" may use all data, since the missing part of log p(x)
        would only make the family's part larger.
        """
        if self.unsplit:
            return "undecided", f"Not split: {self.unsplit}."
        known = self
        if not well_known(self.evidence) and bool((reliable := self.evidence.reliable).any()):
            known = self.select(reliable)
        low, _ = known._contrast(level)
        _, high = self._contrast(level)
        if high < 0:
            known = self
        summary = known.summary()
        encoder, family = summary["amortization"], summary["approximation"]
        split = f"encoder {encoder.with_error()}, family {family.with_error(unit=' nats')}"
        split += "" if family.doubt else " (Monte Carlo error)"
        if len(known) < len(self):
            split += f" for the {len(known)} of {len(self)} data whose log p(x) is known well"
        below = self.doubts["below the ELBO"]
        if table.are_many(below):
            return "undecided", (
                f"Not decided: log p(x) of {table.count(below)} is below their ELBO, so it is too low ({split})."
            )
        if high >= 0 and low > 0 and (not well_known(known.evidence) or len(known) < len(self) / 2):
            why = "the weights are not reliable enough for log p(x)"
            if "tails" in self.unchecked:
                why = f"the tails of the weights were not judged, {self.unchecked['tails']}; take 100 or more per datum"
            return "undecided", f"Not decided: {why} ({split})."
        unfinished = int((~known.converged).sum())
        # what such fits have not reached is counted as the family's part, never as the encoder's
        if high < 0 and unfinished:
            return "undecided", (
                f"Not decided: {unfinished} of {len(known)} fits had not converged, and the part of the gap that these "
                f"leave is not due to the family ({split})."
            )
        if high < 0 and self.held:
            return "undecided", (
                f"Not decided: {', '.join(self.held)} of the guide is not optimised per datum, and its part of the gap is "
                f"not due to the family ({split})."
            )
        if high < 0:
            return "family", f"The larger part of the gap is the family's (approximation): {split}."
        if low > 0:
            return "encoder", f"The larger part of the gap is the encoder's (amortization): {split}."
        return "undecided", (
            f"Not decided: with these draws the interval does not show which part of the gap is larger: {split}."
        )

    def _contrast(self, level: float) -> tuple[float, float]:
        """The interval of amortization minus approximation."""
        contrast = Estimate.over_data(self.amortization - self.approximation, self.std_errors["contrast"])
        low, high = contrast.confidence_interval(level)
        # log p(x) may be higher than its mean: extend the family's part to the upper end of its interval.
        log_evidence = Estimate.over_data(self.log_evidence, self.std_errors["log_evidence"])
        above = self.evidence.mean_confidence_interval(level)[1] - log_evidence.confidence_interval(level)[1]
        return low - max(above, 0), high

    def warnings(self) -> list[Warning]:
        """Warnings about these estimates. The estimator issues them at each call, `evaluate` once for all batches."""
        own = {reason: flags for reason, flags in self.doubts.items() if reason not in self.evidence.doubts}
        return [*self.evidence.warnings(), *table.warnings_about(own, self.evidence.method)]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {
            **to_plain(self),
            "std_errors": {name: value.tolist() for name, value in self.std_errors.items()},
            **{n: getattr(self, n).tolist() for n in GAPS},
            "evidence": self.evidence.to_dict(),
            "doubts": table.plain(self.doubts),
            "unchecked": self.unchecked,
            "reliable": self.reliable.tolist(),
        }

    def _in_short(self) -> str:
        summary = self.summary()
        gaps = ", ".join(f"{name} {summary[name].with_error()}" for name in GAPS if name in summary)
        return f"{len(self)} data, {gaps} nats, {int((~self.reliable).sum())} in doubt"

    def __str__(self) -> str:
        lines = [f"{f'Gaps of {len(self)} data, nats per datum':<40}{'mean':>10}{'Monte Carlo':>14}{'sampling':>12}"]
        for name, e in self.summary().items():
            title = f"  {self.titles[name]}" if name in GAPS else self.titles[name]
            errors = f"{float(e.std_error):>14.3f}{float(e.sampling_error):>12.3f}"
            if e.doubt:
                errors = f"   error not to be trusted: {e.doubt}"
            lines.append(f"{title:<40}{float(e.value):>10.3f}{errors}")
        lines += [
            *table.printed(self.doubts, self.unchecked, self.evidence.method),
            f"cost: {self.cost:g} decoder evaluations per datum",
            f"q*: {self.family}",
            *([f"given: {', '.join(self.evidence.given)}"] if self.evidence.given else []),
            self.verdict(),
        ]
        return page(lines)
