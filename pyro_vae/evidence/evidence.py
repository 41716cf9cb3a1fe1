"""The record of log p(x) per datum."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConvergenceWarning
from ..ops import pareto_k_threshold
from ..records import (
    LEVEL,
    Estimate,
    Result,
    check_records,
    check_same,
    concatenated,
    mean_cost,
    normal_quantile,
    page,
    places,
    student_quantile,
    to_plain,
)
from ..records import doubts as table
from .barrier import Barrier
from .k_curve import KCurve

Bound = Literal["lower", "upper", "exact", "consistent"]
RAISE = "Raise max_cost, and ask for a smaller tolerance than is needed"
JUDGED = 100  # fewest weights for which a tail index is fitted
MANY = 10_000  # numbers converted to Python objects at a time: each takes ten times as much memory there

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
    "particles",
    "index",
    "loader_index",
    "fingerprint",
)


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Result):
    """log p(x) per datum, as returned by an estimator. B data; nats; larger is better.

    :ivar log_evidence: (B,) estimate of log p(x).
    :ivar std_error: (B,) its Monte Carlo error (delta method); too small, perhaps, where the datum is not `reliable`.
    :ivar elbo: (B,) the ELBO of the guide as given, also where the estimator used other proposals.
    :ivar elbo_std_error: (B,) Monte Carlo error of `elbo`.
    :ivar ess: (B,) effective sample size, between 1 and `num_particles`.
    :ivar pareto_k: (B,) tail index of the weights; nan below 100 particles.
    :ivar smoothed: (B,) the same estimate with Pareto-smoothed weights; only the upper end of the interval reads it.
    :ivar bound: "lower" (at most log p(x) in expectation), "upper", "exact" or "consistent".
    :ivar num_particles: K, weights per datum; the smallest number, where data have different numbers.
    :ivar cost: decoder evaluations per datum; a gradient counts as three.
    :ivar acceptance: (B,) mean acceptance of the transitions of annealed chains, or `None`.
    :ivar second: (B,) a second estimate of log p(x), from a fit to the posterior, or `None`: see the option `check` of
        `ImportanceSampling`. Only the upper end of the intervals uses it. It was fitted to the same particles, so it is
        neither a bound nor a better estimate.
    :ivar second_std_error: (B,) its Monte Carlo error.
    :ivar particles: (B,) K of each datum, where they differ; otherwise `None`.
    :ivar tolerance: the error requested from `AutoEvidence`; otherwise `None`.
    :ivar curve: the estimate as a function of K (`KCurve`) for independent draws from the guide (`ImportanceSampling`), or
        `None`.
    :ivar barrier: how many annealing steps are enough, for annealed chains (`Barrier`), or `None`.
    :ivar index: (B,) indices into a subsampled plate, or `None`.
    :ivar loader_index: (B,) the place of each datum in the loader of `evaluate`, from 0; `None` in a record of one call.
    :ivar fingerprint: (B,) int64, a hash of each observed datum, the same for any model. `compare` matches data by it.
        `None` where it is not known, as in a record that you made.
    :ivar measure: the kind of p(x): "probability" for discrete data, "density" or "mixed"; empty where it is not known.
    :ivar stripped_scales: the scales that the estimate does not apply, by site: those of `poutine.scale`, and N/B of
        subsampling.
    :ivar given: the sites outside the datum plate that have one value; all numbers here are conditional on these values.
    :ivar left_out: observations and factors of the guide that are not counted in log q.
    :ivar looped: why the guide or the model ran one particle at a time, by "guide" or "model". The numbers are right; it is
        slow.
    :ivar support_checked: `False` when values outside the likelihood's support were allowed: then the numbers are scores,
        not log p(x).
    :ivar method: what ran: "importance sampling" (draws from the guide), "fitted proposals", "annealed chains", "reverse
        chains", "exact", or the name of your estimator class. The remedies in warnings depend on it.
    :ivar checks: (B,) bool by reason: the results of the estimator's checks, true where the number is in doubt.
    :ivar unchecked: why a reason was not checked, by reason.

    Example::

        evidence = pv.AdaptiveImportanceSampling(model, guide)(x)
        evidence.log_evidence, evidence.confidence_interval(), evidence.reliable
    """

    _derived = ("doubts", "reliable")
    _hidden = ("checks", "curve")
    _headline = "log_evidence"
    _joins_in_steps = True

    log_evidence: Tensor
    std_error: Tensor
    elbo: Tensor
    elbo_std_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    smoothed: Tensor
    bound: Bound
    num_particles: int
    cost: float
    acceptance: Tensor | None = None
    second: Tensor | None = None
    second_std_error: Tensor | None = None
    particles: Tensor | None = None
    tolerance: float | None = None
    curve: KCurve | None = None
    barrier: Barrier | None = None
    index: Tensor | None = None
    fingerprint: Tensor | None = None
    measure: str = ""
    stripped_scales: Mapping[str, float | Tensor] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    looped: Mapping[str, str] = field(default_factory=dict)
    support_checked: bool = True
    method: str = ""
    checks: Mapping[str, Tensor] = field(default_factory=dict)
    unchecked: Mapping[str, str] = field(default_factory=dict)
    loader_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bound != "exact" and self.num_particles < JUDGED:
            object.__setattr__(self, "unchecked", {"tails": f"K < {JUDGED}", **self.unchecked})

    @classmethod
    def cat(cls, records: Sequence["Evidence"]) -> "Evidence":
        """Join the results of several batches in their order; they must come from the same estimator."""
        check_records(cls, records)
        same = ["bound", "tolerance", "given", "left_out", "support_checked", "method", "measure"]
        check_same(records, same if records and records[0].particles is not None else ["num_particles", *same])
        curves = [r.curve for r in records if r.curve is not None]
        barriers = [r.barrier for r in records if r.barrier is not None]
        return cls(
            **concatenated(records, PER_DATUM),
            curve=KCurve.cat(curves) if len(curves) == len(records) else None,
            barrier=Barrier.cat(barriers) if len(barriers) == len(records) else None,
            bound=records[0].bound,
            num_particles=min(r.num_particles for r in records),
            tolerance=records[0].tolerance,
            cost=mean_cost(records),
            measure=records[0].measure,
            stripped_scales={k: v for r in records for k, v in r.stripped_scales.items()},
            given=records[0].given,
            left_out=records[0].left_out,
            looped={side: why for r in records for side, why in r.looped.items()},
            support_checked=records[0].support_checked,
            method=records[0].method,
            checks=table.concatenated_flags(records),
            unchecked={n: why for r in records for n, why in r.unchecked.items()},
        )

    def select(self, kept: Tensor) -> "Evidence":
        """The record of some of the data: those where `kept`, (B,) bool, is true, or those with these indices."""
        kept = places(kept, len(self))
        some: dict[str, Any] = {n: None if (v := getattr(self, n)) is None else v[kept] for n in PER_DATUM}
        checks = {name: flags[kept] for name, flags in self.checks.items()}
        parts: dict[str, Any] = {
            name: None if (part := getattr(self, name)) is None else part.select(kept) for name in ("curve", "barrier")
        }
        particles = some["particles"]
        fewest = self.num_particles if particles is None or not len(particles) else int(particles.min())
        return replace(self, **some, **parts, checks=checks, num_particles=fewest)

    def __len__(self) -> int:
        return len(self.log_evidence)

    def mean(self) -> Estimate:
        """The mean of log p(x) over the data, with its errors.

        With more than 5% of the data in doubt, its text says that the errors are not reliable.
        """
        return Estimate.over_data(self.log_evidence, self.std_error, doubt=self._said_of_mean(~self.reliable))

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where the number is in doubt; a reason that was not judged is in `unchecked` instead.

        "tails": Pareto k is above min(1 - 1/log10 K, 0.7), or no weight is positive. "no weight": no weight is positive,
        where there are too few weights for Pareto k. The others are the results of the estimator's checks.
        """
        if self.bound == "exact":
            return dict(self.checks)
        if "tails" in self.unchecked:
            nothing = self.log_evidence == -math.inf
            return {**({"no weight": nothing} if bool(nothing.any()) else {}), **self.checks}
        tails = (self.pareto_k > self._threshold()) | (self.log_evidence == -math.inf)
        return {"tails": tails, **self.checks}

    @property
    def reliable(self) -> Tensor:
        """(B,) true where there is no doubt at all."""
        return table.without_doubt(self.doubts, like=self.log_evidence)

    def confidence_interval(self, level: float = LEVEL) -> tuple[Tensor, Tensor]:
        """Monte Carlo interval per datum, two tensors (B,).

        With 100 particles or more it is [v - z s, max(v, v_PSIS) + z s / (1 - k)]. Weights with a heavy tail (k > 0) give
        estimates that are too low, so only the upper end is widened. Where `second` exists, its upper end is used if it is
        larger. With fewer particles no tail index can be fitted, and the interval is Student's t. An interval does not
        contain the mass of a mode that the proposal never visits.
        """
        if self.bound == "exact":
            return self.log_evidence, self.log_evidence
        v, s = self.log_evidence, self.std_error
        if self.num_particles < JUDGED:
            quantile = student_quantile(level, self.num_particles - 1) if self.num_particles > 1 else math.nan
            return v - quantile * s, v + quantile * s
        quantile = normal_quantile(level)
        # an upper bound is minus the log of a mean of 1 / w; a heavy tail of 1 / w makes it too high
        if self.bound == "upper":
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
        if self.num_particles < JUDGED:
            quantile = student_quantile(level, self.num_particles - 1) if self.num_particles > 1 else math.nan
            half = quantile * float(estimate.std_error)
            return float(estimate.value) - half, float(estimate.value) + half
        half = normal_quantile(level) * float((self.std_error * self._widening()).square().sum().sqrt()) / len(self)
        if self.bound == "upper":
            return float(torch.fmin(self.log_evidence, self.smoothed).mean()) - half, high
        return low, max(float(self._highest().mean()) + half, self._second_high(level))

    def _second_high(self, level: float) -> float:
        """The upper end of the mean by the second estimates: of all data, or only of data that the check doubts.

        The former finds a shortfall that all data share and that is too small to show in any of them. The latter finds one
        that a few data have.
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
        """(B,), the result of a check; false where it was not made."""
        return self.checks.get(reason, torch.zeros_like(self.log_evidence, dtype=torch.bool))

    def _highest(self) -> Tensor:
        """The larger of the raw and the Pareto-smoothed estimate."""
        return torch.fmax(self.log_evidence, self.smoothed)

    def _threshold(self) -> float | Tensor:
        """The largest good Pareto k, by the number of weights."""
        if self.particles is None:
            return pareto_k_threshold(self.num_particles)
        threshold = torch.empty_like(self.log_evidence)
        for part, particles in zip(threshold.split(MANY), self.particles.split(MANY), strict=True):
            part.copy_(part.new_tensor([pareto_k_threshold(k) for k in particles.tolist()]))
        return threshold

    @property
    def _above(self) -> Tensor:
        """(B,) where the error is larger than the requested one."""
        return self.std_error > math.inf if self.tolerance is None else self.std_error > self.tolerance

    def _widening(self) -> Tensor:
        """1 / (1 - k), at most 20: a heavier tail cannot be measured with these weights."""
        return 1 / (1 - self.pareto_k.nan_to_num(nan=0.0).clamp(0.0, 0.95))

    def warnings(self) -> list[Warning]:
        """Warnings about these estimates. An estimator issues them at each call, `evaluate` once for all batches."""
        off = "high" if self.bound == "upper" else "low"
        threshold = f"{pareto_k_threshold(self.num_particles):.2f}"
        found = table.warnings_about(self.doubts, self.method, self._steps(), off=off, threshold=threshold)
        if bool(self._above.any()):
            found.append(ConvergenceWarning(f"{self._too_large()}. {RAISE}"))
        return found

    def _too_large(self) -> str:
        return f"the error of {table.count(self._above)} is above the tolerance of {self.tolerance:g}"

    def _steps(self) -> str:
        """The end of a remedy with the number of steps, where more are needed and the number is known."""
        if self.barrier is None or self.barrier.num_enough <= self.barrier.num_steps:
            return ""
        return f" to {self.barrier.num_enough}"

    def _said_of_mean(self, doubted: Tensor) -> str:
        """As `said_of_mean`, but of exact values, which have no error, even one in doubt counts."""
        if self.bound == "exact" and bool(doubted.any()):
            return f"{table.count(doubted)} in doubt"
        return table.said_of_mean(doubted)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        scales = {n: s.tolist() if isinstance(s, Tensor) else s for n, s in self.stripped_scales.items()}
        parts = {n: None if (part := getattr(self, n)) is None else part.to_dict() for n in ("curve", "barrier")}
        return {
            **to_plain(self),
            **parts,
            "stripped_scales": scales,
            "checks": table.plain(self.checks),
            "unchecked": dict(self.unchecked),
            "doubts": table.plain(self.doubts),
            "reliable": self.reliable.tolist(),
        }

    def _in_short(self) -> str:
        doubted = int((~self.reliable).sum())
        mean = self.mean().with_error(unit=" nats")
        return f"{len(self)} data, log p(x) {mean}, bound '{self.bound}', {doubted} in doubt"

    def __str__(self) -> str:
        rounded = self.doubts.get("precision", torch.zeros_like(self.reliable))
        elbo = Estimate.over_data(self.elbo, self.elbo_std_error, doubt=table.said_of_mean(rounded))
        name = "log p(x)" if self.support_checked else "score (not log p(x): values outside the support)"
        exact = self.bound == "exact"
        bound = f"{self.bound}, up to rounding" if exact and bool(rounded.any()) else self.bound
        most = self.num_particles if self.particles is None else int(self.particles.max())
        weights = "" if exact else f", K = {self.num_particles}" + (f" to {most}" if most > self.num_particles else "")
        lines = [
            f"Evidence of {len(self)} data{weights}, cost {self.cost:g} decoder evaluations per datum",
            f"  {name:<10} {self.mean()}, bound: {bound}",
            f"  {'ELBO':<10} {elbo}",
        ]
        if not exact:
            lines.append(f"  ESS median {float(self.ess.median()):.0f}, lowest {float(self.ess.min()):.1f}")
        known = self.elbo[:0] if self.acceptance is None else self.acceptance[self.acceptance.isfinite()]
        if len(known):  # NaN for data that were not annealed
            lines.append(f"  acceptance of the chains {float(known.mean()):.2f}, lowest {float(known.min()):.2f}")
        if self.barrier is not None:
            lines.append(f"  {self.barrier}")
        if bool(self._above.any()):
            lines.append(f"  {self._too_large()}: {RAISE[0].lower()}{RAISE[1:]}")
        lines += [f"  {line}" for line in table.printed(self.doubts, self.unchecked, self.method, self._steps())]
        if self.given:
            lines.append(f"  given: {', '.join(self.given)}")
        if self.left_out:
            lines.append(f"  left out of log q: {', '.join(self.left_out)}")
        lines += [f"  the {side} ran one particle at a time: {why}" for side, why in self.looped.items()]
        if self.stripped_scales:
            lines.append(f"  scales left out: {dict(self.stripped_scales)}")
        return page(lines)


def well_known(evidence: Evidence) -> bool:
    """Whether the mean over these data is reliable: enough weights to judge, and at most 5% of the data in doubt."""
    return "tails" not in evidence.unchecked and not evidence.mean().doubt
