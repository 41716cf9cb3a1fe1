# %% [markdown]
# # Quickstart: how wrong is this VAE's ELBO, and whose fault is it?
#
# A VAE in plain Pyro, trained with Pyro's own `SVI` on handwritten digits (8x8, whole numbers 0..16, so the honest
# likelihood is Binomial with 16 trials), and then its gaps on held-out digits.

# %%
import os
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import trange

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_EPOCHS = 3 if SMOKE_TEST else 200

# %% [markdown]
# ## The model and the guide, as in Pyro's own tutorial

# %%


class VAE(nn.Module):
    """Prior and decoder in `model`, amortized encoder in `guide`."""

    def __init__(self, latent_dim: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, 64))
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent_dim))

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), self.latent_dim), 1.0).to_event(1))
            pyro.sample("pixels", dist.Binomial(16, logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x / 16).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


# %% [markdown]
# ## Train with SVI

# %%
start = time.perf_counter()
pyro.set_rng_seed(0)
pixels = torch.tensor(load_digits().data, dtype=torch.float32)
train, test = train_test_split(pixels, test_size=360, random_state=0)
if SMOKE_TEST:
    test = test[:40]
vae = VAE()
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), Trace_ELBO())
loader = DataLoader(TensorDataset(train), batch_size=100, shuffle=True)
progress = trange(NUM_EPOCHS, desc="SVI", unit="epoch")
for _ in progress:
    loss = sum(svi.step(x) for (x,) in loader) / len(train)
    progress.set_postfix(elbo=f"{-loss:.2f} nats")

# %% [markdown]
# ## The gaps on held-out digits
#
# For every digit: the ELBO of the guide, the ELBO of the best member of the guide's family for that digit alone, and
# log p(x) by importance sampling from a proposal fitted to that digit.

# %%
estimator = pv.InferenceGaps(vae.model, vae.guide, num_particles=50 if SMOKE_TEST else 500)
gaps = pv.evaluate(estimator, DataLoader(TensorDataset(test), batch_size=120), seed=0)
print(gaps)

# %% [markdown]
# Monte Carlo error: how far another seed would move a number for these digits. Sampling error: how far other digits
# would. The picture shows the same numbers as steps from the ELBO up to log p(x).

# %%
figure, axes = plt.subplot_mosaic([["gaps", "data"], ["gaps", "samples"]], figsize=(12, 4), layout="constrained")
pv.plots.plot_gaps(gaps, ax=axes["gaps"])
pv.plots.plot_reconstructions(pv.reconstruct(vae.model, vae.guide, test, seed=0), ax=axes["data"])
pv.plots.plot_samples(pv.simulate(vae.model, test, seed=0), ax=axes["samples"])
figure.savefig("quickstart.png", dpi=150)
print(f"wrote quickstart.png; {time.perf_counter() - start:.0f} s in all")

# %% [markdown]
# ## What to try
#
# - A bigger encoder: does the amortization gap shrink, and log p(x) move?
# - `dist.MultivariateNormal` in the guide: does the approximation gap shrink?
# - The same on `train`: the difference is the encoder's own generalisation gap.
