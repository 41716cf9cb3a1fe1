"""The check of an estimate by a second one from a fit to the posterior."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..kernel import Call, Record
from ..noise import Noise
from ..ops import log_mean_exp, log_mean_exp_std_error
from ..proposals import SPACE, LatentSpace, PosteriorSide
from .evidence import Evidence

REASON = "posterior side"
HIGHEST_Z = 2.2  # joint standard errors by which the second estimate may be above the first


class SecondLook:
    """Collects the particles of one call and compares the two estimates.

    It never raises, and changes no draw of the first estimate.
    """

    def __init__(self, call: Call, num_particles: int, wanted: bool, *, fewest: int) -> None:
        self._call = call
        self._side: PosteriorSide | None = None
        self._why_not = why_not(call, num_particles, wanted, fewest)

    def watch_guide(self, guide: Record, model: Record, log_weight: Tensor) -> None:
        """One noise block of draws of the guide, with the model at some of them and log-weights (K, B)."""

        def add() -> None:
            if self._side is None:
                self._call.set_noise(Noise.CHECK, SPACE)
                self._space = LatentSpace(self._call, guide, model, discrete=True)
                self._side = PosteriorSide(self._space, searched=False)
            self._side.add(self._space.pack(self._call.latent_values(guide))[0], log_weight)

        self._attempt(add)

    def watch_proposal(self, space: LatentSpace, u: Tensor, log_weight: Tensor) -> None:
        """One noise block of draws of a proposal, u (K, B, D), with log-weights (K, B)."""

        def add() -> None:
            if self._side is None:
                self._side = PosteriorSide(space, searched=True)
            self._side.add(u, log_weight)

        self._attempt(add)

    def add_to(self, evidence: Evidence, log_weight: Tensor) -> Evidence:
        """The record with the result of the check, from all log-weights, (K, B)."""
        found: dict[str, Any] = {}
        before = self._call.cost

        def compare() -> None:
            assert self._side is not None
            second, std_error = self._side.estimate()
            joint = (std_error.square() + log_mean_exp_std_error(log_weight).square()).sqrt()
            higher = second > log_mean_exp(log_weight, 0) + HIGHEST_Z * joint
            found.update(second=second, second_std_error=std_error, checks={**evidence.checks, REASON: higher})

        self._attempt(compare)
        if self._why_not is not None:
            found = {"unchecked": {**evidence.unchecked, REASON: self._why_not}}
        return replace(evidence, **found, cost=evidence.cost + self._call.cost - before)

    def _attempt(self, step: Callable[[], None]) -> None:
        if self._why_not is None:
            try:
                step()
            except Exception as error:  # an error of the check must not lose the estimate
                self._why_not = first_clause(error)


def why_not(call: Call, num_particles: int, wanted: bool, fewest: int) -> str | None:
    if not wanted:
        return "check=False"
    if num_particles < fewest:
        return f"not judged below {fewest:,} particles"
    if not call.structure.latents:
        return "all latents are summed out"
    if call.structure.read_prior_sites:
        return "the prior draws some latents (prior_sites)"
    return None


def first_clause(error: Exception) -> str:
    """The start of a message, up to its explanation or remedy."""
    return re.split(r": |\. | \(", str(error).strip() or type(error).__name__, maxsplit=1)[0]
