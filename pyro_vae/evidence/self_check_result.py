"""The record of a check of an estimator on simulated data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UnreliableEvidenceWarning
from ..records import LEVEL, Result, check_records, page
from ..records import doubts as table
from .evidence import Evidence
from .sandwich import Sandwich

ALARM = 3.0  # standard errors: one false alarm in 700
NEAR = 0.1  # nats, the largest mean distance of the bounds, and the largest bias, that does not matter


@dataclass(frozen=True, eq=False, repr=False)
class SelfCheckResult(Result):
    """The result of `SelfCheck` on B data simulated from the user's model. Nats.

    :ivar evidence: the `Evidence` of the estimator under test.
    :ivar sandwich: the `Sandwich` of the same data.

    Example::

        check = pv.SelfCheck(model, guide, evidence=pv.AdaptiveImportanceSampling)(x)
        check.passed, check.bias, check.verdict()
    """

    _derived = ("doubts", "reliable", "loader_index")

    evidence: Evidence
    sandwich: Sandwich

    @classmethod
    def cat(cls, records: Sequence["SelfCheckResult"]) -> "SelfCheckResult":
        """Join the results of several batches in their order; they must come from the same check."""
        check_records(cls, records)
        return cls(Evidence.cat([r.evidence for r in records]), Sandwich.cat([r.sandwich for r in records]))

    @property
    def bias(self) -> tuple[float, float]:
        """Lower and upper bound on the mean of the estimate minus log p(x), each with an error in `bias_std_errors`."""
        return float(self._above().mean()), float(self._below().mean())

    @property
    def bias_std_errors(self) -> tuple[float, float]:
        """Standard errors of both bounds of `bias`, from the spread over the data, which includes all Monte Carlo errors."""
        if len(self) < 2:
            return math.nan, math.nan
        root = math.sqrt(len(self))
        return float(self._above().std()) / root, float(self._below().std()) / root

    def coverage(self, level: float = LEVEL) -> float:
        """The share of data for which the interval overlaps the bounds, widened by their errors. It should be `level`."""
        low, high = self.evidence.confidence_interval(level)
        bottom, _ = self.sandwich.lower.confidence_interval(level)
        _, top = self.sandwich.upper.confidence_interval(level)
        return float(((high >= bottom) & (low <= top)).double().mean())

    @property
    def outcome(self) -> str:
        """ "no bias seen", "too high", "too low", or why there is no answer: "bounds apart", "too few data".

        A bias is seen if it is more than three errors. "No bias seen" requires errors below 0.1 nats and bounds that are at
        most as far apart.
        """
        if is_above(self._above(), 0.0):
            return "too high"
        if is_above(self.sandwich.width, NEAR):
            return "bounds apart"
        if is_above(-self._below(), 0.0):
            return "too low"
        if not max(self.bias_std_errors) < NEAR:
            return "too few data"
        return "no bias seen"

    @property
    def passed(self) -> bool:
        """Whether no bias was seen, with errors and bounds small enough to show one."""
        return self.outcome == "no bias seen"

    def verdict(self) -> str:
        """The result in one sentence."""
        least, most = self.bias
        errors = self.bias_std_errors
        bias = f"bias between {least:+.3f} +- {errors[0]:.3f} and {most:+.3f} +- {errors[1]:.3f} nats"
        outcome = self.outcome
        if outcome == "too high":
            return f"The estimate is above its upper bound ({bias}): these data did not come from this model."
        if outcome == "bounds apart":
            width = float(self.sandwich.width.mean())
            return (
                f"Not decided: the bounds are {width:.2f} nats apart ({bias}). Raise num_steps. If they stay apart, the fit "
                "and the guide miss a part of the posterior, which weights cannot show: try start='prior', or a guide with "
                "several modes."
            )
        if outcome == "too low":
            return (
                f"The estimate is too low for this model ({bias}). "
                f"{table.remedy_for('below the ELBO', self.evidence.method)}."
            )
        if outcome == "too few data":
            return f"Not decided: {len(self)} data leave the bias open ({bias}). Pass more data, or raise num_steps."
        return f"No bias seen on {len(self)} simulated data ({bias}); intervals reach the bounds for {self.coverage():.0%}."

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where the estimate under test or one of the bounds is in doubt."""
        return table.either(self.evidence.doubts, self.sandwich.doubts)

    @property
    def unchecked(self) -> dict[str, str]:
        """Why a reason was not checked in one of the three, by reason."""
        return {**self.sandwich.unchecked, **self.evidence.unchecked}

    @property
    def reliable(self) -> Tensor:
        """(B,) true where there is no doubt at all."""
        return table.without_doubt(self.doubts, like=self.evidence.log_evidence)

    def warnings(self) -> list[Warning]:
        """The verdict, unless no bias was seen."""
        return [UnreliableEvidenceWarning(self.verdict())] if not self.passed else []

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {
            "evidence": self.evidence.to_dict(),
            "sandwich": self.sandwich.to_dict(),
            "bias": self.bias,
            "bias_std_errors": self.bias_std_errors,
            "coverage": self.coverage(),
            "outcome": self.outcome,
            "passed": self.passed,
            "verdict": self.verdict(),
            "doubts": table.plain(self.doubts),
            "unchecked": self.unchecked,
            "reliable": self.reliable.tolist(),
        }

    @property
    def loader_index(self) -> Tensor | None:
        """(B,) the place of each datum in the loader of `evaluate`, from 0; `None` in a record of one call."""
        return self.evidence.loader_index

    def __len__(self) -> int:
        return len(self.evidence)

    def __str__(self) -> str:
        return page([str(self.evidence), str(self.sandwich), self.verdict()])

    def _above(self) -> Tensor:
        return self.evidence.log_evidence - self.sandwich.upper.log_evidence

    def _below(self) -> Tensor:
        return self.evidence.log_evidence - self.sandwich.lower.log_evidence


def is_above(values: Tensor, limit: float) -> bool:
    """Whether the mean of values per datum is significantly above a limit."""
    if len(values) < 2:
        return False
    return float(values.mean()) - limit > ALARM * float(values.std()) / math.sqrt(len(values))
