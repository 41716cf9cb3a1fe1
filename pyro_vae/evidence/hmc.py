"""Hamiltonian transitions for many chains and data at once, with an exact flow of a reference Gaussian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError, listed
from ..proposals import GaussianProposal, MixtureProposal

TARGET_ACCEPTANCE = 0.65
ADAPTATION = 0.3  # gain of the log step size per unit of acceptance
LONGEST_STEP = 1.5  # radians; a quarter turn swaps position and momentum, and nothing is gained beyond it


@dataclass(frozen=True)
class State:
    """The states of the chains, with the densities at both ends of the path. C chains, B data, D latents.

    :ivar u: (C, B, D) unconstrained latents.
    :ivar log_start: (C, B) log-density of the start of the path at u; `start_gradient` (C, B, D).
    :ivar log_joint: (C, B) log p(x, u); `joint_gradient` (C, B, D).
    """

    u: Tensor
    log_start: Tensor
    log_joint: Tensor
    start_gradient: Tensor
    joint_gradient: Tensor

    def log_density(self, t: Tensor) -> Tensor:
        """(1 - t) log_start + t log_joint, (C, B), for t (B,)."""
        return torch.lerp(self.log_start, self.log_joint, t)

    def gradient(self, t: Tensor) -> Tensor:
        return torch.lerp(self.start_gradient, self.joint_gradient, t.unsqueeze(-1))

    def where(self, chosen: Tensor, other: State) -> State:
        """This state where `chosen`, (C, B), is true, the other state elsewhere."""
        mine, others = vars(self).values(), vars(other).values()
        return State(
            *(torch.where(chosen if a.ndim == 2 else chosen.unsqueeze(-1), a, b) for a, b in zip(mine, others, strict=True))
        )


@dataclass(frozen=True)
class ChosenPart:
    """A component of a mixture for each chain, `label` (C, B), used as the reference Gaussian of a transition.

    The label is drawn before each transition, with the mixture's probabilities of the components at the chain's state. The
    transition leaves the joint density of state and label invariant, hence also that of the state. This is why `log_label`
    enters the acceptance.
    """

    mixture: MixtureProposal
    label: Tensor

    @classmethod
    def at(cls, mixture: MixtureProposal, u: Tensor) -> ChosenPart:
        log_terms = mixture.log_terms(u)
        bad = (~(log_terms.logsumexp(-1).isfinite())).any(0)
        if bool(bad.any()):
            raise NonFiniteError(
                f"chains of data {listed(bad)} have left all components of the mixture that was fitted to their posterior: "
                "its scales are too small, relative to its means, for this precision. Use float64 (model.double(), "
                "guide.double(), data in double), or start='prior'"
            )
        return cls(mixture, torch.distributions.Categorical(logits=log_terms).sample())

    def whitened(self, u: Tensor) -> Tensor:
        return self._chosen([component.whitened(u) for component in self.mixture.components], self.label.T.unsqueeze(1))

    def coloured(self, noise: Tensor) -> Tensor:
        return self._chosen([component.coloured(noise) for component in self.mixture.components], self.label.unsqueeze(-1))

    def pulled(self, gradient: Tensor) -> Tensor:
        return self._chosen([component.pulled(gradient) for component in self.mixture.components], self.label.T.unsqueeze(1))

    def log_label(self, u: Tensor) -> Tensor:
        """(C, B), log of the probability of the label at u."""
        return self.mixture.log_terms(u).log_softmax(-1).gather(-1, self.label.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def _chosen(by_part: list[Tensor], label: Tensor) -> Tensor:
        chosen = by_part[0]
        for i, values in enumerate(by_part[1:], start=1):
            chosen = torch.where(label == i, values, chosen)
        return chosen


def transition(
    state: State,
    evaluate: Callable[[Tensor], State],
    t: Tensor,
    reference: GaussianProposal | ChosenPart,
    step_size: Tensor,
    num_leapfrog: int,
) -> tuple[State, Tensor]:
    """One HMC step that leaves start^(1 - t) joint^t invariant; returns the state and the acceptance, (C, B).

    The density is written as N(loc, S) exp(psi). The Gaussian part of the motion is a rotation of position and momentum,
    which is computed exactly. Only psi is integrated numerically. Where the reference fits, steps of a radian are accepted
    (Beskos et al., 2011, https://doi.org/10.1016/j.spa.2011.06.003). `t` and `step_size` are (B,).
    """
    h = step_size.reshape(-1, 1, 1)
    cos, sin = h.cos(), h.sin()
    v = reference.whitened(state.u)  # (B, D, C), like all of the motion
    p = first = torch.randn_like(v)

    def kick(at: State, v: Tensor) -> Tensor:
        """Half a step along the gradient of psi."""
        return 0.5 * h * (reference.pulled(at.gradient(t)) + v)

    moved, w = state, v
    for _ in range(num_leapfrog):
        p = p + kick(moved, w)
        w, p = cos * w + sin * p, cos * p - sin * w
        moved = evaluate(reference.coloured(w))
        p = p + kick(moved, w)
    # The rotation keeps the sum of the quadratic forms of position and momentum, so these cancel.
    before = state.log_density(t) - 0.5 * first.square().sum(1).T
    after = moved.log_density(t) - 0.5 * p.square().sum(1).T
    if isinstance(reference, ChosenPart):
        before, after = before + reference.log_label(state.u), after + reference.log_label(moved.u)
    acceptance = (after - before).clamp(max=0).exp().nan_to_num(nan=0.0)
    accepted = torch.rand_like(acceptance) < acceptance
    return moved.where(accepted, state), acceptance


def adapted(step_size: Tensor, acceptance: Tensor) -> Tensor:
    """Step sizes (B,), adapted to the acceptance probabilities of the chains, (C, B)."""
    return (step_size * (ADAPTATION * (acceptance.mean(0) - TARGET_ACCEPTANCE)).exp()).clamp(max=LONGEST_STEP)
