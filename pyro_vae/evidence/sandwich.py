"""The record of log p(x) from below and from above."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..records import Estimate, Result, check_records, page
from ..records import doubts as table
from .evidence import Evidence


@dataclass(frozen=True, eq=False, repr=False)
class Sandwich(Result):
    """log p(x) of simulated data between two bounds, as `BidirectionalMonteCarlo` returned it. B data, nats.

    :ivar lower: `Evidence` with bound "lower", from chains that start before the data are known.
    :ivar upper: `Evidence` with bound "upper", from chains that start at the latents behind the data. Its `std_error` is
        that of the chains, given those latents.
    """

    _derived = ("width", "doubts", "reliable", "loader_index")
    _headline = "width"
    _joins_in_steps = True

    lower: Evidence
    upper: Evidence

    @property
    def width(self) -> Tensor:
        """(B,) upper minus lower; not negative in expectation, but its draws may be."""
        return self.upper.log_evidence - self.lower.log_evidence

    def mean_width(self) -> Estimate:
        """The mean width. Both errors are from its spread over the data, which contains the draw of the latents."""
        estimate = Estimate.over_data(self.width, self.lower.std_error, doubt=table.said_of_mean(~self.reliable))
        return replace(estimate, std_error=estimate.sampling_error)

    @classmethod
    def cat(cls, records: Sequence["Sandwich"]) -> "Sandwich":
        """Join the results of several batches in their order; they must come from the same estimator."""
        check_records(cls, records)
        return cls(Evidence.cat([r.lower for r in records]), Evidence.cat([r.upper for r in records]))

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where one of the two ends is in doubt."""
        return table.either(self.lower.doubts, self.upper.doubts)

    @property
    def unchecked(self) -> dict[str, str]:
        """Why a reason was not judged at one of the ends, by its name."""
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
        """Those of both ends."""
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
