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
    r"""Pyro's `Trace_ELBO` with a weight beta on the KL: the beta-VAE objective::

        loss = -sum over data of E_q[ log p(x|z) + sum over latents of beta (log p(z) - log q(z|x)) ]    (nats)

    Sources: Higgins et al., 2017, https://openreview.net/forum?id=Sy2fzU9gl; for the rate-distortion curve Alemi et al.,
    2018, https://arxiv.org/abs/1711.00464; for annealing Bowman et al., 2016, https://arxiv.org/abs/1511.06349.

    At beta = 1 the loss is minus the ELBO. At beta > 1 it is larger, so it is still minus a lower bound of log p(x). At beta
    < 1 it is not a bound, and at beta = 0 it is the reconstruction loss of an autoencoder. B data of shape X, latents of
    shape D. The loss is averaged over K particles and multiplied by the scale of a plate (N/B).

    beta multiplies the log-densities of all unobserved sites of model and guide, including auxiliary draws of autoguides. It
    also enters the score-function terms of draws that are not reparameterised. Factors of the guide count as log q if they
    have ``has_rsample=True``; otherwise they have weight one. A latent masked on one side is masked on both. Values that the
    model draws because of `obs_mask` do not enter the loss.

    :param beta: a number >= 0, a tensor without dimensions, a schedule, or a dict of these by latent site. A schedule is any
        callable from the number of updates to a number or tensor, such as `LinearAnnealing`. Sites that a dict does not name
        have beta 1.
    :param compile: whether to compile steps by the inductor of `torch.compile`: one graph of loss, terms and gradients for
        each shape of the arguments. True, or a dict with `mode` and `options` as for `torch.compile`, and `max_graphs`, by
        default 8. With ``backend="eager"`` steps are traced only, which needs no C++ compiler. The first call runs
        uncompiled and takes some seconds more to compile. `loss`, and calls that record no gradients, are never compiled.
    :param options: options of Pyro's class: `num_particles` K, `max_plate_nesting`, `vectorize_particles`, ...

    :ivar terms: `Terms` of the last call: reconstruction, KL per site, the ELBO without beta, loss and beta. They come from
        the same run of model and guide, and are computed on first access. None before the first call.
    :ivar num_updates: the number that is passed to a schedule. `loss_and_grads`, and so `SVI.step`, adds one. With a torch
        optimiser, accumulated gradients or a checkpoint, set it yourself: it is a plain number. `state_dict()` of the
        objective contains it, and so does that of the module that ``objective(model, guide)`` returns.
    :raises OptionError: for a beta that is negative or not finite, or that names a site the pair does not have.
    :raises AuxiliarySiteError: for a beta by site where an autoguide draws several sites jointly.
    :raises CompileError: for programs that cannot be compiled, and where a compiled step gives other numbers than the
        programs on the same noise. This is checked in the calls 1, 2, 10 and 100.
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

    It differs from Pyro's class at beta = 1 in three cases:

    - with a mask on one side;
    - with draws that only the guide has and that are not reparameterised: Pyro leaves their -log q out of the score-function
      gradient;
    - with a factor of the guide that is not a log q (``has_rsample=False``): here it is a separate loss, with its gradient.
      A factor marked ``infer={"is_loss": True}`` is a separate loss with any ``has_rsample``, and evaluations leave it out.
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
    """Pyro's `TraceGraph_ELBO` with a weight on the KL: its score-function gradient has fewer terms, and baselines.

    For guides with draws that are not reparameterised (Schulman et al., 2015, https://arxiv.org/abs/1506.05254). It has the
    value, parameters, attributes and errors of `BetaTrace_ELBO`. B data, K particles, nats. Unlike Pyro's class it also
    works as a module with a torch optimiser.

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
    """Minus the ELBO of one particle, detached, and its surrogate: as in Pyro's Trace_ELBO, but no value is read."""
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
