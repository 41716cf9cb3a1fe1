"""Annealed importance sampling along a path of distributions from a start to the posterior of each datum."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..kernel import Call
from ..records import ANNEALED_CHAINS
from .annealing import AnnealedChains, Annealing
from .evidence import Evidence
from .fitted import with_search
from .meter import Meter, with_barrier
from .summary import summarise


@dataclass(repr=False, eq=False, kw_only=True)
class AnnealedImportanceSampling(AnnealedChains):
    r"""log p(x) by annealed importance sampling.

    Chains of many small steps lead from a start distribution s to the posterior of each datum::

        log p(x) ~ log 1/C sum_c w_c,   log w = sum_i (t_i - t_(i-1)) [log p(x, u_(i-1)) - log s(u_(i-1))],   u_0 ~ s

    where u_i follows from u_(i-1) by a Hamiltonian transition that leaves s^(1 - t_i) p(x, .)^(t_i) invariant. The estimate
    of p(x) is unbiased with any number of steps. That of log p(x) is therefore a lower bound in expectation, which becomes
    tight as steps are added (Neal, 2001, https://doi.org/10.1023/A:1008923215028; for decoders Wu et al., 2017,
    https://arxiv.org/abs/1611.04273).

    The transitions follow a Gaussian exactly and integrate numerically only the difference from it (Beskos et al., 2011,
    https://doi.org/10.1016/j.spa.2011.06.003). Steps can therefore be long where the Gaussian fits well. A pilot run with
    separate noise chooses the step sizes for each datum and temperature, and the adaptive schedule. They are then frozen.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites. The fits start at it, and `elbo` is its ELBO.
    :param num_steps: T, temperatures after the first.
    :param num_chains: C, chains per datum.
    :param num_leapfrog: gradients per transition.
    :param start: s, one of "fitted", "guide" and "prior". "fitted" are the proposals that `AdaptiveImportanceSampling` fits
        to each datum: the mixture that its search has found with at most ten latents, otherwise a Gaussian. The nearer the
        start is to the posterior, the fewer steps are needed. Chains rarely cross from one mode to another, so a mode that
        the start has missed is usually missed by the chains too; `doubts["search"]` says where.
    :param schedule: "adaptive" (steps of equal conditional effective sample size, as measured by the pilot), "linear" or
        "sigmoid".
    :param progress: show a progress bar on runs of more than a few seconds.
    :param prior_sites: must be empty here, because these sites would be drawn anew at every step.

    Call it with the model's arguments. It returns `Evidence` for the B data of the call, in which `num_particles` is C and
    `acceptance` (B,) is the acceptance rate of the transitions. The error is the one over chains. Memory grows with C, not
    with T. The record's `barrier` says how many steps are enough (`Barrier`). With fewer than 100 chains `doubts["steps"]`
    is true where far fewer steps ran.

    :raises LocalFitError: for latents that are not continuous, and for a guide that cannot be scored with start="guide".
    :raises StructureError: (or a subclass, see `pyro_vae.errors`) for a program that defines no importance weight per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.
    :raises OptionError: for an option out of range.

    Example::

        evidence = pv.AnnealedImportanceSampling(model, guide, num_steps=200, num_chains=16)(x)
        evidence.log_evidence, evidence.acceptance      # (B,) each
    """

    def estimate(self, call: Call) -> Evidence:
        return self.annealed(call)

    def annealed(self, call: Call, *, with_prior: bool = False) -> Evidence:
        """The estimate; `with_prior` starts half of the chains at the prior, with start="fitted"."""
        run = Annealing(call, self, with_prior=with_prior)
        meter = Meter(run)
        log_weight, acceptance, _ = run.forward(meter.see)
        evidence = with_search(summarise(call, log_weight, run.elbo, call.cost, ANNEALED_CHAINS), run.fitted)
        return with_barrier(replace(evidence, acceptance=acceptance), meter.barrier(log_weight))
