"""Linear-Gaussian models whose best encoder is linear, and encoders for them."""

import pyro
import pyro.distributions as dist
import torch
from pair_helpers import F64
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

FEW = {"num_data": 100, "num_particles": 100, "progress": False, "seed": 0}


class Linear(nn.Module):
    """A diagonal Gaussian whose mean is linear in x, through `rank` numbers, and whose scale is the same for all x."""

    def __init__(self, data_dim, latent_dim, rank=None, scale=None):
        super().__init__()
        rank = rank or latent_dim
        self.down, self.up = nn.Linear(data_dim, rank, dtype=F64), nn.Linear(rank, latent_dim, dtype=F64)
        self.log_scale = nn.Parameter(torch.zeros(latent_dim, dtype=F64))
        self.scale = scale

    def forward(self, x):
        pyro.module("encoder", self)
        with pyro.plate("data", len(x)):
            scale = self.log_scale.exp() if self.scale is None else self.scale
            pyro.sample("z", dist.Normal(self.up(self.down(x)), scale).to_event(1))


class Network(nn.Module):
    """A diagonal Gaussian by a network with one hidden layer, all in one module as in Pyro's tutorials."""

    def __init__(self, data_dim, latent_dim, width, name="encoder"):
        super().__init__()
        self.name = name
        self.net = nn.Sequential(nn.Linear(data_dim, width), nn.Tanh(), nn.Linear(width, 2 * latent_dim)).double()

    def forward(self, x):
        pyro.module(self.name, self)
        loc, log_scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def adam(lr=1e-2, fall=1.0):
    """Adam whose learning rate is multiplied by `fall` at each epoch."""
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "gamma": fall}
    return pv.FusedOptim(torch.optim.lr_scheduler.ExponentialLR, options)


def batches_of(x, size=100, shuffle=False):
    return DataLoader(TensorDataset(x), size, shuffle=shuffle)
