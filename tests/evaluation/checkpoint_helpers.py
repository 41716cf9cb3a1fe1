"""A pair whose runs can be counted, and records compared bit for bit."""

import dataclasses

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv


def linear(num_in, num_out, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(num_in, num_out)


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.decoder = linear(2, 4, seed)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, seed=1):
        super().__init__()
        self.encoder = linear(4, 2, seed)

    def forward(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.7).to_event(1))


def data(num_data=23):
    return torch.randn(num_data, 4, generator=torch.Generator().manual_seed(3))


def batches_of(x, size=5):
    return list(x.split(size))


def estimator(model=None, guide=None, **options):
    return pv.ImportanceSampling(model or Model(), guide or Guide(), **{"num_particles": 100, **options})


class Stop(Exception):
    """What ends a run in the middle."""


def until(number, batches, error=Stop):
    """The batches before this number; then an error, as a process that is killed has it."""
    for place, batch in enumerate(batches):
        if place == number:
            raise error
        yield batch


def same(one, other):
    """Whether two values are the same bit for bit, through all their parts."""
    if isinstance(one, torch.Tensor):
        alike = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
        )
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)
