"""The record of log p(x) per datum."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UnreliableEvidenceWarning
from ..ops import pareto_k_threshold
from .curve import KCurve
from .joining import check_same, concatenated, mean_cost, to_plain
from .mean import LEVEL, Estimate, normal_quantile, student_quantile

DOUBTFUL = 0.05  # share of data with a fault beyond which a mean over them is not believed

PER_DATUM = (
    "log_evidence",
    "std_error",
    "elbo",
    "elbo_std_error",
    "ess",
    "pareto_k",
    "smoothed",
    "acceptance",
    "second",
    "second_std_error",
    "index",
)


@dataclass(frozen=True, eq=False)
class Evidence:
    """log p(x) per datum, as an estimator returned it. B data; nats; larger is better.

    :ivar log_evidence: (B,) estimate of log p(x).
    :ivar std_error: (B,) its Monte Carlo error (delta method); too small where `pareto_k` is high.
    :ivar elbo: (B,) L[q] of the user's own guide, whatever the estimator.
    :ivar elbo_std_error: (B,) Monte Carlo error of `elbo`.
    :ivar ess: (B,) effective sample size, between 1 and `num_particles`.
    :ivar pareto_k: (B,) tail index of the weights; nan below 100 particles.
    :ivar smoothed: (B,) the same estimate with Pareto-smoothed weights; only the upper end of the interval reads it.
    :ivar bound: "lower" (at most log p(x) in expectation), "upper", "exact" or "consistent".
    :ivar num_particles: K, the weights behind each value.
    :ivar cost: decoder evaluations per datum; a gradient counts as three.
    :ivar acceptance: (B,) mean acceptance of the transitions of annealed chains, or `None`.
    :ivar second: (B,) log p(x) once more, from the posterior's side, or `None`: see `ImportanceSampling`. Only the upper end
        of the intervals reads it. It saw the same particles, so it is no bound and no better estimate.
    :ivar second_std_error: (B,) its Monte Carlo error.
    :ivar curve: the estimate against K, where the weights are independent and alike (`ImportanceSampling`), or `None`.
    :ivar index: (B,) indices into a subsampled plate, or `None`.
    :ivar stripped_scales: the scales of `poutine.scale` and N/B, by site, that the estimate leaves out.
    :ivar support_checked: `False` when values outside the likelihood's support were let through: then this is a score,
        not log p(x).
    :ivar checks: (B,) bool by reason: what a check of the estimator's own has found, true where it doubts the number.
    :ivar unchecked: why a reason was not judged, by its name.
    """

    log_evidence: Tensor
    std_error: Tensor
    elbo: Tensor
    elbo_std_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    smoothed: Tensor
    bound: str
    num_particles: int
    cost: float
    acceptance: Tensor | None = None
    second: Tensor | None = None
    second_std_error: Tensor | None = None
    curve: KCurve | None = None
    index: Tensor | None = None
    stripped_scales: Mapping[str, float | Tensor] = field(default_factory=dict)
    support_checked: bool = True
    checks: Mapping[str, Tensor] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def cat(cls, records: Sequence["Evidence"]) -> "Evidence":
        """Join the results of several batches in their order; they must come from the same estimator."""
        check_same(records, ("bound", "num_particles", "support_checked"))
        curves = [r.curve for r in records if r.curve is not None]
        return cls(
            **concatenated(records, PER_DATUM),
            curve=KCurve.cat(curves) if len(curves) == len(records) else None,
            bound=records[0].bound,
            num_particles=records[0].num_particles,
            cost=mean_cost(records),
            stripped_scales={k: v for r in records for k, v in r.stripped_scales.items()},
            support_checked=records[0].support_checked,
            checks={n: torch.cat([r._check(n) for r in records]) for r in records for n in r.checks},
            unchecked={n: why for r in records for n, why in r.unchecked.items()},
        )

    def select(self, kept: Tensor) -> "Evidence":
        """The record of some of the data: those where `kept`, (B,) bool, is true, or those with these indices."""
        some: dict[str, Any] = {n: None if (v := getattr(self, n)) is None else v[kept] for n in PER_DATUM}
        checks = {name: flags[kept] for name, flags in self.checks.items()}
        return replace(self, **some, checks=checks, curve=None if self.curve is None else self.curve.select(kept))

    def __len__(self) -> int:
        return len(self.log_evidence)

    def mean(self) -> Estimate:
        """The mean of log p(x) over the data."""
        return Estimate.over_data(self.log_evidence, self.std_error)

    @property
    def unreliable(self) -> Tensor:
        """(B,) true where Pareto k is above min(1 - 1/log10 K, 0.7)."""
        return self.pareto_k > pareto_k_threshold(self.num_particles)

    @property
    def doubtful(self) -> bool:
        """Whether the mean over these data is not to be trusted: few weights, or heavy tails in more than 5% of the data."""
        if self.bound == "exact":
            return False
        return self.num_particles < 100 or int(self.unreliable.sum()) > DOUBTFUL * len(self)

    def confidence_interval(self, level: float = LEVEL) -> tuple[Tensor, Tensor]:
        """Monte Carlo interval per datum, two tensors (B,).

        From 100 particles on [v - z s, max(v, v_PSIS) + z s / (1 - k)]: weights with a heavy tail (k > 0) miss on the
        low side, so only the upper end is widened. Where `second` has an upper end of its own, the larger of the two counts.
        Below that, where no tail index can be fitted, Student's t. An interval cannot see a mode that the proposal never
        visits.
        """
        if self.bound == "exact":
            return self.log_evidence, self.log_evidence
        v, s = self.log_evidence, self.std_error
        if self.num_particles < 100:
            quantile = student_quantile(level, self.num_particles - 1) if self.num_particles > 1 else math.nan
            return v - quantile * s, v + quantile * s
        quantile = normal_quantile(level)
        if self.bound == "upper":  # minus the log of a mean of 1 / w, whose heavy tail pushes it up
            return torch.fmin(v, self.smoothed) - quantile * s * self._widening(), v + quantile * s
        high = self._highest() + quantile * s * self._widening()
        if self.second is not None and self.second_std_error is not None:
            high = torch.fmax(high, self.second + quantile * self.second_std_error)
        return v - quantile * s, high

    def mean_confidence_interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The same interval for the mean over these data; errors of different data are independent."""
        estimate = self.mean()
        low, high = estimate.confidence_interval(level)
        if self.bound == "exact":
            return low, high
        if self.num_particles < 100:
            quantile = student_quantile(level, self.num_particles - 1) if self.num_particles > 1 else math.nan
            half = quantile * float(estimate.std_error)
            return float(estimate.value) - half, float(estimate.value) + half
        half = normal_quantile(level) * float((self.std_error * self._widening()).square().sum().sqrt()) / len(self)
        if self.bound == "upper":
            return float(torch.fmin(self.log_evidence, self.smoothed).mean()) - half, high
        return low, max(float(self._highest().mean()) + half, self._second_high(level))

    def _second_high(self, level: float) -> float:
        """The upper end of the mean by the second estimates: of all data, or only of those where the check doubts the first.

        The first sees a shortfall that all data share and none shows, the second one that a few data have.
        """
        if self.second is None or self.second_std_error is None:
            return -math.inf
        known, ends = self.second.isfinite() & self.second_std_error.isfinite(), []
        for chosen in (known, known & self._check("posterior side")):
            values = torch.where(chosen, self.second, self._highest())
            errors = torch.where(chosen, self.second_std_error, self.std_error * self._widening())
            ends.append(float(values.mean()) + normal_quantile(level) * float(errors.square().sum().sqrt()) / len(self))
        return max(ends)

    def _check(self, reason: str) -> Tensor:
        """(B,), what a check found; false where it was not made."""
        return self.checks.get(reason, torch.zeros_like(self.log_evidence, dtype=torch.bool))

    def _highest(self) -> Tensor:
        """The larger of the raw and the Pareto-smoothed estimate."""
        return torch.fmax(self.log_evidence, self.smoothed)

    def _widening(self) -> Tensor:
        """1 / (1 - k), at most 20: beyond that the tail is not known from these weights."""
        return 1 / (1 - self.pareto_k.nan_to_num(nan=0.0).clamp(0.0, 0.95))

    def warnings(self) -> list[Warning]:
        """What is doubtful about these estimates; estimators raise it, `evaluate` once for all batches."""
        count = int(self.unreliable.sum())
        if not count:
            return []
        off = "high" if self.bound == "upper" else "low"
        remedy = (
            "Raise num_particles; where the guide was used as it is, AdaptiveImportanceSampling fits the proposal to each "
            "datum first"
        )
        if self.acceptance is not None:
            remedy = "Raise num_steps"
        return [
            UnreliableEvidenceWarning(
                f"the weights of {count} of {len(self)} data have a Pareto k above "
                f"{pareto_k_threshold(self.num_particles):.2f}: their log p(x) is likely too {off}, by more than the stated "
                f"error. {remedy}"
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        scales = {n: s.tolist() if isinstance(s, Tensor) else s for n, s in self.stripped_scales.items()}
        curve = None if self.curve is None else self.curve.to_dict()
        checks = {name: flags.tolist() for name, flags in self.checks.items()}
        return {**to_plain(self), "curve": curve, "stripped_scales": scales, "checks": checks}

    def __str__(self) -> str:
        elbo = Estimate.over_data(self.elbo, self.elbo_std_error)
        name = "log p(x)" if self.support_checked else "score (not log p(x): values outside the support)"
        lines = [
            f"Evidence of {len(self)} data, K = {self.num_particles}, cost {self.cost:g} decoder evaluations per datum",
            f"  {name:<10} {self.mean()}, bound: {self.bound}",
            f"  {'ELBO':<10} {elbo}",
            f"  ESS median {float(self.ess.median()):.0f}, lowest {float(self.ess.min()):.1f}; "
            f"Pareto k above threshold: {int(self.unreliable.sum())} of {len(self)}",
        ]
        if self.acceptance is not None:
            lines.append(
                f"  acceptance of the chains {float(self.acceptance.mean()):.2f}, lowest {float(self.acceptance.min()):.2f}"
            )
        if self.stripped_scales:
            lines.append(f"  scales left out: {dict(self.stripped_scales)}")
        return "\n".join(lines)
