"""The beta-ELBO with analytic KL: Pyro's TraceMeanField_ELBO, for reparameterised guides."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import pyro.distributions as dist
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor
from torch.distributions import kl_divergence

from ..errors import StructureError
from ..kernel import WeighedTraces, innermost
from .beta import BetaELBO, densities_of
from .terms import Density, Pass


class BetaTraceMeanField_ELBO(BetaELBO, TraceMeanField_ELBO):
    r"""Pyro's `TraceMeanField_ELBO` with a weight on the KL, which is analytic where torch knows a formula::

        loss = -sum over data of ( E_q log p(x|z) - sum over latents of beta KL(q(z|x) || p(z)) )        nats

    The parameters, the attributes and the errors of `BetaTrace_ELBO`, averaged over K particles. The faster of the two, with
    less noise while the KL is far from zero (Kingma and Welling, 2014, https://arxiv.org/abs/1312.6114). A KL without a
    formula is sampled.

    The KL of a site is taken given the latents drawn before it. That is right if, for every latent z, the latents that z
    depends on in the model do not depend on z in the guide: it holds where both sides sample in the same order, which
    Pyro's check looks at.

    :raises StructureError: (beside the others) for draws of the guide that are not reparameterised.

    Example::

        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pv.BetaTraceMeanField_ELBO(beta=4.0))

    Where it differs from Pyro's class at beta = 1: with a mask on one side (Pyro ignores one of the model), and with
    autoguides that draw in unconstrained space, whose log-Jacobian Pyro leaves out.
    """

    _costs: list[Tensor]

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        # Without a score function the loss is its own surrogate: no scalar has to be read off the device.
        particles = [self._particle_loss(*traces) for traces in self._get_traces(model, guide, args, kwargs)]
        loss = reduce(operator.add, particles) / self.num_particles
        warn_if_nan(loss, "loss")
        self._warn_if_schedule_stands_still()
        return loss

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[float, Tensor]:
        loss = self._particle_loss(model_trace, guide_trace)
        return loss.item(), loss

    def _particle_loss(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        costs, self._costs = self._costs, []
        return reduce(operator.add, costs)

    def _measure(self, traces: WeighedTraces) -> Pass:
        measured = densities_of(traces)
        kl: dict[str, Any] = dict(measured.kl)
        costs = [-s["log_prob_sum"] for s in traces.model_sites.values() if s["is_observed"]]
        costs += [s["log_prob_sum"] for n, s in traces.guide_sites.items() if s["is_observed"] and n not in traces.scales]
        for name, sites in traces.groups.items():
            check_reparameterised(traces, sites)
            analytic = analytic_kl(traces, sites)
            if analytic is None:
                costs += [traces.guide_sites[s]["log_prob_sum"] for s in sites if s in traces.guide_sites]
                costs += [-traces.model_sites[s]["log_prob_sum"] for s in sites if s in traces.model_sites]
            else:
                site = traces.guide_sites[name]
                costs.append(scale_and_mask(analytic, site["scale"], site["mask"]).sum())
                kl[name] = ([Density(analytic.detach(), traces.scales[name], site["mask"])], [])
        self._costs = costs
        return Pass(measured.observed, kl, measured.others, measured.plates)


def analytic_kl(traces: WeighedTraces, sites: tuple[str, ...]) -> Tensor | None:
    """KL(q(z|x) || p(z)) of one latent, of the shape of its plates; None where torch knows no formula or q is a point."""
    q, p = traces.guide_sites[sites[0]]["fn"], traces.model_sites.get(sites[0], {}).get("fn")
    if p is None or len(sites) > 1 or isinstance(innermost(q), dist.Delta):
        return None
    try:
        kl: Tensor = kl_divergence(q, p)
    except NotImplementedError:
        return None
    return kl.expand(q.batch_shape)


def check_reparameterised(traces: WeighedTraces, sites: tuple[str, ...]) -> None:
    for name in sites:
        site = traces.guide_sites.get(name)
        if site is None or (site["fn"].has_rsample and is_identically_zero(site["score_parts"].score_function)):
            continue
        raise StructureError(
            f"the guide's site '{name}' ({type(innermost(site['fn'])).__name__}) is not reparameterised, so the gradient of "
            "the reconstruction would be missing: use BetaTrace_ELBO, BetaTraceGraph_ELBO or, with enumeration, "
            "BetaTraceEnum_ELBO"
        )
