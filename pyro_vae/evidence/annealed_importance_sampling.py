"""Annealed importance sampling: a path of distributions from a start to the posterior of each datum."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from ..kernel import INFER, Pair
from ..options import one_of, seed_or_none, whole_number
from ..records import ANNEALED_CHAINS, warn_about
from .annealing import SCHEDULES, Annealing
from .evidence import Evidence
from .fitted import with_search
from .paths import STARTS
from .summary import summarise


class AnnealedImportanceSampling:
    r"""log p(x) by annealed importance sampling, chains of many small steps from a start to the posterior of each datum::

        log p(x) ~ log 1/C sum_c w_c,   log w = sum_i (t_i - t_(i-1)) [log p(x, u_(i-1)) - log s(u_(i-1))],   u_0 ~ s

    where u_i follows from u_(i-1) by a Hamiltonian transition that leaves s^(1 - t_i) p(x, .)^(t_i) invariant. Unbiased for
    p(x) with any number of steps, so a lower bound on log p(x) in expectation, tight as steps are added (Neal, 2001,
    https://doi.org/10.1023/A:1008923215028; for decoders Wu et al., 2017, https://arxiv.org/abs/1611.04273).

    The transitions follow a Gaussian exactly and integrate only what differs from it (Beskos et al., 2011,
    https://doi.org/10.1016/j.spa.2011.06.003), so that steps are long where the fit is good. Step sizes per datum and
    temperature, and the adaptive schedule, come from a pilot run with noise of its own and are frozen then.

    :param model: any Pyro model with continuous (or enumerated) latents whose data lie in one plate.
    :param guide: its guide, with the same latent sites; where the fits begin, and what `elbo` is about.
    :param num_steps: T, temperatures after the first.
    :param num_chains: C, chains per datum.
    :param num_leapfrog: gradients per transition.
    :param start: s, one of "fitted" (the proposals that `AdaptiveImportanceSampling` fits to each datum: up to ten latents
        the mixture that its search has found, beyond that a Gaussian), "guide" and "prior". The nearer to the posterior,
        the fewer steps are needed. Chains rarely cross from one mode to another: where the start has missed a mode, so do
        they, and `doubts["search"]` says what it says there.
    :param schedule: "adaptive" (steps of equal conditional ESS, as the pilot saw it), "linear" or "sigmoid".
    :param progress: show a progress bar on runs of more than a few seconds.
    :param seed: fixes the noise and leaves the caller's random state alone; `None` draws from that state.
    :param datum_plate: the plate of the data; found by itself where only one is common to all sites; `None` makes the
        whole call one datum.
    :param prior_sites: refused here if any, because they would be drawn anew at every step.
    :param check_support: raise on observations outside the support of their likelihood.

    Called with the model's own arguments; returns `Evidence` for the B data of the call, `num_particles` being C and
    `acceptance` (B,) that of the transitions. The error is the one over chains. Memory grows with C, not with T.

    :raises LocalFitError: for latents that are not continuous, and for a guide that cannot be scored with start="guide".
    :raises StructureError: (and its kinds, see `pyro_vae.errors`) for a program without known weights per datum.
    :raises InvalidDataError: for NaN, values outside the support, an empty batch.
    :raises OptionError: for an option out of range.

    Example::

        evidence = pv.AnnealedImportanceSampling(model, guide, num_steps=200, num_chains=16)(x)
        evidence.log_evidence, evidence.acceptance      # (B,) each
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        *,
        num_steps: int = 200,
        num_chains: int = 16,
        num_leapfrog: int = 1,
        start: str = "fitted",
        schedule: str = "adaptive",
        progress: bool = True,
        seed: int | None = None,
        datum_plate: str | None = INFER,
        prior_sites: Collection[str] = (),
        check_support: bool = True,
    ) -> None:
        self.num_steps = whole_number("num_steps", num_steps)
        self.num_chains = whole_number("num_chains", num_chains)
        self.num_leapfrog = whole_number("num_leapfrog", num_leapfrog)
        self.start, self.schedule = one_of("start", start, STARTS), one_of("schedule", schedule, SCHEDULES)
        self.progress = progress
        self.seed = seed_or_none(seed)
        self._pair = Pair(model, guide, datum_plate=datum_plate, prior_sites=prior_sites, check_support=check_support)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Evidence:
        with self._pair.open(args, kwargs, self.seed) as call:
            run = Annealing(call, self)
            log_weight, acceptance, _ = run.forward()
            evidence = with_search(summarise(call, log_weight, run.elbo, call.cost, ANNEALED_CHAINS), run.fitted)
            evidence = replace(evidence, acceptance=acceptance)
        warn_about(evidence, stacklevel=3)
        return evidence
