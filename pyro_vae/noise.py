"""Random numbers: a seed for every noise block, and restored random states."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy
import torch

from .options import seed_or_none

NOISE_BLOCK = 100  # particles whose noise is drawn together; results for a seed depend on it, so it must not be tuned

# The index of a batch within a data set. `evaluate` increments it, so that no two batches have the same noise.
batch_number = 0


class Noise(IntEnum):
    """The use of a noise block. No two uses within one call have the same stream and block.

    A user's estimator may use any whole number from 100.
    """

    PROBE = 0  # runs that determine the structure of a pair
    SUBSAMPLE = 1  # indices of subsampled plates
    SIMULATION = 2  # data and latents from the model
    GUIDE = 3  # draws of the guide that are measured
    FIT = 4  # gradients for proposals
    PROPOSAL = 5  # draws of fitted proposals that are measured
    SEARCH = 6  # starts of the search for modes
    ANNEAL = 7  # chains from the prior to the posterior
    REVERSE = 8  # chains back
    CHECK = 9  # the check by a second estimate
    OFFSETS = 10  # the fit of q*, and its second start
    PILOT = 11  # chains that set step sizes and temperatures
    WITNESSES = 12  # the test whether another mode has a better q*
    OPTIMUM = 13  # gradients for a Gaussian q*
    GAPS = 14  # draws for L[q] and L[q*], different from those with which fits have started
    PART = 15  # seeds of calls for some of the data
    LEAVE_ONE_OUT = 16  # seeds of calls for the data given draws of the latents outside their plate
    CALIBRATION = 17  # ties between a latent and draws of the guide, and the test whether the guide depends on the data
    POSTERIOR = 18  # the check of a function of the latents, its value under the guide, resampling by weight


def noise_seed(seed: int, stream: int, block: int) -> int:
    """The seed of one noise block.

    It depends only on (seed, batch, stream, block), so draws do not depend on chunks or processes.
    """
    entropy = numpy.random.SeedSequence([seed, batch_number, stream, block])
    return int(entropy.generate_state(1, numpy.uint64)[0] >> numpy.uint64(1))


def seed_torch(seed: int) -> None:
    """Seed the random numbers of torch, as `torch.manual_seed` does.

    Without an accelerator, that function stores a traceback at each call for devices that may be initialised later, which
    takes .7 ms and memory per call. Its generators use no more than 64 bits of a seed.
    """
    seed %= 2**63
    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def fresh_seed() -> int:
    """A seed drawn from the caller's random state, for calls without a seed."""
    return int(torch.randint(2**62, ()))


def checked_seed(seed: int | None) -> int:
    seed = seed_or_none(seed)
    return fresh_seed() if seed is None else seed


@contextmanager
def batch_noise(number: int) -> Iterator[None]:
    """Use the noise of the batch with this index."""
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
