r"""
Your first VAE in Pyro
======================

This tutorial writes a prior, a decoder and an encoder in plain Pyro and trains them on
handwritten digits. It measures what the reparameterisation trick gains, splits an ELBO
in two exact ways, and draws everything that two latents can represent.

Prerequisites: :doc:`01_the_bound`, PyTorch modules; about 1 minute to run.
"""

# %%
# The data decide the likelihood
# ------------------------------
# The digits of scikit-learn have 8x8 pixels, which are whole numbers from 0 to 16. Each
# counts how many of 16 cells are inked. So the right likelihood is a Binomial with 16
# trials per pixel, and :math:`\log p(x)` is the logarithm of a true probability.

import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_STEPS, NUM_GRADIENTS, NUM_TEST = (100, 50, 10) if SMOKE_TEST else (3000, 1000, 297)

digits = load_digits(return_X_y=True)
pixels, labels = (torch.tensor(part, dtype=torch.float) for part in digits)
shuffled = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
train, test = shuffled[:1500], shuffled[1500:][:NUM_TEST]
train, train_labels, test, test_labels = (
    pixels[train],
    labels[train],
    pixels[test],
    labels[test],
)

# %%
# Model and guide
# ---------------
# The *model* says how data come about: from the prior through the decoder to the
# pixels. The *guide* approximates the way back: for a digit it returns a Gaussian over
# the latents. One network, the encoder, does this for all digits. That is *amortized*
# inference: a new digit costs one pass through the encoder, and no optimisation
# (`Kingma and Welling 2014 <https://arxiv.org/abs/1312.6114>`__, `Rezende et al. 2014
# <https://arxiv.org/abs/1401.4082>`__).
#
# In Pyro both are functions of the data. The plate says that digits are independent.
# ``to_event(1)`` says that the numbers of one digit belong together.


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, 128),
            nn.Softplus(),
            nn.Linear(128, 4),
        )
        self.decoder = nn.Sequential(
            nn.Linear(2, 128),
            nn.Softplus(),
            nn.Linear(128, 128),
            nn.Softplus(),
            nn.Linear(128, 64),
        )
        self.normal = dist.Normal

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), 2), 1.0)
            z = pyro.sample("z", prior.to_event(1))
            likelihood = dist.Binomial(16, logits=self.decoder(z))
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x))

    def encode(self, x):
        mean, log_scale = self.encoder(x / 16).chunk(2, dim=-1)
        return self.normal(mean, log_scale.exp()).to_event(1)


# %%
# How to differentiate a mean over draws
# --------------------------------------
# The ELBO is a mean under the guide, and the guide has parameters :math:`\phi` that we
# train. So we need the gradient of :math:`\mathrm{E}_{q_\phi} f(z)` in parameters on
# which the draws depend. There are two estimators, and both have the right mean.
#
# The *score function* estimator differentiates the density. It works for any draws, and
# uses only the value of :math:`f`:
#
# .. math::
#
#    \nabla_\phi \mathrm{E}_q f(z)
#    = \mathrm{E}_q \big[ f(z) \, \nabla_\phi \log q_\phi(z) + \nabla_\phi f \big] .
#
# The last term is the part of :math:`f` that contains :math:`\phi` itself.
#
# The *pathwise* estimator differentiates the draws. Write :math:`z = \mu + \sigma
# \varepsilon`, with a noise :math:`\varepsilon` that does not depend on the parameters
# (the reparameterisation trick). Then the gradient passes through :math:`f`, that is,
# through the decoder, and uses the direction in which :math:`f` grows:
#
# .. math::
#
#    \nabla_\phi \mathrm{E}_q f(z)
#    = \mathrm{E}_\varepsilon \big[ \nabla_\phi f(\mu + \sigma \varepsilon) \big] .
#
# We try both where the answer is known. For :math:`f = (z - 3)^2` the mean is
# :math:`(\mu - 3)^2 + \sigma^2`, with the derivative :math:`2 (\mu - 3)` in
# :math:`\mu`. A constant added to :math:`f` changes nothing in this derivative, but it
# multiplies the noise of the score function.

