"""The record of the parts of a mean KL."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SurgeryWarning
from ..records import Estimate, Result, page, to_plain

PARTS = ("kl", "mutual_information", "marginal_kl", "total_correlation", "dimension_wise_kl")
NEAR = 0.1  # nats below log N within which the mutual information counts as limited by the number of data
ROUNDING = 1e-4  # nats
SIGMAS = 3.0
ROWS = 20  # dimensions shown when printed
AGGREGATES = {
    "full": "all data, exact for them",
    "leave-one-out": "all data except the one that z was drawn for: mutual information biased up, not bounded by log N",
    "minibatch": "the data of each batch: mutual information biased up, dimension-wise KL down",
}


@dataclass(frozen=True, eq=False, repr=False)
class Surgery(Result):
    """A mean KL(q(z|x) to p(z)) over N data and its parts, as returned by `ELBOSurgery`. D dimensions; nats per datum.

    The parts use the same draws, so kl = mutual_information + marginal_kl and marginal_kl = total_correlation +
    dimension_wise_kl hold up to rounding. For the same reason their errors are dependent and do not add up. The errors do
    not include the bias of an `aggregate` other than "full".

    :ivar kl: mean KL(q(z|x) to p(z)), an `Estimate` with its Monte Carlo and its sampling error, like all parts. With one
        particle per datum the Monte Carlo error is an upper bound, equal to the sampling error.
    :ivar mutual_information: between z and the index of its datum; from 0 to log N.
    :ivar marginal_kl: KL(q(z) to p(z)) of the aggregated posterior.
    :ivar total_correlation: KL(q(z) to the product of its q(z_d)); NaN where the guide's dimensions are not independent.
    :ivar dimension_wise_kl: sum of KL(q(z_d) to p(z_d)), including the dependence of a prior that does not factorise; NaN
        where `total_correlation` is.
    :ivar dimension_wise: (D,) KL(q(z_d) to p(z_d)); NaN where guide or prior do not factorise over dimensions.
    :ivar dimension_wise_std_error: its Monte Carlo errors, (D,).
    :ivar names: D names, `'z[3]'` for the fourth number of the latent site `'z'`.
    :ivar num_data: N, the data in q(z).
    :ivar num_draws: the number of data over which means were taken.
    :ivar num_particles: K, draws for each of them.
    :ivar aggregate: the estimate of q(z).
    :ivar cost: decoder evaluations per datum.

    Example::

        surgery = pv.ELBOSurgery(vae.model, vae.guide)(loader)
        surgery.mutual_information, surgery.verdict()
    """

    kl: Estimate
    mutual_information: Estimate
    marginal_kl: Estimate
    total_correlation: Estimate
    dimension_wise_kl: Estimate
    dimension_wise: Tensor
    dimension_wise_std_error: Tensor
    names: tuple[str, ...]
    num_data: int
    num_draws: int
    num_particles: int
    aggregate: str
    cost: float

    @classmethod
    def from_densities(
        cls,
        *,
        log_q: Tensor,
        log_mixture: Tensor,
        log_prior: Tensor,
        log_prior_by_dimension: Tensor | None,
        names: tuple[str, ...],
        num_data: int,
        aggregate: str,
        cost: float,
    ) -> "Surgery":
        """From log q(z|x) (K, n), log q(z) and log q(z_d) (K, n, 1 + D) or (K, n, 1), log p(z) (K, n), (K, n, D)."""
        num_particles, num_draws = log_q.shape
        dtype, log_prior = log_prior.dtype, log_prior.double()
        joint, by_dimension = log_mixture[..., 0], log_mixture[..., 1:]
        unknown = torch.full_like(
            by_dimension if by_dimension.shape[-1] else log_mixture.expand(-1, -1, len(names)), math.nan
        )
        known = by_dimension if by_dimension.shape[-1] else unknown
        product = known.sum(-1)
        sampled = num_draws < num_data
        terms = (log_q - log_prior, log_q - joint, joint - log_prior, joint - product, product - log_prior)
        parts = dict(zip(PARTS, (estimate_of(term, sampled, dtype) for term in terms), strict=True))
        separate = unknown if log_prior_by_dimension is None else known - log_prior_by_dimension.double()
        value, std_error, _ = mean_and_errors(separate, sampled)
        return cls(
            **parts,
            dimension_wise=value.to(dtype),
            dimension_wise_std_error=std_error.to(dtype),
            names=names,
            num_data=num_data,
            num_draws=num_draws,
            num_particles=num_particles,
            aggregate=aggregate,
            cost=cost,
        )

    @property
    def log_num_data(self) -> float:
        """log N, the ceiling of the mutual information, nats."""
        return math.log(self.num_data)

    @property
    def ceiling(self) -> bool:
        """Whether the mutual information is within 0.1 nats of log N, the most that N data allow."""
        return float(self.mutual_information.value) > self.log_num_data - NEAR

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about parts that are not known for this pair."""
        if bool(self.dimension_wise_kl.value.isnan()) and self.aggregate != "leave-one-out":
            return (
                "Total correlation and dimension-wise KL are not known: the guide's dimensions are not independent given x.",
            )
        if bool(self.dimension_wise.isnan().all()) and not bool(self.dimension_wise_kl.value.isnan()):
            return (
                "The prior does not factorise over dimensions: the dimension-wise KL includes their dependence under the "
                "prior, and may be negative.",
            )
        return ()

    def verdict(self) -> str:
        """One sentence about the share of the mutual information in the KL."""
        information, kl = float(self.mutual_information.value), float(self.kl.value)
        if not math.isfinite(information):
            return (
                "No verdict: the posteriors of some data do not overlap with any other, and the mutual information is not "
                "finite."
            )
        size = f"{information:.3f} +- {float(self.mutual_information.std_error):.3f} nats (Monte Carlo error)"
        if self.ceiling:
            return (
                f"The latents tell the {self.num_data} data apart, as far as these can show: {size} of at most "
                f"{self.log_num_data:.3f}."
            )
        share = f", {100 * information / kl:.0f} % of the KL" if kl > 0 and information >= 0 else ""
        if kl > 0 and information >= kl:  # more than 100% only by the noise of the other part
            share = ", all of the KL"
        return f"The latents say {size} about which of the {self.num_data} data they came from{share}."

    @property
    def doubts(self) -> dict[str, str]:
        """By part, why it is in doubt: it is outside its possible range, or a mutual information is at its ceiling."""
        limits = dict.fromkeys(PARTS, (0.0, math.inf))
        limits["mutual_information"] = (0.0, self.log_num_data)
        if bool(self.dimension_wise.isnan().all()):
            del limits["dimension_wise_kl"]  # it may be negative then
        cause = "too few draws: raise num_particles or num_draws"
        if self.aggregate != "full":
            cause = f"the bias of aggregate='{self.aggregate}', or {cause}, or use aggregate='full'"
        found = {}
        if self.ceiling:
            found["mutual_information"] = (
                f"the mutual information, {float(self.mutual_information.value):.4g} nats, is within {NEAR} of log N = "
                f"{self.log_num_data:.4g}: the data set is too small to tell how much more there is. Pass more data"
            )
        for name, (low, high) in limits.items():
            part = getattr(self, name)
            value, margin = float(part.value), SIGMAS * float(part.std_error)
            beyond = max(low - value, value - high)
            if beyond > ROUNDING and not beyond <= margin:
                found[name] = (
                    f"{name} is {value:.4g} nats (Monte Carlo error {float(part.std_error):.2g}), outside of "
                    f"[{low:g}, {high:.4g}]: that is {cause}"
                )
        return found

    @property
    def reliable(self) -> bool:
        """Whether there is no doubt at all."""
        return not self.doubts

    def warnings(self) -> list[Warning]:
        """Warnings about the doubts; the estimator issues them."""
        return [SurgeryWarning(sentence) for sentence in self.doubts.values()]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {
            **to_plain(self),
            "names": list(self.names),
            "log_num_data": self.log_num_data,
            "ceiling": self.ceiling,
            "notes": list(self.notes),
            "doubts": self.doubts,
            "reliable": self.reliable,
        }

    def _columns(self) -> dict[str, list[Any]]:
        """A row for each part, and one for each dimension."""
        estimates = [getattr(self, part) for part in PARTS]
        missing = [math.nan] * len(self.names)
        return {
            "part": [*PARTS, *(f"dimension_wise[{name}]" for name in self.names)],
            "value": [*(float(e.value) for e in estimates), *self.dimension_wise.tolist()],
            "std_error": [*(float(e.std_error) for e in estimates), *self.dimension_wise_std_error.tolist()],
            "sampling_error": [*(float(e.sampling_error) for e in estimates), *missing],
        }

    def _num_rows(self) -> int:
        return len(PARTS) + len(self.names)

    def _in_short(self) -> str:
        return f"{self.num_data} data, KL {self.kl.with_error(unit=' nats')}, {len(self.names)} dimensions"

    def __str__(self) -> str:
        titles = {
            "kl": "KL to the prior",
            "mutual_information": f"  mutual information (at most {self.log_num_data:.3f})",
            "marginal_kl": "  KL of q(z) to the prior",
            "total_correlation": "    total correlation",
            "dimension_wise_kl": "    dimension-wise KL",
        }
        title = f"Surgery of {self.num_data} data, nats per datum"
        monte_carlo = "Monte Carlo <=" if self.num_particles == 1 else "Monte Carlo"
        lines = [f"{title:<42}{'mean':>10}{monte_carlo:>16}{'sampling':>12}"]
        for name, title in titles.items():
            e = getattr(self, name)
            lines.append(f"{title:<42}{float(e.value):>10.3f}{float(e.std_error):>16.3f}{float(e.sampling_error):>12.3f}")
        lines += self._dimensions()
        lines.append(
            f"q(z): {AGGREGATES[self.aggregate]}; means over {self.num_draws} data, {self.num_particles} draws each"
        )
        return page([*lines, *self.notes, self.verdict()])

    def _dimensions(self) -> list[str]:
        if bool(self.dimension_wise.isnan().any()):
            return []
        order = self.dimension_wise.argsort(descending=True).tolist()
        rows = [
            f"{f'      {self.names[d]}':<42}{float(self.dimension_wise[d]):>10.3f}"
            f"{float(self.dimension_wise_std_error[d]):>16.3f}"
            for d in order[:ROWS]
        ]
        return rows + ([f"      ... {len(order) - ROWS} more dimensions, each less"] if len(order) > ROWS else [])


def mean_and_errors(terms: Tensor, sampled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, Monte Carlo and sampling error of terms (K, n, ...), independent between data.

    With one particle, the Monte Carlo error is at most the spread over the data. With data chosen at random, it equals the
    spread.
    """
    num_particles, num_draws = terms.shape[:2]
    means = terms.mean(0)
    value = means.mean(0)
    sampling = means.std(0) / math.sqrt(num_draws) if num_draws > 1 else torch.full_like(value, math.nan)
    if num_particles == 1 or sampled:
        return value, sampling, sampling
    return value, (terms.var(0).sum(0) / num_particles).sqrt() / num_draws, sampling


def estimate_of(terms: Tensor, sampled: bool, dtype: torch.dtype) -> Estimate:
    return Estimate(*(number.to(dtype) for number in mean_and_errors(terms, sampled)))
