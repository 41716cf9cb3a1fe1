"""The beta-ELBO with analytic KL: Pyro's TraceMeanField_ELBO, for reparameterised guides."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from pyro.distributions.rejector import Rejector
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.util import warn_if_nan
from torch import Tensor

from ..autocast import for_program
from ..densities import innermost
from ..errors import StructureError
from .terms import Density, Pass
from .traces.beta_elbo import BetaELBO, densities_of
from .traces.beta_messenger import WeighedTraces
from .traces.kl_formulas import OwnDraws, analytic_kl
from .traces.kl_targets import Per, check_beta, target_of
from .traces.rates import Rates, mean_rates
from .traces.tape import tape_pair
from .weights import Weight


class BetaTraceMeanField_ELBO(BetaELBO, TraceMeanField_ELBO):
    r"""Pyro's `TraceMeanField_ELBO` with a weight on the KL, which is analytic where torch has a formula::

        loss = -sum over data of ( E_q log p(x|z) - sum over latents of beta KL(q(z|x) || p(z)) )        nats

    It has the parameters, attributes and errors of `BetaTrace_ELBO`; B data, averaged over K particles. It is faster than
    `BetaTrace_ELBO`, with less noise while the KL is far from zero (Kingma and Welling, 2014,
    https://arxiv.org/abs/1312.6114). A KL without a formula is sampled.

    The KL of a site is computed by formula given the latents drawn before it. This is right only if the latents that z
    depends on in the model do not depend on z in the guide. It is always right where both sides draw in the same order.
    Where the order differs, dependences are traced through guide and model, and a KL for which the formula would be wrong is
    sampled. A sampled part may be negative. A mean-field guide that draws in the order of the model keeps its formulas, and
    so has less noise.

    **Free bits** are a floor of lambda nats under the KL of each dimension j of a latent, or of each site. A dimension below
    the floor is not pulled to the prior, which prevents posterior collapse (Kingma et al., 2016,
    https://arxiv.org/abs/1606.04934, appendix C.8)::

        loss = -reconstruction + sum over sites and j of beta N max(lambda, mean over the data of KL_j)

    The mean is over the data and the particles of the call; N is the number of data with the scale of the plate. Masked
    data, and masked dimensions of a datum, are left out of the mean and of N. Dimensions are the elements of the event and
    of plates inside the datum. Below the floor a KL has no gradient. As KL_j <= max(lambda, KL_j), the loss at beta = 1 is
    still minus a lower bound of log p(x). It depends on the batch size: with smaller batches the maximum of means is larger,
    on average.

    **Capacity** is a target of C nats per datum for the KL of all latents together, usually a rising schedule (Burgess et
    al., 2018, https://arxiv.org/abs/1804.03599, with weight 1000 and C from 0 to 25)::

        loss = -reconstruction + capacity_weight N |KL / N - C|

    N counts the data of which some latent is not masked. With a weight of at least 1, the loss plus N C is minus a lower
    bound of log p(x); the loss alone is not a bound.

    Both options need one plate of the data that is common to all sites (with a dict of free bits: common to the named
    latents and the observations). Particles that run in a loop are then all in memory at once. `terms` has the KL and the
    ELBO without floor or target.

    :param free_bits: lambda: a number >= 0, a tensor without dimensions, a schedule, or a dict of these by latent site.
        Sites that a dict does not name have no floor.
    :param free_bits_per: "dimension", or "site" for the KL of whole sites, whose dimensions may depend on one another.
    :param capacity: C: a number >= 0, a tensor without dimensions or a schedule; only without free bits and at beta = 1.
    :param capacity_weight: a number >= 0, a tensor without dimensions or a schedule.
    :param compile: as in `BetaTrace_ELBO`.
    :raises OptionError: (besides the others) for free bits of a site that the pair does not have; for capacity with free
        bits or a beta.
    :raises StructureError: (besides the others) for draws of the guide that are not reparameterised; for free bits of a site
        that has no separate KL, or none by dimension.
    :raises DatumPlateError: for free bits or capacity, if no plate, or more than one, is common to all sites.
    :raises SubsamplingError: for free bits or capacity, if there is a subsampled plate inside the datum.

    Example::

        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pv.BetaTraceMeanField_ELBO(beta=4.0))
        pv.BetaTraceMeanField_ELBO(free_bits=0.5)
        pv.BetaTraceMeanField_ELBO(capacity=pv.LinearAnnealing(100_000, end=25.0))

    It differs from Pyro's class at beta = 1 in three cases:

    - with a mask on one side: Pyro ignores a mask of the model;
    - with autoguides that draw in unconstrained space: Pyro leaves out their log-Jacobian;
    - with a guide that draws in another order than the model: Pyro uses the formulas nevertheless, with a warning.
    """

    _costs: list[Tensor]  # of the current particle: the terms of the loss with a plus sign
    _gains: list[Tensor]  # and those with a minus sign
    _rates: Rates = {}  # and the KLs, where the loss needs more than their sum
    _call: tuple[Any, ...] = ()  # the model, the guide and their arguments

    def __init__(
        self,
        beta: Weight | Mapping[str, Weight] = 1.0,
        *,
        free_bits: Weight | Mapping[str, Weight] = 0.0,
        free_bits_per: Per = "dimension",
        capacity: Weight | None = None,
        capacity_weight: Weight = 1000.0,
        compile: bool | Mapping[str, Any] = False,
        **options: Any,
    ) -> None:
        super().__init__(beta, compile=compile, **options)
        self._target = target_of(free_bits, free_bits_per, capacity, capacity_weight)
        check_beta(self._target, self._beta)
        self._own_draws = OwnDraws()

    def _differentiable_loss(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        # Without score-function terms the loss is its surrogate: no scalar has to be read from the device.
        return self._all_particles(model, guide, args, kwargs)

    def _value_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        loss = self._all_particles(model, guide, args, kwargs)
        return loss.detach(), loss

    def _loss_alone(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> float:
        return self._as_float(model, guide, args, kwargs, backward=False)

    def _loss_and_grads(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> float:
        return self._as_float(model, guide, args, kwargs, backward=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_costs": [], "_gains": [], "_rates": {}, "_call": ()}

    def _weights(self) -> dict[str, Weight]:
        return super()._weights() | (self._target.weights if self._target else {})

    def _as_float(self, model: Callable, guide: Callable, args: Any, kwargs: Any, backward: bool) -> float:
        if self._target is None:  # one particle after the other, so that memory does not grow with K
            losses = (self._particle_loss() / self.num_particles for _ in self._get_traces(model, guide, args, kwargs))
        else:  # which needs the mean over the particles
            losses = (self._all_particles(model, guide, args, kwargs) for _ in range(1))
        total = 0.0
        for loss in losses:
            if backward and loss.requires_grad:
                loss.backward(retain_graph=self.retain_graph)
            total += loss.item()
        warn_if_nan(total, "loss")  # type: ignore[call-overload]
        return total

    def _all_particles(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Tensor:
        check_beta(self._target, self._beta)
        now: Any = self._target and self._target.now(self._value)
        losses, runs = [], []
        for _ in self._get_traces(model, guide, args, kwargs):
            losses.append(self._particle_loss())
            runs.append(self._rates)
            self._rates = {}
        loss = reduce(operator.add, losses)
        if self.num_particles > 1:
            loss = loss / self.num_particles
        if self._target is None:
            return loss
        cost, plain = self._target.cost(mean_rates(runs, self.num_particles), now, self._betas)
        extra = Density((cost - plain).detach() * self.num_particles)  # factors that enter the loss, but no KL and no ELBO
        self._passes[-1] = replace(self._passes[-1], others=[*self._passes[-1].others, extra])
        return loss + cost

    def _particle_loss(self) -> Tensor:
        costs, self._costs, gains, self._gains = self._costs, [], self._gains, []
        if costs:
            return reduce(operator.sub, gains, reduce(operator.add, costs))
        return -reduce(operator.add, gains) if gains else torch.zeros(())

    def _get_traces(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        self._call = model, guide, args, kwargs
        try:
            yield from super()._get_traces(model, guide, args, kwargs)
        finally:
            self._call = ()

    def _run_pair(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Any, Any]:
        with for_program():
            return tape_pair(self.max_plate_nesting, model, guide, args, kwargs)

    def _measure(self, traces: WeighedTraces) -> Pass:
        model, guide = traces.model_sites, traces.guide_sites
        check_reparameterised(guide)
        excluded = self._own_draws.find(guide, model, *self._call)
        analytic = {name: analytic_kl(traces, sites) for name, sites in traces.groups.items() if name not in excluded}
        known = {name: kl for name, kl in analytic.items() if kl is not None}
        sampled = [s for name, sites in traces.groups.items() if name not in known for s in sites]
        # Where the KL has a formula, log p(z) and log q(z|x) are never computed: they would only cost time.
        observed = [s for s in model.values() if s["is_observed"]]
        others = [s for n, s in guide.items() if s["is_observed"] and n not in traces.scales]
        costs = [scale_and_mask(kl, guide[n]["scale"], guide[n]["mask"]).sum() for n, kl in known.items()]
        costs += [score(guide[n]) for n in sampled if n in guide]
        own = [score(s) for s in others]
        fit = [score(s) for s in observed]
        gains = [score(model[n]) for n in sampled if n in model]
        if self._target is not None:
            self._rates, costs, gains = self._target.measure(traces, known), [], []
        self._costs, self._gains = [*costs, *own], [*fit, *gains]
        return densities_of(traces, known)


def score(site: Any) -> Tensor:
    """The log-density of a site, summed over its plates, with scale and mask."""
    with for_program():
        site["unscaled_log_prob"] = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    total: Tensor = scale_and_mask(site["unscaled_log_prob"], site["scale"], site["mask"]).sum()
    return total


def check_reparameterised(guide_sites: Mapping[str, Any]) -> None:
    for name, site in guide_sites.items():
        fn = innermost(site["fn"])
        if not site["is_observed"] and (not fn.has_rsample or isinstance(fn, Rejector)):
            raise StructureError(
                f"the guide's site '{name}' ({type(fn).__name__}) is not reparameterised, so the gradient of the "
                "reconstruction would be missing: use BetaTrace_ELBO, BetaTraceGraph_ELBO or, with enumeration, "
                "BetaTraceEnum_ELBO"
            )
