r"""
Your first VAE in Pyro
======================

A prior, a decoder and an encoder, written in plain Pyro and trained on handwritten digits. At the end you will know what
the reparameterisation trick buys, in numbers; you will have taken an ELBO apart in two ways, both exactly; and you will
have seen everything that two latents can hold on one page.
"""

# %%
# The data decide the likelihood
# ------------------------------
# The digits of scikit-learn have 8x8 pixels, whole numbers from 0 to 16: each counts how many of 16 cells are inked. So the
# honest likelihood is a Binomial with 16 trials per pixel, and log p(x) means what it says.

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

pixels, labels = (torch.tensor(part, dtype=torch.float) for part in load_digits(return_X_y=True))
shuffled = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
train, test = shuffled[:1500], shuffled[1500:][:NUM_TEST]
train, train_labels, test, test_labels = pixels[train], labels[train], pixels[test], labels[test]

# %%
# Model and guide
# ---------------
# The *model* is the story of the data, from the prior through the decoder to the pixels. The *guide* is a guess at the way
# back: for a digit, a Gaussian over its latents. One network, the encoder, makes the guess for all digits. That is
# *amortized* inference: a new digit costs one pass, and no optimisation of its own (`Kingma and Welling 2014
# <https://arxiv.org/abs/1312.6114>`__, `Rezende et al. 2014 <https://arxiv.org/abs/1401.4082>`__). In Pyro both are
# functions of the data. The plate says that digits are independent; ``to_event(1)`` that the numbers of one belong together.


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.Softplus(), nn.Linear(128, 4))
        hidden = nn.Sequential(nn.Linear(2, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus())
        self.decoder = nn.Sequential(hidden, nn.Linear(128, 64))
        self.normal = dist.Normal

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(16, logits=self.decoder(z)).to_event(1), obs=x)

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
# The ELBO is a mean under the guide, and the guide has the parameters :math:`\phi` that we train. How does one differentiate
# :math:`E_{q_\phi} f(z)` by what the draws depend on? Two ways, both right in the mean. The *score function* estimator
# differentiates the density. It asks nothing of the draws, and uses of :math:`f` only how large it is:
#
# .. math:: \nabla_\phi E_q f(z) = E_q \big[ f(z) \, \nabla_\phi \log q_\phi(z) \big] \qquad (+ \; E_q \nabla_\phi f) .
#
# The *pathwise* estimator moves the draws. Write :math:`z = \mu + \sigma \varepsilon` with noise :math:`\varepsilon` that no
# parameter touches (the reparameterisation trick); then the gradient goes through the decoder and knows the direction in
# which :math:`f` grows:
#
# .. math:: \nabla_\phi E_q f(z) = E_\varepsilon \big[ \nabla_\phi f(\mu + \sigma \varepsilon) \big] .
#
# Try it where the answer is known. For :math:`f = (z - 3)^2` the mean is :math:`(\mu - 3)^2 + \sigma^2`, its derivative by
# :math:`\mu` is :math:`2 (\mu - 3)`. Both estimators find it; the constant 100, which changes nothing, is poison to one.

pyro.set_rng_seed(0)
epsilon = torch.randn(200_000, dtype=torch.float64)
for constant in (0, 100):
    z = 1 + 0.5 * epsilon
    score_function, pathwise = ((z - 3) ** 2 + constant) * (z - 1) / 0.5**2, 2 * (z - 3)
    for name, draws in (("score function", score_function), ("pathwise", pathwise)):
        noise = float(draws.std())
        error = noise / len(draws) ** 0.5
        print(f"f + {constant:<3d} {name:14}: {draws.mean():6.3f} +- {error:.3f}, truth -4; noise of one draw {noise:7.2f}")
        assert abs(float(draws.mean()) + 4) < 4.5 * error

# %%
# Pyro takes the second where the distribution of a site allows it, and else the first. It has a Normal that does not allow
# it, for tests of just this. So the same loss, model and guide give both; train the VAE either way, from the same weights
# with the same batches.

