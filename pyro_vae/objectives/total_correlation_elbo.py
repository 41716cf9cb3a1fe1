"""beta-TCVAE: the KL in three weighted parts, mutual information, total correlation and dimension-wise KL."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..aggregate import check_dimensions, check_separate, check_unmasked, log_q_by_dimension
from ..densities import bounds_of, innermost
from ..errors import OptionError, StructureError, quoted
from ..kernel import INFER, Call, LogDensities, Record, Structure
from ..ops import index_code_information
from ..options import whole_number
from ..records import Result
from .datum_elbo import DatumELBO, plates_of
from .gradients import scored_sites
from .objective import BetaObjective
from .traces.matching import Beta
from .weights import Weight, checked_weight


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Result):
    """The parts of the mean KL(q(z|x) || p(z)) of a batch: detached tensors without dimensions, in nats per datum.

    Means over the data of the batch, from one draw each, without the scale of their plate. The sum of the parts is the
    sampled KL.

    :ivar mutual_information: ``E[log q(z|x) - log q(z)]``, at most log N.
    :ivar total_correlation: ``E[log q(z) - sum_j log q(z_j)]``.
    :ivar dimension_wise: ``E[sum_j log q(z_j) - log p(z)]``.

    Example::

        objective = pv.TotalCorrelationELBO(dataset_size=len(data), beta=6.0)
        objective.loss(model, guide, x)
        objective.decomposition.mutual_information, objective.decomposition.total_correlation
    """

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_wise: Tensor


class TotalCorrelationELBO(DatumELBO, BetaObjective):
    r"""The ELBO with its KL split in three weighted parts: beta-TCVAE.

    The parts are (Chen, Li, Grosse and Duvenaud, 2018, https://arxiv.org/abs/1802.04942)::

        loss = sum over data of  - E log p(x|z)
                                 + mutual_information * E[ log q(z|x) - log q(z) ]               index-code information
                                 + beta               * E[ log q(z) - sum_j log q(z_j) ]         total correlation
                                 + dimension_wise     * E[ sum_j log q(z_j) - log p(z) ]         dimension-wise KL

    in nats. q(z) is the aggregated posterior ``q(z) = 1/N sum_n q(z|x_n)`` of N data. z is drawn once from q(z|x) for each
    of the B data of a batch. Each of the D dimensions of z is one element of a latent site. The scale of a subsampled plate
    (N/B) or of `poutine.scale` is applied outside the logarithms. With all three weights 1 the loss is minus the ELBO, for
    every draw.

    log q(z) and log q(z_j) are estimated from the batch (`pyro_vae.ops.index_code_information`), stratified::

        q(z_i) ~ 1/N q(z_i|x_i) + (N - 1) / (N (B - 1)) sum over j != i of q(z_i|x_j)

    The right-hand side is unbiased if a batch is a uniform sample without replacement, and exact at B = N. Its logarithm is
    too small on average (Jensen), the more so the larger N/B is and the less the q(z|x_n) overlap. At B < N:

    - the **mutual information is overestimated**, but never above log N;
    - the **dimension-wise KL is underestimated**;
    - the total correlation may be wrong in either direction. It is usually too low, because the joint density is more biased
      than those of single dimensions. It is too high once the mutual information has reached log N.

    Compare only runs with the same batch size. (The weights in the authors' code differ from these.)

    Under a prior with independent dimensions, the last part is ``sum_j KL(q(z_j) || p(z_j))``. Under any other prior, it
    includes the dependence of the prior and may be negative. The total correlation is always that of q(z), so its weight
    then pulls q(z) away from the prior.

    :param dataset_size: N, the number of data from which batches are drawn.
    :param beta: the weight of the total correlation: a number, a tensor without dimensions, or a schedule.
    :param mutual_information: the weight of the index-code mutual information, likewise.
    :param dimension_wise: the weight of the dimension-wise KL, likewise.
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites.
    :param compile: as in `BetaTrace_ELBO`.

    :ivar decomposition: the `Decomposition` of the KL in the last call; `None` before the first.
    :ivar terms: `Terms` of the last call; their `elbo` is the ELBO, not ``-loss``, and their `beta` is the weight of the
        total correlation.
    :ivar num_updates: the number passed to a schedule, as in `BetaTrace_ELBO`.
    :raises OptionError: for a dataset_size that is not a whole number, is smaller than the batch, or differs from the size
        of a subsampled plate; for a weight that is negative or not finite.
    :raises StructureError: (or a subclass) for a batch of one; for a guide without known densities of single dimensions (a
        joint distribution, a flow, an autoguide, one latent drawn given another); for draws that are not reparameterised,
        where gradients are recorded; for data with different scales.
    :raises MaskError: for masked latents. Masked observations are left out as usual.
    :raises EnumerationError: for a site that the guide enumerates. Sites that the model enumerates are summed out.

    Example::

        objective = pv.TotalCorrelationELBO(dataset_size=len(data), beta=6.0)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective)
        svi.step(x)
        print(objective.decomposition.total_correlation)
    """

    _parts: tuple[Tensor, ...]

    def __init__(
        self,
        *,
        dataset_size: int,
        beta: Weight = 6.0,
        mutual_information: Weight = 1.0,
        dimension_wise: Weight = 1.0,
        datum_plate: str | None = INFER,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        dataset_size = whole_number("dataset_size", dataset_size, lowest=2, why="it is the number of all data")
        mutual_information = checked_weight(mutual_information, "mutual_information")
        dimension_wise = checked_weight(dimension_wise, "dimension_wise")
        super().__init__(beta=beta, num_particles=1, datum_plate=datum_plate, compile=compile)
        self.dataset_size = dataset_size
        self.mutual_information, self.dimension_wise = mutual_information, dimension_wise
        self._separate: list[Structure] = []  # calls in which no latent of the guide depends on another
        self._check_beta()

    @property
    def decomposition(self) -> Decomposition | None:
        return Decomposition(*(part.mean() for part in self._parts)) if self._complete else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": (), "_separate": []}

    def _forget(self) -> None:
        super()._forget()
        self._parts = ()

    def _arrays(self) -> tuple[Tensor, ...]:
        return self._parts

    def _set_arrays(self, arrays: tuple[Tensor, ...]) -> None:
        self._parts = arrays

    def _weights(self) -> dict[str, Weight]:
        own = {"mutual_information": self.mutual_information, "dimension_wise": self.dimension_wise}
        return super()._weights() | own

    def _check_beta(self) -> None:
        if isinstance(self.beta, Mapping):
            raise OptionError("beta must be one weight: the total correlation is that of all latents together")

    def _weights_now(self) -> list[Beta]:
        self._check_beta()
        return [self._value("mutual_information"), self._value("beta"), self._value("dimension_wise")]

    def _loss_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        weights_now = self._weights_now()
        call = self._call(model, guide, args, kwargs)
        check_batch(call, self.dataset_size)
        drawn = call.draw(1)
        self._check_guide(call, drawn)
        densities, scale = self._weigh(call, drawn, betas=weights_now[1])
        check_unmasked(densities)
        if isinstance(scale, Tensor) and scale.dim():
            raise StructureError(
                "the data have different scales (poutine.scale), but all data have the same weight in the aggregated "
                "posterior: scale model and guide by one number"
            )
        reconstruction, kl = rate_distortion(densities)
        parts = split(log_q_by_dimension(drawn, call.structure.latents, call.layout), kl, self.dataset_size)
        weighed = reduce(operator.add, (weight * part for weight, part in zip(weights_now, parts, strict=True)))
        loss = ((weighed - reconstruction) * scale).sum()
        self._parts = tuple(part.detach() for part in parts)
        return loss, loss

    def _check_guide(self, call: Call, drawn: Record) -> None:
        structure = call.structure
        if not structure.latents and not structure.guide_enumerated:
            raise StructureError("model and guide share no latent site, so there is no KL to split: use BetaTrace_ELBO")
        check_subsample(call, drawn, self.dataset_size)
        if torch.is_grad_enabled():
            check_gradients(drawn, structure)
        check_dimensions(drawn, [n for n in drawn if n not in structure.guide_enumerated], structure.latents)
        if len(structure.latents) > 1 and not any(known is structure for known in self._separate):
            check_separate(call, drawn, structure.latents)
            self._separate.append(structure)


def split(log_q: Tensor, kl: Tensor, num_data: int) -> tuple[Tensor, Tensor, Tensor]:
    """Information, total correlation and dimension-wise KL of each datum, (B,) each, from log q, (B, B, D), and the KL.

    All three are differences of the information of the index about z and about each z_j.
    """
    joint = index_code_information(log_q.sum(-1), num_data)
    by_dimension = index_code_information(log_q, num_data).sum(-1)
    return joint, by_dimension - joint, kl - by_dimension


def rate_distortion(densities: LogDensities) -> tuple[Tensor, Tensor]:
    """log p(x|z) and log q(z|x) - log p(z), (B,) each; sites that the model enumerates are summed out of both."""
    if densities.structure.model_enumerated:
        log_prior = densities.log_marginal_prior
        return (densities.log_joint - log_prior)[0], (densities.log_guide - log_prior)[0]
    return densities.log_likelihood[0], (densities.log_guide - densities.log_prior)[0]


def check_batch(call: Call, dataset_size: int) -> None:
    if call.batch_size > dataset_size:
        raise OptionError(
            f"dataset_size={dataset_size} is smaller than the batch of {call.batch_size}: pass the number of all data"
        )
    if call.batch_size < 2:
        raise StructureError(
            "the call has one datum, so there are no others to estimate the aggregated posterior from: pass batches "
            "of at least 2 in a pyro.plate (drop_last=True in a DataLoader), and leave datum_plate at its default"
        )


def check_subsample(call: Call, drawn: Record, dataset_size: int) -> None:
    if not call.structure.subsampled:
        return
    for name, size in plates_of(call, drawn).items():
        if size != dataset_size:
            raise OptionError(f"plate '{name}' holds {size} data, but dataset_size={dataset_size}: they must agree")


def check_gradients(drawn: Record, structure: Structure) -> None:
    if scored := scored_sites(drawn, structure.layout.enumerated):
        raise StructureError(
            f"the guide's draws {quoted(scored)} are not reparameterised, so the gradient would be missing: use a "
            "reparameterised distribution; without gradients, objective.loss(model, guide, ...) accepts them"
        )
    for name in structure.latents:
        if any(bound.requires_grad for bound in bounds_of(getattr(innermost(drawn[name].fns[0]), "support", None))):
            raise StructureError(
                f"the support of the guide's site '{name}' depends on parameters, so the aggregated posterior has a "
                "jump at its ends, which the gradient would not include: use a family with a fixed support"
            )
