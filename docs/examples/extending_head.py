"""Waiting times whose hazard rises or falls with the time that has passed."""

import pyro.distributions as dist
from torch.distributions import constraints
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae.nn.checked import Accepts

REMEDY = "leave out waiting times of zero"
TIMES = Accepts("Weibull", constraints.positive, "positive numbers", REMEDY)
SMALLEST = 0.1  # of both parameters: keeps densities and gradients finite


class Weibull(pv.nn.Head):
    """p(x) = (k / s) (x / s)^(k - 1) exp(-(x / s)^k).

    The network gives the scale s and the concentration k for each number.
    """

    num_params = 2

    def __init__(self, *, event_dim=1):
        super().__init__(TIMES, event_dim=event_dim)

    def input_layer(self):
        return pv.nn.Log()

    def forward(self, raw):
        scale, concentration = (softplus(part) + SMALLEST for part in self.chunks(raw))
        return self.checked(dist.Weibull(scale, concentration, validate_args=False))
