"""A likelihood of one's own: counts with more zeros than a Poisson variable has."""

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import constraints
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae.nn.checked import Accepts

COUNTS = Accepts("ZeroInflatedPoisson", constraints.nonnegative_integer, "whole numbers from 0", "round them")


class ZeroInflatedPoisson(pv.nn.Head):
    """p(x) = g Poisson(x; 0) + (1 - g) Poisson(x; rate): the network gives softplus^-1 rate and logit g per number.

    A mixture whose first rate is zero, because Pyro's ZeroInflatedPoisson gives other densities once its mean was read.
    """

    num_params = 2

    def __init__(self, *, event_dim=1):
        super().__init__(COUNTS, event_dim=event_dim)

    def input_layer(self):
        return LogCounts()

    def forward(self, raw):
        rate, logit = self.chunks(raw)
        none = torch.zeros_like(rate)
        gate = dist.Categorical(logits=torch.stack([logit, none], -1))
        counts = dist.Poisson(torch.stack([none, softplus(rate)], -1), validate_args=False)
        return self.checked(dist.MixtureSameFamily(gate, counts, validate_args=False))


class LogCounts(nn.Module):
    """Counts as an encoder should see them."""

    def forward(self, x):
        return x.log1p()
