r"""
The bound: why the ELBO works
=============================

A VAE is trained on a lower bound of log p(x), the ELBO. At the end you will have derived that bound in two ways, will know
to the last digit what it leaves out, and will have seen why the noise of an ELBO dies away as it gets tight. One model
serves throughout, with a single latent and Gaussians everywhere, since all of its numbers are known.
"""

# %%
# The evidence is an integral
# ---------------------------
# A latent variable model says how data come about: draw a latent :math:`z` from the prior, then a datum :math:`x` from the
# likelihood. How probable is the datum, whatever the latent was? That is the *evidence*, and it is an integral:
#
# .. math:: p(x) = \int p(z) \, p(x \mid z) \, dz .
#
# Here :math:`z \sim N(0, 1)` and :math:`x \mid z \sim N(W z, s^2)` with two numbers in :math:`x`: the smallest of all linear
# VAEs, or probabilistic PCA (`Tipping and Bishop 1999 <https://doi.org/10.1111/1467-9868.00196>`__). ``pv.exact`` has
# its evidence, its posterior and the ELBO of any Gaussian guide in closed form.

import math
import os

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.ops import log_mean_exp

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_DRAWS = 2_000 if SMOKE_TEST else 100_000
torch.set_default_dtype(torch.float64)
pyro.set_rng_seed(0)

weight, noise = torch.tensor([[0.8], [1.0]]), 0.7
exact = pv.exact.LinearGaussian(weight, torch.zeros(2), noise**2)
x = torch.tensor([[1.5, 0.5]])  # one datum, (B, X) = (1, 2)
log_evidence = float(exact.log_evidence(x))
mu, sigma = float(exact.posterior(x).mean), float(exact.posterior(x).stddev)


def log_joint(z):
    """log p(x, z) for latents (..., 1)."""
    return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(z @ weight.T, noise).log_prob(x).sum(-1)


grid = torch.linspace(-8, 8, 2001)
by_quadrature = float(torch.logsumexp(log_joint(grid.unsqueeze(-1)), 0) + (grid[1] - grid[0]).log())
print(f"log p(x): {log_evidence:.6f} in closed form, {by_quadrature:.6f} on a grid, nats")
assert abs(by_quadrature - log_evidence) < 1e-8

# %%
# A grid serves one latent or two; for twenty, one as fine would need more points than the Earth has atoms. The obvious way
# out is to draw latents from the prior and to average the likelihood. The average is right in the mean, and soon useless:
# as latents are added, the posterior becomes a speck in the prior, and no draw hits it. Read down the last column (means
# over 20 data, drawn from the model).

