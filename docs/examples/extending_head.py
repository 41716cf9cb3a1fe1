"""A likelihood of one's own: counts with more zeros than a Poisson variable has."""

import pyro.distributions as dist
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.nn.checked import Accepts

COUNTS = Accepts("ZeroInflatedPoisson", constraints.nonnegative_integer, "whole numbers from 0", "round them")


class ZeroInflatedPoisson(pv.nn.Head):
    """p(x) = g [x = 0] + (1 - g) Poisson(x; rate): the network gives log rate and logit g per number."""

    num_params = 2

    def __init__(self, *, event_dim=1):
        super().__init__(COUNTS, event_dim=event_dim)

    def input_layer(self):
        return LogCounts()

    def forward(self, raw):
        log_rate, logits = self.chunks(raw)
        return self.checked(dist.ZeroInflatedPoisson(log_rate.exp(), gate_logits=logits, validate_args=False))


class LogCounts(nn.Module):
    """Counts as an encoder should see them."""

    def forward(self, x):
        return x.log1p()
