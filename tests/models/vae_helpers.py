"""What the tests of the models share: a small VAE, and training by hand that a trained one must equal."""

import copy

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_vae.models import VAE
from pyro_vae.nn import Normal, StandardNormal

LEARNING_RATE = 0.02


def small_vae():
    """Data of 6 numbers, 2 latents."""
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), Normal())
    decoder = nn.Sequential(nn.Linear(2, 6), Normal(scale=0.5))
    return VAE(encoder, decoder, StandardNormal(2))


def small_data(num_data=10):
    return torch.randn(num_data, 6, generator=torch.Generator().manual_seed(1))


def svi_of(vae, loss=None):
    return SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss or Trace_ELBO())


class ByHand:
    """The same steps as `svi_of`, in torch alone: the networks are called and each parameter has an Adam of its own."""

    def __init__(self, vae):
        self.vae, self.optimizers = vae, {}

    def step(self, x):
        q = self.vae.encoder(x)
        z = q.rsample()
        elbo = self.vae.decoder(z).log_prob(x) + self.vae.prior().log_prob(z) - q.log_prob(z)
        self.vae.zero_grad()
        (-elbo.sum()).backward()
        for parameter in self.vae.parameters():
            if parameter.requires_grad:
                optimizer = self.optimizers.get(parameter) or torch.optim.Adam([parameter], lr=LEARNING_RATE)
                self.optimizers[parameter] = optimizer
                optimizer.step()


def snapshot(vae):
    return copy.deepcopy(vae.state_dict())


def assert_all_moved(vae, before):
    """Every parameter, not one of them."""
    for name, _ in vae.named_parameters():
        assert not torch.equal(vae.state_dict()[name], before[name]), f"{name} did not learn"


def assert_same(state, other):
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
