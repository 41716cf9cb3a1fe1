"""Posterior mean and KL to the prior of each latent unit, per datum."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor

from ..densities import by_number, innermost, known_kl
from ..kernel import Call, Layout, LogDensities, Record, SiteRecord, padded, reduce_to_datum
from ..noise import Noise
from ..objectives import depends_on_own_draw, out_of_order
from ..records import Result
from .formulas import density_of_guide, joint_kl, mean_of
from .refusals import check_finite, refuse_without_draws, warn_if_coarse


@dataclass(frozen=True)
class SiteTerms:
    """One latent site at one particle. B data, U units; nats."""

    mean: Tensor  # (B, U) of q given the latents drawn before this one
    kl: Tensor  # (B, U), NaN where q or p does not factorise over units
    site_kl: Tensor  # (B,)
    mask: Tensor  # (B, U), false where a unit has no place in a datum
    analytic: bool  # no drawn value was used
    is_kl: bool  # whether this is the KL of q and p given the same draws; otherwise only the sum over all sites is a KL


@dataclass(frozen=True, eq=False, repr=False)
class Averages(Result):
    """Means over particles, and the variances of these means."""

    value: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class UnitTerms(Result):
    """All latent sites of one batch. B data, D units, S sites; nats."""

    units: tuple[str, ...]
    sites: tuple[str, ...]
    mean: Averages  # (B, D)
    kl: Averages  # (B, D)
    site_kl: Averages  # (B, S)
    mask: Tensor  # (B, D)
    is_kl: Tensor  # (D,), as in `SiteTerms`
    cost: int  # decoder evaluations per datum


def unit_terms(call: Call, num_particles: int) -> UnitTerms:
    """Average over particles: of formulas given the latents drawn before where there are any, otherwise of drawn values.

    No formula is valid where the prior of a latent depends on the draw of this latent, through later draws of the guide.
    """
    latents = call.structure.latents
    refuse_without_draws(call)
    call.one_by_one()
    warn_if_coarse(call)
    means, kls, site_kls = Mean(), Mean(), Mean()
    sampled: frozenset[str] | None = None
    for k in range(num_particles):
        guide, model, weights = one_particle(call, k)
        if sampled is None:
            sampled = sites_without_formula(call, guide, model)
        sites = [site_terms(name, guide, model, weights, call.layout, name not in sampled) for name in latents]
        means.add(torch.cat([s.mean for s in sites], 1))
        kls.add(torch.cat([s.kl for s in sites], 1))
        joint = jointly_drawn(guide, latents)
        by_site = {name: s.site_kl for name, s in zip(latents, sites, strict=True) if name not in joint}
        if joint:
            by_site["+".join(joint)] = joint_terms(joint, weights)
        site_kls.add(torch.stack(list(by_site.values()), 1))
        if all(s.analytic for s in sites) and has_one_draw(call, guide):
            break  # the other particles would give the same numbers
    kl = site_kls.averages()
    check_finite(kl.value, tuple(by_site))
    return UnitTerms(
        units=tuple(unit for name, s in zip(latents, sites, strict=True) for unit in unit_names(name, s.kl.shape[1])),
        sites=tuple(by_site),
        mean=means.averages(),
        kl=kls.averages(),
        site_kl=kl,
        mask=torch.cat([s.mask for s in sites], 1),
        is_kl=torch.cat([torch.full_like(s.mask[0], s.is_kl) for s in sites]),
        cost=call.cost,
    )


def one_particle(call: Call, number: int) -> tuple[Record, Record, LogDensities]:
    """Draw a particle from the guide and score it under guide and model.

    Discrete draws that only the guide has are summed out.
    """
    call.set_noise(Noise.GUIDE, number)
    guide = call.draw_latents(1)
    model = call.score(call.latent_values(guide), 1)
    guide = call.summed(guide, model, 1)
    return guide, model, call.weigh(guide, model, 1)


class Mean:
    """A running mean over particles and its variance, from deviations from the first: for equal terms it is exactly zero."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, term: Tensor) -> None:
        if not self.count:
            self._first, self._sum, self._squares = term, torch.zeros_like(term), torch.zeros_like(term)
        deviation = term - self._first
        self._sum, self._squares = self._sum + deviation, self._squares + deviation.square()
        self.count += 1

    def averages(self) -> Averages:
        shift = self._sum / self.count
        spread = (self._squares / self.count - shift.square()).clamp(min=0.0)
        return Averages(self._first + shift, spread / max(self.count - 1, 1))


def sites_without_formula(call: Call, guide: Record, model: Record) -> frozenset[str]:
    """The latents whose prior depends on the draw of the same latent."""
    names = out_of_order(guide, model)
    if not names:
        return frozenset()
    call.cost += 1 + len(names)
    return depends_on_own_draw(names, call.guide.fn, call.model.fn, call.guide.args, call.guide.kwargs)


