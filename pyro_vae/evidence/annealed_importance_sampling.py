"""Annealed importance sampling: a path of distributions from a start to the posterior of each datum."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import LocalFitError, quoted
from ..kernel import ANNEAL, GUIDE, INFER, PILOT, Call, Pair
from ..options import one_of, seed_or_none, whole_number
from ..records import ANNEALED_CHAINS, warn_about
from .adaptive_importance_sampling import ELBO_PARTICLES, START_PARTICLES, Proposal, fit_proposals, with_search
from .evidence import Evidence
from .hmc import State, adapted, transition
from .importance_sampling import summarise
from .paths import STARTS, Path

SCHEDULES = ("adaptive", "linear", "sigmoid")
Visit = Callable[[int, State, Tensor], None]
SHORT_EVERY, SHORT = 3, 0.125  # on a given grid, one transition in three is so many times as long as tuned
PILOT_STEPS, PILOT_CHAINS = 40, 4
PILOT_RUN = 1000  # block of noise, beyond those of the search
FIRST_STEP_SIZE = 0.8  # radians
SIGMOID_STEEPNESS = 4.0  # of Grosse, Ghahramani and Adams (2015)
LINEAR_SHARE = 0.2  # of an adaptive schedule, in case the pilot saw no variation where there is some
FIT_PARTICLES = 500  # the fit is that of AdaptiveImportanceSampling with at least so many particles


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


class Annealing:
    """What forward and reverse chains of one call share: the path, and what a pilot run tuned and froze.

    :param grid: temperatures (T + 1,) from 0 on in place of the options' schedule, the same for all data. From a start at
        the prior they may run past 1: start^(1 - t) joint^t is p(z) p(x given z)^t.
    """

    def __init__(self, call: Call, options: AnnealedImportanceSampling, grid: Tensor | None = None) -> None:
        self.call, self.options, self.grid = call, options, grid
        call.set_noise(GUIDE, 0)
        guide = call.draw(ELBO_PARTICLES)
        model = call.score(call.latent_values(guide), ELBO_PARTICLES)
        self.elbo = call.weigh(guide, model, ELBO_PARTICLES).elbo
        call.check_finite(self.elbo)
        if not call.structure.latents:
            raise LocalFitError("all latents are summed out, so there is nothing to anneal: use ImportanceSampling")
        if call.structure.prior_sites:
            raise LocalFitError(
                f"{quoted(call.structure.prior_sites)} would be drawn from the prior anew at every step of a chain: use "
                "AdaptiveImportanceSampling, or add them to the guide"
            )
        known = (*call.structure.latents, *call.structure.guide_enumerated)
        hidden = [name for name in guide if name not in known]
        if options.start == "guide" and hidden:
            raise LocalFitError(
                f"the guide computes its latents from {quoted(hidden)}, so log q is not known at other values: use "
                "start='fitted'"
            )
        self.latent_shapes = {name: value.shape[1:] for name, value in call.latent_values(guide).items()}
        # What long chains cost allows more starts of the search, and a mode that it misses the chains miss too.
        num_particles = max(FIT_PARTICLES, options.num_steps * options.num_chains)
        proposal: Proposal = "auto" if options.start == "fitted" else "gaussian"
        fitted = fit_proposals(call, guide, model, self.elbo, num_particles, None, proposal)
        if options.start != "fitted":
            fitted = replace(fitted, why_not=f"chains from the {options.start} search for no modes")
        self.space, self.fitted, moments = fitted.space, fitted, fitted.moments
        if options.start == "prior":
            call.set_noise(PILOT, 0)
            u = self.space.draw_prior(START_PARTICLES)[0]
            moments = u.mean(0), u.std(0)
        shape = fitted.proposal.parts[0] if fitted.witnesses is None else fitted.proposal.as_fitted()
        self.path = Path(self.space, options.start, shape, moments)
        self.temperatures, self.step_sizes = self._tune()

    def forward(self, visit: Visit | None = None) -> tuple[Tensor, Tensor, State]:
        """Log-weights (C, B), acceptance (B,) and the last states, from the start to the joint.

        `visit` sees the states and the log-weights so far at every temperature: the start, then after each transition.
        """
        self.call.set_noise(ANNEAL, 0)
        state = self.path.draw(self.options.num_chains)
        log_weight = torch.zeros_like(state.log_joint)
        acceptance = torch.zeros_like(log_weight[0])
        if visit is not None:
            visit(0, state, log_weight)
        for i in self._steps("forward chains", range(1, self.options.num_steps + 1)):
            log_weight += (self.temperatures[i] - self.temperatures[i - 1]) * (state.log_joint - state.log_start)
            self.call.set_noise(ANNEAL, i)
            state, accepted = self._move(state, i)
            acceptance += accepted.mean(0) / self.options.num_steps
            if visit is not None:
                visit(i, state, log_weight)
        self.call.check_finite(log_weight)
        return log_weight, acceptance, state

    def reverse(self, u: Tensor, stream: int) -> tuple[Tensor, Tensor, State]:
        """Log-weights (C, B), acceptance (B,) and the first states, from posterior draws u, (C, B, D), to the start."""
        state = first = self.path.evaluate(u)
        log_weight = torch.zeros_like(state.log_joint)
        acceptance = torch.zeros_like(log_weight[0])
        for i in self._steps("reverse chains", range(self.options.num_steps, 0, -1)):
            self.call.set_noise(stream, i)
            state, accepted = self._move(state, i)
            log_weight += (self.temperatures[i] - self.temperatures[i - 1]) * (state.log_joint - state.log_start)
            acceptance += accepted.mean(0) / self.options.num_steps
        self.call.check_finite(log_weight)
        return log_weight, acceptance, first

    def _move(self, state: State, i: int) -> tuple[State, Tensor]:
        t = self.temperatures[i]
        reference = self.path.reference(t.clamp(max=1), state.u)  # beyond the joint the fit would be extrapolated
        step_size = self.step_sizes[i]
        if self.grid is not None and i % SHORT_EVERY == 0:
            # Whoever gave a grid looks at all states alike: none may be stuck where the density is steeper than was tuned
            # for. Weights alone would forget such a chain. Which steps are short depends on no state.
            step_size = SHORT * step_size
        return transition(state, self.path.evaluate, t, reference, step_size, self.options.num_leapfrog)

    def _steps(self, what: str, steps: range) -> Any:
        return tqdm(steps, desc=what, unit="step", leave=False, delay=5, disable=not self.options.progress)

    def _tune(self) -> tuple[Tensor, Tensor]:
        """Temperatures and step sizes, (T + 1, B) each, from a pilot run of a few chains; frozen from then on."""
        pilot_steps = min(self.options.num_steps, PILOT_STEPS)
        share = torch.linspace(0, 1, pilot_steps + 1, dtype=self.elbo.dtype, device=self.elbo.device)
        grid = share if self.options.start == "fitted" else share**3  # other starts change fastest at first
        if self.grid is not None:
            grid = grid * self.grid[-1]
        self.call.set_noise(PILOT, PILOT_RUN)
        state = self.path.draw(PILOT_CHAINS)
        step_size = torch.full_like(self.elbo[0], FIRST_STEP_SIZE)
        spreads, step_sizes = [], []
        for t in grid:
            spreads.append(finite_spread(state.log_joint - state.log_start))
            t = t.expand_as(step_size)
            reference = self.path.reference(t.clamp(max=1), state.u)
            state, acceptance = transition(state, self.path.evaluate, t, reference, step_size, self.options.num_leapfrog)
            step_size = adapted(step_size, acceptance)
            step_sizes.append(step_size)
        temperatures = self._temperatures(grid, torch.stack(spreads))
        knots = grid.unsqueeze(-1).expand(-1, len(step_size))
        return temperatures, interpolate(temperatures, knots, torch.stack(step_sizes))

    def _temperatures(self, grid: Tensor, spreads: Tensor) -> Tensor:
        """(T + 1, B), from 0 to 1.

        "adaptive" takes steps of equal conditional ESS, 1 / (1 + step^2 variance of log_joint - log_start): equal parts of
        the integral of the standard deviation that the pilot saw.
        """
        if self.grid is not None:
            return self.grid.unsqueeze(-1).expand(-1, spreads.shape[1])
        share = torch.linspace(0, 1, self.options.num_steps + 1, dtype=grid.dtype, device=grid.device).unsqueeze(-1)
        share = share.expand(-1, spreads.shape[1])
        if self.options.schedule == "linear":
            return share
        if self.options.schedule == "sigmoid":
            ends = torch.sigmoid(SIGMOID_STEEPNESS * (2 * share - 1))
            return (ends - ends[0]) / (ends[-1] - ends[0])
        parts = 0.5 * (spreads[1:] + spreads[:-1]) * (grid[1:] - grid[:-1]).unsqueeze(-1)
        length = torch.cat([torch.zeros_like(parts[:1]), parts.cumsum(0)])
        length = length / length[-1].clamp(min=torch.finfo(length.dtype).tiny)
        length = (1 - LINEAR_SHARE) * length + LINEAR_SHARE * grid.unsqueeze(-1)
        return interpolate(share, length / length[-1], grid.unsqueeze(-1).expand_as(length))


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), (P, B) each and rising in P, at x, (T, B)."""
    right = torch.searchsorted(knots.T.contiguous(), x.T.contiguous()).T.clamp(1, len(knots) - 1)
    x0, x1 = knots.gather(0, right - 1), knots.gather(0, right)
    weight = (x - x0) / (x1 - x0).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.lerp(values.gather(0, right - 1), values.gather(0, right), weight.clamp(0, 1))


def finite_spread(differences: Tensor) -> Tensor:
    """Standard deviation over chains, (C, B) to (B,), of those that are finite: a weight of zero ends its chain."""
    kept = differences.isfinite()
    values = torch.where(kept, differences, torch.zeros_like(differences))
    count = kept.sum(0).clamp(min=1)
    centred = torch.where(kept, differences - values.sum(0) / count, torch.zeros_like(differences))
    return (centred.square().sum(0) / (count - 1).clamp(min=1)).sqrt()