pyro.set_rng_seed(0)
epsilon = torch.randn(200_000, dtype=torch.float64)
for constant in (0, 100):
    z = 1 + 0.5 * epsilon
    found = {
        "score function": ((z - 3) ** 2 + constant) * (z - 1) / 0.5**2,
        "pathwise": 2 * (z - 3),
    }
    for name, draws in found.items():
        noise = float(draws.std())
        error = noise / len(draws) ** 0.5
        print(f"f + {constant:<3d} {name:14}: {draws.mean():6.3f}", end="")
        print(f" +- {error:.3f}, truth -4; noise of one draw {noise:7.2f}")
        assert abs(float(draws.mean()) + 4) < 4.5 * error

# %%
# Pyro uses the pathwise estimator where the distribution of a site allows it, and the
# score function elsewhere. For tests, Pyro has a Normal that does not allow the first.
# So the same loss, model and guide can use either. We train the VAE twice, from the
# same weights and with the same batches.

ESTIMATORS = {"score function": NonreparameterizedNormal, "pathwise": dist.Normal}


def trained(normal):
    # pyro.module shares tensors by name: without this line, the second VAE would not
    # train parameters of its own.
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae, losses = VAE(), []
    vae.normal = normal
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), Trace_ELBO())
    for _ in range(NUM_STEPS):
        batch = train[torch.randint(len(train), (100,))]
        losses.append(svi.step(batch) / len(batch))
    return vae, losses


losses = {}
for name, normal in ESTIMATORS.items():
    vae, losses[name] = trained(normal)  # the second, pathwise one is kept

# %%
# Now the network is held fixed, and we estimate the gradient of the encoder for one
# batch many times. *Signal* is the length of the mean gradient. *Noise* is the root of
# the summed variances. The last column says how many draws of the score function are
# worth one pathwise draw.

batch = train[:100]
pyro.set_rng_seed(1)


def gradients(normal, count):
    """Of minus the ELBO by all parameters of the encoder: (count, parameters), nats."""
    vae.normal, parameters, draws = normal, list(vae.encoder.parameters()), []
    for _ in range(count):
        loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, batch)
        found = torch.autograd.grad(loss / len(batch), parameters)
        draws.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(draws)


mean = gradients(dist.Normal, NUM_GRADIENTS).mean(0)
direction = nn.functional.normalize(mean, dim=0)
found = {name: gradients(normal, NUM_GRADIENTS) for name, normal in ESTIMATORS.items()}
along = {name: draws @ direction for name, draws in found.items()}
noise = {name: float(draws.var(0).sum().sqrt()) for name, draws in found.items()}
signal = float(along["pathwise"].mean())

print("estimator        along the direction      noise", end="")
print("   noise / signal   draws for one pathwise draw")
for name, values in along.items():
    error = float(values.std()) / NUM_GRADIENTS**0.5
    worth = (noise[name] / noise["pathwise"]) ** 2
    print(f"{name:15} {values.mean():10.3f} +- {error:7.3f} {noise[name]:9.2f}", end="")
    print(f" {noise[name] / signal:16.1f} {worth:29.0f}")
assert noise["score function"] > 100 * noise["pathwise"]

# %%
# The losses are a hundred nats and more, and act like the constant above. Even a
# thousand draws of the score function do not tell its mean, along the direction of the
# gradient, from zero. The left panel below shows the gradients along this direction.
# The right panel shows the training with each estimator.

# sphinx_gallery_start_ignore
BLUE, ORANGE = "#0072B2", "#D55E00"
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
spread = 3 * float(along["score function"].std())
bins = torch.linspace(signal - spread, signal + spread, 61).tolist()
looks = {
    "score function": {"color": ORANGE, "alpha": 0.5},
    "pathwise": {"histtype": "step", "color": BLUE},
}
for name, look in looks.items():
    left.hist(along[name].tolist(), bins, density=True, label=name, **look)
left.axvline(signal, color="black", linewidth=1, linestyle=":")
left.set(xlabel="gradient along its mean (dotted)", ylabel="density", yscale="log")
left.set_title("Gradients of one batch")
left.legend(frameon=False)
for name, look in (("score function", "--"), ("pathwise", "-")):
    elbos = -torch.tensor(losses[name]).unflatten(0, (50, -1)).mean(1)
    step = torch.arange(1, 51) * NUM_STEPS / 50
    right.plot(step, elbos, look, color=looks[name]["color"], label=name)
