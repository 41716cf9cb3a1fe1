"""What the tests of heads share: data for each, and densities at the values of one number."""

import pyro
import torch
from head_specs import F64, SPECS
from torch import nn as torch_nn

# Two-sided tail beyond 4.5 standard errors; a test of N independent numbers fails N times as often.
SIGMAS, FALSE_ALARM = 4.5, 7e-6


def log_density(fn, where):
    """log_prob at each of the points, for an event of one number; those of a sum over large counts lie between counts."""
    with pyro.validation_enabled(False):
        return fn.log_prob(where.values.unsqueeze(-1)).detach()


def density(fn, where):
    return log_density(fn, where).exp()


def raw_numbers(head, seed=0, size=1, batch=(), spread=1.0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch, head.num_outputs(size))
    return spread * torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def in_eval_mode(name, event_dim=1, dtype=F64):
    return SPECS[name].make(event_dim).to(dtype).eval()


def simulated(head, num_data=60, size=6, seed=0, spread=4.0):
    """Data (B, X) from the head behind a linear map of two standard normal latents."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, head.num_outputs(size), generator=generator)
    z = torch.randn(num_data, 2, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return head.eval()(spread * z @ weight).sample()


class Bias(torch_nn.Module):
    """A network whose output does not depend on its input: (..., anything) to (..., width)."""

    def __init__(self, width):
        super().__init__()
        self.raw = torch_nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return self.raw.expand(*x.shape[:-1], -1)
