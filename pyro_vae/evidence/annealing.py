"""Forward and reverse annealed chains of one call, with step sizes and temperatures tuned by a pilot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import LocalFitError, quoted
from ..kernel import Call
from ..noise import Noise
from ..options import amount, flag, one_of
from .estimator import Estimator
from .fitted import START_PARTICLES, Proposal, fit_proposals
from .hmc import State, adapted, transition
from .paths import Path, Start
from .summary import guide_draws, summed_draws

Schedule = Literal["adaptive", "linear", "sigmoid"]
# Called with the index of the temperature, the states and the log-weights so far; may return replacements for both.
Visit = Callable[[int, State, Tensor], tuple[State, Tensor] | None]
SHORT_EVERY, SHORT = 3, 0.125  # on a given grid, one transition in three has a step size scaled by one of these factors
PILOT_STEPS, PILOT_CHAINS = 40, 4
FIRST_STEP_SIZE = 0.8  # radians
SIGMOID_STEEPNESS = 4.0  # of Grosse, Ghahramani and Adams (2015)
LINEAR_SHARE = 0.2  # of an adaptive schedule is spent evenly, in case the pilot measured no variation where there is some
FIT_PARTICLES = 500  # the fit is that of AdaptiveImportanceSampling with at least this many particles


@dataclass(repr=False, eq=False, kw_only=True)
class AnnealedChains(Estimator):
    """The options of estimators that anneal; see `AnnealedImportanceSampling`."""

    num_steps: int = 200
    num_chains: int = 16
    num_leapfrog: int = 1
    start: Start = "fitted"
    schedule: Schedule = "adaptive"
    progress: bool = True

    def check_options(self) -> None:
        for name in ("num_steps", "num_chains", "num_leapfrog"):
            setattr(self, name, amount(name, getattr(self, name)))
        self.progress = flag("progress", self.progress)
        one_of("start", self.start, Start)
        one_of("schedule", self.schedule, Schedule)


class Annealing:
    """A path from a start to the joint density, and chains in both directions along it.

    Step sizes and temperatures come from a pilot run.

    :param grid: temperatures (T + 1,) that start at 0 and replace the schedule of the options, the same for all data. With
        the prior as the start they may exceed 1: start^(1 - t) joint^t is then p(z) p(x given z)^t.
    :param with_prior: see `Path`.
    """

    def __init__(self, call: Call, options: AnnealedChains, grid: Tensor | None = None, *, with_prior: bool = False) -> None:
        self.call, self.options, self.grid = call, options, grid
        guide, model, weights = guide_draws(call)
        self.elbo = weights.elbo
        guide, model = summed_draws(call, guide, model)
        if not call.structure.latents:
            raise LocalFitError(
                "all latents are enumerated and summed out, so there is nothing to anneal: use ImportanceSampling"
            )
        if call.structure.read_prior_sites:
            raise LocalFitError(
                f"{quoted(call.structure.read_prior_sites)} would be drawn from the prior anew at every step of a "
                "chain: use AdaptiveImportanceSampling, or add them to the guide"
            )
        known = (*call.structure.latents, *call.structure.guide_enumerated)
        hidden = [name for name in guide if name not in known]
        if options.start == "guide" and hidden:
            raise LocalFitError(
                f"the guide computes its latents from {quoted(hidden)}, so log q is not known at other values: use "
                "start='fitted'"
            )
        self.latent_shapes = {name: value.shape[1:] for name, value in call.latent_values(guide).items()}
        # Long chains cost so much that more starts of the search are affordable. Chains miss any mode that the search
        # misses.
        num_particles = max(FIT_PARTICLES, options.num_steps * options.num_chains)
        proposal: Proposal = "auto" if options.start == "fitted" else "gaussian"
        fitted = fit_proposals(call, guide, model, self.elbo, num_particles, None, proposal)
        if options.start != "fitted":
            fitted = replace(fitted, why_not=f"there is no search for modes with start='{options.start}'")
        self.space, self.fitted, moments = fitted.space, fitted, fitted.moments
        if options.start == "prior":
            call.set_noise(Noise.PILOT, 0)
            u = self.space.draw_prior(START_PARTICLES)[0]
            moments = u.mean(0), u.std(0)
        shape = fitted.proposal.components[0] if fitted.witnesses is None else fitted.proposal.as_fitted()
        self.path = Path(self.space, options.start, shape, moments, with_prior=with_prior)
        self.temperatures, self.step_sizes = self._tune()

    def forward(self, visit: Visit | None = None) -> tuple[Tensor, Tensor, State]:
        """Log-weights (C, B), acceptance (B,) and the last states, from the start to the joint.

        `visit` is called with the states and the log-weights so far at every temperature: at the start, then after each
        transition. It may return replacements, as a resampling step does. The chains of a datum then depend on one another,
        and errors that assume independent chains, such as those of `summarise`, are too small.
        """
        self.call.set_noise(Noise.ANNEAL, 0)
        state = self.path.draw(self.options.num_chains)
        log_weight = torch.zeros_like(state.log_joint)
        acceptance = torch.zeros_like(log_weight[0])
        if visit is not None:
            state, log_weight = visit(0, state, log_weight) or (state, log_weight)
        for i in self._steps("forward chains", range(1, self.options.num_steps + 1)):
            log_weight = log_weight + self._increment(state, i)  # not in place: the visitor may have kept a reference to it
            self.call.set_noise(Noise.ANNEAL, i)
            state, accepted = self._move(state, i)
            acceptance += accepted.mean(0) / self.options.num_steps
            if visit is not None:
                state, log_weight = visit(i, state, log_weight) or (state, log_weight)
        self.call.check_finite(log_weight)
        return log_weight, acceptance, state

    def reverse(self, u: Tensor, stream: int) -> tuple[Tensor, Tensor, State]:
        """Chains from posterior draws u, (C, B, D), to the start: log-weights (C, B), acceptance (B,), first states."""
        state = first = self.path.evaluate(u)
        log_weight = torch.zeros_like(state.log_joint)
        acceptance = torch.zeros_like(log_weight[0])
        for i in self._steps("reverse chains", range(self.options.num_steps, 0, -1)):
            self.call.set_noise(stream, i)
            state, accepted = self._move(state, i)
            log_weight = log_weight + self._increment(state, i)
            acceptance += accepted.mean(0) / self.options.num_steps
        self.call.check_finite(log_weight)
        return log_weight, acceptance, first

    def _increment(self, state: State, i: int) -> Tensor:
        return (self.temperatures[i] - self.temperatures[i - 1]) * (state.log_joint - state.log_start)

    def _move(self, state: State, i: int) -> tuple[State, Tensor]:
        t = self.temperatures[i]
        reference = self.path.reference(t.clamp(max=1), state.u)  # beyond the joint the fit would be extrapolated
        step_size = self.step_sizes[i]
        if self.grid is not None and i % SHORT_EVERY == 0:
            # With a given grid all states are used alike, not by weight. No chain may then be stuck where the density is
            # steeper than the step size was tuned for. Which steps are short must not depend on the state, or the transition
            # is not invariant.
            step_size = SHORT * step_size
        return transition(state, self.path.evaluate, t, reference, step_size, self.options.num_leapfrog)

    def _steps(self, what: str, steps: range) -> Any:
        return tqdm(steps, desc=what, unit="step", leave=False, delay=5, disable=not self.options.progress)

    def _tune(self) -> tuple[Tensor, Tensor]:
        """Temperatures and step sizes, (T + 1, B) each, from a pilot run of a few chains; frozen from then on."""
        pilot_steps = min(self.options.num_steps, PILOT_STEPS)
        share = torch.linspace(0, 1, pilot_steps + 1, dtype=self.elbo.dtype, device=self.elbo.device)
        # with other starts the density changes fastest at first
        grid = share if self.options.start == "fitted" else share**3
        if self.grid is not None:
            grid = grid * self.grid[-1]
        self.call.set_noise(Noise.PILOT, 1)
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

        "adaptive" takes steps of equal conditional effective sample size, 1 / (1 + step^2 variance of log_joint -
        log_start). These are equal parts of the integral of the standard deviation that the pilot measured.
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
    """Standard deviation over the finite values of chains, (C, B) to (B,): a weight of zero ends its chain."""
    kept = differences.isfinite()
    values = torch.where(kept, differences, torch.zeros_like(differences))
    count = kept.sum(0).clamp(min=1)
    centred = torch.where(kept, differences - values.sum(0) / count, torch.zeros_like(differences))
    return (centred.square().sum(0) / (count - 1).clamp(min=1)).sqrt()
