"""The beta-ELBO by sampling: Pyro's Trace_ELBO and TraceGraph_ELBO."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.util import MultiFrameTensor
from pyro.poutine import Trace
from torch import Tensor

from .traces.beta_elbo import BetaELBO


class BetaTrace_ELBO(BetaELBO, Trace_ELBO):
    r"""Pyro's `Trace_ELBO` with a weight on the KL, the beta-VAE objective::

        loss = -sum over data of E_q[ log p(x|z) + sum over latents of beta (log p(z) - log q(z|x)) ]    (nats)

    (Higgins et al., 2017, https://openreview.net/forum?id=Sy2fzU9gl; as a point on the rate-distortion curve Alemi et al.,
    2018, https://arxiv.org/abs/1711.00464; annealed Bowman et al., 2016, https://arxiv.org/abs/1511.06349). At beta = 1 it
    is minus the ELBO, at beta > 1 it is above that, so still minus a lower bound of log p(x); below 1 it bounds nothing, at
    0 it is the reconstruction loss of an autoencoder. B data of shape X, latents of shape D; averaged over K particles, the
    scale of a plate (N/B) outside.

    beta multiplies the log-densities of all unobserved sites of model and guide, auxiliary draws of autoguides included,
    also in the score-function terms of draws that are not reparameterised. Factors of the guide count as log q with
    ``has_rsample=True`` and keep weight one otherwise. A latent masked on one side is masked on both. What `obs_mask` leaves
    to the model to draw carries no weight.

    :param beta: a number >= 0, a tensor without dimensions, a schedule (any callable from the number of updates to one of
        these, such as `LinearAnnealing`), or a dict of these by latent site; sites that it does not name have beta 1.
    :param compile: whether steps are compiled by `torch.compile`'s inductor: one graph of loss, terms and gradients for
        arguments of each shape. True, or a dict: `mode` and `options` as for `torch.compile`; `max_graphs`, 8 unless given;
        ``backend="eager"`` for the graph alone, without a C++ compiler. The first call runs as without, and takes some
        seconds to compile. `loss`, and calls that record no gradients, are never compiled.
    :param options: those of Pyro's class: `num_particles` K, `max_plate_nesting`, `vectorize_particles`, ...

    :ivar terms: `Terms` of the last call: reconstruction, KL per site, the true ELBO, loss and beta; from the same run of
        model and guide, and computed only when asked for. None before the first call.
    :ivar num_updates: the number handed to a schedule. `loss_and_grads`, and so `SVI.step`, adds one; under a torch
        optimiser, with accumulated gradients or from a checkpoint, set it: it is a plain number. It stands in `state_dict()`
        of the objective and of the module that ``objective(model, guide)`` returns.
    :raises OptionError: for a beta that is negative or not finite, or that names a site the pair does not have.
    :raises AuxiliarySiteError: for a beta by site where an autoguide draws several sites jointly.
    :raises CompileError: for programs that cannot be compiled, and where a compiled step gives other numbers than the
        programs do on the same noise, which is looked at in the calls 1, 2, 10 and 100.
    :raises StructureError: (or a subclass) for a latent that is missing in the guide, or is scaled on one side only.

    Example::

        objective = pv.BetaTrace_ELBO(beta=pv.LinearAnnealing(1000))
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective)
        svi.step(x)
        objective.terms.per_datum().elbo

        loss = objective(vae.model, vae.guide)  # or as a module, under torch.optim
        optimizer = torch.optim.Adam(loss.parameters())
        for objective.num_updates, x in enumerate(loader):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()

    Where it differs from Pyro's class at beta = 1: with a mask on one side; with draws of the guide alone that are not
    reparameterised, whose -log q Pyro leaves out of the score-function gradient; and with a factor of the guide that is no
    log q (``has_rsample=False``), which is a loss of its own here, gradient included. One that is marked
    ``infer={"is_loss": True}`` is one too, with any ``has_rsample``, and evaluations leave it out.
    """

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any]:
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        return loss, surrogate - score_of_auxiliaries(model_trace, guide_trace)

    def _value_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        pairs = [value_and_surrogate(*traces) for traces in self._get_traces(model, guide, args, kwargs)]
        loss, surrogate = (reduce(operator.add, side) / self.num_particles for side in zip(*pairs, strict=True))
        return loss, surrogate


class BetaTraceGraph_ELBO(BetaELBO, TraceGraph_ELBO):
    """Pyro's `TraceGraph_ELBO` with a weight on the KL: fewer terms, and baselines, in the score-function gradient.

    The value, the parameters, the attributes and the errors of `BetaTrace_ELBO`; for guides with draws that are not
    reparameterised (Schulman et al., 2015, https://arxiv.org/abs/1506.05254). B data, K particles, nats. Unlike Pyro's class
    it also works as a module under a torch optimiser.

    Example::

        guide_site = pyro.sample("c", dist.Bernoulli(logits=h), infer={"baseline": {"use_decaying_avg_baseline": True}})
        svi = SVI(model, guide, optimizer, pv.BetaTraceGraph_ELBO(beta=0.5))
    """

    def _value_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        elbo, surrogate = self._loss_and_surrogate_loss(model, guide, args, kwargs)
        return -elbo.detach(), surrogate


def value_and_surrogate(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """Minus the ELBO of one particle, detached, and its surrogate: what Pyro's Trace_ELBO has, but that no value is read."""
    model, guide = ([s for s in t.nodes.values() if s["type"] == "sample"] for t in (model_trace, guide_trace))
    log_p, log_q = ([s["log_prob_sum"] for s in side] for side in (model, guide))
    terms = [s["score_parts"].entropy_term for s in guide]
    entropies = [term.sum() for term in terms if not is_identically_zero(term)]
    scored = [s for s in guide if not is_identically_zero(s["score_parts"].score_function)]
    scores = []
    if scored:
        log_r = _compute_log_r(model_trace, guide_trace)
        scores = [(log_r.sum_to(s["cond_indep_stack"]) * s["score_parts"].score_function).sum() for s in scored]
    zero = torch.zeros(())
    loss = reduce(operator.add, log_q, zero) - reduce(operator.add, log_p, zero)
    surrogate = reduce(operator.add, entropies, zero) - reduce(operator.add, [*log_p, *scores], zero)
    return loss.detach(), surrogate - score_of_auxiliaries(model_trace, guide_trace)


def score_of_auxiliaries(model_trace: Trace, guide_trace: Trace) -> Tensor | float:
    """The score terms of -log q(a) where only the guide has the site a: Pyro's Trace_ELBO leaves them out."""
    sites = {n: s for n, s in guide_trace.nodes.items() if s["type"] == "sample"}
    alone = [s for n, s in sites.items() if n not in model_trace.nodes]
    scored = [s for s in sites.values() if not is_identically_zero(s["score_parts"].score_function)]
    if not alone or not scored:
        return 0.0
    cost = MultiFrameTensor(*((s["cond_indep_stack"], -s["log_prob"].detach()) for s in alone))
    terms = [(cost.sum_to(s["cond_indep_stack"]) * s["score_parts"].score_function).sum() for s in scored]
    return sum(terms[1:], terms[0])
