"""log p(x, z) and log q(z|x) with beta, and the terms of a call, from the log-densities (K, B) of a pair."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import NamedTuple

from torch import Tensor

from ..errors import EnumerationError, quoted
from ..kernel import LogDensities
from .terms import Density, Pass, like
from .traces.beta_messenger import beta_at
from .traces.matching import Betas, check_names


class Sides(NamedTuple):
    """The sites whose densities enter one KL, those of the guide and those of the prior."""

    guide: tuple[str, ...]
    prior: tuple[str, ...]


def kl_sites(weights: LogDensities) -> dict[str, Sides]:
    """The sites of each KL, by the name under which it is reported; one for all latents that an autoguide draws jointly."""
    latents = weights.structure.latents
    left = [n for n in weights.log_guide_by_site if n.removesuffix("_unconstrained") not in latents]
    factors = {n: Sides((n,), ()) for n in left if weights.is_factor(n)}
    if len(factors) < len(left):
        drawn = tuple(n for n in weights.log_guide_by_site if n not in factors)
        return {"+".join(latents): Sides(drawn, latents), **factors}
    own = {name: (name, f"{name}_unconstrained") for name in latents}
    return {
        name: Sides(tuple(n for n in sites if n in weights.log_guide_by_site), (name,)) for name, sites in own.items()
    } | factors


def check_enumeration(weights: LogDensities, betas: Betas = 1.0) -> None:
    structure = weights.structure
    if structure.guide_enumerated:
        raise EnumerationError(
            f"the guide enumerates {quoted(structure.guide_enumerated)}, but importance weights sum it out of the "
            "model only, so its log q would never be trained: enumerate it in the model only, or let the guide draw "
            "it"
        )
    if structure.model_enumerated and (isinstance(betas, Mapping | Tensor) or betas != 1.0):
        raise EnumerationError(
            f"the model sums out {quoted(structure.model_enumerated)}, and inside the logarithm of a sum single terms "
            "cannot be weighted: use beta=1, or draw the site in the guide"
        )


def beta_densities(weights: LogDensities, betas: Betas) -> tuple[Tensor, Tensor]:
    """log p(x|z) + beta log p(z) and beta log q(z|x), (K, B) each, with the beta of each site."""
    check_enumeration(weights, betas)
    if isinstance(betas, Mapping):
        groups = kl_sites(weights)
        sites = {name: tuple(dict.fromkeys((*sides.prior, *sides.guide))) for name, sides in groups.items()}
        check_names(betas, sites, weights.log_guide_by_site, weights.structure.latents)
        log_prior = total(like(p, beta_at(betas, n)) * p for n, p in weights.log_prior_by_site.items())
        log_guide = total(like(q, beta_at(betas, g)) * q for g, s in groups.items() for q in of_guide(weights, s.guide))
        return weights.log_likelihood + log_prior, log_guide
    if not isinstance(betas, Tensor) and betas == 1.0:
        return weights.log_joint, weights.log_guide
    beta = like(weights.log_prior, betas)
    return weights.log_likelihood + beta * weights.log_prior, beta * weights.log_guide


def of_guide(weights: LogDensities, names: Iterable[str]) -> list[Tensor]:
    return [weights.log_guide_by_site[n] for n in names]


def total(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(operator.add, tensors)


def pass_of(weights: LogDensities, scale: float | Tensor) -> Pass:
    """The detached densities of one call, for `Terms`."""

    def density(log_prob: Tensor) -> Density:
        return Density(weights.per_particle(log_prob.detach()), scale)

    if weights.structure.model_enumerated:
        # A summed-out site belongs to the likelihood, except for its part in the prior of the latents.
        prior = density(weights.log_marginal_prior)
        observed = density(weights.log_joint - weights.log_marginal_prior)
        return Pass([observed], {"+".join(weights.structure.latents): ([density(weights.log_guide)], [prior])}, [], [])
    kl = {
        name: (
            [density(weights.log_guide_by_site[n]) for n in sides.guide],
            [density(weights.log_prior_by_site[n]) for n in sides.prior],
        )
        for name, sides in kl_sites(weights).items()
    }
    return Pass([density(log_p) for log_p in weights.log_likelihood_by_site.values()], kl, [], [])