right.set(xlabel="step", ylabel="ELBO, nats per digit", ylim=(-330, -110))
right.set_title("Training")
right.legend(frameon=False, loc="lower right")
# sphinx_gallery_end_ignore
plt.show()

# %%
# Two ways to split the ELBO
# --------------------------
# The first way is how the ELBO is computed: the *reconstruction*, minus the KL from the
# guide to the prior. Minus the reconstruction is called the *distortion* :math:`D`, the
# KL is called the *rate* :math:`R`:
#
# .. math::
#
#    \mathcal{L}[q] = \mathrm{E}_q \log p(x \mid z)
#    - \mathrm{KL}(q(z \mid x) \,\|\, p(z)) = -(D + R) .
#
# For a Gaussian guide with means :math:`\mu_j` and standard deviations
# :math:`\sigma_j`, and the prior :math:`\mathrm{N}(0, I)`, the rate has a formula:
#
# .. math::
#
#    R = \frac12 \sum_j \left( \mu_j^2 + \sigma_j^2 - \log \sigma_j^2 - 1 \right) .
#
# The first term pulls every mean to 0. The second holds down standard deviations above
# 1. The third pushes up standard deviations below 1, without bound as they fall to 0,
#    so
# that the guide does not shrink to a point. The :math:`-1` makes the minimum zero, at
# :math:`\mu_j = 0` and :math:`\sigma_j = 1`.
#
# The second way is what the ELBO leaves out, as in :doc:`01_the_bound`:
#
# .. math::
#
#    \mathcal{L}[q] = \log p(x) - \mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x)) .
#
# These are two KLs of the same guide, and they mean different things. The KL to the
# prior is not a fault. Its mean over the data is an upper bound of the information that
# the latents carry about the data (:doc:`08_elbo_surgery` measures both). If this mean
# is low, the latents carry little information. The KL to the posterior is the inference
# gap, which is nothing but loss.
#
# The objectives of ``pyro_vae`` keep the terms of the first split in
# ``objective.terms``. The second split needs :math:`p(x)`, which for two latents is a
# sum over a grid. One grid serves all digits. We check it against ``ExactEvidence``,
# which finds a grid for every datum and works for any model of one or two latents.

objective = pv.BetaTraceMeanField_ELBO(
    num_particles=50,
    vectorize_particles=True,
    max_plate_nesting=1,
)
objective.loss(vae.model, vae.guide, test)
terms = objective.terms.per_datum()

axis = torch.linspace(-5, 5, 401)
area = (axis[1] - axis[0]) ** 2
points = torch.cartesian_prod(axis, axis)
prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
fair = dist.Binomial(16, logits=torch.zeros(64)).to_event(1)
with torch.no_grad():
    logits = vae.decoder(points)
    at_zero = prior.log_prob(points) - 16 * nn.functional.softplus(logits).sum(1)
    log_coefficients = fair.log_prob(test) + 64 * 16 * math.log(2)


def on_the_grid(index):
    """log p(x), log p(z | x) and log q(z | x) of one held-out digit, on the grid."""
    log_joint = logits @ test[index] + at_zero + log_coefficients[index]
    log_evidence = torch.logsumexp(log_joint, 0) + area.log()
    with torch.no_grad():
        log_q = vae.encode(test[index]).log_prob(points)
    return log_evidence, log_joint - log_evidence, log_q


log_evidence, kl = torch.empty(len(test)), torch.empty(len(test))
for index in range(len(test)):
    log_evidence[index], log_posterior, log_q = on_the_grid(index)
    kl[index] = (log_q.exp() * (log_q - log_posterior)).sum() * area
log_p, to_posterior = float(log_evidence.mean()), float(kl.mean())
elbo, difference = float(terms.elbo), log_p - to_posterior

print(f"{len(test)} held-out digits, nats per digit")
print(f"reconstruction {terms.reconstruction:9.2f}", end="")
print(f" - KL to the prior     {terms.kl_sum:6.2f} = ELBO {elbo:8.2f}")
print(f"log p(x)       {log_p:9.2f}", end="")
print(f" - KL to the posterior {to_posterior:6.2f} = ELBO {difference:8.2f}")
truth = pv.ExactEvidence(vae.model, vae.guide, seed=0)(test[:2])
assert (truth.log_evidence - log_evidence[:2]).abs().max() < 0.01
assert abs(elbo - difference) < 0.01 * abs(elbo)  # 50 draws of the reconstruction

