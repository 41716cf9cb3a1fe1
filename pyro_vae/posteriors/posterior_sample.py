"""The record of draws from the posterior."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..evidence import Evidence
from ..records import Result, page, to_plain
from ..records import doubts as table


@dataclass(frozen=True, eq=False, repr=False)
class PosteriorSample(Result):
    """S draws from p(z given x) for each of B data, as returned by `posterior`.

    :ivar latents: the draws by site, in the shapes of the program with an axis of S draws in front: (S, B, D).
    :ivar means: the mean of the likelihood at each draw by observed site, (S, B, X), where it has one; empty without
        `means=True`.
    :ivar num_distinct: (B,), the number of different draws among the S. Sites that the guide enumerates are drawn anew in
        each and do not count.
    :ivar num_particles: K, the weighted draws from which they were resampled.
    :ivar evidence: the `Evidence` of the same weights; its `ess` limits the number of distinct draws.

    Example::

        sample = pv.posterior(model, guide, x, num_samples=100)
        sample.latents["latent"], sample.num_distinct       # (100, B, D), (B,)
    """

    _derived = ("doubts", "reliable")
    _hidden = ("latents", "means")

    latents: dict[str, Tensor]
    means: dict[str, Tensor]
    num_distinct: Tensor
    num_particles: int
    evidence: Evidence

    def __len__(self) -> int:
        return len(self.num_distinct)

    @property
    def num_samples(self) -> int:
        """S."""
        return len(next(iter(self.latents.values())))

    @property
    def doubts(self) -> dict[str, Tensor]:
        """(B,) bool by reason, true where the weights are in doubt: the doubts of `evidence`."""
        return self.evidence.doubts

    @property
    def unchecked(self) -> dict[str, str]:
        """Why a reason was not checked, by reason."""
        return dict(self.evidence.unchecked)

    @property
    def reliable(self) -> Tensor:
        """(B,) true where there is no doubt at all."""
        return self.evidence.reliable

    def warnings(self) -> list[Warning]:
        """Warnings about the weights; `posterior` issues them."""
        return [type(w)(f"the draws use the weights of log p(x): {w}") for w in self.evidence.warnings()]

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain Python, for JSON."""
        return {**to_plain(self), "evidence": self.evidence.to_dict(), "reliable": self.reliable.tolist()}

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.latents.items())
        lines = [
            f"Posterior sample of {len(self)} data, {self.num_samples} draws each out of K = {self.num_particles}",
            f"  {shapes}",
            f"  distinct draws median {int(self.num_distinct.median())}, lowest {int(self.num_distinct.min())}",
            f"  ESS of the weights median {float(self.evidence.ess.median()):.0f}, lowest {self.evidence.ess.min():.1f}",
        ]
        lines += [f"  {line}" for line in table.printed(self.doubts, self.evidence.unchecked, self.evidence.method)]
        return page(lines)
