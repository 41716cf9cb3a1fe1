"""Log-densities per particle and datum, (K, B), which all estimators and objectives are computed from."""

import math
from collections.abc import Collection
from functools import cached_property

import torch
from torch import Tensor

from ..densities import check_event_masks
from ..errors import MaskError
from .checks.structure import Structure
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
        self._guide, self.model = guide, model

    @cached_property
    def log_likelihood_by_site(self) -> dict[str, Tensor]:
        sites = {n: s for n, s in self.model.items() if s.is_observed}
        return {n: masked_sum(s.log_prob, s.mask, self.layout) for n, s in sites.items()}

    @cached_property
    def log_prior_by_site(self) -> dict[str, Tensor]:
        names = (*self.structure.latents, *self.structure.guide_enumerated, *self.structure.model_enumerated)
        return {n: self._latent_density(n, self.model) for n in names}

    @cached_property
    def log_guide_by_site(self) -> dict[str, Tensor]:
        return {
            n: self._latent_density(n, self._guide)
            for n in self._guide
            if n in self.structure.guide_sites or n.endswith("_unconstrained")
        }

    def _latent_density(self, name: str, record: Record) -> Tensor:
        site, mask = record[name], self.joint_mask(name)
        log_prob = site.log_prob
        if mask is not None and name in self.layout.enumerated:
            # Summed out, a masked site must leave one: it counts as uniform on both sides.
            num_values = site.value.shape[0]
            return reduce_to_datum(torch.where(mask, log_prob, log_prob.new_full((), -math.log(num_values))), self.layout)
        return masked_sum(log_prob, mask, self.layout)

    def joint_mask(self, name: str) -> Tensor | None:
        """The mask of a latent site, (K, *plates): what is masked on one side is masked on both."""
        latent = latent_of(name, self.model)
        sides = [record[n] for record in (self._guide, self.model) for n in {name, latent} if n in record]
        if latent in self._guide and latent in self.model and latent == name:
            check_event_masks(name, self._guide[name].event_mask, self.model[name].event_mask)
        masks = [padded(s.mask, self.layout.num_plates + 1) for s in sides if s.mask is not None]
        joint = None
        for mask in masks:
            joint = mask if joint is None else joint & mask
        if joint is not None and name in self._guide:
            self._check_switch(name, joint)
        return joint

    def kept_places(self, name: str) -> Tensor | None:
        """Where a latent is not masked, by masks of whole events and inside events, broadcastable to its value."""
        whole = self.joint_mask(name)  # checks that the masks inside events are alike
        site, width = self._guide.get(name, self.model[name]), self.layout.num_plates + 1
        if whole is not None:
            whole = padded(whole, width)
            whole = whole.reshape(whole.shape + (1,) * site.event_dim)
        if site.event_mask is None:
            return whole
        inside = padded(site.event_mask, width + site.to_event_dim)
        inside = inside.reshape(inside.shape + (1,) * (site.event_dim - site.to_event_dim))
        return inside if whole is None else inside & whole

    def _check_switch(self, name: str, mask: Tensor) -> None:
        """Refuse a mask that depends on sites that the model sums out, because log q has no axis for them."""
        for switch in self.structure.model_enumerated:
            axis = -(self.layout.num_plates + 2 + self.layout.enumerated.index(switch))
            if mask.ndim >= -axis and mask.shape[axis] > 1:
                raise MaskError(
                    f"the model masks '{name}' by '{switch}', which it sums out, so the guide cannot have that mask: "
                    f"enumerate '{switch}' in the guide, or mask model and guide alike by data"
                )

    @property
    def observations(self) -> dict[str, Tensor]:
        """The observed values by site, in their own shapes."""
        return {n: s.value for n, s in self.model.items() if s.is_observed and s.value.numel()}

    def log_drawn(self, names: Collection[str]) -> Tensor:
        """log p of sites that the model drew itself, where no gradient runs through the draw, (K, B)."""
        return self._sum({n: self._latent_density(n, self.model) for n in names if not self.model[n].value.requires_grad})

    def is_factor(self, name: str) -> bool:
        """Whether a site of the guide is a `pyro.factor`: its value is empty."""
        return not self._guide[name].value.numel()

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
        return self._summed_out(self.log_likelihood + self.log_prior)

    @cached_property
    def log_joint_of_values(self) -> Tensor:
        """log p(x, z, e), (*E, K, B) for the values e that the guide enumerates; those of the model are summed out."""
        log_joint = self._with_all_axes(self.log_likelihood + self.log_prior)
        # The axes of `layout.enumerated` run from right to left: those of the model are the leftmost.
        num_model = len(self.structure.model_enumerated)
        return log_joint.logsumexp(tuple(range(num_model))) if num_model else log_joint

    @cached_property
    def log_marginal_prior(self) -> Tensor:
        """log p(z) of the sampled latents, shape (K, B): enumerated sites are summed out."""
        return self._summed_out(self.log_prior)

    @cached_property
    def log_marginal_guide(self) -> Tensor:
        """log q(z given x) of the sampled latents, shape (K, B): enumerated sites are summed out."""
        return self._summed_out(self.log_guide)

    @cached_property
    def log_weight(self) -> Tensor:
        # Not log_guide minus those that are enumerated: a value that the guide never takes has a log q of -inf.
        enumerated = self.structure.guide_enumerated
        sampled = self._sum({n: s for n, s in self.log_guide_by_site.items() if n not in enumerated})
        return self._summed_out(self.log_likelihood + self.log_prior - sampled)

    @cached_property
    def elbo(self) -> Tensor:
        if not self.layout.enumerated:
            return self.log_weight
        num_model = len(self.structure.model_enumerated)
        bound = self.log_joint_of_values - self._guide_axes(self.log_guide, num_model)
        if self.structure.guide_enumerated:
            log_q = self._sum({n: self.log_guide_by_site[n] for n in self.structure.guide_enumerated})
            weights = self._guide_axes(log_q, num_model).exp()
            # 0 x -inf is 0 here: a value of no probability under q does not count.
            bound = torch.where(weights > 0, weights * bound, torch.zeros_like(bound)).sum(self._axes(bound))
        return self.per_particle(bound)

    def _summed_out(self, tensor: Tensor) -> Tensor:
        """(*E, K, B) to (K, B): the logarithm of the sum over the values of what is enumerated."""
        tensor = self._with_all_axes(tensor)
        return self.per_particle(tensor.logsumexp(self._axes(tensor)) if self.layout.enumerated else tensor)

    def _with_all_axes(self, tensor: Tensor) -> Tensor:
        return padded(tensor, len(self.layout.enumerated) + 2)

    @staticmethod
    def _axes(tensor: Tensor) -> tuple[int, ...]:
        return tuple(range(tensor.ndim - 2))

    def per_particle(self, tensor: Tensor) -> Tensor:
        """Expand to all particles where nothing was sampled."""
        return tensor.expand(*tensor.shape[:-2], self.num_particles, self.layout.batch_size)

    def _guide_axes(self, tensor: Tensor, num_model: int) -> Tensor:
        """Drop the axes of size one of what the model enumerates, on which log q does not depend."""
        tensor = self._with_all_axes(tensor)
        for _ in range(num_model):
            tensor = tensor.squeeze(0)
        return tensor
