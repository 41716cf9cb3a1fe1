"""The record of the gaps between ELBO and log p(x) per datum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, UnreliableEvidenceWarning
from .evidence import DOUBTFUL, Evidence
from .joining import check_same, concatenated, mean_cost, to_plain
from .mean import LEVEL, Estimate

PER_DATUM = ("elbo", "optimal_elbo", "log_evidence", "converged")
SIGMAS, ROUNDING = 4.5, 0.05  # errors, and nats, by which log p(x) must lie below an ELBO to be refuted by it
GAPS = ("amortization", "approximation", "inference")


@dataclass(frozen=True, eq=False)
class Gaps:
    """The gaps between ELBO and log p(x) per datum, as `InferenceGaps` returned them. B data, nats.

    :ivar elbo: (B,) L[q] of the user's guide.
    :ivar optimal_elbo: (B,) L[q*] of the optimum per datum in a family that contains the guide, on fresh draws.
    :ivar log_evidence: (B,) log p(x), estimated from below.
    :ivar std_errors: Monte Carlo errors (B,) of the above and of the gaps, by name; differences are paired. "contrast" is
        that of amortization minus approximation.
    :ivar converged: (B,) whether the fit of q* settled; where not, amortization is too small.
    :ivar evidence: the `Evidence` behind `log_evidence`, with its ESS and Pareto k.
    :ivar family: what was freed per datum.
    :ivar num_particles: K behind L[q] and L[q*].
    :ivar cost: decoder evaluations per datum, all fits included; a gradient counts as three.
    """

    elbo: Tensor
    optimal_elbo: Tensor
    log_evidence: Tensor
    std_errors: Mapping[str, Tensor]
    converged: Tensor
    evidence: Evidence
    family: str
    num_particles: int
    cost: float

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
        check_same(records, ("family", "num_particles"))
        return cls(
            **concatenated(records, PER_DATUM),
            std_errors={n: torch.cat([r.std_errors[n] for r in records]) for n in records[0].std_errors},
            evidence=Evidence.cat([r.evidence for r in records]),
            family=records[0].family,
            num_particles=records[0].num_particles,
            cost=mean_cost(records),
        )

    def select(self, kept: Tensor) -> "Gaps":
        """The record of some of the data: those where `kept`, (B,) bool, is true, or those with these indices."""
        return replace(
            self,
            **{name: getattr(self, name)[kept] for name in PER_DATUM},
            std_errors={name: error[kept] for name, error in self.std_errors.items()},
            evidence=self.evidence.select(kept),
        )

    def __len__(self) -> int:
        return len(self.elbo)

    def summary(self) -> dict[str, Estimate]:
        """Means over the data: ELBO, optimal ELBO, log p(x) and the three gaps."""
        names = ("elbo", "optimal_elbo", "log_evidence", *GAPS)
        return {name: Estimate.over_data(getattr(self, name), self.std_errors[name]) for name in names}

    @property
    def titles(self) -> dict[str, str]:
        """What the numbers of `summary` are called; data outside the support have a score and no log p(x)."""
        top = "log p(x), lower bound" if self.evidence.support_checked else "score (data outside the support)"
        return {"elbo": "ELBO", "optimal_elbo": "optimal ELBO", "log_evidence": top, **{n: f"{n} gap" for n in GAPS}}

    def larger_part(self, level: float = LEVEL) -> str:
        """Which part of the mean gap is the larger one, "encoder" or "family"; or "undecided", as `verdict` explains."""
        return self._decide(level)[0]

    def verdict(self, level: float = LEVEL) -> str:
        """One sentence about the mean gaps that claims no more than the Monte Carlo intervals allow.

        Where the weights of more than 5% of the data have a heavy tail it is about the others alone, and says so.
        """
        return self._decide(level)[1]

    @property
    def refuted(self) -> Tensor:
        """(B,) true where log p(x) lies below L[q] or L[q*] by more than chance: it misses a mode, and is too low."""
        gaps = torch.stack([self.approximation, self.inference])
        errors = torch.stack([self.std_errors["approximation"], self.std_errors["inference"]])
        return (gaps < -(SIGMAS * errors + ROUNDING)).any(0)

    def _decide(self, level: float) -> tuple[str, str]:
        known = self
        if self.evidence.doubtful and bool((reliable := ~self.evidence.unreliable).any()):
            known = self.select(reliable)
        low, _ = known._contrast(level)
        _, high = self._contrast(level)
        if high < 0:  # of all data: what log p(x) lacks would only be added to the family's part
            known = self
        summary = known.summary()
        sizes = {n: f"{float(summary[n].value):.3f} +- {float(summary[n].std_error):.3f}" for n in GAPS}
        split = f"encoder {sizes['amortization']}, family {sizes['approximation']} nats (Monte Carlo error)"
        if len(known) < len(self):
            split += f" for the {len(known)} of {len(self)} data whose log p(x) is known well"
        unsettled, refuted = int((~known.converged).sum()), int(self.refuted.sum())
        if refuted > DOUBTFUL * len(self):
            below = f"log p(x) of {refuted} of {len(self)} data is below their ELBO, so too low"
            return "undecided", f"Not decided: {below} ({split})."
        if high >= 0 and low > 0 and (known.evidence.doubtful or len(known) < len(self) / 2):
            return "undecided", f"Not decided: log p(x) is not known well enough from these weights ({split})."
        if high < 0 and unsettled:  # what such fits have not reached is taken for the family's, never for the encoder's
            return "undecided", (
                f"Not decided: {unsettled} of {len(known)} fits had not settled, and their part of the gap is not the "
                f"family's ({split})."
            )
        if high < 0:
            return "family", f"The larger part of the gap is the family's (approximation): {split}."
        if low > 0:
            return "encoder", f"The larger part of the gap is the encoder's (amortization): {split}."
        return "undecided", f"Which part of the gap is larger is not decided by this budget: {split}."

    def _contrast(self, level: float) -> tuple[float, float]:
        """The interval of amortization minus approximation."""
        contrast = Estimate.over_data(self.amortization - self.approximation, self.std_errors["contrast"])
        low, high = contrast.confidence_interval(level)
        # log p(x) may be higher than its mean says: let the family's share grow to the upper end of its interval.
        log_evidence = Estimate.over_data(self.log_evidence, self.std_errors["log_evidence"])
        above = self.evidence.mean_confidence_interval(level)[1] - log_evidence.confidence_interval(level)[1]
        return low - max(above, 0), high

    def warnings(self) -> list[Warning]:
        """What is doubtful about these estimates; the estimator raises it, `evaluate` once for all batches."""
        doubts = self.evidence.warnings()
        if count := int(self.refuted.sum()):
            doubts.append(
                UnreliableEvidenceWarning(
                    f"log p(x) of {count} of {len(self)} data lies below their ELBO by more than chance, so it is too low: "
                    "the proposals miss a mode there. Raise num_particles, or give a guide with several modes"
                )
            )
        if count := int((~self.converged).sum()):
            doubts.append(
                ConvergenceWarning(
                    f"the optimum q* of {count} of {len(self)} data had not settled: their amortization gap is too small "
                    "and their approximation gap too large. Raise num_steps"
                )
            )
        return doubts

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        plain = to_plain(self)
        plain["std_errors"] = {name: value.tolist() for name, value in self.std_errors.items()}
        return {**plain, **{n: getattr(self, n).tolist() for n in GAPS}, "evidence": self.evidence.to_dict()}

    def __str__(self) -> str:
        lines = [f"{f'Gaps of {len(self)} data, nats per datum':<40}{'mean':>10}{'Monte Carlo':>14}{'sampling':>12}"]
        for name, e in self.summary().items():
            title = f"  {self.titles[name]}" if name in GAPS else self.titles[name]
            lines.append(f"{title:<40}{float(e.value):>10.3f}{float(e.std_error):>14.3f}{float(e.sampling_error):>12.3f}")
        lines += [
            f"Pareto k above threshold: {int(self.evidence.unreliable.sum())} of {len(self)}; "
            f"fits settled: {int(self.converged.sum())} of {len(self)}; "
            f"cost: {self.cost:g} decoder evaluations per datum",
            f"q*: {self.family}",
            self.verdict(),
        ]
        return "\n".join(lines)
