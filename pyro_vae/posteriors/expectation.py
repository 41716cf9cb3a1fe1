"""The record of a posterior expectation per datum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..evidence import Evidence
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

JUDGED = 100  # fewest draws with which tails are judged
PER_DATUM = ("value", "std_error", "ess", "pareto_k", "guide_value", "guide_std_error", "bias_std_error", "in_doubt")


@dataclass(frozen=True, eq=False, repr=False)
class Expectation(Result):
    """E[f(z) given x] per datum, as returned by `PosteriorExpectation`. B data, F the shape of f for a datum, in units of f.

    Intervals of probabilities include Wilson's, see Brown, Cai and DasGupta (2001), "Interval Estimation for a Binomial
    Proportion", https://doi.org/10.1214/ss/1009213286.

    :ivar value: (B, F), E[f(z) given x] by weighted draws.
    :ivar std_error: (B, F), its Monte Carlo error; not reliable where the datum is not `reliable`. For a probability it is
        at least one over the effective sample size of the weights, which is the change by one further draw.
    :ivar ess: (B, F), effective sample size for f: as many exact draws from the posterior would have the same error. Where
        fewer than five draws determine the error, it is the effective sample size of the weights.
    :ivar pareto_k: (B, F), the larger of the tail indices of the weights and of weight times f; nan below 100 draws.
    :ivar guide_value: (B, F), E_q[f(z)] under the guide.
    :ivar guide_std_error: (B, F), its Monte Carlo error.
    :ivar bias_std_error: (B, F), Monte Carlo error of `bias`.
    :ivar in_doubt: (B, F), where the error of a number is in doubt because of tails or too few draws.
    :ivar evidence: the `Evidence` with log p(x) from the same weights.
    :ivar is_probability: whether f returns truth values.
    :ivar num_particles: K, draws for each value.
    :ivar cost: decoder evaluations per datum, without those of f itself.
    :ivar checks: (B,) bool by reason: the results of the checks of f.

    Example::

        result = pv.PosteriorExpectation(model, guide, lambda z: z["latent"])(x)
        result.value, result.std_error, result.confidence_interval()
    """

    _derived = ("bias", "doubts", "reliable", "loader_index")
    _hidden = ("checks",)
    _headline = "value"
    _joins_in_steps = True

    value: Tensor
    std_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    guide_value: Tensor
    guide_std_error: Tensor
    bias_std_error: Tensor
    in_doubt: Tensor
    evidence: Evidence
    is_probability: bool
    num_particles: int
    cost: float
    checks: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def cat(cls, records: Sequence["Expectation"]) -> "Expectation":
        """Join the results of several batches in their order; they must come from the same estimator."""
        check_records(cls, records)
        check_same(records, ("is_probability", "num_particles"))
        return cls(
            **concatenated(records, PER_DATUM),
            evidence=Evidence.cat([r.evidence for r in records]),
            is_probability=records[0].is_probability,
            num_particles=records[0].num_particles,
            cost=mean_cost(records),
            checks={n: torch.cat([r.checks[n] for r in records]) for n in records[0].checks},
        )

    def select(self, kept: Tensor) -> "Expectation":
        """The record of some of the data: those where `kept`, (B,) bool, is true, or those with these indices."""
        kept = places(kept, len(self))
        some: dict[str, Any] = {n: getattr(self, n)[kept] for n in PER_DATUM}
        checks = {name: flags[kept] for name, flags in self.checks.items()}
        return replace(self, **some, checks=checks, evidence=self.evidence.select(kept))

    @property
    def loader_index(self) -> Tensor | None:
        """(B,) the place of each datum in the loader of `evaluate`, from 0; `None` in a record of one call."""
        return self.evidence.loader_index

    def __len__(self) -> int:
        return len(self.value)

    @property
    def bias(self) -> Tensor:
        """(B, F), the value under the guide minus the value under the posterior; its error is `bias_std_error`."""
        return self.guide_value - self.value

    def mean(self) -> Estimate:
        """The mean over the data, for an f with one number per datum.

        :raises OptionError: for an f with more numbers per datum; `value.mean(0)` has a mean for each of its numbers.
        """
        return self._over_data(self.value, self.std_error)

    def mean_bias(self) -> Estimate:
        """The mean of `bias` over the data, for an f with one number per datum.

        :raises OptionError: for an f with more numbers per datum.
        """
        return self._over_data(self.bias, self.bias_std_error)

    def _over_data(self, values: Tensor, errors: Tensor) -> Estimate:
        if values.ndim > 1:
            raise OptionError(
                f"a mean over data needs one number per datum, and f has the shape {tuple(values.shape[1:])}: use "
                "value.mean(0), with the error std_error.square().sum(0).sqrt() / B"
            )
        return Estimate.over_data(values, errors, doubt=table.said_of_mean(~self.reliable), unit="")

    def confidence_interval(self, level: float = LEVEL) -> tuple[Tensor, Tensor]:
        """Monte Carlo interval per datum, two tensors (B, F): value +- z std_error, below 100 draws by Student's t.

        For a probability it is the union of that interval and Wilson's, within [0, 1]. It then has a positive length also
        where f is true at no draw, or at every draw. Each of the two intervals alone is too short on one side.
        """
        few = 1 < self.num_particles < JUDGED
        z = student_quantile(level, self.num_particles - 1) if few else normal_quantile(level)
        low, high = self.value - z * self.std_error, self.value + z * self.std_error
        if not self.is_probability:
            return low, high
        n = self.evidence.ess.reshape(-1, *[1] * (self.value.ndim - 1)).to(self.value)
        half = (z**2 * self.std_error.square() + z**4 / (4 * n.square())).sqrt()
        middle = self.value + z**2 / (2 * n)
        low = torch.fmin(low, (middle - half) / (1 + z**2 / n))
        return low.clamp(min=0.0), torch.fmax(high, (middle + half) / (1 + z**2 / n)).clamp(max=1.0)

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where a datum is in doubt: the doubts of `evidence`, and two about f.

        The latter are true where more than 5% of the numbers of f are in doubt; `in_doubt` has each. "function tails":
        Pareto k of weight times f is above min(1 - 1/log10 K, 0.7). "few draws": fewer than five draws determine the error,
        or f is constant over the draws of this datum but not over those of others. It does not apply to probabilities, whose
        intervals allow for it.
        """
        return {**self.evidence.doubts, **self.checks}

    @property
    def unchecked(self) -> dict[str, str]:
        """Why a reason was not checked, by reason."""
        judged = "function tails" in self.checks or not self.checks
        return {**self.evidence.unchecked, **({} if judged else {"function tails": f"K < {JUDGED}"})}

    @property
    def reliable(self) -> Tensor:
        """(B,) true where there is no doubt at all."""
        return table.without_doubt(self.doubts, like=self.evidence.log_evidence)

    def warnings(self) -> list[Warning]:
        """Warnings about these numbers. The estimator issues them at each call, `evaluate` once for all batches."""
        of_weights = [type(w)(f"E[f(z) given x] uses the weights of log p(x): {w}") for w in self.evidence.warnings()]
        threshold = f"{pareto_k_threshold(self.num_particles):.2f}"
        return [*of_weights, *table.warnings_about(self.checks, self.evidence.method, threshold=threshold)]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {
            **to_plain(self),
            "evidence": self.evidence.to_dict(),
            "bias": self.bias.tolist(),
            "checks": table.plain(self.checks),
            "doubts": table.plain(self.doubts),
            "unchecked": self.unchecked,
            "reliable": self.reliable.tolist(),
        }

    def __str__(self) -> str:
        shape = "" if self.value.ndim == 1 else f", f of shape {tuple(self.value.shape[1:])}"
        cost = f"cost {self.cost:g} decoder evaluations per datum"
        lines = [f"Expectation of {len(self)} data, K = {self.num_particles}{shape}, {cost}"]
        if self.value.ndim == 1:
            lines += [f"  E[f given x]  {self.mean()}", f"  guide's bias  {self.mean_bias()}"]
        else:
            seen = (self.bias.abs() > 3 * self.bias_std_error).double().mean()
            lines.append(f"  mean {float(self.value.mean()):.3f}, by the guide {float(self.guide_value.mean()):.3f}")
            lines.append(f"  {float(seen):.0%} of the numbers have a bias of the guide beyond three errors")
        lines.append(f"  ESS median {float(self.ess.median()):.0f}, lowest {float(self.ess.min()):.1f}")
        lines += [f"  {line}" for line in table.printed(self.doubts, self.unchecked, self.evidence.method)]
        return page(lines)