def site_terms(
    name: str, guide: Record, model: Record, weights: LogDensities, layout: Layout, by_formula: bool
) -> SiteTerms:
    """:param by_formula: whether a KL given the draws may be averaged over draws of the guide."""
    site, p = guide[name], model[name].fns[0]
    q = density_of_guide(name, guide, p)
    mixed = weights.log_prior_by_site[name].ndim > 2  # the latents that depend on what is summed out of the prior
    value = site.value[0]
    to_units = partial(by_unit, site=site, layout=layout)
    mask = present_units(site, weights)
    mean = mean_of(q)
    means = to_units(value if mean is None else mean)
    sides = [by_number(fn) for fn in (q, p) if fn is not None]
    if len(sides) == 2 and not mixed and not any(side.event_shape for side in sides):
        exact = known_kl(*sides) if by_formula else None
        kl = to_units(sides[0].log_prob(value) - sides[1].log_prob(value) if exact is None else exact)
        site_kl = torch.where(mask, kl, torch.zeros_like(kl)).sum(1)
    else:
        exact = joint_kl(q, p) if by_formula and not mixed and q is not None else None
        site_kl = sampled_kl(name, weights) if exact is None else masked_kl(exact, weights.joint_mask(name), layout)
        one = means.shape[1] == 1 and name not in jointly_drawn(guide, [name])
        kl = site_kl.unsqueeze(1) if one else torch.full_like(means, torch.nan, dtype=site_kl.dtype)
    if not means.is_floating_point():
        means = means.to(site_kl.dtype)
    analytic = mean is not None and exact is not None
    return SiteTerms(means, kl, site_kl, mask, analytic, is_kl=by_formula)


def jointly_drawn(guide: Record, latents: Sequence[str]) -> list[str]:
    """The latents that Deltas set from one joint draw. They have one joint KL."""
    points = [name for name in latents if isinstance(innermost(guide[name].fns[0]), dist.Delta)]
    return [name for name in points if f"{name}_unconstrained" not in guide]


def joint_terms(joint: Sequence[str], weights: LogDensities) -> Tensor:
    """log q - log p of latents that are drawn jointly, (B,): log q is the part that belongs to no other latent."""
    others = set(weights.structure.latents) - set(joint)
    parts = {n: q[0] for n, q in weights.log_guide_by_site.items() if n.removesuffix("_unconstrained") not in others}
    log_prior = weights.log_prior_in_order if weights.layout.enumerated else weights.log_prior_by_site
    return torch.stack(list(parts.values())).sum(0) - torch.stack([log_prior[name][0] for name in joint]).sum(0)


def by_unit(tensor: Tensor, site: SiteRecord, layout: Layout) -> Tensor:
    """Reshape one particle of a site, (*plates, *event), to (B, U); plates inside a datum count as units."""
    tensor = tensor.expand(site.value.shape[1:])
    if layout.datum_dim is None:
        return tensor.reshape(1, -1)
    tensor = tensor.movedim(layout.datum_dim - site.event_dim, 0)
    return tensor.reshape(len(tensor), -1).expand(layout.batch_size, -1)


def present_units(site: SiteRecord, weights: LogDensities) -> Tensor:
    """Where a latent of one particle is not masked, (B, U)."""
    kept = weights.kept_places(site.name)
    here = torch.ones((), dtype=torch.bool, device=site.value.device) if kept is None else kept[0]
    return by_unit(here, site, weights.layout)


def sampled_kl(name: str, weights: LogDensities) -> Tensor:
    """log q - log p at the drawn value of a site, (B,)."""
    own = {name, f"{name}_unconstrained"}
    log_q = sum(log_prob[0] for site, log_prob in weights.log_guide_by_site.items() if site in own)
    summed = bool(weights.layout.enumerated)
    log_prior = weights.log_prior_in_order[name] if summed else weights.log_prior_by_site[name]
    return log_q - log_prior[0]


def masked_kl(kl: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """(*plates) to (B,)."""
    kl = padded(kl, layout.num_plates + 1)
    return reduce_to_datum(kl if mask is None else torch.where(mask, kl, torch.zeros_like(kl)), layout)[0]


def has_one_draw(call: Call, guide: Record) -> bool:
    """Whether the guide draws one latent alone, so that nothing can depend on another draw."""
    drawn = {name.removesuffix("_unconstrained") for name, site in guide.items() if not site.is_observed}
    return len(drawn) == 1 and not call.structure.prior_sites


def unit_names(site: str, count: int) -> Sequence[str]:
    return [site] if count == 1 else [f"{site}[{unit}]" for unit in range(count)]
