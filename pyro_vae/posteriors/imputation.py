"""The record of missing values given the observed ones."""

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
    """Missing values given the observed ones, per datum, as returned by `impute`. B data, X the shape of a site for a datum.

    Mappings are by observed site, as its name in the model, with numbers (B, X) in the units of x.

    :ivar mean: x with E[x given the observed values] in place of missing values; observed values are unchanged. NaN where
        the likelihood has no mean, and where a masked latent determines the value, as after the end of a sequence. In the
        latter case draws are NaN too.
    :ivar stddev: standard deviation of missing values given the observed ones; zero for observed values. Its error is not
        estimated. NaN where the likelihood has none, as with heavy tails.
    :ivar std_error: Monte Carlo error of `mean`; zero for observed values.
    :ivar missing: bool, true where a value is missing.
    :ivar in_doubt: bool, where mean or error are in doubt because of tails or too few draws.
    :ivar draws: (S, B, X), multiple imputation: S data sets with draws of the missing values; empty without `num_draws`.
    :ivar evidence: the `Evidence` with log p of the observed values, from the same weights.
    :ivar num_particles: K, draws for each number.
    :ivar cost: decoder evaluations per datum.
    :ivar checks: (B,) bool by reason: the results of the checks of the missing values.

    Example::

        vae = pv.mlp_missing_vae(2, latent_dim=1, likelihood=pv.nn.Normal(0.5))
        table = torch.tensor([[0.3, -0.2], [0.9, torch.nan]])
        result = pv.impute(vae.model, vae.guide, table, seed=0)
        result.mean["obs"], result.stddev["obs"]        # (B, X) each
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
        """(B,), the number of missing values of a datum."""
        return torch.stack([holes.reshape(len(holes), -1).sum(1) for holes in self.missing.values()]).sum(0)

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where a datum is in doubt: the doubts of `evidence`, and two about its missing values.

        The latter are true where more than 5% of the missing values of a datum are in doubt; `in_doubt` has each. "function
        tails": by Pareto k of weight times x. "few draws": fewer than five draws determine the error.
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
        """Warnings about these numbers; `impute` issues them."""
        threshold = f"{pareto_k_threshold(self.num_particles):.2f}"
        said = [type(w)(f"the imputation uses the weights of log p(x): {w}") for w in self.evidence.warnings()]
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
                    f"    {without} of them have no mean: they are classes (use draws, num_draws=), or depend on "
                    "masked latents"
                )
        if self.draws:
            lines.append(f"  {len(next(iter(self.draws.values())))} draws")
        lines += [f"  {line}" for line in table.printed(self.doubts, self.unchecked, self.evidence.method)]
        return page(lines)