print("latents   log p(x)   by draws from the prior   short by, nats")
for num_latents in (1, 2, 5, 10, 20):
    linear = pv.exact.LinearGaussian(torch.randn(2 * num_latents, num_latents), torch.zeros(2 * num_latents), noise**2)
    data = torch.randn(20, num_latents) @ linear.weight.T + noise * torch.randn(20, 2 * num_latents)
    means = torch.randn(NUM_DRAWS // 5, 1, num_latents) @ linear.weight.T
    estimate = log_mean_exp(dist.Normal(means, noise).log_prob(data).sum(-1), 0).mean()
    truth = linear.log_evidence(data).mean()
    print(f"{num_latents:7d} {truth:10.2f} {estimate:25.2f} {truth - estimate:16.3f}")

# %%
# First derivation: Jensen
# ------------------------
# So draw where the posterior is. Take any distribution :math:`q` that is easy to draw from, the *guide*, and put it into
# the integral. Nothing changes, whatever :math:`q` is:
#
# .. math:: p(x) = \int q(z) \, \frac{p(x, z)}{q(z)} \, dz = E_q \, w , \qquad w = \frac{p(x, z)}{q(z)} .
#
# The mean of the *weights* is p(x). But we need its logarithm, and the logarithm is concave: the log of a mean is at least
# the mean of the logs (Jensen's inequality). That mean is the evidence lower bound, the ELBO:
#
# .. math:: \log p(x) = \log E_q \, w \;\ge\; E_q \log w = L[q] .


def gaussian(mean, width):
    """A guide for the one datum: batch shape (1,), event shape (1,)."""
    return dist.Normal(torch.tensor([[mean]]), torch.tensor([[width]])).to_event(1)


def log_weights(q, num_draws):
    z = q.sample((num_draws,))
    return (log_joint(z) - q.log_prob(z)).squeeze(-1)


guides = {"far": gaussian(mu - 0.9, 0.7), "near": gaussian(mu - 0.3, 0.5)}
print("guide   log of the mean weight   mean log-weight   ELBO in closed form   log p(x)")
for name, q in guides.items():
    log_w, elbo = log_weights(q, NUM_DRAWS), float(exact.elbo(x, q))
    print(f"{name:5} {log_mean_exp(log_w, 0):25.4f} {log_w.mean():17.4f} {elbo:21.4f} {log_evidence:10.4f}")
    assert abs(float(log_w.mean()) - elbo) < 4.5 * float(log_w.std()) / NUM_DRAWS**0.5

# %%
# As a picture: the weights, divided by p(x), lie on the curve of the logarithm. Their mean is 1, the hollow mark. The mean
# of their logarithms, the full mark, lies below the curve, by the more, the wider they are spread along the bend.

ratio = torch.linspace(0.012, 4, 400)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True, sharey=True, layout="constrained")
for ax, (name, q) in zip(axes, guides.items(), strict=True):
    log_ratio, gap = log_weights(q, 300) - log_evidence, log_evidence - float(exact.elbo(x, q))
    ax.plot(ratio, ratio.log(), color="0.6", linewidth=1)
    ax.plot(log_ratio.exp(), log_ratio, "|", color="black", markersize=11, alpha=0.35, label="300 draws of the guide")
    ax.plot(1, 0, "o", color="black", markerfacecolor="white", markersize=9, label="log of the mean weight: log p(x)")
    ax.plot(1, -gap, "o", color="black", markersize=9, label="mean of the log-weights: ELBO")
    ax.annotate(f"{gap:.2f} nats lower", (1, -gap), (9, -5), textcoords="offset points")
    ax.set(xlabel="weight / p(x)", title=f"A guide that is {name}", ylim=(-4.4, 1.7), xlim=(-0.1, 4))
axes[0].set_ylabel("log-weight less log p(x), nats")
axes[1].legend(loc="lower right", frameon=False)
plt.show()

# %%
# Second derivation: what is left out
# -----------------------------------
# Jensen says that there is a gap, not what it is. Bayes' rule does. Since :math:`p(x, z) = p(z \mid x) \, p(x)`, every
# log-weight is
#
# .. math:: \log w = \log p(x) - \log \frac{q(z)}{p(z \mid x)} ,
#           \qquad \text{and in the mean} \qquad L[q] = \log p(x) - \mathrm{KL}\big(q(z) \,\|\, p(z \mid x)\big) .
#
# The *inference gap* is a Kullback-Leibler divergence, from the guide to the posterior: never negative, zero only where
# the two are equal. So raising the ELBO in :math:`q` fits the posterior, though nobody can compute it. Raising it in the
# model raises log p(x) or closes the gap, and the loss does not say which of the two happened.
#
# Move the guide and watch the bound. On the left, three guides beside the posterior (grey). On the right the ELBO of all
# such guides, with the three marked. What lies between ELBO and log p(x), shaded, is the KL; the table adds the two up, to
# the last digit. A wrong mean costs by the square. A guide that is too wide by some factor costs more than one that is too
# narrow by the same: this KL punishes draws where the posterior has no mass, and forgives a guide that sees a part of it.

# sphinx_gallery_thumbnail_number = 2
z = torch.linspace(mu - 2.2, mu + 2.2, 400)
posterior = dist.Normal(mu, sigma).log_prob(z).exp()
means, widths = mu + torch.linspace(-1.3, 1.3, 101), sigma * torch.logspace(-0.75, 0.75, 101)
moved = [(mu - 0.9, sigma), (mu - 0.5, sigma), (mu, sigma)]
stretched = [(mu, 0.33 * sigma), (mu, 2.8 * sigma), (mu, sigma)]
along_mean = [float(exact.elbo(x, gaussian(float(mean), sigma))) for mean in means]
along_width = [float(exact.elbo(x, gaussian(mu, float(width)))) for width in widths]
rows = [("mean", moved, means, along_mean), ("width", stretched, widths, along_width)]

figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
print("  mean   width      ELBO   KL(q to posterior)    their sum")
for row, (what, three, places, elbos) in enumerate(rows):
    beside, curve = axes[row]
    beside.fill_between(z, posterior, color="0.82")
    curve.axhline(log_evidence, color="black", linewidth=1, linestyle=":")
    curve.annotate("log p(x)", (float(places[0]), log_evidence), (0, 3), textcoords="offset points")
    curve.fill_between(places, elbos, log_evidence, color="0.92")
    curve.plot(places, elbos, color="black")
    for parameters, line, mark in zip(three, ("--", "-.", "-"), "svo", strict=True):
        density, q = dist.Normal(*parameters).log_prob(z).exp(), gaussian(*parameters)
        elbo, kl = float(exact.elbo(x, q)), float(kl_divergence(q, gaussian(mu, sigma)))
        print("{:6.2f} {:7.2f}".format(*parameters), f"{elbo:9.4f} {kl:20.4f} {elbo + kl:12.4f}")
        assert abs(elbo + kl - log_evidence) < 1e-10
        beside.plot(z, density, line, color="black", marker=mark, markevery=[int(density.argmax())], markersize=8)
        curve.plot([parameters[row]] * 2, [elbo, log_evidence], color="black", linewidth=1)
        curve.plot(parameters[row], elbo, mark, color="black", markersize=8)
        place = (-20, -22) if mark == "o" else (9, -11)
        curve.annotate(f"KL {kl:.2f}", (parameters[row], elbo), place, textcoords="offset points")
    beside.set(xlabel="latent z", ylabel="density", ylim=(0, None), title=f"Guides that differ in {what}")
    curve.set(xlabel=f"{what} of the guide", ylabel="ELBO, nats", title=f"The ELBO against the {what}")
    curve.set(ylim=(log_evidence - 2.9, log_evidence + 0.35))
axes[1, 1].set_xscale("log")
plt.show()

# %%
# When is the bound tight?
# ------------------------
# When the guide *is* the posterior, and then only. Two things stand in the way. The guide's family may not contain the
# posterior: with two latents it is a tilted ellipse, which a diagonal Gaussian cannot be. What even the best member leaves
# is the *approximation gap*. And an encoder that maps data to guides does not find the best member for each datum: that
# loss is the *amortization gap*. So it is a mistake to read log p(x) minus the ELBO as "how wrong diagonal Gaussians are".
# Here is an encoder that always says :math:`N(0, 0.5^2)`; read which of the two gaps is the larger.

two = pv.exact.LinearGaussian(torch.tensor([[1.0, 0.8], [0.2, 1.1], [0.9, 1.0]]), torch.zeros(3), noise**2)
data = torch.tensor([[1.0, 0.5, 1.2], [-1.0, 0.3, -0.4]])
careless = dist.Normal(torch.zeros(2, 2), 0.5).to_event(1)
for name, q in (("careless", careless), ("best diagonal", two.optimal_diagonal(data)), ("posterior", two.posterior(data))):
    gaps = two.gaps(data, q)
    parts = (float(part.mean()) for part in (gaps.amortization, gaps.approximation, gaps.inference))
    print("{:14} amortization {:6.3f} + approximation {:6.3f} = inference {:6.3f} nats".format(name, *parts))

