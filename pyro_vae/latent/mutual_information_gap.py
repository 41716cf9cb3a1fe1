"""Mutual information between latent dimensions and known factors of the data, and the gap between the two largest."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..batches import ToArguments, check_loader, first_element
from ..errors import ArgumentError, InvalidDataError, NonFiniteError, StructureError, listed, quoted
from ..evaluation import over_batches, rank_and_size, shared_seed
from ..evidence import OfPair
from ..options import amount, check_function, flag, one_of
from ..records import warn_about
from .aggregated_density import Mixture, check_batches, mean_cost
from .draws import BatchDraws, Collector, Distributions
from .factor_information import FactorInformation

Aggregate = Literal["full", "leave-one-out"]


def second_element(batch: Any) -> Tensor:
    """The factors of a batch: its second element."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise ArgumentError(
        f"the factors are the second element of a batch, and the batch ({type(batch).__name__}) has none: pass a loader of "
        "TensorDataset(x, factors), or factors=, a function of the batch"
    )


@dataclass(repr=False, eq=False, kw_only=True)
class MutualInformationGap(OfPair):
    r"""The mutual information gap between latent dimensions and known factors of the data.

    It is the difference between the largest and the second largest information about a factor (Chen, Li, Grosse and
    Duvenaud, 2018, https://arxiv.org/abs/1802.04942)::

        I(z_d; v_f) = E[ log q(z_d | v_f) - log q(z_d) ]                                        nats
        gap_f       = ( largest I(z_d; v_f) over d - second largest ) / H(v_f)                  no unit
        mig         = mean of gap_f over f                                                      no unit

    with q(z_d) = 1/N sum_n q(z_d|x_n), q(z_d|v) the same over the data whose factor has the value v, and H(v_f) the entropy
    of the counts. Means are over N data and K draws z from each q(z|x). With a gap of 1, one dimension determines the factor
    and no other has information about it. With a gap of 0, no dimension has information, or two have equally much;
    `information` tells which. Information is not negative: estimates below zero count as zero in the gap. With a single
    dimension the second largest is zero. The dependence may have any shape; nothing is fitted.

    `aggregate` chooses the data in the mixtures:

    - ``"full"``: all N data, including the one that z was drawn for. Exact for these data as a population. With narrow
      posteriors and few data a draw identifies its datum, and so its factor, in every dimension. Draws for new data would
      not have this information. For posteriors that do not overlap, each I equals H and each gap is 0, whatever the latents
      encode.
    - ``"leave-one-out"``: without the datum that z was drawn for, in both mixtures: the information as for a new datum. The
      estimate for a dimension with little information is negative, the more so the less posteriors overlap.

    An example: a dimension that determines the factor, and four without information (normal means of variance one), have MIG
    1. With posteriors of scale 0.1 "full" gives 0.82, 0.97 and 0.99 for 100, 1,000 and 5,000 data, and with scale 0.02 it
    gives 0.49, 0.90 and 0.98. "leave-one-out" gives 1.02, 1.00 and 1.00 for both
    (`tests/benchmarks/disentanglement_scores.py`). The record of "full" also has the information of "leave-one-out", and
    warns where the two differ. The two largest are chosen on the data that measure them, which biases the gap by about its
    error: up where the first two are close, down where many share the second place. The errors include no bias.

    Only the marginals q(z_d|x) are used, and they must be known, so the guide must draw its dimensions independently given
    x. Latents may be discrete. A dimension is one number of one latent site.

    :param model: any Pyro model whose data lie in one plate and share one prior.
    :param guide: its guide, which must draw the latents directly, each dimension independent of the others given x.
    :param num_particles: K, draws per datum. With K = 1 Monte Carlo noise cannot be separated from differences between data,
        and the Monte Carlo errors are an upper bound: the sampling error.
    :param aggregate: "full" or "leave-one-out".
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites. `None` raises,
        because it makes every batch one datum with unknown dimensions.
    :param prior_sites: latent sites of the model without a counterpart in the guide. They are not part of z.
    :param check_support: raise on observations outside the support of their likelihood, although no number here depends on
        them.

    Call it with a loader (any iterable of batches), which is iterated once, in any order. `args` maps a batch to the tuple
    of the model's arguments or to a dict of keywords; by default it takes the batch's first element. `factors` maps a batch
    to a tensor (B,) or (B, F); by default it takes the second element. Factors are categories: only their equality matters.
    `progress` shows a progress bar. It returns `FactorInformation`. It takes O(N^2 D F) time. Memory per datum: K draws, K
    (F + 2) (D + 1) sums in double precision, and the parameters of its distributions.

    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        dimensions that are not independent given x, an autoguide, sites enumerated in the guide, a prior that differs
        between data.
    :raises MaskError: for masked latents. Masked observations are left out as usual.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch or loader; for factors that are NaN,
        continuous, or the same for all data; with "leave-one-out" for a datum that is the only one with its value.
    :raises NonFiniteError: if a density is NaN or infinite; with "leave-one-out" if the posteriors of all other data are
        zero at a draw.
    :raises ArgumentError: if a tensor is passed as the loader, or the factors do not fit the batch.
    :raises OptionError: for options out of range.

    Example::

        found = pv.MutualInformationGap(vae.model, vae.guide)(DataLoader(TensorDataset(x, labels), 100))
        print(found)
        found.mig.value, found.information      # 0-d, (D, F)
    """

    draws_rather: ClassVar[bool] = True
    num_particles: int = 1
    aggregate: Aggregate = "full"

    def check_options(self) -> None:
        self.num_particles = amount("num_particles", self.num_particles)
        one_of("aggregate", self.aggregate, Aggregate)

    @torch.no_grad()
    def __call__(
        self,
        loader: Iterable[Any],
        *,
        args: ToArguments = first_element,
        progress: bool = True,
        factors: Callable[[Any], Tensor] = second_element,
    ) -> FactorInformation:
        check_loader(loader)
        check_function("factors", factors, "a function from a batch to the factors of its data")
        collector = Collector(self._pair, self.num_particles, shared_seed(self.seed))
        values: list[Tensor] = []
        shown = flag("progress", progress) and rank_and_size()[0] == 0

        def with_factors() -> Iterator[Any]:
            for batch in tqdm(loader, desc=type(self).__name__, unit="batch", disable=not shown):
                values.append(checked_factors(factors(batch)))
                yield batch

        def add(*arguments: Any, **named: Any) -> None:
            collector.add(*arguments, **named)
            check_fit(values, collector.batches)

        over_batches(add, with_factors(), args, of=self, seed=self.seed, everywhere=True)
        batches = collector.batches
        check_batches(batches, self.aggregate)
        labels, counts = labels_of(torch.cat(values), self.aggregate)
        everything = [torch.arange(batch.size) for batch in batches]
        mixture = Mixture(batches, everything, True, labels)
        mixture.run(self._pair, within=False, progress=progress)
        left_out = terms_of(mixture, "leave-one-out")
        terms = left_out if self.aggregate == "leave-one-out" else terms_of(mixture, "full")
        check_overlap(terms, self.aggregate)
        found = FactorInformation.from_terms(
            terms,
            left_out,
            frequencies=(counts / len(counts)).to(terms.device),
            num_values=tuple(int(label.max()) + 1 for label in labels),
            names=batches[0].units,
            aggregate=self.aggregate,
            dtype=batches[0].log_prior.dtype,
            cost=mean_cost(batches),
        )
        if rank_and_size()[0] == 0:
            # stack level beyond the wrapper of torch.no_grad, so that the warning points at the caller
            warn_about(found, stacklevel=3)
        return found


