"""The record of a lower and an upper bound on log p(x)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..records import Estimate, Result, check_records, page
from ..records import doubts as table
from .evidence import Evidence


@dataclass(frozen=True, eq=False, repr=False)
class Sandwich(Result):
    """Lower and upper bounds on log p(x) of simulated data, as returned by `BidirectionalMonteCarlo`. B data, nats.

    :ivar lower: `Evidence` with bound "lower", from chains that run from the start to the posterior.
    :ivar upper: `Evidence` with bound "upper", from chains that run backwards from the latents that produced the data. Its
        `std_error` is that of the chains, given those latents.

    Example::

        sim = pv.simulate(model, x)
        sandwich = pv.BidirectionalMonteCarlo(model, guide, latents=sim.latents)(sim.observed["obs"])
        sandwich.lower.log_evidence, sandwich.upper.log_evidence, sandwich.width
    """

    _derived = ("width", "doubts", "reliable", "loader_index")
    _headline = "width"
    _joins_in_steps = True

    lower: Evidence
    upper: Evidence

    @property
    def width(self) -> Tensor:
        """(B,) upper minus lower. Its expectation is not negative, but an estimate may be."""
        return self.upper.log_evidence - self.lower.log_evidence

    def mean_width(self) -> Estimate:
        """The mean width. Both errors come from its spread over the data, which includes the draw of the latents."""
        estimate = Estimate.over_data(self.width, self.lower.std_error, doubt=table.said_of_mean(~self.reliable))
        return replace(estimate, std_error=estimate.sampling_error)

    @classmethod
    def cat(cls, records: Sequence["Sandwich"]) -> "Sandwich":
        """Join the results of several batches in their order; they must come from the same estimator."""
        check_records(cls, records)
        return cls(Evidence.cat([r.lower for r in records]), Evidence.cat([r.upper for r in records]))

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where one of the two bounds is in doubt."""
        return table.either(self.lower.doubts, self.upper.doubts)

    @property
    def unchecked(self) -> dict[str, str]:
        """Why a reason was not checked for one of the bounds, by reason."""
        return {**self.lower.unchecked, **self.upper.unchecked}

    @property
    def reliable(self) -> Tensor:
        """(B,) true where there is no doubt at all."""
        return table.without_doubt(self.doubts, like=self.width)

    @property
    def loader_index(self) -> Tensor | None:
        """(B,) the place of each datum in the loader of `evaluate`, from 0; `None` in a record of one call."""
        return self.lower.loader_index

    def __len__(self) -> int:
        return len(self.lower)

    def warnings(self) -> list[Warning]:
        """The warnings of both bounds."""
        return [*self.lower.warnings(), *self.upper.warnings()]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {
            "lower": self.lower.to_dict(),
            "upper": self.upper.to_dict(),
            "doubts": table.plain(self.doubts),
            "unchecked": self.unchecked,
            "reliable": self.reliable.tolist(),
        }

    def __str__(self) -> str:
        width = self.mean_width()
        return page(
            [
                f"Sandwich of {len(self)} data, {self.lower.num_particles} chains each way; cost {self.lower.cost:g} forward"
                f" and {self.upper.cost:g} in reverse, decoder evaluations per datum",
                f"  upper bound  {self.upper.mean()}",
                f"  lower bound  {self.lower.mean()}",
                f"  width        {width.with_error(4, unit=' nats')}",
                *([] if self.lower.barrier is None else [f"  {self.lower.barrier}"]),
                *(f"  {line}" for line in table.printed(self.doubts, self.unchecked, self.lower.method)),
            ]
        )
