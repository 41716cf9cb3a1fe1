"""Three VAEs, trained, with one fault each: the verdict names it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import linear_gaussian, model_of
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.exact import LinearGaussian

OPTIONS = {"num_data": 100, "progress": False}


def train(model, guide, x, num_epochs, lr=5e-3):
    pyro.set_rng_seed(0)
    loader = DataLoader(TensorDataset(x), 100, shuffle=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), pv.BetaTraceMeanField_ELBO())
    for _ in range(num_epochs):
        for (batch,) in loader:
            svi.step(batch)


def diagnose(model, guide, x, y):
    return pv.diagnose(
        model,
        guide,
        train=DataLoader(TensorDataset(x), 100, shuffle=True),
        test=DataLoader(TensorDataset(y), 100),
        **OPTIONS,
    )


@pytest.fixture(scope="module")
def digits():
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    return pixels[:1400], pixels[1400:]


@pytest.mark.slow
def test_a_vae_made_to_collapse(digits):
    """Noise of variance 4 is above every eigenvalue of digits/16 (at most 0.7), so that a linear VAE has no use for z."""
    x, y = (pixels / 16 for pixels in digits)
    vae = pv.mlp_vae(64, latent_dim=4, likelihood=pv.nn.Normal(scale=2.0), hidden=(64,))
    train(vae.model, vae.guide, x, num_epochs=20)
    page = diagnose(vae.model, vae.guide, x, y)
    assert page.culprit == "collapse", page
    assert page.units.num_active == 0


@pytest.mark.slow
def test_an_encoder_that_is_too_small(digits):
    """Two hidden units for eight latents."""
    x, y = digits
    large = pv.mlp_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16), hidden=(64,))
    encoder = nn.Sequential(large.encoder[0], nn.Linear(64, 2), nn.Tanh(), nn.Linear(2, 16), pv.nn.Normal())
    vae = pv.VAE(encoder, large.decoder, prior=pv.nn.StandardNormal(8))
    train(vae.model, vae.guide, x, num_epochs=40)
    page = diagnose(vae.model, vae.guide, x, y)
    assert page.culprit == "encoder", page
    assert float(page.test.amortization.mean()) > 3 * float(page.test.approximation.mean())


@pytest.mark.slow
def test_a_family_that_is_too_simple():
    """A fixed decoder with correlated posteriors, and a linear encoder of independent Normals, the best there is."""
    lm, _ = linear_gaussian(latent_dim=2, data_dim=6, variance=0.3, dtype=torch.float32)
    lm = LinearGaussian(lm.weight[:, :1] + torch.tensor([0.0, 0.4]), lm.bias, lm.variance)
    model = model_of(lm)
    x = pv.simulate(model, torch.zeros(1500, 6), seed=0).observed["x"]

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 4)

        def forward(self, x):
            pyro.module("encoder", self)
            with pyro.plate("data", len(x)):
                loc, log_scale = self.net(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    guide = Guide()
    train(model, guide, x[:1000], num_epochs=60, lr=2e-2)
    page = diagnose(model, guide, x[:1000], x[1000:])
    assert page.culprit == "family", page
    gap = page.test.summary()["approximation"]
    assert float(gap.value) == pytest.approx(float(lm.approximation_gap()), abs=0.03)