# %%
# So the bound is far from tight. The figure shows why, for four digits from a good
# guide to the worst one. The posterior is grey. The guide is drawn as ellipses at one
# and two standard deviations. The posterior of a digit is narrow, and the encoder,
# which has never seen these digits, places its Gaussian beside it. Some posteriors are
# also bent, and no Gaussian can follow a bend.

# sphinx_gallery_start_ignore
order = kl.argsort()
figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
ranks = [int(share * (len(test) - 1)) for share in (0.1, 0.5, 0.8, 1.0)]
for ax, index in zip(axes, [int(order[rank]) for rank in ranks], strict=True):
    parts = on_the_grid(index)[1:]
    posterior, q = (part.exp().reshape(401, 401) for part in parts)
    heights = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 1.0]) * posterior.max()
    ax.contourf(axis, axis, posterior.T, levels=heights.tolist(), cmap="Greys")
    ellipses = [0.135 * float(q.max()), 0.607 * float(q.max())]
    ax.contour(axis, axis, q.T, levels=ellipses, colors=BLUE, linewidths=1.2)
    ax.set_title(f"a {int(test_labels[index])}: KL {kl[index]:.1f} nats")
    ax.set_xlabel("first latent")
    for limit, side in ((ax.set_xlim, 1), (ax.set_ylim, 0)):
        reached = axis[(posterior + q).sum(side) * area**0.5 > 0.05].tolist()
        limit(reached[0] - 0.1, reached[-1] + 0.1)
axes[0].set_ylabel("second latent")
# sphinx_gallery_end_ignore
plt.show()

# %%
# It would be a mistake, then, to read the gap as the price of a Gaussian family.
# ``InferenceGaps`` fits the best Gaussian to every digit. So it can split the gap into
# the encoder's part (amortization) and the family's part (approximation). Its
# :math:`\log p(x)` is a lower bound. The exact sum on the grid is printed last, for
# comparison. A warning counts the digits whose importance weights may not be reliable.

print(pv.InferenceGaps(vae.model, vae.guide, seed=0)(test[:100]))
print(f"log p(x) of these digits on the grid: {log_evidence[:100].mean():.3f}")

# %%
# All that two latents can represent
# ----------------------------------
# The left panel below shows the training digits at their posterior means. Digits of one
# class lie together, although no label was used in training. The right panel shows the
# way back: the decoder's mean over a grid of latents. The grid is spaced by the
# quantiles of the prior from 5 to 95 per cent.

# sphinx_gallery_thumbnail_number = 3
loader = DataLoader(TensorDataset(train, train_labels), batch_size=500)
aggregated = pv.AggregatedPosterior(vae.model, vae.guide, seed=0)
latents = aggregated(loader, labels=lambda batch: batch[1], progress=False)
manifold = pv.manifold(vae.model, vae.guide, train[:1], num_steps=16, seed=0)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
pv.plots.plot_latents(latents, ax=left)
pv.plots.plot_manifold(manifold, ax=right)
plt.show()

# %%
# *Reconstruction* takes a digit to its latents and back. *Generation* discards the
# encoder: it samples the prior and decodes the draw. Samples look like digits only
# where the posteriors of the data fill the prior. A draw from a region without data
# decodes to no digit.

reconstructions = pv.reconstruct(vae.model, vae.guide, test, seed=0)
samples = pv.simulate(vae.model, test, seed=0)
figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.2), layout="constrained")
pv.plots.plot_reconstructions(reconstructions, ax=top, num_images=16)
pv.plots.plot_samples(samples, ax=bottom, num_images=32)
plt.show()

# %%
# .. admonition:: Which losses are likelihoods?
#
#    *Half the squared error plus KL* is, up to a constant, minus the ELBO of a Gaussian
#    decoder with standard deviation 1, and of no other. For pixels in 0..1 this scale
#    is far too large. The best linear VAE with it is 61 nats per digit worse than with
#    the scale that fits (0.23). It uses **no** latent, because in no direction do the
#    digits vary by more than the assumed noise. A low squared error is a high
#    likelihood only at a matching scale, so learn the scale:
#    ``pv.nn.Normal(scale="learned")``.
#
#    *Binary cross-entropy* is a Bernoulli likelihood only for pixels that are 0 or 1.
#    For grey pixels it is the logarithm of something that does not integrate to one.
#    The missing constants come to dozens of nats, and they change with the decoder.
#    ``pyro_vae`` refuses to call it log p(x). Use a Binomial, as here, or
#    ``pv.nn.ContinuousBernoulli`` (`Loaiza-Ganem and Cunningham 2019
#    <https://arxiv.org/abs/1907.06845>`__).
#
# The numbers of the box, from closed forms:

