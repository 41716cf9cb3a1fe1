"""Weighted draws from the posterior of each datum, in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LocalFitError, quoted
from ..evidence import Evidence, Fitted, ImportanceSampling, fitted_log_weights, summarise, with_search
from ..kernel import Call
from ..noise import NOISE_BLOCK, Noise
from ..ops import pareto_smooth
from ..proposals import proposal_draws
from ..records import FITTED_PROPOSALS

MASKS = 4  # noise block
LOOKED_AT = 3  # draws for the masks
FEWEST = 1000  # draws of the guide: the fewest for which the check by a second estimate is made


@dataclass(frozen=True)
class Block:
    """Some of the K draws.

    :ivar first: the index of the first one.
    :ivar values: by latent site, (K, *plates, *event).
    :ivar origin: (K, B), the component of the proposal that each comes from.
    """

    first: int
    values: dict[str, Tensor]
    origin: Tensor

    def __len__(self) -> int:
        return len(self.origin)


@dataclass(frozen=True)
class WeightedDraws:
    """K draws for each of B data.

    :ivar evidence: the record of log p(x) from the same draws.
    :ivar weights: (K, B), Pareto-smoothed, float64, summing to one; zeros for a datum without a positive weight.
    :ivar blocks: function that yields all draws, the same at every call.
    :ivar num_origins: the number of components from which the draws come.
    :ivar of_guide: whether the draws come from the guide.
    :ivar kept: where latents are not masked, by site that has a mask, broadcastable to (K, *plates, *event).
    """

    evidence: Evidence
    weights: Tensor
    blocks: Callable[[], Iterator[Block]]
    num_origins: int = 1
    of_guide: bool = False
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.weights)


def weighted_draws(call: Call, num_particles: int) -> WeightedDraws:
    """Weighted draws from fitted proposals, or from the guide where latents cannot be fitted.

    These are discrete latents, and latents with masks that depend on draws.

    Only weights (K, B) are kept: draws are made again from the same noise, which needs no decoder.
    """
    before = call.cost
    try:
        log_weight, elbo, fitted = fitted_log_weights(call, num_particles, None, "auto")
    except LocalFitError:
        return draws_of_guide(call, num_particles)
    evidence = summarise(call, log_weight, elbo, call.cost - before, FITTED_PROPOSALS)
    evidence = with_search(evidence, fitted, of_mean=True)
    if fitted is None:  # all latents are summed out: one draw without latents
        origin = torch.zeros(1, call.batch_size, dtype=torch.long, device=call.device)
        return WeightedDraws(evidence, torch.ones_like(origin, dtype=torch.float64), lambda: iter([Block(0, {}, origin)]))
    num_origins = len(fitted.proposal.components) + 1
    return WeightedDraws(
        evidence,
        normalised(log_weight),
        lambda: fitted_blocks(fitted, num_particles),
        num_origins=num_origins,
        kept=fitted.space.kept,
    )


def draws_of_guide(call: Call, num_particles: int) -> WeightedDraws:
    num_particles, before = max(num_particles, FEWEST), call.cost
    sampling: Any = ImportanceSampling(call.model.fn, call.guide.fn, num_particles=num_particles)
    evidence, log_weight = sampling.weighed(call)
    evidence = replace(evidence, cost=call.cost - before)
    return WeightedDraws(
        evidence,
        normalised(log_weight),
        lambda: guide_blocks(call, num_particles),
        of_guide=True,
        kept=kept_places(call),
    )


def kept_places(call: Call) -> dict[str, Tensor]:
    """Where latents are not masked, by site that has a mask. Masks that depend on draws are left to f."""
    call.set_noise(Noise.POSTERIOR, MASKS)
    guide = call.draw(LOOKED_AT)
    weights = call.weigh(guide, call.score(call.latent_values(guide), LOOKED_AT), LOOKED_AT)
    places = {name: weights.kept_places(name) for name in call.structure.latents}
    return {n: kept[:1] for n, kept in places.items() if kept is not None and bool((kept == kept[:1]).all())}


def hide(values: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of latents, canonical, NaN where they are masked; discrete ones are unchanged."""
    hidden = dict(values)
    for name, flags in kept.items():
        if values[name].is_floating_point():
            hidden[name] = torch.where(flags, values[name], math.nan)
    return hidden


def normalised(log_weight: Tensor) -> Tensor:
    """Weights (K, B) that sum to one, smoothed, none larger than the largest raw one (Vehtari et al. 2024)."""
    smoothed = torch.minimum(pareto_smooth(log_weight)[0], log_weight.amax(0)).double()
    return smoothed.softmax(0).nan_to_num(nan=0.0)


def fitted_blocks(fitted: Fitted, num_particles: int) -> Iterator[Block]:
    first = 0
    for u, origin in proposal_draws(fitted.space, fitted.proposal, num_particles):
        yield Block(first, fitted.space.unpack(u)[0], origin)
        first += len(u)


def guide_blocks(call: Call, num_particles: int) -> Iterator[Block]:
    for block, first in enumerate(range(0, num_particles, NOISE_BLOCK)):
        size = min(NOISE_BLOCK, num_particles - first)
        call.set_noise(Noise.GUIDE, block)
        values = call.latent_values(call.draw(size))
        check_no_axis(call, values)
        yield Block(first, values, torch.zeros(size, call.batch_size, dtype=torch.long, device=call.device))


def check_no_axis(call: Call, values: dict[str, Tensor]) -> None:
    """Raise for latents that the guide draws given an enumerated site: a particle then has one value per class."""
    layout = call.layout
    several = [n for n, v in values.items() if v.ndim > 1 + layout.num_plates + layout.event_dims[n]]
    if several:
        raise LocalFitError(
            f"the guide draws {quoted(several)} given {quoted(call.structure.guide_enumerated)}, which it enumerates, and "
            "no proposal can be fitted: let the guide draw the enumerated site (without infer={'enumerate': ...})"
        )
