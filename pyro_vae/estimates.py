"""Records of results: frozen, per datum, with their errors, and they print themselves. All values in nats."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .ops import pareto_k_threshold

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over data with its two errors, which answer different questions.

    :ivar value: the mean, 0-d tensor, nats.
    :ivar std_error: **Monte Carlo** error: how far another seed would move the value *for these data*.
    :ivar sampling_error: error of the mean as a draw of data from a population; contains the Monte Carlo noise. NaN for
        one datum.
    """

    value: Tensor
    std_error: Tensor
    sampling_error: Tensor

    @classmethod
    def over_data(cls, values: Tensor, std_errors: Tensor) -> "Estimate":
        """From values and Monte Carlo errors per datum, shape (B,), independent between data."""
        num_data = values.shape[0]
        sampling = values.std() / math.sqrt(num_data) if num_data > 1 else torch.full_like(values[0], math.nan)
        return cls(values.mean(), std_errors.square().sum().sqrt() / num_data, sampling)

    def confidence_interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The Monte Carlo interval of the mean for these data."""
        half = normal_quantile(level) * float(self.std_error)
        return float(self.value) - half, float(self.value) + half

    def __str__(self) -> str:
        return (
            f"{float(self.value):.3f} nats (Monte Carlo error {float(self.std_error):.3f}, "
            f"sampling error {float(self.sampling_error):.3f})"
        )


def normal_quantile(level: float) -> float:
    """Two-sided: 1.96 for 0.95."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))