grey = train.double() / 16
fitted = pv.exact.LinearGaussian.fit(grey, 2)
best = pv.exact.LinearGaussian.max_log_likelihood(grey, 2)
loss = best - pv.exact.LinearGaussian.max_log_likelihood(grey, 2, 1.0)
unused = int(pv.exact.collapsed(grey, 2, 1.0).sum())
print(f"Gaussian decoder of scale 1: {unused} of 2 latents unused; ", end="")
print(f"{fitted.variance.sqrt():.2f} is {loss:.1f} nats better")

means = grey.mean(0).clamp(0.01, 0.99)
proper = dist.ContinuousBernoulli(probs=means).to_event(1).log_prob(grey).mean()
cross_entropy = (grey * means.log() + (1 - grey) * (1 - means).log()).sum(1).mean()
missing = float(proper - cross_entropy)
print(f"Bernoulli of grey pixels: {missing:.1f} nats per digit from a density", end="")
print(" (at the mean digit)")

# %%
# What to try
# -----------
#
# - Multiply the encoder's standard deviations by 3 before taking the gradients. Does
#   the advantage of the pathwise estimator grow or shrink?
# - Give the guide's site ``infer={"baseline": {"use_decaying_avg_baseline": True}}``
#   and train the score function with ``pv.BetaTraceGraph_ELBO()``. How much does a
#   baseline help?
# - Use four latents, or eight. How does the ELBO change, and how the rate? Which gap
#   grows? (In place of the grid use ``pv.AdaptiveImportanceSampling``.)
# - Write the VAE as ``pv.mlp_vae(64, latent_dim=2, likelihood=pv.nn.Binomial(16))``.
#   Two of these in one process need no ``clear_param_store``.
#
# Practice problems
# -----------------
#
# 1. Derive the score function estimator from :math:`\nabla q = q \, \nabla \log q`. Why
#    may one subtract a constant from :math:`f`?
# 2. In the example with :math:`f = (z - 3)^2`, compute the standard deviation of one
#    pathwise draw by hand.
# 3. In the same example, what constant would you subtract from :math:`f` to lower the
#    noise of the score function?
# 4. What is the rate of a latent with :math:`\mu = 0` and :math:`\sigma = 0.1`, and of
#    one with :math:`\mu = 2` and :math:`\sigma = 1`?
# 5. Where does the formula for the rate come from? Use the means of :math:`z^2` and of
#    :math:`(z - \mu)^2 / \sigma^2` under the guide.
#
# Answers
# -------
#
# 1. :math:`\nabla \int q f \, dz = \int \nabla q \, f \, dz + \int q \, \nabla f \, dz
#    = \mathrm{E}_q[f \, \nabla \log q + \nabla f]`. For a constant :math:`c`, the mean
#    of :math:`c \, \nabla \log q` is :math:`c \, \nabla \int q \, dz = c \, \nabla 1 =
#    0`.
# 2. A draw is :math:`2 (z - 3)`, and :math:`z` has standard deviation 0.5, so it is 1.
#    The table agrees.
# 3. The mean of :math:`f`, here :math:`4 + 0.25`, is a good choice, though not exactly
#    the best. The losses of a VAE have a large mean as well, which a baseline removes.
# 4. :math:`\frac12 (0.01 + \log 100 - 1) = 1.81` and :math:`\frac12 \cdot 4 = 2` nats.
# 5. In one dimension :math:`\log q - \log p = \frac12 \big( z^2 - (z - \mu)^2 /
#    \sigma^2 - \log \sigma^2 \big)`. The means under :math:`q` are
#    :math:`\mu^2 + \sigma^2` and 1. Sum over the dimensions.
#
# Next: where a gap comes from, datum by datum: :doc:`03_three_gaps`.
