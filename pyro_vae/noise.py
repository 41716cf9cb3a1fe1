"""Where random numbers come from: a seed for every noise block, and random states that are restored."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy
import torch

from .options import seed_or_none

NOISE_BLOCK = 100  # particles whose noise is drawn together; part of what a seed means, so never a tuning knob

# The number of a batch within a data set. `evaluate` counts it up, so that no two batches share their noise.
batch_number = 0


class Noise(IntEnum):
    """What a noise block is drawn for. No two uses within one call share a stream and a block.

    An estimator of one's own may take any whole number from 100 on.
    """

    PROBE = 0  # finding out what a pair is
    SUBSAMPLE = 1  # which data of a plate
    SIMULATION = 2  # data and latents from the model
    GUIDE = 3  # draws of the guide that are measured
    FIT = 4  # gradients for proposals
    PROPOSAL = 5  # draws of fitted proposals that are measured
    SEARCH = 6  # where the search for modes starts
    ANNEAL = 7  # chains from the prior to the posterior
    REVERSE = 8  # chains back
    CHECK = 9  # the check from the posterior's side
    OFFSETS = 10  # the fit of q*, and again where it starts again
    PILOT = 11  # chains that set step sizes and temperatures
    WITNESSES = 12  # whether another mode holds a better q*
    OPTIMUM = 13  # gradients for a Gaussian q*
    GAPS = 14  # draws by which L[q] and L[q*] are measured: others than those that fits have started from
    PART = 15  # seeds of calls for some of the data
    LEAVE_ONE_OUT = 16  # seeds of calls about the data given draws of the latents outside their plate
    CALIBRATION = 17  # ties between a latent and draws of the guide, and whether the guide looks at the data
    POSTERIOR = 18  # the probe of a function of the latents, the guide's own value of it, draws by weight


def noise_seed(seed: int, stream: int, block: int) -> int:
    """The seed of one noise block.

    A function of (seed, batch, stream, block) alone, so that chunks and processes change no draw.
    """
    entropy = numpy.random.SeedSequence([seed, batch_number, stream, block])
    return int(entropy.generate_state(1, numpy.uint64)[0] >> numpy.uint64(1))


def seed_torch(seed: int) -> None:
    """Seed the random numbers of torch, as `torch.manual_seed` does.

    Where there is no accelerator, that function keeps a traceback for each of those it might find later: .7 ms per call, and
    memory that grows with the number of calls. Its generators take no more than 64 bits of a seed.
    """
    seed %= 2**63
    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def fresh_seed() -> int:
    """A seed drawn from the caller's random state, for calls that were given none."""
    return int(torch.randint(2**62, ()))


def checked_seed(seed: int | None) -> int:
    seed = seed_or_none(seed)
    return fresh_seed() if seed is None else seed


@contextmanager
def batch_noise(number: int) -> Iterator[None]:
    """Use the noise of the batch with this number."""
    global batch_number
    before, batch_number = batch_number, number
    try:
        yield
    finally:
        batch_number = before


@contextmanager
def kept_random_state(devices: list[torch.device] | None = None) -> Iterator[None]:
    """Restore the random state of torch (on the given devices, or all), NumPy and Python on exit."""
    python, of_numpy = random.getstate(), numpy.random.get_state()
    cuda = None if devices is None else [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(of_numpy)
