"""Hold a guide against latents that are known: those behind data simulated from the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..evidence import OfPair, check_data_option
from ..kernel import Call
from ..noise import Noise, checked_seed
from ..options import amount
from ..records import warn_about
from .calibration import Calibration
from .measurement import measure
from .posterior_draws import simulated


@dataclass(repr=False, eq=False, kw_only=True)
class GuideCalibration(OfPair):
    r"""Is q(z | x) too narrow, too wide or in the wrong place? Asks data of the model, whose latents are known.

    Latents and data are drawn from the model, so that each latent is an exact draw from the posterior of its own datum, and
    the guide draws L latents for each datum. No fits are made, and no log p(x) is needed. Two things are measured.

    **Ranks.** If q(z | x) is the posterior, the rank of a latent among the draws of the guide is uniform in every dimension,
    and so is the rank of log q(z | x), which sees dimensions together::

        u_d = (number of draws with z_d below the true one + uniform noise) / (L + 1)      uniform on (0, 1)

    The noise orders equal values, as those of discrete latents, at random. A narrow guide puts too many latents outside its
    draws, a wide one too few; a shifted one puts them all on one side. The distribution function of the ranks is compared
    with a band that uniform ranks of N data leave in one dimension or another with a probability of at most 1%.

    **The symmetric gap**, without log p(x), which cancels::

        E_x [KL(p(z | x) to q) + KL(q to p(z | x))]
            = mean over data of [log p(x, z) - log q(z | x)] at the latent behind x, minus the mean of the same at draws of q

    The second term is the ELBO. The gap is at least the mean of log p(x) - ELBO. It is infinite where the guide gives the
    posterior's draws no density, and has no known error where its terms have a heavy tail (`doubts`).

    What both say is about data of the model. A model that fits badly makes your data unlike those, and a guide that is right
    on the one may be wrong on the other.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites; one that looks at the data.
    :param num_particles: L, draws of the guide for each datum. They need no decoder, but for ten of them.
    :param data: maps the simulated values by observed site to the model's arguments; by default they stand in the place of
        the arguments that the sites observed.

    Called with the model's own arguments, of which the observed ones count only by their shapes and by what they mask; what
    the model conditions on is used as it is. Returns a `Calibration` of as many simulated data, B, in nats. For more data,
    or where the whole call is one datum, go through the same batch several times: every pass simulates others. 300 data see
    a standard deviation that is wrong by a fifth, 1000 one that is wrong by a tenth.

    Latents without a counterpart in the guide, and those that are summed out, have no rank (`left_out`). Where the density
    of the guide at given latents is not known, neither is the gap (`unchecked`).

    :raises ArgumentError: if no argument, or more than one, holds what a site observed, and no `data` says where
        simulated values go.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        for a model that reads its observations elsewhere than in ``obs=``, and for a guide that draws no latent.
    :raises MaskError: where what is masked depends on drawn values.
    :raises NonFiniteError: if log p(x, z) or log q(z | x) is NaN at draws of the guide.
    :raises OptionError: for options out of range.

    References: Talts, Betancourt, Simpson, Vehtari and Gelman (2018), "Validating Bayesian Inference Algorithms with
    Simulation-Based Calibration", https://arxiv.org/abs/1804.06788; Yao, Vehtari, Simpson and Gelman (2018), "Yes, but Did
    It Work?: Evaluating Variational Inference", https://arxiv.org/abs/1802.02538; Säilynoja, Bürkner and Vehtari (2022),
    "Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple sample
    comparison", https://doi.org/10.1007/s11222-022-10090-6; Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman and
    Vehtari (2023), "Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities Shapes
    Sensitivity", https://arxiv.org/abs/2211.02383; Domke (2021), "An Easy to Interpret Diagnostic for Approximate
    Inference: Symmetric Divergence Over Simulations", https://arxiv.org/abs/2103.01030.

    Example::

        calibration = pv.GuideCalibration(model, guide, seed=0)(x)
        print(calibration)
        calibration.plot()
        # ten simulations of the same batch
        pv.evaluate(pv.GuideCalibration(model, guide, seed=0), [x] * 10)
    """

    draws_rather: ClassVar[bool] = True
    num_particles: int = 100
    data: Callable[[dict[str, Tensor]], tuple[Any, ...]] | None = None

    def check_options(self) -> None:
        self.num_particles = amount("num_particles", self.num_particles)
        check_data_option(self.data)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Calibration:
        seed = checked_seed(self.seed)
        with self._pair.open(args, kwargs, seed) as call:
            of_template = one_draw(call)
            sites, args, kwargs, cost = simulated(call, self.model, args, kwargs, self.data, self.datum_plate)
        with self._pair.open(args, kwargs, seed) as call:
            blind = same(of_template, one_draw(call))
            record = measure(call, sites, self.num_particles, blind=blind, cost=cost)
        warn_about(record, stacklevel=3)  # past torch.no_grad, to the caller
        return record


def one_draw(call: Call) -> dict[str, Tensor]:
    """The same noise at every call: only a guide that looks at other data draws something else."""
    call.set_noise(Noise.CALIBRATION, 1)
    return call.latent_values(call.draw_latents(1))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)