def terms_of(mixture: Mixture, aggregate: str) -> Tensor:
    """log q(z_d|v_f) - log q(z_d) at the draws, (K, N, F, D)."""
    alone = mixture.log_q(aggregate, sum(batch.size for batch in mixture.batches))[:, 1:]
    return mixture.by_datum(mixture.log_q_alike(aggregate)[..., 1:] - alone.unsqueeze(1))


def checked_factors(values: Any) -> Tensor:
    """The factors of one batch, (B, F), on the CPU."""
    if not isinstance(values, Tensor) or values.ndim not in (1, 2) or not values[:1].numel():
        came = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ArgumentError(f"the factors of a batch must be a tensor (B,) or (B, F), got {came}")
    values = values.detach().cpu().reshape(len(values), -1)
    if values.is_floating_point() and bool((bad := ~values.isfinite().all(1)).any()):
        raise InvalidDataError(f"factors are NaN or infinite for data {listed(bad)} of a batch: leave those data out")
    return values


def check_fit(values: Sequence[Tensor], batches: Sequence[BatchDraws]) -> None:
    """Check that the last batch has one density per dimension and a row of factors for every datum."""
    batch, found = batches[-1], values[-1]
    if not isinstance(batch.columns, Distributions):
        raise StructureError(
            f"the guide draws the dimensions of {quoted(batch.rows)} together, so q(z_d|x) of one dimension is not known: "
            "pass a guide that draws each from its marginal, as Normal(loc, scale).to_event(1); for a MultivariateNormal "
            "use scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt(). No site may be drawn given another; replace a "
            "OneHotCategorical by a Categorical, and give the plate of the data in place of datum_plate=None"
        )
    if len(found) != batch.size:
        raise ArgumentError(
            f"factors has {len(found)} rows for a batch of which the guide drew {batch.size} data: pass one row for each "
            "datum (for a plate that subsamples, pass the subsample of the data)"
        )
    if found.shape[1] != values[0].shape[1]:
        raise ArgumentError(f"factors has {found.shape[1]} columns in one batch and {values[0].shape[1]} in another")


def labels_of(values: Tensor, aggregate: str) -> tuple[list[Tensor], Tensor]:
    """For each factor the index of the value of every datum, F times (N,), and how many data have that value, (N, F)."""
    labels, counts = [], []
    for f, factor in enumerate(values.unbind(1)):
        found, label, count = factor.unique(return_inverse=True, return_counts=True)
        if len(found) == 1:
            raise InvalidDataError(
                f"factor {f} is {found[0].item()} for all {len(factor)} data, so there is no information about it: leave it "
                "out"
            )
        if 2 * len(found) > len(factor) and bool((found != found.round()).any()):
            raise InvalidDataError(
                f"factor {f} is continuous ({len(found)} values of {len(factor)} data), and information about it would be "
                "information about single data: sort its values into bins, as (values * 10).floor()"
            )
        alone = count[label] == 1
        if aggregate == "leave-one-out" and bool(alone.any()):
            raise InvalidDataError(
                f"data {listed(alone)} are the only ones with their value of factor {f}, so no data with that value "
                "are left when one is left out: join rare values, leave those data out, or use aggregate='full'"
            )
        labels.append(label)
        counts.append(count[label])
    return labels, torch.stack(counts, 1).double()


def check_overlap(terms: Tensor, aggregate: str) -> None:
    bad = (~terms.isfinite()).flatten(2).any(2).any(0)
    if bool(bad.any()):
        raise NonFiniteError(
            f"the draws of data {listed(bad)} are outside of the posteriors of all other data with the same factor "
            f"value, so with aggregate='{aggregate}' the density there is zero: use aggregate='full', or pass more "
            "data"
        )
