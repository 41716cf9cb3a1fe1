"""The latent units that a model and guide use, measured over a whole data set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..batches import ToArguments, first_element
from ..evaluation import Folder, OnError, over_loader
from ..evidence import OfPair
from ..options import amount, real_number
from .per_unit import UnitTerms, unit_terms
from .sums import UnitSums
from .unit_activity import UnitActivity


@dataclass(repr=False, eq=False, kw_only=True)
class ActiveUnits(OfPair):
    r"""How much each latent unit depends on the data, over a whole data set.

    A unit is one number of one latent site. Per unit d::

        variance_of_means_d = Var_x( E_q[z_d | x] )                     active where above `threshold`
        kl_d                = E_x KL( q(z_d | x) to p(z_d) )            nats
        fraction_at_prior_d = share of x with that KL below `epsilon`   collapsed where at least 1 - `delta`

    Active units: Burda, Grosse and Salakhutdinov (2016, https://arxiv.org/abs/1509.00519). (epsilon, delta)-collapse: Lucas,
    Tucker, Grosse and Norouzi (2019, https://arxiv.org/abs/1911.02469).

    Posterior means and KLs are analytic given the latents drawn before, and are averaged over K draws of those. Where there
    is no formula:

    - A mean (of a transformed distribution) is that of the K draws. Its Monte Carlo noise, which would make every unit look
      active, is subtracted from the variance.
    - A KL is the mean of log q - log p over the draws. `fraction_at_prior` then needs many draws, because the noise of a
      small KL is about sqrt(2 KL / K).
    - Where q or p of a site does not factorise over units (full covariance, a flow, a mixture over vectors), there is one KL
      for the site, and NaN per unit.

    Means are those of the constrained values. The mean of a Bernoulli is its probability. A Categorical has a KL but no
    mean.

    A formula given the draws is right only if the prior of a latent depends on no draw that the guide makes given that
    latent. It does if the model draws z2, then z1 given z2, and the guide draws z1, then z2 given z1. The number for z1 is
    then the mean of log q - log p over the draws, which may be negative, and its `fraction_at_prior` is NaN. The sum over
    sites is the KL of all latents in either case.

    Where the guide enumerates a site and draws latents given it, the site is summed out. KLs are then those of q(z given x)
    = sum_y q(y given x) q(z given x, y) to p(z), from draws, and the enumerated site is not a unit. A guide that enumerates
    all latents is run so that it draws them.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites.
    :param num_particles: K, at least 2. Only one draw is used where there is one latent with formulas for mean and KL.
    :param threshold: variance of means above which a unit is active, in squared units of the latent. The usual 0.01 is meant
        for priors of variance one.
    :param epsilon: KL in nats below which a unit counts as at the prior for a datum.
    :param delta: share of the data that may be above `epsilon`.
    :param datum_plate: the plate of the data; found automatically where only one is common to all sites; `None` makes every
        batch one datum.
    :param prior_sites: latent sites of the model without a counterpart in the guide, drawn from the prior. They are not
        units.
    :param check_support: raise on observations outside the support of their likelihood, although no number here depends on
        them.

    Call it with a loader (any iterable of batches). Further arguments are `args`, `progress`, `checkpoint` and `on_error`,
    as in `evaluate`. `args` maps a batch to the tuple of the model's arguments or to a dict of keywords; by default it takes
    the batch's first element. It returns `UnitActivity`. Memory does not grow with the data. Parameters that the guide has
    per datum must fit the batches.

    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch or loader.
    :raises NonFiniteError: if a KL is NaN or infinite.
    :raises ArgumentError: if a tensor is passed as the loader.
    :raises OptionError: for options out of range.

    Example::

        units = pv.ActiveUnits(vae.model, vae.guide)(DataLoader(TensorDataset(x), 100))
        print(units)
        units.active, units.kl      # (D,)
    """

    draws_rather: ClassVar[bool] = True
    num_particles: int = 50
    threshold: float = 0.01
    epsilon: float = 0.01
    delta: float = 0.01

    def check_options(self) -> None:
        self.num_particles, self.threshold, self.epsilon, self.delta = checked_options(
            self.num_particles, self.threshold, self.epsilon, self.delta
        )

    @torch.no_grad()
    def __call__(
        self,
        loader: Iterable[Any],
        *,
        args: ToArguments = first_element,
        progress: bool = True,
        checkpoint: Folder | None = None,
        on_error: OnError = "raise",
    ) -> UnitActivity:
        sums = UnitSums(self.epsilon)

        def terms(*arguments: Any, **named: Any) -> UnitTerms:
            with self._pair.open(arguments, named, self.seed) as call:
                return unit_terms(call, self.num_particles)

        kept: Any = {"checkpoint": checkpoint, "on_error": on_error}
        over_loader(terms, loader, args, of=self, seed=self.seed, progress=progress, each=sums.add, **kept)
        return sums.activity(threshold=self.threshold, delta=self.delta, num_particles=self.num_particles)


def checked_options(num_particles: int, threshold: float, epsilon: float, delta: float) -> tuple[int, float, float, float]:
    alone = "with a single draw, noise cannot be separated from the variance over the data"
    return (
        amount("num_particles", num_particles, lowest=2, why=alone),
        real_number("threshold", threshold),
        real_number("epsilon", epsilon),
        real_number("delta", delta, highest=1.0, ends="[)"),
    )