def student_quantile(level: float, df: int) -> float:
    """Two-sided quantile of Student's t, by Hill (1970, Algorithm 396); exact for one and two degrees of freedom."""
    tail = 1 - level
    if df == 1:
        return 1 / math.tan(tail * math.pi / 2)
    if df == 2:
        return math.sqrt(2 / (tail * (2 - tail)) - 2)
    a = 1 / (df - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * df
    y = (d * tail) ** (2 / df)
    if y > 0.05 + a:
        x = -normal_quantile(level)
        y = x * x
        if df < 5:
            c += 0.3 * (df - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = ((1 / (((df + 6) / (df * y) - 0.089 * d - 0.822) * (df + 2) * 3) + 0.5 / (df + 4)) * y - 1) * (df + 1) / (
            df + 2
        ) + 1 / y
    return math.sqrt(df * y)


def concatenated(records: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Join the per-datum fields of records of several batches, in their order."""
    joined: dict[str, Any] = {}
    for name in names:
        parts = [getattr(record, name) for record in records]
        joined[name] = None if parts[0] is None else torch.cat(parts)
    return joined


def to_plain(record: Any) -> dict[str, Any]:
    """Tensors as lists, for JSON."""
    return {
        f.name: value.tolist() if isinstance(value := getattr(record, f.name), Tensor) else value for f in fields(record)
    }


@dataclass(frozen=True)
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
    :ivar index: (B,) indices into a subsampled plate, or `None`.
    :ivar stripped_scales: the scales of `poutine.scale` and N/B, by site, that the estimate leaves out.
    :ivar support_checked: `False` when values outside the likelihood's support were let through: then this is a score,
        not log p(x).
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
    index: Tensor | None = None
    stripped_scales: Mapping[str, float] = field(default_factory=dict)
    support_checked: bool = True

    @classmethod
    def cat(cls, records: Sequence["Evidence"]) -> "Evidence":
        """Join the results of several batches in their order; they must come from the same estimator."""
        check_same(records, ("bound", "num_particles", "support_checked"))
        per_datum = ("log_evidence", "std_error", "elbo", "elbo_std_error", "ess", "pareto_k", "smoothed", "index")
        return cls(
            **concatenated(records, per_datum),
            bound=records[0].bound,
            num_particles=records[0].num_particles,
            cost=mean_cost(records),
            stripped_scales={k: v for r in records for k, v in r.stripped_scales.items()},
            support_checked=records[0].support_checked,
        )

    def __len__(self) -> int:
        return len(self.log_evidence)

    def mean(self) -> Estimate:
        """The mean of log p(x) over the data."""
        return Estimate.over_data(self.log_evidence, self.std_error)

    @property
    def unreliable(self) -> Tensor:
        """(B,) true where Pareto k is above min(1 - 1/log10 K, 0.7)."""
        return self.pareto_k > pareto_k_threshold(self.num_particles)

    def confidence_interval(self, level: float = LEVEL) -> tuple[Tensor, Tensor]:
        """Monte Carlo interval per datum, two tensors (B,).

        From 100 particles on [v - z s, max(v, v_PSIS) + z s / (1 - k)]: weights with a heavy tail (k > 0) miss on the
        low side, so only the upper end is widened. Below that, where no tail index can be fitted, Student's t. An
        interval cannot see a mode that the proposal never visits.
        """
        if self.bound == "exact":
            return self.log_evidence, self.log_evidence
        v, s = self.log_evidence, self.std_error
        if self.num_particles < 100:
            quantile = student_quantile(level, self.num_particles - 1) if self.num_particles > 1 else math.nan
            return v - quantile * s, v + quantile * s
        quantile = normal_quantile(level)
        return v - quantile * s, self._highest() + quantile * s * self._widening()

    def mean_confidence_interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The same interval for the mean over these data; errors of different data are independent."""
        estimate = self.mean()
        low, high = estimate.confidence_interval(level)
        if self.bound == "exact" or self.num_particles < 100:
            return low, high
        half = normal_quantile(level) * float((self.std_error * self._widening()).square().sum().sqrt()) / len(self)
        return low, float(self._highest().mean()) + half

    def _highest(self) -> Tensor:
        """The larger of the raw and the Pareto-smoothed estimate."""
        return torch.fmax(self.log_evidence, self.smoothed)

    def _widening(self) -> Tensor:
        """1 / (1 - k), at most 20: beyond that the tail is not known from these weights."""
        return 1 / (1 - self.pareto_k.nan_to_num(nan=0.0).clamp(0.0, 0.95))

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {**to_plain(self), "stripped_scales": dict(self.stripped_scales)}

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
        if self.stripped_scales:
            lines.append(f"  scales left out: {dict(self.stripped_scales)}")
        return "\n".join(lines)


def check_same(records: Sequence[Any], names: Sequence[str]) -> None:
    if not records:
        raise ValueError("cat needs at least one record, got none: did the loader yield any batch?")
    for name in names:
        values = {getattr(record, name) for record in records}
        if len(values) > 1:
            raise ValueError(f"records differ in {name} ({values}): only results of one estimator can be joined")


def mean_cost(records: Sequence[Any]) -> float:
    sizes = [len(record) for record in records]
    return sum(r.cost * n for r, n in zip(records, sizes, strict=True)) / sum(sizes)


GAPS = ("amortization", "approximation", "inference")


@dataclass(frozen=True)
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
            **concatenated(records, ("elbo", "optimal_elbo", "log_evidence", "converged")),
            std_errors={n: torch.cat([r.std_errors[n] for r in records]) for n in records[0].std_errors},
            evidence=Evidence.cat([r.evidence for r in records]),
            family=records[0].family,
            num_particles=records[0].num_particles,
            cost=mean_cost(records),
        )

    def __len__(self) -> int:
        return len(self.elbo)

    def summary(self) -> dict[str, Estimate]:
        """Means over the data: ELBO, optimal ELBO, log p(x) and the three gaps."""
        names = ("elbo", "optimal_elbo", "log_evidence", *GAPS)
        return {name: Estimate.over_data(getattr(self, name), self.std_errors[name]) for name in names}

    def verdict(self, level: float = LEVEL) -> str:
        """One sentence about the mean gaps of these data that claims no more than the Monte Carlo intervals allow."""
        summary = self.summary()
        contrast = Estimate.over_data(self.amortization - self.approximation, self.std_errors["contrast"])
        low, high = contrast.confidence_interval(level)
        # log p(x) may be higher than its mean says: let the family's share grow to the upper end of its interval.
        low -= max(self.evidence.mean_confidence_interval(level)[1] - summary["log_evidence"].confidence_interval(level)[1], 0)
        sizes = {n: f"{float(summary[n].value):.2f} +- {float(summary[n].std_error):.2f}" for n in GAPS}
        split = f"encoder {sizes['amortization']}, family {sizes['approximation']} nats (Monte Carlo error)"
        unsettled = int((~self.converged).sum())
        if unsettled > 0.05 * len(self):
            return f"Not decided: the per-datum optimum of {unsettled} of {len(self)} data had not settled ({split})."
        if low > 0:
            return f"The larger part of the gap is the encoder's (amortization): {split}."
        if high < 0:
            return f"The larger part of the gap is the family's (approximation): {split}."
        return f"Which part of the gap is larger is not decided by this budget: {split}."

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        plain = to_plain(self)
        plain["std_errors"] = {name: value.tolist() for name, value in self.std_errors.items()}
        return {**plain, **{n: getattr(self, n).tolist() for n in GAPS}, "evidence": self.evidence.to_dict()}

    def __str__(self) -> str:
        titles = {"elbo": "ELBO", "optimal_elbo": "optimal ELBO", "log_evidence": "log p(x), lower bound"}
        lines = [f"{f'Gaps of {len(self)} data, nats per datum':<40}{'mean':>10}{'Monte Carlo':>14}{'sampling':>12}"]
        for name, e in self.summary().items():
            title = titles.get(name, f"  {name} gap")
            lines.append(
                f"{title:<40}{float(e.value):>10.3f}{float(e.std_error):>14.3f}{float(e.sampling_error):>12.3f}"
            )
        lines += [
            f"Pareto k above threshold: {int(self.evidence.unreliable.sum())} of {len(self)}; "
            f"fits settled: {int(self.converged.sum())} of {len(self)}; "
            f"cost: {self.cost:g} decoder evaluations per datum",
            f"q*: {self.family}",
            self.verdict(),
        ]
        return "\n".join(lines)
