"""Split the mean KL over a data set by the aggregated posterior."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..batches import ToArguments, first_element
from ..evaluation import OnError, over_loader, rank_and_size, shared_seed
from ..evidence import OfPair
from ..noise import Noise, batch_noise, noise_seed
from ..options import amount, one_of
from ..records import warn_about
from .aggregated_density import Mixture, check_batches, mean_cost
from .draws import BatchDraws, Collector, Distributions
from .surgery import Surgery

Aggregate = Literal["full", "leave-one-out", "minibatch"]


@dataclass(repr=False, eq=False, kw_only=True)
class ELBOSurgery(OfPair):
    r"""The mean KL to the prior over a data set, split into parts.

    The parts are (Hoffman and Johnson, 2016, http://approximateinference.org/accepted/HoffmanJohnson2016.pdf; Chen, Li,
    Grosse and Duvenaud, 2018, https://arxiv.org/abs/1802.04942)::

        kl = E_x KL(q(z|x) to p(z)) = mutual_information + marginal_kl
        mutual_information          = E log q(z|x) - log q(z)              how much z says about which datum it came from
        marginal_kl                 = E log q(z) - log p(z)                = total_correlation + dimension_wise_kl
        total_correlation           = E log q(z) - sum_d log q(z_d)        what the D dimensions of q(z) share
        dimension_wise_kl           = E sum_d log q(z_d) - log p(z)        how far each dimension of q(z) is from its prior

    in nats, with the aggregated posterior ``q(z) = 1/N sum_n q(z|x_n)``. Means are over the N data of the loader and K draws
    z from each q(z|x). All parts use the same draws, so the sums above hold up to rounding. This is no check: they would
    hold for a wrong q(z) too.

    `aggregate` chooses the estimate of q(z), and with it the bias:

    - ``"full"``: all N data, exact for these data. Takes O(N^2 D) time. The mutual information is between 0 and **log N**.
      Where it is near log N, each draw identifies its datum, and with more data the mutual information would be larger.
    - ``"leave-one-out"``: all data but the one that z was drawn for, ``1/(N - 1) sum over j != i of q(z_i|x_j)``: q(z) as
      for a new datum. The mutual information is not bounded by log N. It is overestimated, the more so the fewer posteriors
      overlap. It is infinite (and the marginal KL minus infinite) where a datum has no overlap with others; total
      correlation is then NaN.
    - ``"minibatch"``: each batch of B represents all data, with weights (N - 1) / (B - 1) for its other data, in time O(N B
      D) (`pyro_vae.ops.index_code_information`). The batches must be uniform draws of the data: use a loader with
      shuffle=True. Unbiased for q(z), but not for its logarithm: mutual information is overestimated (never above log N),
      dimension-wise KL is underestimated, and total correlation may be wrong in either direction.

    The errors do not include these biases. `mutual_information` and `marginal_kl` are computed for any guide whose latents
    have a density: joint distributions, flows, latents drawn given other latents, discrete latents. The other two parts need
    dimensions that are independent given x; otherwise they are NaN, and the record says so. A dimension is one number of one
    latent site. If the prior does not factorise over dimensions, `dimension_wise_kl` includes the prior's dependence, may be
    negative, and cannot be given per dimension (`dimension_wise` is NaN).

    :param model: any Pyro model whose data lie in one plate and share one prior.
    :param guide: its guide, which must draw the latents directly, so not an autoguide. Sites that it enumerates are summed
        out of q(z|x). If it enumerates all latents, it is run so that it draws them.
    :param num_particles: K, draws per datum. With K = 1 Monte Carlo noise cannot be separated from differences between data,
        and `std_error` is an upper bound: the sampling error.
    :param num_draws: take the means over this many of the N data, chosen at random, which reduces the time to O(num_draws N
        D). q(z) still uses all data. `std_error` includes the effect of the choice.
    :param aggregate: "full", "leave-one-out" or "minibatch".
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites; `None` makes every
        batch one datum (and its dimensions unknown).
    :param prior_sites: latent sites of the model without a counterpart in the guide. They are not part of z.
    :param check_support: raise on observations outside the support of their likelihood, although no number here depends on
        them.

    Call it with a loader (any iterable of batches), which is iterated once, in any order. Further arguments are `args`,
    `progress` and `on_error`, as in `evaluate`. `args` maps a batch to the tuple of the model's arguments or to a dict of
    keywords; by default it takes the batch's first element. It returns `Surgery`.

    There is no checkpoint, because draws and distributions of all data must be in memory at once. Memory per datum: K draws,
    each with 2 (D + 1) sums in double precision, and the parameters of its distributions (2 D numbers for a diagonal
    Gaussian). Where dimensions are not independent, the arguments of every batch are kept in place of distributions, and the
    guide runs again for every block of draws.

    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        an autoguide, a prior that differs between data, a batch of one with "minibatch".
    :raises MaskError: for masked latents. Masked observations are left out as usual.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch or loader.
    :raises NonFiniteError: if a density is NaN or infinite.
    :raises ArgumentError: if a tensor is passed as the loader.
    :raises OptionError: for options out of range.

    Example::

        surgery = pv.ELBOSurgery(vae.model, vae.guide)(DataLoader(TensorDataset(x), 100))
        print(surgery)
        surgery.mutual_information.value, surgery.log_num_data
    """

    draws_rather: ClassVar[bool] = True
    num_particles: int = 1
    num_draws: int | None = None
    aggregate: Aggregate = "full"

    def check_options(self) -> None:
        self.num_particles = amount("num_particles", self.num_particles)
        self.num_draws = None if self.num_draws is None else amount("num_draws", self.num_draws)
        one_of("aggregate", self.aggregate, Aggregate)

    @torch.no_grad()
    def __call__(
        self,
        loader: Iterable[Any],
        *,
        args: ToArguments = first_element,
        progress: bool = True,
        on_error: OnError = "raise",
    ) -> Surgery:
        seed = shared_seed(self.seed)
        collector = Collector(self._pair, self.num_particles, seed)
        # The prior of each batch is compared with that of the one before: every process checks all of them.
        options: Any = {"seed": self.seed, "progress": progress, "on_error": on_error, "everywhere": True}
        over_loader(collector.add, loader, args, of=self, **options)
        batches = collector.batches
        check_batches(batches, self.aggregate)
        chosen = self._choose(batches, seed)
        by_dimension = all(isinstance(batch.columns, Distributions) for batch in batches)
        mixture = Mixture(batches, chosen, by_dimension)
        mixture.run(self._pair, within=self.aggregate == "minibatch", progress=progress)
        num_data = sum(batch.size for batch in batches)
        surgery = Surgery.from_densities(
            log_q=mixture.by_datum(mixture.own[:, 0]),
            log_mixture=mixture.by_datum(mixture.log_q(self.aggregate, num_data)),
            log_prior=torch.cat([b.log_prior[:, c] for b, c in zip(batches, chosen, strict=True)], 1),
            log_prior_by_dimension=prior_by_dimension(batches, chosen),
            names=batches[0].units,
            num_data=num_data,
            aggregate=self.aggregate,
            cost=mean_cost(batches),
        )
        if rank_and_size()[0] == 0:
            # stack level beyond the wrapper of torch.no_grad, so that the warning points at the caller
            warn_about(surgery, stacklevel=3)
        return surgery

    def _choose(self, batches: Sequence[BatchDraws], seed: int) -> list[Tensor]:
        """The data of each batch over which means are taken, in order."""
        sizes = [batch.size for batch in batches]
        num_data = sum(sizes)
        if self.num_draws is None or self.num_draws >= num_data:
            return [torch.arange(size) for size in sizes]
        with batch_noise(len(batches)):  # a noise block that no batch uses
            generator = torch.Generator().manual_seed(noise_seed(seed, Noise.SUBSAMPLE, 0))
        taken = torch.zeros(num_data, dtype=torch.bool)
        taken[torch.randperm(num_data, generator=generator)[: self.num_draws]] = True
        return [part.nonzero().squeeze(1) for part in taken.split(sizes)]


def prior_by_dimension(batches: Sequence[BatchDraws], chosen: Sequence[Tensor]) -> Tensor | None:
    parts = [
        None if (prior := batch.log_prior_by_dimension) is None else prior[:, data.to(prior.device)]
        for batch, data in zip(batches, chosen, strict=True)
    ]
    known = [part for part in parts if part is not None]
    return torch.cat(known, 1) if len(known) == len(parts) else None