ESTIMATORS = {"score function": NonreparameterizedNormal, "pathwise": dist.Normal}


def trained(normal):
    pyro.clear_param_store()  # pyro.module shares tensors by name: otherwise the second VAE would not train its own
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
# Now hold the network still and look at the gradient of the encoder for one batch, many times over. *Signal* is the length
# of the mean gradient, *noise* the root of the summed variances. The last column says how many draws of the score function
# are worth one pathwise draw. The losses are a hundred nats and more, like the constant above: along the direction of the
# gradient, all draws of the score function together do not tell its mean from zero.

batch = train[:100]
pyro.set_rng_seed(1)


def gradients(normal, count):
    """Gradients of minus the ELBO by all parameters of the encoder, (count, parameters); nats per digit."""
    vae.normal, draws = normal, []
    for _ in range(count):
        loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, batch) / len(batch)
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(vae.encoder.parameters()))]))
    return torch.stack(draws)


direction = nn.functional.normalize(gradients(dist.Normal, NUM_GRADIENTS).mean(0), dim=0)
found = {name: gradients(normal, NUM_GRADIENTS) for name, normal in ESTIMATORS.items()}
along = {name: draws @ direction for name, draws in found.items()}
noise = {name: float(draws.var(0).sum().sqrt()) for name, draws in found.items()}
signal = float(along["pathwise"].mean())

print("estimator        along the direction      noise   noise / signal   draws for one pathwise draw")
for name, values in along.items():
    error, worth = float(values.std()) / NUM_GRADIENTS**0.5, (noise[name] / noise["pathwise"]) ** 2
    print(f"{name:15} {values.mean():10.3f} +- {error:7.3f} {noise[name]:9.2f} {noise[name] / signal:16.1f} {worth:29.0f}")
assert noise["score function"] > 100 * noise["pathwise"]

# %%
# On the left those gradients, along their mean. On the right what that means for training.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
spread = 3 * float(along["score function"].std())
bins = torch.linspace(signal - spread, signal + spread, 61).tolist()
for name, style in (("score function", {"color": "0.75"}), ("pathwise", {"histtype": "step", "color": "black"})):
    left.hist(along[name].tolist(), bins, density=True, label=name, **style)
left.axvline(signal, color="black", linewidth=1, linestyle=":")
left.set(xlabel="gradient along its mean (dotted)", ylabel="density", yscale="log", title="Gradients of one batch")
left.legend(frameon=False)
for name, line in (("score function", "--"), ("pathwise", "-")):
    elbos = -torch.tensor(losses[name]).unflatten(0, (50, -1)).mean(1)
    right.plot(torch.arange(1, 51) * NUM_STEPS / 50, elbos, line, color="black", label=name)
right.set(xlabel="step", ylabel="ELBO, nats per digit", title="Training", ylim=(-330, -110))
right.legend(frameon=False, loc="lower right")
plt.show()

# %%
# The ELBO taken apart, twice
# ---------------------------
# First by how it is computed: what the decoder explains, less what the encoder says about the digit beyond the prior. With
# the *distortion* D and the *rate* R,
#
# .. math:: L[q] = E_q \log p(x \mid z) - \mathrm{KL}(q(z \mid x) \,\|\, p(z)) = -(D + R) .
#
# Second by what it leaves out, as in :doc:`01_the_bound`:
#
# .. math:: L[q] = \log p(x) - \mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x)) .
#
# Two KLs of the same guide. The first is no fault: it is the information that the latents carry, and a low one may mean
# that they carry none. The second is nothing but fault. The objectives of ``pyro_vae`` keep the terms of the first in
# ``objective.terms``. The second takes p(x), which for two latents is a sum over a grid; one grid serves all digits. It is
# checked against ``ExactEvidence``, which finds a grid for every datum, for any model of one or two latents.

