"""Each head in a VAE of ten lines of plain Pyro: it trains, and its gaps can be measured."""

import pyro
import pytest
import torch
from head_specs import SPECS
from nn_helpers import simulated
from pair_helpers import quiet
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn as torch_nn

import pyro_vae as pv
import pyro_vae.nn as nn


class VAE(torch_nn.Module):
    def __init__(self, encoder, decoder, latent_dim=2):
        super().__init__()
        self.encoder, self.decoder, self.prior = encoder, decoder, nn.StandardNormal(latent_dim)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", self.decoder(pyro.sample("latent", self.prior())), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("latent", self.encoder(x))


def vae_for(head, size=6, latent=None):
    latent = nn.Normal() if latent is None else latent
    see = head.input_layer()
    width = see(torch.zeros(1, size)).shape[-1]
    encoder = torch_nn.Sequential(see, nn.MLP(width, latent.num_outputs(2), hidden=(16,)), latent)
    decoder = torch_nn.Sequential(nn.MLP(2, head.num_outputs(size), hidden=(16,)), head)
    return VAE(encoder, decoder)


def trains_and_has_gaps(vae, x, num_steps=100):
    """The loss falls by far more than its noise; of a few data ELBO <= L[q*] and ELBO <= log p(x), within error."""
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), Trace_ELBO())
    vae.train()
    losses = torch.tensor([svi.step(x) for _ in range(num_steps)])
    assert bool(losses.isfinite().all())
    first, last = losses[:10], losses[-10:]
    assert float(first.mean() - last.mean()) > 4.5 * float(last.std()) / 10**0.5
    vae.eval()
    with quiet():
        gaps = pv.InferenceGaps(vae.model, vae.guide, num_particles=50, seed=0)(x[:3])
    for name in ("elbo", "optimal_elbo", "log_evidence", "amortization", "approximation", "inference"):
        assert bool(getattr(gaps, name).isfinite().all()), name
    for name in ("amortization", "inference"):
        assert bool((getattr(gaps, name) > -4.5 * gaps.std_errors[name] - 0.1).all()), name
    assert gaps.evidence.support_checked


@pytest.mark.parametrize("name", SPECS)
def test_a_head_trains_and_has_gaps(name):
    head = SPECS[name].make()
    trains_and_has_gaps(vae_for(head), simulated(head, spread=SPECS[name].spread_of_data))


def test_full_covariance_trains_and_has_gaps():
    head = nn.Normal(0.3)
    trains_and_has_gaps(vae_for(head, latent=nn.MultivariateNormal()), simulated(head))


def test_images_train_and_have_gaps():
    head = nn.Bernoulli(event_dim=3)
    encoder = torch_nn.Sequential(nn.ConvNet((1, 5, 6), 4, channels=(4, 8)), nn.Normal())
    decoder = torch_nn.Sequential(nn.DeconvNet(2, (1, 5, 6), channels=(8, 4)), head)
    x = (torch.rand(40, 1, 1, 1) > 0.5).float().expand(40, 1, 5, 6).clone()
    x[:, :, :2] = 1
    trains_and_has_gaps(VAE(encoder, decoder), x)
