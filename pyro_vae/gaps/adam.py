"""Fit the offsets of a guide by Adam, for families that are not Gaussian."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import LocalFitError
from ..kernel import Call
from ..noise import Noise
from ..proposals import differentiable
from .offsets import GuideOffsets

LEARNING_RATE, FIT_PARTICLES, NUM_STEPS = 0.1, 4, 50
LAST_LEVEL, MAX_ROUNDS = 1, 7
SMALL_GAIN = 0.5
CHECK_PARTICLES, TOLERANCE = 50, 0.05  # nats that a whole round may still gain for a datum to count as converged


def fit_offsets(call: Call, *, start: Callable[[GuideOffsets], None] | None = None, effort: float = 1.0) -> GuideOffsets:
    """Maximise the ELBO of every datum over the offsets of this datum, for all data of the batch at once.

    Rounds of Adam steps use sticking-the-landing gradients (Roeder, Wu and Duvenaud, 2017,
    https://arxiv.org/abs/1703.09194). A round ends at the average of the iterates of its second half. After each round the
    gain is measured per datum on common noise. A datum that lost more than 0.05 nats (and three errors) is put back. One
    that gained less than 0.05 nats (and two errors of at most 0.05) has converged. Once most data gain under half a nat,
    rounds have twice the particles and a rate lower by the root of two. The fit stops when all data have converged in such a
    round, or after seven of them. Twice the particles would cost twice as much and gain 0.02 nats.

    :param start: function that sets the offsets at which the fit starts; by default the fit starts at the guide.
    :param effort: multiple of seven rounds, at most.
    """
    offsets = GuideOffsets(call)
    terms = check_terms(call, offsets)  # also creates the offsets, at zero
    if not offsets.tensors:
        raise LocalFitError(
            "the guide draws no continuous latent whose parameters could be optimised per datum, so the gap cannot be split"
        )
    if start is not None:
        start(offsets)
        terms = check_terms(call, offsets)
    level = 0
    for round_ in range(round(MAX_ROUNDS * effort)):
        before = offsets.state()
        offsets.usable = torch.ones_like(offsets.usable)
        ascend(call, offsets, level, first_block=1 + round_ * NUM_STEPS)
        new_terms = check_terms(call, offsets)
        gain = (new_terms - terms).mean(0)
        noise = (new_terms - terms).std(0) / CHECK_PARTICLES**0.5
        lost = ~(gain >= -TOLERANCE - 3 * noise)  # ~ rather than <, so that NaN is put back too
        offsets.restore(before, lost)
        offsets.converged = ~lost & (gain <= TOLERANCE + 2 * noise) & (noise <= TOLERANCE) & offsets.usable
        terms = torch.where(lost, terms, new_terms)
        if level == LAST_LEVEL and bool(offsets.converged.all()):
            break
        if bool(gain.median() < SMALL_GAIN):
            level = min(level + 1, LAST_LEVEL)
    return offsets


def check_terms(call: Call, offsets: GuideOffsets) -> Tensor:
    """ELBO terms at the current offsets, (K, B), on the same noise at every call."""
    return call.log_weights(CHECK_PARTICLES, Noise.OFFSETS, adjust=offsets.adjust)[1]


def ascend(call: Call, offsets: GuideOffsets, level: int, first_block: int) -> None:
    num_particles = FIT_PARTICLES * 2**level
    optimizer = torch.optim.Adam(offsets.tensors, lr=LEARNING_RATE / 2 ** (level / 2), betas=(0.9, 0.99))
    average = [torch.zeros_like(tensor) for tensor in offsets.tensors]
    averaged = NUM_STEPS // 2
    for step in range(NUM_STEPS):
        call.set_noise(Noise.OFFSETS, first_block + step)
        with differentiable():
            guide = call.draw(num_particles, adjust=offsets.adjust)
            model = call.score(call.latent_values(guide), num_particles)
            elbo = call.weigh(guide, model, num_particles).elbo
            gradients = torch.autograd.grad(-elbo.mean(0).sum(), offsets.tensors)
        offsets.check_gradients(gradients, elbo)
        for tensor, gradient in zip(offsets.tensors, gradients, strict=True):
            # not the gradient of a datum with a draw whose ELBO term is not finite
            tensor.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
            offsets.usable = offsets.usable & gradient.isfinite().all()
        optimizer.step()
        if step >= NUM_STEPS - averaged:
            average = [a + t.detach() / averaged for a, t in zip(average, offsets.tensors, strict=True)]
    offsets.set_state(average)
