"""
Quickstart: how wrong is this VAE's ELBO, and whose fault is it?
================================================================

A VAE trained with Pyro's own ``SVI`` on handwritten digits (8x8, whole numbers 0..16, so the honest likelihood is Binomial
with 16 trials), the weight of the KL annealed from 0 to 1, and then its gaps on held-out digits.
"""

# %%
import os
import time

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_EPOCHS = 3 if SMOKE_TEST else 200
IS_PROGRAM = "__file__" in globals()  # not a page or a notebook: these show the figure themselves, and want no bars

# %%
# A pair and an objective
# -----------------------
#
# ``vae.model`` and ``vae.guide`` are ordinary Pyro programs; your own, in any style, go through the same steps.

start = time.perf_counter()
pyro.set_rng_seed(0)
pixels = torch.tensor(load_digits().data, dtype=torch.float32)
train, test = train_test_split(pixels, test_size=360, random_state=0)
if SMOKE_TEST:
    test = test[:40]
loader = DataLoader(TensorDataset(train), batch_size=100, shuffle=True)
num_updates = NUM_EPOCHS * len(loader)

vae = pv.mlp_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16), hidden=(128,))
objective = pv.BetaTraceMeanField_ELBO(beta=pv.LinearAnnealing(num_updates // 5))
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), objective)

# %%
# Train with SVI
# --------------
#
# The monitor shows distortion, rate and the true ELBO, whatever beta is.

monitor = pv.Monitor(objective, num_updates=num_updates, progress=IS_PROGRAM)
for _ in range(NUM_EPOCHS):
    for (x,) in monitor.watch(loader):
        svi.step(x)
print(monitor.history())

# %%
# The gaps on held-out digits
# ---------------------------
#
# For every digit: the ELBO of the guide, the ELBO of the best member of the guide's family for that digit alone, and
# log p(x) by importance sampling from a proposal fitted to that digit.

estimator = pv.InferenceGaps(vae.model, vae.guide, num_particles=50 if SMOKE_TEST else 500)
gaps = pv.evaluate(estimator, DataLoader(TensorDataset(test), batch_size=120), progress=IS_PROGRAM, seed=0)
print(gaps)

# %%
# Monte Carlo error: how far another seed would move a number for these digits. Sampling error: how far other digits
# would. The picture shows the same numbers as steps from the ELBO up to log p(x).

panels = [["training", "gaps", "data"], ["training", "gaps", "samples"]]
figure, axes = plt.subplot_mosaic(panels, figsize=(16, 4.5), layout="constrained")
pv.plots.plot_training(monitor.history(), ax=axes["training"])
pv.plots.plot_gaps(gaps, ax=axes["gaps"])
pv.plots.plot_reconstructions(pv.reconstruct(vae.model, vae.guide, test, seed=0), ax=axes["data"])
pv.plots.plot_samples(pv.simulate(vae.model, test, seed=0), ax=axes["samples"])
if IS_PROGRAM:
    figure.savefig("quickstart.png", dpi=150)
    print(f"wrote quickstart.png; {time.perf_counter() - start:.0f} s in all")
plt.show()

# %%
# What to try
# -----------
#
# - A bigger encoder: does the amortization gap shrink, and log p(x) move?
# - ``pv.nn.MultivariateNormal`` as the head of the encoder: does the approximation gap shrink?
# - ``beta=0.0``: an autoencoder. What do its samples look like, and what is its rate?
# - The same on ``train``: the difference is the encoder's own generalisation gap.
#
# Why there is a gap at all: :doc:`01_the_bound`.
