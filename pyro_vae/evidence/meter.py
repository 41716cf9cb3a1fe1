"""Measurement of the barrier along annealed chains."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..ops import MIN_PARTICLES_FOR_K
from .annealing import Annealing, finite_spread
from .barrier import Barrier
from .evidence import Evidence
from .hmc import State


def with_barrier(evidence: Evidence, barrier: Barrier | None) -> Evidence:
    """The record with the barrier, and with a doubt where too few steps ran; `None` leaves the record as it is.

    With 100 chains or more the tail index judges the weights instead, since many chains make up for few steps.
    """
    if barrier is None:
        return replace(evidence, unchecked={**evidence.unchecked, "steps": "one chain has no spread"})
    if evidence.num_particles >= MIN_PARTICLES_FOR_K:
        return replace(evidence, barrier=barrier)
    return replace(evidence, barrier=barrier, checks={**evidence.checks, "steps": barrier.too_few})


class Meter:
    """A visitor of `Annealing.forward` that measures the barrier from the states of forward chains."""

    def __init__(self, run: Annealing) -> None:
        self.temperatures = run.temperatures
        self.num_chains, self.num_steps = run.options.num_chains, run.options.num_steps
        self._spreads: list[Tensor] = []

    def see(self, step: int, state: State, log_weight: Tensor) -> None:
        self._spreads.append(finite_spread(state.log_joint - state.log_start))

    def barrier(self, log_weight: Tensor) -> Barrier | None:
        """The barrier, from the final log-weights of the chains, (C, B); `None` for one chain, which has no spread."""
        if self.num_chains < 2:
            return None
        spreads = torch.stack(self._spreads)
        length = (0.5 * (spreads[1:] + spreads[:-1]) * self.temperatures.diff(dim=0)).sum(0)
        return Barrier(length, finite_spread(log_weight).square(), self.num_steps)