objective = pv.BetaTraceMeanField_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
objective.loss(vae.model, vae.guide, test)
terms = objective.terms.per_datum()

axis = torch.linspace(-5, 5, 401)
area = (axis[1] - axis[0]) ** 2
points = torch.cartesian_prod(axis, axis)
with torch.no_grad():
    logits = vae.decoder(points)
    at_zero = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(points) - 16 * nn.functional.softplus(logits).sum(1)
    log_coefficients = dist.Binomial(16, logits=torch.zeros(64)).to_event(1).log_prob(test) + 64 * 16 * math.log(2)


def on_the_grid(index):
    """log p(x), and log p(z | x) and log q(z | x) at the points, for one held-out digit."""
    log_joint = logits @ test[index] + at_zero + log_coefficients[index]
    log_evidence = torch.logsumexp(log_joint, 0) + area.log()
    with torch.no_grad():
        return log_evidence, log_joint - log_evidence, vae.encode(test[index]).log_prob(points)


log_evidence, kl = torch.empty(len(test)), torch.empty(len(test))
for index in range(len(test)):
    log_evidence[index], log_posterior, log_q = on_the_grid(index)
    kl[index] = (log_q.exp() * (log_q - log_posterior)).sum() * area
log_p, to_posterior, elbo = float(log_evidence.mean()), float(kl.mean()), float(terms.elbo)

print(f"{len(test)} held-out digits, nats per digit")
print(f"reconstruction {terms.reconstruction:9.2f} - KL to the prior     {terms.kl_sum:6.2f} = ELBO {elbo:8.2f}")
print(f"log p(x)       {log_p:9.2f} - KL to the posterior {to_posterior:6.2f} = ELBO {log_p - to_posterior:8.2f}")
truth = pv.ExactEvidence(vae.model, vae.guide, seed=0)(test[:2])
assert (truth.log_evidence - log_evidence[:2]).abs().max() < 0.01
assert abs(elbo - (log_p - to_posterior)) < 0.01 * abs(elbo)  # 50 draws of the reconstruction

# %%
# So the bound is far from tight. Why? Here are four digits, from a good guide to the worst: the posterior in grey, the guide
# as ellipses at one and two standard deviations. A digit says precisely where its latents are, and the encoder, which has
# never seen these digits, points beside it. Some posteriors are bent as well, which no Gaussian follows.

order = kl.argsort()
figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
for ax, index in zip(axes, [int(order[int(share * (len(test) - 1))]) for share in (0.1, 0.5, 0.8, 1.0)], strict=True):
    posterior, q = (part.exp().reshape(401, 401) for part in on_the_grid(index)[1:])
    shades = [share * float(posterior.max()) for share in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)]
    ax.contourf(axis, axis, posterior.T, levels=shades, cmap="Greys")
    ax.contour(axis, axis, q.T, levels=[0.135 * float(q.max()), 0.607 * float(q.max())], colors="black", linewidths=1)
    ax.set(title=f"a {int(test_labels[index])}: KL {kl[index]:.1f} nats", xlabel="first latent")
    for limit, side in ((ax.set_xlim, 1), (ax.set_ylim, 0)):
        reached = axis[(posterior + q).sum(side) * area**0.5 > 0.05].tolist()
        limit(reached[0] - 0.1, reached[-1] + 0.1)
axes[0].set_ylabel("second latent")
plt.show()

# %%
# It is a mistake, then, to read the gap as the price of a Gaussian family. ``InferenceGaps`` fits the best Gaussian to every
# digit and splits the gap into the encoder's part and the family's. Its log p(x) is a lower bound; the sum on the grid,
# printed last, says how close, and a warning counts the digits whose weights are not to be trusted.

print(pv.InferenceGaps(vae.model, vae.guide, seed=0)(test[:100]))
print(f"log p(x) of these digits on the grid: {log_evidence[:100].mean():.3f}")

