"""The record of what is missing, given what was seen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..evidence import Evidence
from ..ops import pareto_k_threshold
from ..records import Result, page, to_plain
from ..records import doubts as table
from .expectation import JUDGED


@dataclass(frozen=True, eq=False, repr=False)
class Imputation(Result):
    """What is missing given what was seen, per datum, as `impute` returned it. B data, X the shape of a site for a datum.

    Mappings are by observed site, as its name in the model, with numbers (B, X) in the units of x.

    :ivar mean: E[x given what was seen]: x filled in. What was seen stays as it is. NaN where the likelihood has no mean,
        and for what lies behind a masked latent, as after the end of a sequence. In that case alone draws are NaN too.
    :ivar stddev: standard deviation of what is missing, given what was seen; zero for what was seen. It has no error of its
        own. NaN where the likelihood has none, as with heavy tails.
    :ivar std_error: Monte Carlo error of `mean`; zero for what was seen.
    :ivar missing: bool, what is missing.
    :ivar in_doubt: bool, where tails or too few draws speak against mean or error.
    :ivar draws: (S, B, X), multiple imputation: S data sets with draws of what is missing; empty unless asked for.
    :ivar evidence: the `Evidence` behind it: log p of what was seen, from the same weights.
    :ivar num_particles: K, the draws behind each number.
    :ivar cost: decoder evaluations per datum.
    :ivar checks: (B,) bool by reason: what was found about the numbers that are missing.
    """

    _derived = ("num_missing", "doubts", "reliable")
    _hidden = ("checks", "draws")

    mean: dict[str, Tensor]
    stddev: dict[str, Tensor]
    std_error: dict[str, Tensor]
    missing: dict[str, Tensor]
    in_doubt: dict[str, Tensor]
    draws: dict[str, Tensor]
    evidence: Evidence
    num_particles: int
    cost: float
    checks: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.evidence)

    @property
    def num_missing(self) -> Tensor:
        """(B,), how many numbers of a datum are missing."""
        return torch.stack([holes.reshape(len(holes), -1).sum(1) for holes in self.missing.values()]).sum(0)

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where a datum is in doubt: those of `evidence`, and two of what is missing from it.

        They stand for more than 5% of the missing numbers of a datum; `in_doubt` has each. "function tails": Pareto k of
        weight times x. "few draws": the error rests on fewer than five.
        """
        return {**self.evidence.doubts, **self.checks}

    @property
    def unchecked(self) -> dict[str, str]:
        """Why a reason was not judged, by its name."""
        judged = "function tails" in self.checks or not self.checks
        return {**self.evidence.unchecked, **({} if judged else {"function tails": f"K < {JUDGED}"})}

    @property
    def reliable(self) -> Tensor:
        """(B,) true where there is no doubt at all."""
        return table.without_doubt(self.doubts, like=self.evidence.log_evidence)

    def warnings(self) -> list[Warning]:
        """What is in doubt about these numbers; `impute` raises it."""
        threshold = f"{pareto_k_threshold(self.num_particles):.2f}"
        said = [type(w)(f"the imputation goes by the weights of log p(x): {w}") for w in self.evidence.warnings()]
        of_means = table.warnings_about(self.checks, self.evidence.method, threshold=threshold)
        return [*said, *(type(w)(f"the mean of the likelihood is averaged, f: {w}") for w in of_means)]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {
            **to_plain(self),
            "evidence": self.evidence.to_dict(),
            "num_missing": self.num_missing.tolist(),
            "checks": table.plain(self.checks),
            "doubts": table.plain(self.doubts),
            "unchecked": self.unchecked,
            "reliable": self.reliable.tolist(),
        }

    def __str__(self) -> str:
        cost = f"cost {self.cost:g} decoder evaluations per datum"
        lines = [f"Imputation of {len(self)} data, K = {self.num_particles}, {cost}"]
        for name, holes in self.missing.items():
            with_holes = int(holes.reshape(len(holes), -1).any(1).sum())
            line = f"  {name}: {int(holes.sum())} of {holes.numel()} numbers are missing, in {with_holes} data"
            if bool(holes.any()):
                spread, error = (float(part[name][holes].nanmedian()) for part in (self.stddev, self.std_error))
                line += f"; median sd {spread:.3g}, Monte Carlo error of the mean {error:.2g}"
            lines.append(line)
            if without := int((self.mean[name].isnan() & holes).sum()):
                lines.append(
                    f"    {without} of them have no mean: classes (take draws, num_draws=), or behind masked latents"
                )
        if self.draws:
            lines.append(f"  {len(next(iter(self.draws.values())))} draws")
        lines += [f"  {line}" for line in table.printed(self.doubts, self.unchecked, self.evidence.method)]
        return page(lines)
