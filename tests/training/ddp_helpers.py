"""Pairs whose noise is a function of the datum, so that a batch in parts has the noise of the whole."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

WIDTH, DIM, NUM_DATA = 6, 2, 8


class NoiseOfDatum(dist.Normal):
    """A normal whose noise is a function of its mean and of the number of the particle."""

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        loc = self.loc.detach().expand(shape)
        particles = torch.arange(shape[0]).reshape(-1, 1, 1) if len(shape) == 3 else 0
        return self.loc + self.scale * torch.sin(1000 * loc + particles)

    def sample(self, sample_shape=()):
        return self.rsample(sample_shape).detach()


class Model(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.decode, self.size = nn.Linear(DIM, WIDTH), size

    def forward(self, x):
        with pyro.plate("data", self.size, subsample=x) if self.size else pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 0.7).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.encode, self.size = nn.Linear(WIDTH, 2 * DIM), size

    def forward(self, x):
        with pyro.plate("data", self.size, subsample=x) if self.size else pyro.plate("data", len(x)):
            loc, log_scale = self.encode(x).chunk(2, -1)
            pyro.sample("z", NoiseOfDatum(loc, log_scale.exp()).to_event(1))


@dataclass
class Case:
    """:ivar adds_up: whether the loss of a batch is the sum of those of its parts."""

    objective: Callable[[], Any]
    adds_up: bool = True
    size: int | None = None
    context: Callable[[], Any] = nullcontext


SCHEDULE = pv.LinearAnnealing(4, start=0.2)
CASES = {
    "trace": Case(partial(pv.BetaTrace_ELBO, beta=SCHEDULE)),
    "graph": Case(pv.BetaTraceGraph_ELBO),
    "mean-field": Case(partial(pv.BetaTraceMeanField_ELBO, beta=SCHEDULE)),
    "mean-field, plate with a size": Case(pv.BetaTraceMeanField_ELBO, size=40),
    "free bits": Case(partial(pv.BetaTraceMeanField_ELBO, free_bits=0.42), adds_up=False),
    "capacity": Case(partial(pv.BetaTraceMeanField_ELBO, capacity=1.0), adds_up=False),
    "importance-weighted": Case(partial(pv.ImportanceWeightedELBO, num_particles=3)),
    "importance-weighted, dreg": Case(partial(pv.ImportanceWeightedELBO, num_particles=3, gradient="dreg")),
    "inclusive": Case(partial(pv.InclusiveKL, num_particles=3)),
    "total correlation": Case(partial(pv.TotalCorrelationELBO, dataset_size=100), adds_up=False),
    "compiled": Case(partial(pv.ImportanceWeightedELBO, num_particles=3, compile={"backend": "eager"})),
    "autocast": Case(pv.BetaTrace_ELBO, context=partial(torch.autocast, "cpu", dtype=torch.bfloat16)),
}


def made(name):
    torch.manual_seed(0)
    case = CASES[name]
    return case.objective()(Model(case.size), Guide(case.size))


def data():
    return torch.randn(NUM_DATA, WIDTH, generator=torch.Generator().manual_seed(1))
