"""Draws of the latents outside the plate of the data, with their densities: from the guide, or from fitted proposals."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..evidence import Fitted, fit_proposals, guide_draws, summed_draws
from ..kernel import Call, LogDensities, Outside, Record, narrow_record
from ..noise import NOISE_BLOCK, Noise
from ..ops import MIN_PARTICLES_FOR_K, log_mean_exp, log_mean_exp_std_error
from ..proposals import LatentSpace, MixtureProposal, draws_of_prior, proposal_draws

Values = dict[str, Tensor]
GUIDE, FITTED = "draws of the guide", "fitted proposals"
FEWEST_COMPARED = 3  # draws of the guide whose density is computed twice


@dataclass(frozen=True, eq=False)
class OutsideSample:
    """S draws theta of the latents outside the plate of the data.

    :ivar values: (S, *plates, *event) by site, including auxiliary draws of the guide.
    :ivar log_prior: (S,), log p(theta), including observations outside the plate.
    :ivar log_proposal: (S,), the log-density of the distribution from which theta was drawn.
    :ivar method: the name of that distribution.
    :ivar found: the fit, if there was a search for modes.
    """

    values: Values
    log_prior: Tensor
    log_proposal: Tensor
    method: str
    found: Fitted | None = None

    def __len__(self) -> int:
        return len(self.log_prior)


def from_guide(call: Call, outside: Outside, num_draws: int) -> OutsideSample:
    """Draws from the guide, in a call that treats all data as one datum."""
    parts: list[OutsideSample] = []
    for block, start in enumerate(range(0, num_draws, NOISE_BLOCK)):
        size = min(NOISE_BLOCK, num_draws - start)
        call.set_noise(Noise.GUIDE, block)
        guide = call.draw(size)
        if not parts:
            few = min(size, FEWEST_COMPARED)
            first = narrow_record(guide, call.layout, 0, few)
            outside.check_drawn_first(call, first, call.score(call.latent_values(first), few), few)
        for first_draw, length in call.chunks(size):
            piece = narrow_record(guide, call.layout, first_draw, length)
            model = call.score(call.latent_values(piece), length)
            latents, observed, drawn = outside.log_densities(call.weigh(piece, model, length))
            values = {n: full(v, length) for n, v in outside.values(piece).items()}
            parts.append(OutsideSample(values, latents + observed, drawn, GUIDE))
    return joined(parts)


def from_proposal(
    call: Call, outside: Outside, space: LatentSpace, proposal: MixtureProposal, inside: Values, num: int
) -> OutsideSample:
    """Draws from a proposal over the latents outside the plate.

    `inside` has values of the latents of the data, for one particle.
    """
    parts: list[OutsideSample] = []
    share = draws_of_prior(num) / num
    for u, _ in proposal_draws(space, proposal, num):
        for first, length in call.chunks(len(u)):
            piece = u[first : first + length]
            values, log_det = space.unpack(piece)
            model = call.score({**inside, **values}, length)
            log_prior = space.densities(model, piece, log_det)[1]
            log_ratio = (log_prior - proposal.log_prob_with_prior(piece, log_prior, share)).squeeze(-1)
            latents, observed, _ = outside.log_densities(LogDensities(call.structure, {}, model, length))
            parts.append(OutsideSample(values, latents + observed, latents - log_ratio, FITTED))
    return joined(parts)


def fitted(call: Call, outside: Outside, num_draws: int) -> OutsideSample:
    """Draws from proposals fitted to p(theta given all data), where the data have no latents that are drawn."""
    guide, model, weights = guide_draws(call)
    guide, model = summed_draws(call, guide, model)
    found = fit_proposals(call, guide, model, weights.elbo, num_draws, None, "auto")
    return replace(from_proposal(call, outside, found.space, found.proposal, {}, num_draws), found=found)


def misses_mode(sample: OutsideSample, log_likelihood: Tensor) -> tuple[bool | None, str]:
    """Whether the search found a mode of p(theta given all data) that the draws lack; or `None`, and why that is not known.

    :param log_likelihood: (S, N), log p(x_n | theta_s) of all data.
    """
    found = sample.found
    if found is None:
        return None, f"no search for modes behind {sample.method} here"
    if found.witnesses is None or len(sample) < MIN_PARTICLES_FOR_K:
        return None, found.why_not or f"S < {MIN_PARTICLES_FOR_K}"
    log_weight = (sample.log_prior.double() + log_likelihood.double().sum(1) - sample.log_proposal.double()).unsqueeze(-1)
    log_evidence, std_error = log_mean_exp(log_weight, 0), log_mean_exp_std_error(log_weight)
    return bool(found.misses_mode(log_evidence, std_error, len(sample), of_mean=True).any()), ""  # scores are means


def full(value: Tensor, num_draws: int) -> Tensor:
    return value if len(value) == num_draws else value.expand(num_draws, *value.shape[1:])


def joined(parts: list[OutsideSample]) -> OutsideSample:
    values = {n: torch.cat([part.values[n] for part in parts]) for n in parts[0].values}
    log_prior, log_proposal = torch.cat([p.log_prior for p in parts]), torch.cat([p.log_proposal for p in parts])
    return OutsideSample(values, log_prior, log_proposal, parts[0].method)


def narrowed(values: Mapping[str, Tensor], first: int, length: int) -> Values:
    return {n: v[first : first + length] for n, v in values.items()}


def values_inside(record: Record, outside: Outside) -> Values:
    """Values of the latents of the data for one particle, (1, *plates, *event)."""
    return {n: record[n].value for n in outside.inside if n in record}