# %%
# Everything that two latents hold
# --------------------------------
# On the left the training digits at their posterior means: the map that the encoder drew. Kinds of digits have gathered,
# though nobody said which is which. On the right the way back: the decoder's mean over a grid of latents, spaced by the
# quantiles of the prior from 5 to 95 per cent.

# sphinx_gallery_thumbnail_number = 3
loader = DataLoader(TensorDataset(train, train_labels), batch_size=500)
latents = pv.AggregatedPosterior(vae.model, vae.guide, seed=0)(loader, labels=lambda batch: batch[1], progress=False)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
pv.plots.plot_latents(latents, ax=left)
pv.plots.plot_manifold(pv.manifold(vae.model, vae.guide, train[:1], num_steps=16, seed=0), ax=right)
plt.show()

# %%
# Reconstruction takes a digit to its latents and back; generation starts from the prior. The prior fits only as far as the
# encoder's map fills it: samples from the holes of the map look like no digit.

figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.2), layout="constrained")
pv.plots.plot_reconstructions(pv.reconstruct(vae.model, vae.guide, test, seed=0), ax=top, num_images=16)
pv.plots.plot_samples(pv.simulate(vae.model, test, seed=0), ax=bottom, num_images=32)
plt.show()

# %%
# .. admonition:: A loss is a likelihood, or it is not
#
#    *Half the squared error plus KL* is, up to a constant, minus the ELBO of a Gaussian decoder with standard deviation 1,
#    and of no other. On pixels in 0..1 that scale is absurd: the best linear VAE with it is 61 nats per digit worse than
#    with the scale that fits (0.23), and it uses **no** latent: in no direction do the digits vary by more than the assumed
#    noise. Low squared error is high likelihood only at a matching scale; learn it, ``pv.nn.Normal(scale="learned")``.
#
#    *Binary cross-entropy* is a Bernoulli only for pixels that are 0 or 1. On grey ones it is the logarithm of something
#    that does not integrate to one; the constants that are missing come to dozens of nats, and they change with the
#    decoder. ``pyro_vae`` refuses to call it log p(x). Use a Binomial, as here, or ``pv.nn.ContinuousBernoulli``
#    (`Loaiza-Ganem and Cunningham 2019 <https://arxiv.org/abs/1907.06845>`__).
#
# The numbers of the box, from closed forms:

grey = train.double() / 16
fitted = pv.exact.LinearGaussian.fit(grey, 2)
loss = pv.exact.LinearGaussian.max_log_likelihood(grey, 2) - pv.exact.LinearGaussian.max_log_likelihood(grey, 2, 1.0)
unused = int(pv.exact.collapsed(grey, 2, 1.0).sum())
print(f"Gaussian decoder of scale 1: {unused} of 2 latents unused; {fitted.variance.sqrt():.2f} is {loss:.1f} nats better")

means = grey.mean(0).clamp(0.01, 0.99)
proper = dist.ContinuousBernoulli(probs=means).to_event(1).log_prob(grey).mean()
cross_entropy = (grey * means.log() + (1 - grey) * (1 - means).log()).sum(1).mean()
print(f"Bernoulli of grey pixels: {float(proper - cross_entropy):.1f} nats per digit from a density (at the mean digit)")

# %%
# What to try
# -----------
#
# - Multiply the encoder's standard deviations by 3 before taking the gradients. Does the advantage grow or shrink?
# - Give the guide's site ``infer={"baseline": {"use_decaying_avg_baseline": True}}`` and train the score function with
#   ``pv.BetaTraceGraph_ELBO()``. How much does a baseline help?
# - Four latents, or eight. How does the ELBO move, how the rate? Which gap grows? (Instead of the grid take
#   ``pv.AdaptiveImportanceSampling``.)
# - Write it as ``pv.mlp_vae(64, latent_dim=2, likelihood=pv.nn.Binomial(16))``. Two of these in one process need no
#   ``clear_param_store``.
#
# Next: where a gap comes from, datum by datum, :doc:`03_three_gaps`.
