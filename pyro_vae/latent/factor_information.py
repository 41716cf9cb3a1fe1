"""The record of the information of each latent dimension about each factor of the data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SurgeryWarning
from ..records import Estimate, Result, page, to_plain
from .surgery import mean_and_errors

ROWS = 20  # factors shown when printed
HALF = 0.5  # share of the entropy of a factor above which a dimension is said to encode it
CLOSE = 0.05  # share of the entropy below which a difference does not count
SIGMAS = 4.5
AGGREGATES = {"full": "all data, exact for them", "leave-one-out": "all data except the one that z was drawn for"}


class Ratio(Estimate):
    """An estimate without a unit."""

    def __str__(self) -> str:
        return (
            f"{float(self.value):.3f} (Monte Carlo error {float(self.std_error):.3f}, "
            f"sampling error {float(self.sampling_error):.3f})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class FactorInformation(Result):
    """The information of D latent dimensions about F factors of N data, as returned by `MutualInformationGap`.

    Information and entropy are in nats; a gap is a share of an entropy and has no unit. Errors are paired: a gap is the mean
    over the data of one difference.

    :ivar mig: the mutual information gap, the mean of `gap` over the factors: an `Estimate` with its Monte Carlo and its
        sampling error, and **without a unit**. With one particle per datum the Monte Carlo error is an upper bound, equal to
        the sampling error.
    :ivar gap: (F,) the largest information about the factor minus the second largest, in shares of `entropy`; an information
        below zero counts as zero.
    :ivar gap_std_error: (F,) its Monte Carlo errors.
    :ivar gap_sampling_error: (F,) its sampling errors, over data drawn from a population, including the counts in `entropy`.
    :ivar information: (D, F) I(z_d; v_f), nats.
    :ivar information_std_error: (D, F) its Monte Carlo errors.
    :ivar information_sampling_error: (D, F) its sampling errors, over data drawn from a population.
    :ivar entropy: (F,) H(v_f) of the counts, nats.
    :ivar num_values: how many values each factor has.
    :ivar leave_one_out: (D, F) the `information` with the posterior of the datum that z was drawn for left out of both
        mixtures, from the same draws and for either `aggregate`. NaN where a datum is the only one with its value of the
        factor.
    :ivar names: D names, `'z[3]'` for the fourth number of the latent site `'z'`.
    :ivar num_data: N.
    :ivar num_particles: K, draws for each datum.
    :ivar aggregate: "full" or "leave-one-out".
    :ivar cost: decoder evaluations per datum.

    Example::

        found = pv.MutualInformationGap(vae.model, vae.guide)(DataLoader(TensorDataset(x, labels), 100))
        found.mig.value, found.gap, found.verdict()
    """

    mig: Estimate
    gap: Tensor
    gap_std_error: Tensor
    gap_sampling_error: Tensor
    information: Tensor
    information_std_error: Tensor
    information_sampling_error: Tensor
    entropy: Tensor
    num_values: tuple[int, ...]
    leave_one_out: Tensor
    names: tuple[str, ...]
    num_data: int
    num_particles: int
    aggregate: str
    cost: float

    @classmethod
    def from_terms(
        cls,
        terms: Tensor,
        left_out: Tensor,
        *,
        frequencies: Tensor,
        num_values: tuple[int, ...],
        names: tuple[str, ...],
        aggregate: str,
        dtype: torch.dtype,
        cost: float,
    ) -> "FactorInformation":
        """The record, from terms in double precision.

        These are log q(z_d|v_f) - log q(z_d), (K, N, F, D), the same without the posterior of the datum drawn for, and for
        each datum the share of the data that has its value, (N, F).
        """
        surprise = -frequencies.log()
        gap, residuals = gap_of(terms, surprise)
        _, gap_error, gap_sampling = mean_and_errors(residuals, sampled=False)
        _, error, sampling = mean_and_errors(residuals.mean(-1), sampled=False)
        information, std_error, sampling_error = (part.T.to(dtype) for part in mean_and_errors(terms, sampled=False))
        return cls(
            mig=Ratio(gap.mean().to(dtype), error.to(dtype), sampling.to(dtype)),
            gap=gap.to(dtype),
            gap_std_error=gap_error.to(dtype),
            gap_sampling_error=gap_sampling.to(dtype),
            information=information,
            information_std_error=std_error,
            information_sampling_error=sampling_error,
            entropy=surprise.mean(0).to(dtype),
            num_values=num_values,
            leave_one_out=left_out.mean((0, 1)).T.to(dtype),
            names=names,
            num_data=terms.shape[1],
            num_particles=terms.shape[0],
            aggregate=aggregate,
            cost=cost,
        )

    @property
    def order(self) -> Tensor:
        """(D, F) for every factor the dimensions, in the order of falling information."""
        return self.information.argsort(dim=0, descending=True, stable=True)

    @property
    def leave_one_out_mig(self) -> float:
        """The value of `mig` for "leave-one-out"."""
        return float((ahead(self.leave_one_out.T.topk(min(2, len(self.names))).values.clamp(min=0.0)) / self.entropy).mean())

    def verdict(self) -> str:
        """One sentence: how many factors are encoded by one dimension, by several, or by none."""
        best = (self.information / self.entropy).max(0).values
        best_error = self.information_std_error.gather(0, self.order[:1])[0] / self.entropy
        apart = self.gap - 2 * self.gap_std_error > HALF
        shared = (self.gap + 2 * self.gap_std_error < HALF) & (best - 2 * best_error > HALF)
        unknown = best + 2 * best_error < HALF
        undecided = len(self.gap) - int((apart | shared | unknown).sum())
        return (
            f"MIG {float(self.mig.value):.3f} +- {float(self.mig.std_error):.3f} (Monte Carlo error): of {len(self.gap)} "
            f"factors {int(apart.sum())} encoded by one dimension (gap above {HALF}), {int(shared.sum())} by several, "
            f"{int(unknown.sum())} by none (no share above {HALF}), {undecided} undecided."
        )

    @property
    def doubts(self) -> dict[str, str]:
        """Why the information may reflect the number of data rather than the latents, by reason.

        "range": an information is outside its possible range. "rare values": a datum is the only one with its value of a
        factor. "own posterior": the information changes when each datum's own posterior is left out.
        """
        found = {}
        beyond = torch.maximum(-self.information, self.information - self.entropy)
        # an information further outside cannot be Monte Carlo error
        margin = (SIGMAS * self.information_std_error).minimum(self.entropy)
        bad = (beyond > CLOSE * self.entropy + margin).nonzero().tolist()
        if bad:
            d, f = bad[0]
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            found["range"] = (
                f"the information of '{self.names[d]}' about factor {f}{more} is {float(self.information[d, f]):.3g} nats, "
                f"outside of [0, {float(self.entropy[f]):.3g}]: the posteriors are so narrow that those of so few data do "
                "not overlap, or there are too few draws. Pass more data, or raise num_particles"
            )
        left_out = self.leave_one_out.clamp(min=0.0)
        if self.aggregate == "full" and bool(left_out.isnan().any()):
            found["rare values"] = (
                "some data are the only ones with their value of a factor, or their draws are far from the posteriors of "
                "all others: any difference from the others then counts as information about the factor. Join rare values, "
                "or pass more data"
            )
        elif self.aggregate == "full" and float((own := (self.information - left_out) / self.entropy).max()) > CLOSE:
            d, f = divmod(int(own.argmax()), own.shape[1])
            found["own posterior"] = (
                f"'{self.names[d]}' says {float(self.information[d, f]):.3g} nats of information about factor {f}, but "
                f"{float(left_out[d, f]):.3g} with each datum's own posterior left out (MIG {float(self.mig.value):.3g} and "
                f"{self.leave_one_out_mig:.3g}): the posteriors are so narrow, for so few data, that draws identify single "
                "data, and with them their factors. Pass more data before you draw conclusions about new data"
            )
        return found

    @property
    def reliable(self) -> bool:
        """Whether there is no doubt at all."""
        return not self.doubts

    def warnings(self) -> list[Warning]:
        """The doubts; the estimator raises them."""
        return [SurgeryWarning(sentence) for sentence in self.doubts.values()]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {
            **to_plain(self),
            "names": list(self.names),
            "num_values": list(self.num_values),
            "leave_one_out_mig": self.leave_one_out_mig,
            "order": self.order.tolist(),
            "doubts": self.doubts,
            "reliable": self.reliable,
        }

    def _columns(self) -> dict[str, list[Any]]:
        """A row for each factor, and a column for the information of each dimension about it."""
        by_factor = ("gap", "gap_std_error", "gap_sampling_error", "entropy")
        by_dimension = ("information", "information_std_error", "information_sampling_error", "leave_one_out")
        return {
            "num_values": list(self.num_values),
            **{name: getattr(self, name).tolist() for name in by_factor},
            **{
                f"{name}[{dim}]": values.tolist()
                for name in by_dimension
                for dim, values in zip(self.names, getattr(self, name), strict=True)
            },
        }

    def _num_rows(self) -> int:
        return len(self.gap)

    def _in_short(self) -> str:
        return (
            f"{self.num_data} data, {len(self.gap)} factors, {len(self.names)} dimensions, MIG {float(self.mig.value):.3f}"
        )

    def __str__(self) -> str:
        width = max(len("most in"), *(len(name) for name in self.names))
        title = f"Information about factors, {self.num_data} data, {len(self.names)} dimensions"
        monte_carlo = "Monte Carlo <=" if self.num_particles == 1 else "Monte Carlo"
        lines = [
            f"{title} (shares of each factor's entropy)",
            f"{'factor':>6}{'values':>8}{'nats':>8}  {'most in':<{width}}{'share':>7}  {'next':<{width}}{'share':>7}"
            f"{'gap':>8}{monte_carlo:>16}{'sampling':>10}",
        ]
        lines += [self._row(f, width) for f in range(min(len(self.gap), ROWS))]
        if len(self.gap) > ROWS:
            lines.append(f"... {len(self.gap) - ROWS} more factors")
        lines.append(
            f"{'MIG':>6}{float(self.mig.value):>{42 + 2 * width}.3f}{float(self.mig.std_error):>16.3f}"
            f"{float(self.mig.sampling_error):>10.3f}"
        )
        left_out = ""
        if self.aggregate == "full":
            left_out = f"; MIG {self.leave_one_out_mig:.3f} with the posterior of the datum drawn for left out"
        lines.append(f"q(z): {AGGREGATES[self.aggregate]}, {self.num_particles} draws each{left_out}")
        return page([*lines, self.verdict()])

    def _row(self, f: int, width: int) -> str:
        leaders = ""
        for d in self.order[:2, f].tolist():
            leaders += f"  {self.names[d]:<{width}}{float(self.information[d, f] / self.entropy[f]):>7.3f}"
        return (
            f"{f:>6}{self.num_values[f]:>8}{float(self.entropy[f]):>8.3f}{leaders:<{18 + 2 * width}}"
            f"{float(self.gap[f]):>8.3f}{float(self.gap_std_error[f]):>16.3f}{float(self.gap_sampling_error[f]):>10.3f}"
        )


def gap_of(terms: Tensor, surprise: Tensor) -> tuple[Tensor, Tensor]:
    """The gaps (F,) of terms (K, N, F, D), and the contribution of each draw, (K, N, F), up to a constant.

    The gap is a ratio, so a datum changes it by its part of the difference and by its part of the entropy. The latter is the
    same for all draws of a datum, and not part of the Monte Carlo error. Estimates below zero count as zero in the gap;
    their noise stays in the error.
    """
    entropy = surprise.mean(0)
    largest, places = terms.mean((0, 1)).topk(min(2, terms.shape[-1]), -1)
    leading = terms.gather(-1, places.expand(*terms.shape[:2], -1, -1))
    gap = ahead(largest.clamp(min=0.0)) / entropy
    return gap, (ahead(leading) - gap * surprise) / entropy


def ahead(leading: Tensor) -> Tensor:
    """The first minus the second of (..., 2); the first alone where there is only one."""
    return leading[..., 0] - leading[..., 1:].sum(-1)