# %%
# The noise tells the gap
# -----------------------
# An ELBO is estimated by a mean of :math:`\log w` over draws. Look at the second derivation again: once :math:`q` is the
# posterior, :math:`\log w = \log p(x)` for *every* draw. The noise is then not small, it is zero: one draw is enough. And
# near the posterior, expanding :math:`\log E_q w` about the mean of :math:`\log w`,
#
# .. math:: \log p(x) - L[q] \;\approx\; \tfrac12 \operatorname{Var}_q \log w .
#
# On the left of the figure, log-weights on the way from a poor guide to the posterior: they pull together *and* move up,
# until all lie on log p(x). On the right, both sides of the formula.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
ways = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97, 1.0)
print("way to the posterior   gap, nats   half the variance of log w")
for place, way in enumerate(ways):
    q = gaussian(mu - 0.9 * (1 - way), sigma * 1.5 ** (1 - way))
    log_w, gap = log_weights(q, NUM_DRAWS), log_evidence - float(exact.elbo(x, q))
    half_variance = 0.5 * float(log_w.var())
    print(f"{way:20.2f} {abs(gap):11.5f} {half_variance:28.5f}")
    left.plot(place + 0.28 * (torch.rand(2000) - 0.5), log_w[:2000], ".", color="black", markersize=2, alpha=0.15)
    left.plot([place - 0.33, place + 0.33], [log_evidence - gap] * 2, color="black", linewidth=2.5)
    if way < 1:
        right.plot(half_variance, gap, "o", color="black")
        right.annotate(f"{way:g}", (half_variance, gap), (8, -4), textcoords="offset points")
    assert way < 0.9 or abs(half_variance - gap) <= 0.25 * half_variance + 1e-12  # at the posterior both are zero
left.axhline(log_evidence, color="black", linewidth=1, linestyle=":")
left.set(ylim=(log_evidence - 6, log_evidence + 2.5), ylabel="log-weight, nats", xlabel="way to the posterior")
left.set(xticks=range(len(ways)), xticklabels=ways, title="Draws of log w; bars: their mean, the ELBO")
right.loglog([1e-3, 6], [1e-3, 6], color="0.6", linewidth=1)
right.set(xlabel="half the variance of log w", ylabel="log p(x) - ELBO, nats", title="Close to the posterior they agree")
plt.show()

# %%
# More draws inside the logarithm
# -------------------------------
# The mean of K weights varies less than one weight, so Jensen costs less. This is the importance-weighted bound (`Burda et
# al. 2016 <https://arxiv.org/abs/1509.00519>`__), which rises to log p(x) with K, whatever the guide:
#
# .. math:: L_K = E \log \frac1K \sum_{k=1}^K w_k , \qquad
#           L[q] = L_1 \le L_K \le L_{2K} \le \log p(x) , \qquad \log p(x) - L_K \approx \frac{\chi^2}{2K} ,
#
# with :math:`\chi^2` the variance of :math:`w / p(x)`. ``pv.ImportanceSampling`` computes it for any Pyro model and guide:
# write the same model as Pyro programs, and hand it many copies of the datum to average over.


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T, noise).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", guides["far"].expand((len(x),)))


evidence = pv.ImportanceSampling(model, guide, num_particles=256, seed=0)(x.expand(20 if SMOKE_TEST else 5000, -1))
print(evidence)

d, r = -0.9, 0.7 / sigma  # of the guide that is far
chi_squared = r**2 / math.sqrt(2 * r**2 - 1) * math.exp((d / sigma) ** 2 / (2 * r**2 - 1)) - 1
bound, predicted = evidence.mean(), log_evidence - chi_squared / (2 * 256)
print(f"L_256 = {bound.value:.4f} +- {bound.std_error:.4f}, log p(x) - chi-squared / 2K = {predicted:.4f} nats")
assert abs(float(bound.value) - predicted) < 4.5 * float(bound.std_error)

ax = pv.plots.plot_k_curve(evidence.curve, ax=plt.subplots(figsize=(6, 3.9), layout="constrained")[1])
ax.axhline(log_evidence, color="black", linewidth=1, linestyle=":")
ax.set_title("The importance-weighted bound rises to log p(x) (dotted)")
plt.show()

# %%
# What to try
# -----------
#
# - Set ``noise`` to 0.1. The posterior narrows; which of the four figures changes most, and why?
# - Make ``far`` 0.2 wide. Its ELBO is easy to estimate, the bounds of K draws are not: look at ``evidence.pareto_k``.
#   Chi-squared is infinite once the guide's variance is under half the posterior's.
# - Take a Laplace with the mean and the width of the posterior as the guide. What do its ``log_weights`` say of its KL?
# - Move ``x`` far away, to (15, 5). Does the KL of ``far`` change? Why not?
#
# Next: a guide for all data at once, by a network, and a decoder worth the name: :doc:`02_first_vae`.
