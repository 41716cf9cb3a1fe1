"""The beta-ELBO with analytic KL: Pyro's TraceMeanField_ELBO, for reparameterised guides."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import pyro.distributions as dist
from pyro.distributions.rejector import Rejector
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement
from pyro.infer.util import is_validation_enabled
from pyro.util import warn_if_nan
from torch import Tensor
from torch.distributions import kl_divergence

from ..errors import StructureError
from ..kernel import WeighedTraces, innermost, tape_pair
from .beta import BetaELBO, densities_of
from .terms import Pass


class BetaTraceMeanField_ELBO(BetaELBO, TraceMeanField_ELBO):
    r"""Pyro's `TraceMeanField_ELBO` with a weight on the KL, which is analytic where torch knows a formula::

        loss = -sum over data of ( E_q log p(x|z) - sum over latents of beta KL(q(z|x) || p(z)) )        nats

    The parameters, the attributes and the errors of `BetaTrace_ELBO`, averaged over K particles; B data. The faster of the
    two, with less noise while the KL is far from zero (Kingma and Welling, 2014, https://arxiv.org/abs/1312.6114). A KL
    without a formula is sampled.

    The KL of a site is taken given the latents drawn before it. That is right if, for every latent z, the latents that z
    depends on in the model do not depend on z in the guide: it holds where both sides sample in the same order, which
    Pyro's check looks at.

    :raises StructureError: (beside the others) for draws of the guide that are not reparameterised.

    Example::

        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pv.BetaTraceMeanField_ELBO(beta=4.0))

    Where it differs from Pyro's class at beta = 1: with a mask on one side (Pyro ignores one of the model), and with
    autoguides that draw in unconstrained space, whose log-Jacobian Pyro leaves out.
    """

    _costs: list[Tensor]  # of the present particle: what stands in the loss with a plus
    _gains: list[Tensor]  # and with a minus

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        # Without a score function the loss is its own surrogate: no scalar has to be read off the device.
        particles = [self._particle_loss() for _ in self._get_traces(model, guide, args, kwargs)]
        loss = reduce(operator.add, particles)
        if self.num_particles > 1:
            loss = loss / self.num_particles
        self._warn_if_schedule_stands_still()
        return loss

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        return self._per_particle(model, guide, args, kwargs, backward=False)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        loss = self._per_particle(model, guide, args, kwargs, backward=True)
        self.num_updates += 1
        return loss

    def _per_particle(self, model: Callable, guide: Callable, args: Any, kwargs: Any, backward: bool) -> float:
        """One particle after the other, so that memory does not grow with K."""
        total = 0.0
        for _ in self._get_traces(model, guide, args, kwargs):
            loss = self._particle_loss() / self.num_particles
            if backward and loss.requires_grad:
                loss.backward(retain_graph=self.retain_graph)
            total += loss.item()
        warn_if_nan(total, "loss")  # type: ignore[call-overload]
        return total

    def _particle_loss(self) -> Tensor:
        costs, self._costs, gains, self._gains = self._costs, [], self._gains, []
        return reduce(operator.sub, gains, reduce(operator.add, costs)) if costs else -reduce(operator.add, gains)

    def _run_pair(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Any, Any]:
        tapes = tape_pair(self.max_plate_nesting, model, guide, args, kwargs)
        if is_validation_enabled():
            _check_mean_field_requirement(*tapes)
        return tapes

    def _measure(self, traces: WeighedTraces) -> Pass:
        model, guide = traces.model_sites, traces.guide_sites
        check_reparameterised(guide)
        analytic = {name: analytic_kl(traces, sites) for name, sites in traces.groups.items()}
        known = {name: kl for name, kl in analytic.items() if kl is not None}
        sampled = [s for name, sites in traces.groups.items() if name not in known for s in sites]
        # Where the KL has a formula, log p(z) and log q(z|x) are never computed: they would only cost time.
        observed = [s for s in model.values() if s["is_observed"]]
        others = [s for n, s in guide.items() if s["is_observed"] and n not in traces.scales]
        self._costs = [
            *(scale_and_mask(kl, guide[n]["scale"], guide[n]["mask"]).sum() for n, kl in known.items()),
            *(score(guide[n]) for n in sampled if n in guide),
            *(score(s) for s in others),
        ]
        self._gains = [*(score(s) for s in observed), *(score(model[n]) for n in sampled if n in model)]
        return densities_of(traces, known)


def score(site: Any) -> Tensor:
    """The log-density of a site, summed over its plates, with scale and mask."""
    site["unscaled_log_prob"] = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    total: Tensor = scale_and_mask(site["unscaled_log_prob"], site["scale"], site["mask"]).sum()
    return total


def analytic_kl(traces: WeighedTraces, sites: tuple[str, ...]) -> Tensor | None:
    """KL(q(z|x) || p(z)) of one latent, of the shape of its plates; None where torch knows no formula or q is a point."""
    sides = [side[sites[0]]["fn"] for side in (traces.guide_sites, traces.model_sites) if sites[0] in side]
    if len(sides) < 2 or len(sites) > 1 or isinstance(innermost(sides[0]), dist.Delta):
        return None
    q, p = map(without_mask, sides)  # the sites have the masks of both sides by now
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        return None
    return kl.expand(q.batch_shape) if isinstance(kl, Tensor) else None


def without_mask(fn: Any) -> Any:
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def check_reparameterised(guide_sites: Mapping[str, Any]) -> None:
    for name, site in guide_sites.items():
        fn = innermost(site["fn"])
        if not site["is_observed"] and (not fn.has_rsample or isinstance(fn, Rejector)):
            raise StructureError(
                f"the guide's site '{name}' ({type(fn).__name__}) is not reparameterised, so the gradient of the "
                "reconstruction would be missing: use BetaTrace_ELBO, BetaTraceGraph_ELBO or, with enumeration, "
                "BetaTraceEnum_ELBO"
            )
