"""The terms of one call of an objective: reconstruction, KL per site, the ELBO without beta, the loss and beta."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ..errors import DatumPlateError, quoted
from ..records import Result
from .traces.beta_messenger import beta_at
from .traces.matching import Beta, Betas

Place = tuple[tuple[Any, ...], torch.Size]
PARTICLES = "num_particles_vectorized"  # Pyro's name of the plate of vectorised particles


@dataclass(frozen=True, eq=False, repr=False)
class Terms(Result):
    r"""The parts of one loss, detached tensors without dimensions, in nats.

    ``loss = -reconstruction + sum over sites of beta * kl`` and ``elbo = reconstruction - kl_sum``, the ELBO without beta. A
    factor of the guide that is not a log q enters the loss only, and so do the additions of free bits and capacity. All are
    sums over the data, with the scale of their plate (N/B under subsampling), averaged over particles.

    :ivar reconstruction: ``E_q log p(x|z)``, minus the distortion D.
    :ivar kl: ``E_q[log q(z|x) - log p(z)]`` by latent site. Analytic in the mean-field objective, where there is a formula
        that is right. Latents that an autoguide draws jointly have one KL, under their names joined by ``+``.
    :ivar kl_sum: the sum of `kl`, the rate R.
    :ivar elbo: ``-(D + R)``.
    :ivar loss: the loss that the objective returned.
    :ivar beta: the weight of the KL in this call, or a dict of weights by site.

    Example::

        objective.loss(model, guide, x)
        objective.terms.reconstruction, objective.terms.kl["latent"], objective.terms.per_datum().elbo
    """

    _hidden = ("plates",)

    reconstruction: Tensor
    kl: Mapping[str, Tensor]
    kl_sum: Tensor
    elbo: Tensor
    loss: Tensor
    beta: Betas
    plates: Mapping[str, int]

    def per_datum(self, plate: str | None = None) -> Terms:
        """The same terms divided by the number of data: the full size N of the plate that all sites share.

        :param plate: name of the plate; needed where the sites share several plates.
        :raises DatumPlateError: if the sites share no plate, or several and none is named.
        """
        if plate is None and len(self.plates) != 1:
            raise DatumPlateError(
                f"per_datum() divides by the size of the one plate common to all sites, but they share "
                f"{quoted(self.plates)}: name it with per_datum(plate=...)"
            )
        if plate is not None and not (isinstance(plate, str) and plate in self.plates):
            raise DatumPlateError(f"the sites do not share a plate {plate!r}; they share {quoted(self.plates)}: name one")
        count = self.plates[plate] if plate is not None else next(iter(self.plates.values()))
        return replace(
            self,
            reconstruction=self.reconstruction / count,
            kl={name: kl / count for name, kl in self.kl.items()},
            kl_sum=self.kl_sum / count,
            elbo=self.elbo / count,
            loss=self.loss / count,
            plates={},
        )


class Summable(Protocol):
    """A lazily summed part of the loss."""

    def sum(self) -> Tensor: ...


class Density(NamedTuple):
    """The log-density of one site, summed on demand."""

    log_prob: Tensor
    scale: Beta = 1.0
    mask: Tensor | bool | None = None

    def sum(self) -> Tensor:
        return scale_and_mask(self.log_prob, self.scale, self.mask).sum()


@dataclass(frozen=True, eq=False)
class Pass:
    """The densities of one run of guide and model.

    :ivar observed: densities of the observed sites of the model.
    :ivar kl: by KL, the densities that enter it with a plus sign (log q) and with a minus sign (log p).
    :ivar others: factors of the guide that are not part of log q; they enter the loss only.
    :ivar places: the plates and the batch shapes of the model's sites.
    """

    observed: Sequence[Summable]
    kl: Mapping[str, tuple[Sequence[Summable], Sequence[Summable]]]
    others: Sequence[Summable]
    places: Sequence[Place]


def terms_of(passes: Sequence[Pass], num_particles: int, betas: Betas) -> Terms:
    with torch.no_grad():
        reconstruction = total(d for one in passes for d in one.observed) / num_particles
        # A program may have a site in some particles only.
        names = dict.fromkeys(name for one in passes for name in one.kl)
        sides = {name: [one.kl[name] for one in passes if name in one.kl] for name in names}
        kl = {
            name: (total(d for q, _ in pairs for d in q) - total(d for _, p in pairs for d in p)) / num_particles
            for name, pairs in sides.items()
        }
        zero = torch.zeros_like(reconstruction)
        # Latents with one joint KL, joined by "+", have one beta.
        weighed = [value * like(value, beta_at(betas, name.split("+")[0])) for name, value in kl.items()]
        kl_sum = reduce(operator.add, kl.values(), zero)
        others = total(d for one in passes for d in one.others) / num_particles
        return Terms(
            reconstruction=reconstruction,
            kl=kl,
            kl_sum=kl_sum,
            elbo=reconstruction - kl_sum,
            loss=reduce(operator.add, weighed, zero) - reconstruction + others,
            beta=betas,
            plates=common_plates(passes[0].places),
        )


def like(value: Tensor, beta: Beta) -> Beta:
    """beta in the precision of a KL: with two tensors without dimensions, torch would use the higher precision."""
    return beta.to(value.dtype) if isinstance(beta, Tensor) else beta


def total(densities: Iterable[Summable]) -> Tensor:
    sums = [density.sum() for density in densities]
    return reduce(operator.add, sums) if sums else torch.zeros(())


def common_plates(places: Sequence[Place]) -> dict[str, int]:
    """Full sizes of the plates common to all sites; for a plate without a size, that of its sites."""
    if not places:
        return {}
    shared = set.intersection(*({frame.name for frame in frames} for frames, _ in places)) - {PARTICLES}
    sizes = {}
    for frame in places[0][0]:
        if frame.name in shared:
            size = frame.size if frame.full_size is None else frame.full_size
            if size < 0:
                size = max(shape[frame.dim] if len(shape) >= -frame.dim else 1 for _, shape in places)
            sizes[frame.name] = size
    return sizes


def places_of(sites: Iterable[Any]) -> list[Place]:
    return [(s["cond_indep_stack"], s["fn"].batch_shape) for s in sites if not s["infer"].get("_deterministic")]
