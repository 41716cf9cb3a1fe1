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
    r"""The mean KL over a data set, taken apart (Hoffman and Johnson, 2016,
    http://approximateinference.org/accepted/HoffmanJohnson2016.pdf; Chen, Li, Grosse and Duvenaud, 2018,
    https://arxiv.org/abs/1802.04942)::

        kl = E_x KL(q(z|x) to p(z)) = mutual_information + marginal_kl
        mutual_information          = E log q(z|x) - log q(z)              how much z says about which datum it came from
        marginal_kl                 = E log q(z) - log p(z)                = total_correlation + dimension_wise_kl
        total_correlation           = E log q(z) - sum_d log q(z_d)        what the D dimensions of q(z) share
        dimension_wise_kl           = E sum_d log q(z_d) - log p(z)        how far each dimension of q(z) is from its prior

    in nats, with the aggregated posterior ``q(z) = 1/N sum_n q(z|x_n)`` and means over the N data of the loader and K draws
    z from each q(z|x). All parts share the same draws, so that the sums above hold to rounding. That they hold says nothing:
    they do for any wrong q(z) as well.

    `aggregate` says which q(z) is meant, and what its estimate is wrong by:

    - ``"full"``: all N data, exact for these data. Takes O(N^2 D) time. The mutual information lies between 0 and **log N**:
      where it comes near that, the draws tell all N data apart, and more data would give more.
    - ``"leave-one-out"``: all data but the one that z was drawn for, ``1/(N - 1) sum over j != i of q(z_i|x_j)``: what q(z)
      would say of a new datum. The mutual information is no longer bounded by log N: it is overestimated, the more so the
      fewer data overlap, and infinite (the marginal KL minus infinite) where one stands apart. Total correlation is then
      NaN.
    - ``"minibatch"``: each batch of B stands for all data, its others weighed by (N - 1) / (B - 1), in time O(N B D)
      (`pyro_vae.ops.index_code_information`). The batches must be uniform draws of the data (a loader with shuffle=True; a
      data set in an order is no such thing). Unbiased for q(z), but not for its logarithm: mutual information is
      overestimated (never above log N), dimension-wise KL underestimated, total correlation off in either direction.

    None of these biases is in the errors. `mutual_information` and `marginal_kl` are known for any guide whose latents have
    a density: joint distributions, flows, latents drawn given other latents, discrete ones. The other two need dimensions
    that are independent given x and are NaN elsewhere; the record says so. A dimension is one number of one latent site. log
    p(z) enters as a whole; under a prior that couples dimensions `dimension_wise_kl` also holds what it couples, may be
    negative, and does not factorise (`dimension_wise` is NaN).

    :param model: any Pyro model whose data lie in one plate and share one prior.
    :param guide: its guide, which draws the latents themselves: no autoguide. What it enumerates beside them is summed out
        of q(z|x); where it enumerates all latents, it is taken for one that draws them.
    :param num_particles: K, draws per datum. From one alone Monte Carlo noise cannot be told from differences between data:
        `std_error` is then an upper bound, the sampling error.
    :param num_draws: take the means over this many of the N data, chosen at random, which cuts the time to O(num_draws N D);
        q(z) is made of all data nevertheless. `std_error` holds the choice too.
    :param aggregate: "full", "leave-one-out" or "minibatch".
    :param datum_plate: the plate of the data; found by itself where only one is common to all sites; `None` makes every
        batch one datum (and its dimensions unknown).
    :param prior_sites: latent sites of the model without a counterpart in the guide: no part of z.
    :param check_support: raise on observations outside the support of their likelihood, though no number here reads them.

    Called with a loader, any iterable of batches, which is gone through once, in any order; `args`, which maps a batch to
    the tuple of the model's arguments or a dict of keywords (by default its first element); `progress`; and `on_error` as in
    `evaluate`; returns `Surgery`. There is no checkpoint: draws and distributions of all data must be in memory at once.
    Kept in memory are, per datum, K draws, 2 (D + 1) sums in double precision for each, and the parameters of its
    distributions (2 D numbers for a diagonal Gaussian). Where dimensions are not independent, the arguments of every batch
    are kept in place of distributions, and the guide runs again for every block of draws.

    :raises StructureError: (and its kinds, see `pyro_vae.errors`) for a program without known weights per datum, an
        autoguide, a prior that differs from datum to datum, a batch of one with "minibatch".
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
        # The prior of each batch is compared with that of the one before: every rank looks at all of them.
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
            warn_about(surgery, stacklevel=3)  # past torch.no_grad, to the caller
        return surgery

    def _choose(self, batches: Sequence[BatchDraws], seed: int) -> list[Tensor]:
        """The data of each batch that means are taken over, in order."""
        sizes = [batch.size for batch in batches]
        num_data = sum(sizes)
        if self.num_draws is None or self.num_draws >= num_data:
            return [torch.arange(size) for size in sizes]
        with batch_noise(len(batches)):  # the noise of a batch that was not there
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
