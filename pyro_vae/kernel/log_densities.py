"""Log-densities per particle and datum, (K, B), from which all estimators and objectives are computed."""

import math
from collections.abc import Callable, Collection
from functools import cached_property

import torch
from torch import Tensor

from ..densities import check_event_masks
from ..errors import MaskError
from .checks.structure import Structure
from .elimination import sum_of_sites
from .recorder import Layout
from .records import Record, latent_of, padded


def reduce_to_datum(tensor: Tensor, layout: Layout) -> Tensor:
    """Sum the plates inside a datum: (*E, K, *plates) to (*E, K, B)."""
    tensor = padded(tensor, layout.num_plates + 1)
    if layout.datum_dim is None:
        inner = list(range(-layout.num_plates, 0))
        return (tensor.sum(inner) if inner else tensor).unsqueeze(-1)
    inner = [dim for dim in range(-layout.num_plates, 0) if dim != layout.datum_dim]
    tensor = tensor.sum(inner) if inner else tensor
    return tensor if tensor.shape[-1] == layout.batch_size else tensor.expand(*tensor.shape[:-1], layout.batch_size)


def masked_sum(log_prob: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    if mask is not None:
        log_prob = torch.where(mask, log_prob, torch.zeros((), dtype=log_prob.dtype, device=log_prob.device))
    return reduce_to_datum(log_prob, layout)


class LogDensities:
    """Log-densities of K particles for B data, kept per site and summed on demand; nats, unscaled.

    `log_likelihood`, `log_prior` and `log_guide` have shape (*E, K, B), with one axis E per enumerated site, `log_weight`
    and `elbo` have shape (K, B)::

        log_weight = log sum_e p(x, z, e) / q(z given e)        (evidence: any enumerated site is summed out)
        elbo       = sum_e q(e) [log p(x, z, e) - log q(z, e)]  (guide-enumerated axes are averaged under q)

    Without enumerated sites both are log_likelihood + log_prior - log_guide.
    """

    def __init__(self, structure: Structure, guide: Record, model: Record, num_particles: int) -> None:
        self.structure, self.layout, self.num_particles = structure, structure.layout, num_particles
        self.guide, self.model = guide, model

    @cached_property
    def log_likelihood_by_site(self) -> dict[str, Tensor]:
        return {n: reduce_to_datum(self.masked(n, self.model), self.layout) for n in self.observed}

    @cached_property
    def log_prior_by_site(self) -> dict[str, Tensor]:
        return {n: reduce_to_datum(self.masked(n, self.model), self.layout) for n in self.unobserved}

    @cached_property
    def log_guide_by_site(self) -> dict[str, Tensor]:
        return {n: reduce_to_datum(self.masked(n, self.guide), self.layout) for n in self.scored}

    @property
    def observed(self) -> list[str]:
        return [n for n, s in self.model.items() if s.is_observed]

    @property
    def unobserved(self) -> tuple[str, ...]:
        """The sites of log p(z)."""
        return (*self.structure.latents, *self.structure.guide_enumerated, *self.structure.model_enumerated)

    @property
    def scored(self) -> list[str]:
        """The sites of log q(z|x)."""
        return [n for n in self.guide if n in self.structure.guide_sites or n.endswith("_unconstrained")]

    def masked(self, name: str, record: Record) -> Tensor:
        """The log-density of one site over (*E, K, *plates), without masked elements."""
        site = record[name]
        mask = site.mask if site.is_observed else self.joint_mask(name)
        if mask is None or site.is_summed:  # a mask over plates inside a datum would repeat the sum over them
            return site.log_prob
        # A masked site must sum to one when it is summed out: it counts as uniform on both sides.
        hidden = -math.log(site.value.shape[0]) if name in self.layout.enumerated else 0.0
        return torch.where(mask, site.log_prob, site.log_prob.new_full((), hidden))

    def joint_mask(self, name: str) -> Tensor | None:
        """The mask of a latent site, (K, *plates): a latent masked on one side is masked on both."""
        latent = latent_of(name, self.model)
        sides = [record[n] for record in (self.guide, self.model) for n in {name, latent} if n in record]
        if latent in self.guide and latent in self.model and latent == name:
            check_event_masks(name, self.guide[name].event_mask, self.model[name].event_mask)
        masks = [padded(s.mask, self.layout.num_plates + 1) for s in sides if s.mask is not None]
        joint = None
        for mask in masks:
            joint = mask if joint is None else joint & mask
        if joint is not None and name in self.guide:
            self._check_switch(name, joint)
        return joint

    def kept_places(self, name: str) -> Tensor | None:
        """Where a latent is not masked, by masks of whole events and inside events, broadcastable to its value."""
        whole = self.joint_mask(name)  # checks that the masks inside events are equal
        site, width = self.guide.get(name, self.model[name]), self.layout.num_plates + 1
        if whole is not None:
            whole = padded(whole, width)
            whole = whole.reshape(whole.shape + (1,) * site.event_dim)
        if site.event_mask is None:
            return whole
        inside = padded(site.event_mask, width + site.to_event_dim)
        inside = inside.reshape(inside.shape + (1,) * (site.event_dim - site.to_event_dim))
        return inside if whole is None else inside & whole

    def _check_switch(self, name: str, mask: Tensor) -> None:
        """Raise for a mask that depends on sites that the model sums out, because log q has no axis for them."""
        for axis, switch in self.structure.axes_at(name).items():
            dim = -(self.layout.num_plates + 2 + axis)
            if switch in self.structure.model_enumerated and mask.ndim >= -dim and mask.shape[dim] > 1:
                raise MaskError(
                    f"the model masks '{name}' by '{switch}', which it sums out, so the guide cannot have that mask: "
                    f"enumerate '{switch}' in the guide, or mask model and guide alike by data"
                )

    @property
    def observations(self) -> dict[str, Tensor]:
        """The observed values by site, in their original shapes."""
        return {n: s.value for n, s in self.model.items() if s.is_observed and s.value.numel()}

    def log_drawn(self, names: Collection[str]) -> Tensor:
        """log p of sites drawn by the model, where the draw has no gradient, (K, B)."""
        return self._sum({
            n: reduce_to_datum(self.masked(n, self.model), self.layout)
            for n in names
            if not self.model[n].value.requires_grad
        })  # fmt: skip

    def is_factor(self, name: str) -> bool:
        """Whether a site of the guide is a `pyro.factor`: its value is empty."""
        return not self.guide[name].value.numel()

    @cached_property
    def log_likelihood(self) -> Tensor:
        return self._sum(self.log_likelihood_by_site)

    @cached_property
    def log_prior(self) -> Tensor:
        return self._sum(self.log_prior_by_site)

    @cached_property
    def log_guide(self) -> Tensor:
        return self._sum(self.log_guide_by_site)

    def _sum(self, sites: dict[str, Tensor]) -> Tensor:
        total = None
        for log_prob in sites.values():
            total = log_prob if total is None else total + log_prob
        if total is None:
            total = torch.zeros(1, 1, device=next(iter(self.model.values())).value.device)
        return self.per_particle(total)

    @cached_property
    def log_joint(self) -> Tensor:
        """log p(x, z), shape (K, B): enumerated sites are summed out."""
        return self._over_values(self.log_joint_of_values)

    @cached_property
    def log_joint_of_values(self) -> Tensor:
        """log p(x, z, e), (*E, K, B), for the values e that the guide enumerates.

        Sites that only the model enumerates are summed out.
        """
        if not self.structure.model_enumerated:
            return self._with_guide_axes(self.log_likelihood + self.log_prior)
        return self._eliminated((*self.observed, *self.unobserved))

    @cached_property
    def log_marginal_prior(self) -> Tensor:
        """log p(z) of the sampled latents, shape (K, B): enumerated sites are summed out."""
        if not self.structure.model_enumerated:
            return self._over_values(self._with_guide_axes(self.log_prior))
        return self._over_values(self._eliminated(self.unobserved))

    @cached_property
    def log_marginal_guide(self) -> Tensor:
        """log q(z given x) of the sampled latents, shape (K, B): enumerated sites are summed out."""
        return self._over_values(self._with_guide_axes(self.log_guide))

    @property
    def log_guide_in_order(self) -> dict[str, Tensor]:
        """log q of each site given the sites before it, enumerated ones summed out: (K, B) each, for log q in total."""
        sites = {n: self.log_guide_by_site[n] for n in self.guide if n in self.log_guide_by_site}
        return self._in_order(sites, lambda names: self._with_guide_axes(self._sum({n: sites[n] for n in names})))

    @property
    def log_prior_in_order(self) -> dict[str, Tensor]:
        """log p of each site given the sites before it in the model, as `log_guide_in_order`."""
        sites = {n: self.log_prior_by_site[n] for n in self.model if n in self.unobserved}
        if self.structure.model_enumerated:
            return self._in_order(sites, self._eliminated)
        return self._in_order(sites, lambda names: self._with_guide_axes(self._sum({n: sites[n] for n in names})))

    def _in_order(self, names: Collection[str], log_density: Callable[[list[str]], Tensor]) -> dict[str, Tensor]:
        """Differences of the log-densities of ever more sites, (*E, K, B), summed over the values."""
        found, before = {}, torch.zeros(())
        for number, name in enumerate(names, start=1):
            total = self._over_values(log_density(list(names)[:number]))
            found[name], before = total - before.to(total), total
        return found

    @cached_property
    def log_weight(self) -> Tensor:
        # Not log_guide minus the enumerated sites: a value that the guide never takes has a log q of -inf.
        enumerated = self.structure.guide_enumerated
        sampled = self._sum({n: s for n, s in self.log_guide_by_site.items() if n not in enumerated})
        return self._over_values(self.log_joint_of_values - self._with_guide_axes(sampled))

    @cached_property
    def elbo(self) -> Tensor:
        if not self.structure.guide_enumerated:
            return self.log_weight
        bound = self.log_joint_of_values - self._with_guide_axes(self.log_guide)
        log_q = self._sum({n: self.log_guide_by_site[n] for n in self.structure.guide_enumerated})
        weights = self._with_guide_axes(log_q).exp()
        # 0 x -inf is 0 here: a value of probability zero under q does not count.
        bound = torch.where(weights > 0, weights * bound, torch.zeros_like(bound)).sum(self._axes(bound))
        return self.per_particle(bound)

    def _eliminated(self, names: Collection[str]) -> Tensor:
        """(*E, K, B): the sum of the log-densities of these sites of the model.

        Sites that only the model enumerates are summed out.
        """
        log_probs = {n: self.masked(n, self.model) for n in names}
        total = sum_of_sites(log_probs, self.model, self.structure)
        return self._with_guide_axes(self.per_particle(reduce_to_datum(total, self.layout)))

    def _over_values(self, tensor: Tensor) -> Tensor:
        """(*E, K, B) to (K, B): the logarithm of the sum over the values of sites that the guide enumerates."""
        return self.per_particle(tensor.logsumexp(self._axes(tensor)) if tensor.ndim > 2 else tensor)

    def _with_guide_axes(self, tensor: Tensor) -> Tensor:
        """One axis for each site that the guide enumerates: the first of them next to the particles."""
        return padded(tensor, len(self.structure.guide_enumerated) + 2)

    @staticmethod
    def _axes(tensor: Tensor) -> tuple[int, ...]:
        return tuple(range(tensor.ndim - 2))

    def per_particle(self, tensor: Tensor) -> Tensor:
        """Expand to all particles where nothing was sampled."""
        return tensor.expand(*tensor.shape[:-2], self.num_particles, self.layout.batch_size)
