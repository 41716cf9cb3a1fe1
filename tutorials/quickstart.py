r"""
Quickstart: how far is this VAE's ELBO from log p(x), and why?
==============================================================

This program trains a variational autoencoder (VAE) with Pyro's own ``SVI``. Then it
measures, for every held-out image, how far the ELBO is from log p(x), and which part
of that distance is due to the encoder.

Prerequisites: you have trained a model with PyTorch; less than 1 minute to run.
"""

# %%
# Data and settings
# -----------------
# The data are handwritten digits of 8x8 pixels. Each pixel is a whole number from 0 to
# 16, so the likelihood is a Binomial with 16 trials per pixel.

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
# A page or a notebook shows the figure by itself and needs no progress bars.
IS_PROGRAM = "__file__" in globals()

start = time.perf_counter()
pyro.set_rng_seed(0)
pixels = torch.tensor(load_digits().data, dtype=torch.float32)
train, test = train_test_split(pixels, test_size=360, random_state=0)
if SMOKE_TEST:
    test = test[:40]
loader = DataLoader(TensorDataset(train), batch_size=100, shuffle=True)
num_updates = NUM_EPOCHS * len(loader)

# %%
# A model, a guide and an objective
# ---------------------------------
# ``vae.model`` and ``vae.guide`` are ordinary Pyro programs. Your own programs, in any
# style, go through the same steps. The weight of the KL, beta, rises linearly from 0 to
# 1 over the first fifth of the training: at step :math:`t` of a warm-up of :math:`T`
# steps, :math:`\beta_t = \min(1, t / T)`.

vae = pv.mlp_vae(64, latent_dim=8, likelihood=pv.nn.Binomial(16), hidden=(128,))
annealing = pv.LinearAnnealing(num_updates // 5)
objective = pv.BetaTraceMeanField_ELBO(beta=annealing)
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), objective)

# %%
# Train with SVI
# --------------
# The monitor records the ELBO at every step, whatever beta is. It also records the two
# parts of the ELBO. The *distortion* is what the decoder leaves unexplained. The *rate*
# is the KL from the encoder's distribution to the prior. All values are in nats, the
# unit of natural logarithms, per datum (one datum is one digit).

monitor = pv.Monitor(objective, num_updates=num_updates, progress=IS_PROGRAM)
for _ in range(NUM_EPOCHS):
    for (x,) in monitor.watch(loader):
        svi.step(x)
print(monitor.history())

# %%
# Measure the gaps on held-out digits
# -----------------------------------
# ``InferenceGaps`` computes three numbers for every digit:
#
# - the ELBO of the guide;
# - the optimal ELBO: that of q*, the best member of the guide's family for this digit;
# - log p(x), by importance sampling from a proposal that is fitted to this digit.

num_particles = 50 if SMOKE_TEST else 500
estimator = pv.InferenceGaps(vae.model, vae.guide, num_particles=num_particles)
held_out = DataLoader(TensorDataset(test), batch_size=120)
gaps = pv.evaluate(estimator, held_out, progress=IS_PROGRAM, seed=0)
print(gaps)

# %%
# The amortization gap lies between the first two numbers. It is lost because one
# encoder serves all digits. The approximation gap lies between the last two. It is lost
# because the family (here diagonal Gaussians) does not contain the posterior.
#
# Each mean has two errors. The Monte Carlo error says how much another seed would
# change it for these digits. The sampling error says how much other digits would change
# it. The lines under *doubts* count the digits whose numbers may be wrong, and say what
# to do about them.
#
# The figure shows the training, the steps from the ELBO up to log p(x), some
# reconstructions and some samples. To draw a sample, the program discards the encoder
# and decodes a draw from the prior.

panels = [["training", "gaps", "data"], ["training", "gaps", "samples"]]
figure, axes = plt.subplot_mosaic(panels, figsize=(16, 4.5), layout="constrained")
reconstructions = pv.reconstruct(vae.model, vae.guide, test, seed=0)
samples = pv.simulate(vae.model, test, seed=0)
pv.plots.plot_training(monitor.history(), ax=axes["training"])
pv.plots.plot_gaps(gaps, ax=axes["gaps"])
pv.plots.plot_reconstructions(reconstructions, ax=axes["data"])
pv.plots.plot_samples(samples, ax=axes["samples"])
# sphinx_gallery_start_ignore
if IS_PROGRAM:
    figure.savefig("quickstart.png", dpi=150)
    seconds = time.perf_counter() - start
    print(f"wrote quickstart.png; {seconds:.0f} s in all")
# sphinx_gallery_end_ignore
plt.show()

# %%
# What to try
# -----------
#
# - Use a bigger encoder. Does the amortization gap shrink? Does log p(x) change?
# - Use ``pv.nn.MultivariateNormal()`` as the head of the encoder (``posterior=``). Does
#   the approximation gap shrink?
# - Use ``beta=0.0``, an autoencoder. What do its samples look like, and what is its
#   rate?
# - Measure the gaps on ``train``. The difference from the held-out digits shows how
#   much worse the encoder is on digits that it has not seen.
#
# Practice problems
# -----------------
#
# 1. Compute the gaps from the table: the optimal ELBO minus the ELBO, and so on. Which
#    row is the sum of two others?
# 2. A colleague keeps the model and replaces the diagonal Gaussian by a richer family.
#    By how many nats can the optimal ELBO rise at most?
# 3. Another VAE has an ELBO that is one nat higher on the same digits. Is it the better
#    model?
#
# Answers
# -------
#
# 1. The inference gap, log p(x) minus the ELBO, is the sum of the amortization gap and
#    the approximation gap.
# 2. By the approximation gap. If the new family contains the posteriors, the optimal
#    ELBO is log p(x). The ELBO itself may rise by more or less, because it depends on
#    the new encoder.
# 3. Not necessarily. Its log p(x) may be lower while its gap is smaller. Compare log
#    p(x), with the sampling error of the difference.
#
# Why there is a gap at all: :doc:`01_the_bound`.
