"""The best Gaussian of a family for each datum, by rounds of natural gradients, see `targets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise
from ..proposals import GaussianProposal, LatentSpace
from .active import Active
from .controls import Quadratic
from .targets import Target, gain_between, target_of

MAX_ROUNDS = 8  # rounds in which no datum is far from its optimum
WALKS = 3  # rounds at most, as a multiple, counting those in which a datum is far away
# share of data that must be within the tolerance, and the multiple of it allowed for the others
NEARLY_ALL, AT_MOST = 0.95, 2.5
# share of the tolerance within which a datum may leave, since the lowest estimates are too low by chance
LEAVES = 0.5
FAR = 0.5  # nats to a target, beyond noise, above which earlier rounds are discarded
NOISY = 0.2  # error in nats of the ELBO in a round, above which heavy tails hide how much is left to gain
SIGMAS, FALL = 3.0, 0.02  # errors and nats by which the ELBO may fall; a larger fall is undone


def best_gaussian(
    space: LatentSpace,
    start: GaussianProposal,
    quadratic: Quadratic,
    blocks: Tensor,
    tolerance: float,
    effort: float = 1.0,
) -> tuple[GaussianProposal, Tensor]:
    """Maximise E_q[log p(x, u) - log q(u)] over Gaussians whose covariance is zero outside of `blocks`, (D, D) bool.

    Each round draws from q and gives a target: the mean that would be best if log p had the curvature of Q, and the mean
    curvature of log p under q. The next q is an average of all targets, see `Fit`. Where the targets agree with q, the mean
    gradient is zero and the precision is the mean curvature, as at the optimum. When half of the data are within half of
    the tolerance, the others go on without them, where the arguments can be cut.

    :param start: a member of the family.
    :param tolerance: nats: rounds end when nearly all data have no more than this left to gain, and none has more than
        `AT_MOST` times this.
    :param effort: multiple of eight rounds, at most, not counting those in which a target is far away.
    :return: q, and an estimate of the nats that are left to gain, (B,), see `Fit`.
    """
    rounds_left = round(MAX_ROUNDS * effort)
    with Active(space) as active:
        everything = fit = Fit.at(start)
        for round_ in range(WALKS * rounds_left):
            active.space.call.set_noise(Noise.OPTIMUM, round_)
            target = target_of(active.space, fit.q, quadratic, blocks, fit.damped)
            fit, far = fit.after(target, quadratic)
            everything = everything.with_part(active.kept, fit)
            rounds_left -= not bool(far.any())
            left = everything.left
            nearly_all = bool((left <= tolerance).float().mean() >= NEARLY_ALL)
            if (nearly_all and bool((left <= AT_MOST * tolerance).all())) or not rounds_left:
                break
            unfinished = fit.left > LEAVES * tolerance
            if active.narrow(unfinished, fit.q):
                fit, quadratic = fit.select(unfinished), Quadratic(quadratic.gaussian.select(unfinished))
    return everything.q, everything.left


@dataclass(frozen=True)
class Fit:
    """What the rounds have found for each datum.

    The next q is an average of all targets, so the noise of the rounds averages out. Weights grow from round to round,
    because early targets are drawn from a q that is not good yet. Where a target is far away, q moves to it and the average
    starts again there. A step that made the ELBO of q clearly lower is undone, and the fit of this datum continues without
    the correlations of Q.

    :ivar q: the current member of the family; `kept` is the one before, with its ELBO and the error of that, and `start` the
        one at which the average started.
    :ivar damped: (B,), where the correlations of Q are not used.
    :ivar count: (B,), targets in the average, and the start; `noise` is the sum of their noise in nats.
    :ivar left: (B,), an estimate of the nats that are left to gain. It adds three parts. The first is a little more than the
        noise of the average, at most the gain of the rounds. The second is the gain that the last target predicts, the third
        the gain of the last step, both beyond their noise.
    """

    q: GaussianProposal
    kept: GaussianProposal
    start: GaussianProposal
    kept_elbo: Tensor
    kept_error: Tensor
    damped: Tensor
    count: Tensor
    noise: Tensor
    left: Tensor

    @classmethod
    def at(cls, q: GaussianProposal) -> Fit:
        like = q.loc[:, 0]
        zero, infinity = torch.zeros_like(like), torch.full_like(like, torch.inf)
        return cls(q, q, q, -infinity, zero, zero.bool(), torch.ones_like(like), zero, infinity)

    def select(self, chosen: Tensor) -> Fit:
        """Of some of the data."""
        values: Any = (v.select(chosen) if isinstance(v, GaussianProposal) else v[chosen] for v in vars(self).values())
        return Fit(*values)

    def with_part(self, kept: Tensor, part: Fit) -> Fit:
        """With what a part, the data with the indices `kept`, has found."""
        if len(kept) == len(self.left):
            return part
        values: Any = (put(old, kept, new) for old, new in zip(vars(self).values(), vars(part).values(), strict=True))
        return Fit(*values)

    def after(self, target: Target, quadratic: Quadratic) -> tuple[Fit, Tensor]:
        """After a round, and (B,) where its target is far away."""
        errors = (target.error.square() + self.kept_error.square()).sqrt()
        fell = ~(target.elbo > self.kept_elbo - SIGMAS * errors - FALL)  # ~ rather than <, so that NaN is undone too
        beyond_noise = (target.gain - 2 * target.noise).clamp(min=0)
        far = ~fell & ((beyond_noise > FAR) | target.narrow)  # earlier rounds are discarded: the target is a new start
        weight = torch.where(far, 1.0, 2 / (self.count + 2))
        moved = target.approached(self.q, weight)
        q, start = self.kept.where(fell, moved), moved.where(far, self.start)
        # gain of the last step; infinite in the first round
        progress = (target.elbo - self.kept_elbo - SIGMAS * errors).clamp(min=0)
        left_of_gain = (1 - weight).square() * beyond_noise
        noise = torch.where(far, 0.0, torch.where(fell, self.noise, self.noise + target.noise))
        count = torch.where(far, 1.0, torch.where(fell, self.count, self.count + 1))
        short = 4 / 3 * noise / (count - 1).clamp(min=1).square()  # the squares of such weights add up to 4 / 3 n
        gained = gain_between(start, q, quadratic)
        shrunk = torch.where(short > 0, 1.2 * gained * short / (gained + short), 0.0)
        unknown = fell | far | (target.error > NOISY)
        fit = Fit(
            q=q,
            kept=self.kept.where(fell, self.q),
            start=start,
            kept_elbo=torch.where(fell, self.kept_elbo, target.elbo),
            kept_error=torch.where(fell, self.kept_error, target.error),
            damped=self.damped | fell,
            count=count,
            noise=noise,
            left=torch.where(unknown, torch.inf, shrunk + left_of_gain + progress),
        )
        return fit, far


def put(old: Any, kept: Tensor, new: Any) -> Tensor | GaussianProposal:
    """The old tensors, but new ones for the data with the indices `kept`."""
    if isinstance(old, GaussianProposal):
        return GaussianProposal(old.loc.index_copy(0, kept, new.loc), old.tril.index_copy(0, kept, new.tril))
    return old.index_copy(0, kept, new)
