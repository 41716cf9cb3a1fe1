"""Calibration of a guide: compare its draws with the known latents of data simulated from the model."""

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
    r"""Test whether q(z | x) is too narrow, too wide or in the wrong place, on data simulated from the model.

    Latents and data are drawn from the model, so each latent is an exact draw from the posterior of its datum. The guide
    draws L latents for each datum. No fit and no log p(x) is needed. There are two measurements.

    **Ranks.** If q(z | x) is the posterior, the rank of a latent among the draws of the guide is uniform in every dimension,
    and so is the rank of log q(z | x), which tests all dimensions jointly::

        u_d = (number of draws with z_d below the true one + uniform noise) / (L + 1)      uniform on (0, 1)

    The noise orders equal values, such as those of discrete latents, at random. With a guide that is too narrow, too many
    latents are outside its draws; with one that is too wide, too few. With a shifted guide, most are on one side. The
    distribution function of the ranks is compared with a band. For uniform ranks of N data, the probability to leave the
    band in any dimension is at most 1%.

    **The symmetric gap**, in which log p(x) cancels::

        E_x [KL(p(z | x) to q) + KL(q to p(z | x))]
            = mean over data of [log p(x, z) - log q(z | x)] at the latent behind x, minus the mean of the same at draws of q

    The second term is the ELBO. The gap is at least the mean of log p(x) - ELBO. It is infinite where the density of the
    guide is zero at draws of the posterior. Its error is not known where its terms have a heavy tail (`doubts`).

    Both results hold for data simulated from the model. If the model fits badly, your data differ from these, and a guide
    that is right for one may be wrong for the other.

    :param model: any Pyro model whose data lie in one plate.
    :param guide: its guide, with the same latent sites; it must depend on the data.
    :param num_particles: L, draws of the guide for each datum. Only ten of them need the decoder.
    :param data: function from the simulated values by observed site to the model's arguments. By default they replace the
        arguments that the sites observed.

    Call it with the model's arguments. Of the observed ones only shapes and masks are used; arguments that the model
    conditions on are used as they are. It returns a `Calibration` of as many simulated data, B, in nats. For more data, or
    where the whole call is one datum, pass the same batch several times: every pass simulates new data. With 300 data it
    finds a standard deviation that is wrong by a fifth, with 1000 one that is wrong by a tenth.

    Latents without a counterpart in the guide, and those that are summed out, have no rank (`left_out`). Where the density
    of the guide at given latents is not known, neither is the gap (`unchecked`).

    :raises ArgumentError: if no argument, or more than one, holds what a site observed, and `data` is not given.
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum,
        for a model that reads its observations elsewhere than in ``obs=``, and for a guide that draws no latent.
    :raises MaskError: where a mask depends on drawn values.
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
        # stack level beyond the wrapper of torch.no_grad, so that the warning points at the caller
        warn_about(record, stacklevel=3)
        return record


def one_draw(call: Call) -> dict[str, Tensor]:
    """One draw with the same noise at every call, so that only a guide that depends on the data gives different values."""
    call.set_noise(Noise.CALIBRATION, 1)
    return call.latent_values(call.draw_latents(1))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)
