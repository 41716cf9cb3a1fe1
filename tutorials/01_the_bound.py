r"""
The bound: why the ELBO works
=============================

A variational autoencoder is trained on a lower bound of log p(x), the ELBO. This
tutorial derives the bound in two ways and computes exactly what it leaves out. It shows
why an ELBO can be estimated without noise once the bound is tight. One small Gaussian
model serves throughout, because all of its numbers are known.

Prerequisites: densities and expectations, a little PyTorch; less than 1 minute to run.
"""

# %%
# Updating beliefs
# ----------------
# A latent variable model says how data come about: draw a latent :math:`z` from the
# prior :math:`p(z)`, then a data point :math:`x` (a *datum*) from the likelihood
# :math:`p(x \mid z)`. The prior is what one believes about the latent before the datum
# is seen. Bayes' theorem says what to believe afterwards, the *posterior*:
#
# .. math::
#
#    p(z \mid x) = \frac{p(x \mid z) \, p(z)}{p(x)}, \qquad
#    p(x) = \int p(z) \, p(x \mid z) \, dz .
#
# The denominator is the *evidence*: how probable the datum is, whatever the latent was.
# Training a model means raising :math:`\log p(x)` of the data, and the posterior needs
# it too. So everything depends on this integral.
#
# In our model :math:`z \sim \mathrm{N}(0, 1)` is one number, :math:`x` is two numbers,
# and :math:`x \mid z \sim \mathrm{N}(W z, s^2 I)`. This is the smallest linear VAE,
# also called probabilistic PCA (`Tipping and Bishop 1999
# <https://doi.org/10.1111/1467-9868.00196>`__). ``pv.exact`` has its evidence, its
# posterior and the ELBO of any Gaussian guide in closed form. Logarithms are natural,
# so all values are in *nats*.

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
x = torch.tensor([[1.5, 0.5]])  # one datum: shape (1, 2)
log_evidence = float(exact.log_evidence(x))
mu, sigma = float(exact.posterior(x).mean), float(exact.posterior(x).stddev)


def log_joint(z):
    """log p(x, z) for latents (..., 1)."""
    prior, likelihood = dist.Normal(0.0, 1.0), dist.Normal(z @ weight.T, noise)
    return prior.log_prob(z).sum(-1) + likelihood.log_prob(x).sum(-1)


grid = torch.linspace(-8, 8, 2001)
on_grid = torch.logsumexp(log_joint(grid.unsqueeze(-1)), 0)
by_quadrature = float(on_grid + (grid[1] - grid[0]).log())
print(f"log p(x): {log_evidence:.6f} in closed form, ", end="")
print(f"{by_quadrature:.6f} on a grid, nats")
assert abs(by_quadrature - log_evidence) < 1e-8

# %%
# A grid is good for one latent or two. For twenty latents, a grid as fine as this one
# would need more points than the Earth has atoms. An obvious alternative is to draw
# latents from the prior and to average the likelihood. The average has the right mean.
# But with more latents the posterior fills a smaller and smaller part of the prior, and
# soon no draw hits it. The last column below shows how far the estimate is too low. It
# is a mean over 20 data that are drawn from the model.

print("latents   log p(x)   by draws from the prior   short by, nats")
for num_latents in (1, 2, 5, 10, 20):
    num_pixels = 2 * num_latents
    loadings = torch.randn(num_pixels, num_latents)
    linear = pv.exact.LinearGaussian(loadings, torch.zeros(num_pixels), noise**2)
    data = torch.randn(20, num_latents) @ loadings.T
    data = data + noise * torch.randn(20, num_pixels)
    means = torch.randn(NUM_DRAWS // 5, 1, num_latents) @ loadings.T
    log_likelihood = dist.Normal(means, noise).log_prob(data).sum(-1)
    estimate = log_mean_exp(log_likelihood, 0).mean()
    truth = linear.log_evidence(data).mean()
    shortfall = truth - estimate
    print(f"{num_latents:7d} {truth:10.2f} {estimate:25.2f} {shortfall:16.3f}")

# %%
# First derivation: Jensen's inequality
# -------------------------------------
# The draws should come from where the posterior is. Take any distribution :math:`q`
# that is easy to draw from and is positive wherever :math:`p(x, z)` is. It is called
# the *guide*. Multiply and divide by it:
#
# .. math::
#
#    p(x) = \int q(z) \, \frac{p(x, z)}{q(z)} \, dz = \mathrm{E}_q \, w , \qquad
#    w = \frac{p(x, z)}{q(z)} .
#
# The mean of the *weights* :math:`w` is :math:`p(x)`, whatever :math:`q` is. We need
# its logarithm. The logarithm is concave, so the logarithm of a mean is at least the
# mean of the logarithms (Jensen's inequality). That mean is the evidence lower bound,
# the ELBO:
#
# .. math::
#
#    \log p(x) = \log \mathrm{E}_q \, w \;\ge\; \mathrm{E}_q \log w = \mathcal{L}[q] .


def gaussian(mean, width):
    """A guide for the one datum: batch shape (1,), event shape (1,)."""
    return dist.Normal(torch.tensor([[mean]]), torch.tensor([[width]])).to_event(1)


def log_weights(q, num_draws):
    z = q.sample((num_draws,))
    return (log_joint(z) - q.log_prob(z)).squeeze(-1)


guides = {"far": gaussian(mu - 0.9, 0.7), "near": gaussian(mu - 0.3, 0.5)}
head = "guide   log of the mean weight   mean log-weight   ELBO in closed form"
print(f"{head}   log p(x)")
for name, q in guides.items():
    log_w, elbo = log_weights(q, NUM_DRAWS), float(exact.elbo(x, q))
    print(f"{name:5} {log_mean_exp(log_w, 0):25.4f} {log_w.mean():17.4f}", end="")
    print(f" {elbo:21.4f} {log_evidence:10.4f}")
    error = float(log_w.std()) / NUM_DRAWS**0.5
    assert abs(float(log_w.mean()) - elbo) < 4.5 * error

# %%
# The figure shows the inequality. The weights, divided by :math:`p(x)`, lie on the
# curve of the logarithm. Their mean is 1, and the logarithm of 1 is the hollow mark.
# The mean of their logarithms is the full mark below the curve. The wider the weights
# are spread along the bend, the further below it lies.

# sphinx_gallery_start_ignore
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
ratio = torch.linspace(0.012, 4, 400)
figure, axes = plt.subplots(
    1,
    2,
    figsize=(9, 3.8),
    sharex=True,
    sharey=True,
    layout="constrained",
)
for ax, (name, q) in zip(axes, guides.items(), strict=True):
    log_ratio = log_weights(q, 300) - log_evidence
    gap = log_evidence - float(exact.elbo(x, q))
    ax.plot(ratio, ratio.log(), color="0.6", linewidth=1)
    ticks = {"color": BLUE, "markersize": 11, "alpha": 0.35}
    ax.plot(log_ratio.exp(), log_ratio, "|", label="300 draws of the guide", **ticks)
    hollow = {"color": "black", "markerfacecolor": "white", "markersize": 9}
    ax.plot(1, 0, "o", label="log of the mean weight: log p(x)", **hollow)
    full = {"color": ORANGE, "markersize": 9}
    ax.plot(1, -gap, "o", label="mean of the log-weights: ELBO", **full)
    place = {"xytext": (9, -5), "textcoords": "offset points"}
    ax.annotate(f"{gap:.2f} nats lower", (1, -gap), **place)
    ax.set(xlabel="weight / p(x)", title=f"A guide that is {name}")
    ax.set(ylim=(-4.4, 1.7), xlim=(-0.1, 4))
axes[0].set_ylabel("log-weight less log p(x), nats")
axes[1].legend(loc="lower right", frameon=False)
# sphinx_gallery_end_ignore
plt.show()

# %%
# Second derivation: what is left out
# -----------------------------------
# Jensen's inequality says that there is a gap, but not how large it is. Bayes' theorem
# does. Since :math:`p(x, z) = p(z \mid x) \, p(x)`, every log-weight is
#
# .. math:: \log w = \log p(x) - \log \frac{q(z)}{p(z \mid x)} .
#
# Take the mean under :math:`q`:
#
# .. math:: \mathcal{L}[q] = \log p(x) - \mathrm{KL}(q(z) \,\|\, p(z \mid x)) .
#
# So the gap is a Kullback-Leibler divergence. For two densities it is the integral
#
# .. math:: \mathrm{KL}(q \,\|\, p) = \int q(z) \log \frac{q(z)}{p(z)} \, dz ,
#
# and for discrete latents the sum. It is never negative. The proof takes one line: the
# logarithm lies below its tangent, :math:`\log t \le t - 1`, and so
#
# .. math::
#
#    -\mathrm{KL}(q \,\|\, p) = \int q \log \frac{p}{q} \, dz
#    \;\le\; \int q \left( \frac{p}{q} - 1 \right) dz \;\le\; 1 - 1 = 0 .
#
# Equality needs :math:`t = p / q = 1` wherever :math:`q > 0`. Hence the KL is zero only
# if the two distributions are equal.
#
# The distance :math:`\log p(x) - \mathcal{L}[q]` is called the *inference gap*. Raising
# the ELBO in :math:`q` brings the guide closer to the posterior, though nobody can
# compute the posterior. Raising it in the model raises :math:`\log p(x)` or closes the
# gap, and the loss does not show which of the two happened.
#
# The ELBO is a function of a whole density. To find the density at which such an
# expression is greatest is the task of the calculus of variations, hence the name
# *variational* inference. The answer over all densities is the posterior.
#
# The next table moves a Gaussian guide away from the posterior, first by its mean, then
# by its width. The last column adds the ELBO and the KL.

moved = [(mu - 0.9, sigma), (mu - 0.5, sigma), (mu, sigma)]
stretched = [(mu, 0.33 * sigma), (mu, 2.8 * sigma), (mu, sigma)]
print("  mean   width      ELBO   KL(q to posterior)    their sum")
for mean, width in moved + stretched:
    q = gaussian(mean, width)
    elbo = float(exact.elbo(x, q))
    kl = float(kl_divergence(q, gaussian(mu, sigma)))
    print(f"{mean:6.2f} {width:7.2f} {elbo:9.4f} {kl:20.4f} {elbo + kl:12.4f}")
    assert abs(elbo + kl - log_evidence) < 1e-10

# %%
# The sum is always :math:`\log p(x)`. In the figure, the left panels show the guides of
# the table and the posterior (grey). The right panels show the ELBO of all guides that
# differ from the posterior in the same way. The shaded distance between the ELBO and
# :math:`\log p(x)` is the KL.
#
# A wrong mean costs the square of its distance. A guide that is too wide by some factor
# costs more than one that is too narrow by the same factor. The reason is that
# :math:`\mathrm{KL}(q \,\|\, p)` punishes draws where the posterior has little mass. It
# punishes much less a guide that covers only a part of the posterior.

# sphinx_gallery_thumbnail_number = 2
# sphinx_gallery_start_ignore
z = torch.linspace(mu - 2.2, mu + 2.2, 400)
posterior = dist.Normal(mu, sigma).log_prob(z).exp()
means = mu + torch.linspace(-1.3, 1.3, 101)
widths = sigma * torch.logspace(-0.75, 0.75, 101)
along_mean = [float(exact.elbo(x, gaussian(float(m), sigma))) for m in means]
along_width = [float(exact.elbo(x, gaussian(mu, float(w)))) for w in widths]
rows = [("mean", moved, means, along_mean), ("width", stretched, widths, along_width)]
looks = [("--", "s", ORANGE), ("-.", "v", GREEN), ("-", "o", BLUE)]
figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
for row, (what, three, places, elbos) in enumerate(rows):
    densities, curve = axes[row]
    densities.fill_between(z, posterior, color="0.82")
    curve.axhline(log_evidence, color="black", linewidth=1, linestyle=":")
    place = {"xytext": (0, 3), "textcoords": "offset points"}
    curve.annotate("log p(x)", (float(places[0]), log_evidence), **place)
    curve.fill_between(places, elbos, log_evidence, color="0.92")
    curve.plot(places, elbos, color="black")
    for parameters, (line, mark, color) in zip(three, looks, strict=True):
        density, q = dist.Normal(*parameters).log_prob(z).exp(), gaussian(*parameters)
        elbo = float(exact.elbo(x, q))
        top = {"marker": mark, "markevery": [int(density.argmax())], "markersize": 8}
        densities.plot(z, density, line, color=color, **top)
        place = [parameters[row]] * 2
        curve.plot(place, [elbo, log_evidence], color=color, linewidth=1)
        curve.plot(parameters[row], elbo, mark, color=color, markersize=8)
        offset = (-20, -22) if mark == "o" else (9, -11)
        text = f"KL {abs(log_evidence - elbo):.2f}"
        at = (parameters[row], elbo)
        curve.annotate(text, at, offset, textcoords="offset points")
    densities.set(xlabel="latent z", ylabel="density", ylim=(0, None))
    densities.set(title=f"Guides that differ in {what}")
    curve.set(xlabel=f"{what} of the guide", ylabel="ELBO, nats")
    curve.set(title=f"The ELBO against the {what}")
    curve.set(ylim=(log_evidence - 2.9, log_evidence + 0.35))
axes[1, 1].set_xscale("log")
# sphinx_gallery_end_ignore
plt.show()

# %%
# When is the bound tight?
# ------------------------
# The bound is tight when the guide is the posterior, and only then. There are two
# reasons why it may not be.
#
# - The *family* of the guide may not contain the posterior. With two latents the
#   posterior of our model is a tilted ellipse, which a diagonal Gaussian cannot be.
#   What even the best member of the family loses is the *approximation gap*.
# - An *encoder* is one function that maps every datum to a guide. It need not find the
#   best member for each datum. What it loses is the *amortization gap*.
#
# So it is a mistake to read :math:`\log p(x)` minus the ELBO as the price of diagonal
# Gaussians. The first row below has an encoder that always returns
# :math:`\mathrm{N}(0, 0.5^2)`. Which of its two gaps is larger?

wide = torch.tensor([[1.0, 0.8], [0.2, 1.1], [0.9, 1.0]])
two = pv.exact.LinearGaussian(wide, torch.zeros(3), noise**2)
data = torch.tensor([[1.0, 0.5, 1.2], [-1.0, 0.3, -0.4]])
candidates = {
    "careless": dist.Normal(torch.zeros(2, 2), 0.5).to_event(1),
    "best diagonal": two.optimal_diagonal(data),
    "posterior": two.posterior(data),
}
for name, q in candidates.items():
    gaps = two.gaps(data, q)
    print(f"{name:14} amortization {gaps.amortization.mean():6.3f}", end="")
    print(f" + approximation {gaps.approximation.mean():6.3f}", end="")
    print(f" = inference {gaps.inference.mean():6.3f} nats")

# %%
# The noise shows the gap
# -----------------------
# An ELBO is estimated by a mean of :math:`\log w` over draws. In the second derivation,
# if :math:`q` is the posterior, then :math:`\log w = \log p(x)` for *every* draw. The
# noise is then zero, and one draw is enough. Close to the posterior, expand
# :math:`\log \mathrm{E}_q w` around the mean of :math:`\log w`:
#
# .. math::
#
#    \log p(x) - \mathcal{L}[q] \;\approx\; \tfrac12 \operatorname{Var}_q \log w .
#
# The table goes in steps from a poor guide (0) to the posterior (1).

ways = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97, 1.0)
draws, steps = [], []
print("way to the posterior   gap, nats   half the variance of log w")
for way in ways:
    q = gaussian(mu - 0.9 * (1 - way), sigma * 1.5 ** (1 - way))
    log_w, gap = log_weights(q, NUM_DRAWS), log_evidence - float(exact.elbo(x, q))
    half_variance = 0.5 * float(log_w.var())
    draws.append(log_w[:2000])
    steps.append((gap, half_variance))
    print(f"{way:20.2f} {abs(gap):11.5f} {half_variance:28.5f}")
    # At the posterior both are zero.
    assert way < 0.9 or abs(half_variance - gap) <= 0.25 * half_variance + 1e-12

# %%
# The left panel shows the draws of the log-weights. Towards the posterior they move
# closer together and their mean, the bar, rises, until all of them are :math:`\log
# p(x)` (dotted). The right panel compares the two sides of the formula.

# sphinx_gallery_start_ignore
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained")
for place, (way, log_w, step) in enumerate(zip(ways, draws, steps, strict=True)):
    gap, half_variance = step
    jitter = place + 0.28 * (torch.rand(len(log_w)) - 0.5)
    left.plot(jitter, log_w, ".", color=BLUE, markersize=2, alpha=0.15)
    bar = [log_evidence - gap] * 2
    left.plot([place - 0.33, place + 0.33], bar, color=ORANGE, linewidth=2.5)
    if way < 1:
        right.plot(half_variance, gap, "o", color=BLUE)
        at, text = (half_variance, gap), {"textcoords": "offset points"}
        right.annotate(f"{way:g}", at, (8, -4), **text)
left.axhline(log_evidence, color="black", linewidth=1, linestyle=":")
left.set(ylim=(log_evidence - 6, log_evidence + 2.5), ylabel="log-weight, nats")
left.set(xticks=range(len(ways)), xticklabels=ways, xlabel="way to the posterior")
left.set_title("Draws of log w; bars: their mean, the ELBO")
right.loglog([1e-3, 6], [1e-3, 6], color="0.6", linewidth=1)
right.set(xlabel="half the variance of log w", ylabel="log p(x) - ELBO, nats")
right.set_title("Close to the posterior they agree")
# sphinx_gallery_end_ignore
plt.show()

# %%
# More draws inside the logarithm
# -------------------------------
# The mean of :math:`K` weights varies less than one weight, so Jensen's inequality
# loses less. This gives the importance-weighted bound (`Burda et al. 2016
# <https://arxiv.org/abs/1509.00519>`__):
#
# .. math::
#
#    \mathcal{L}_K = \mathrm{E} \log \frac1K \sum_{k=1}^K w_k , \qquad
#    \mathcal{L}[q] = \mathcal{L}_1 \le \mathcal{L}_K \le \mathcal{L}_{K+1}
#    \le \log p(x) .
#
# With :math:`K` it rises to :math:`\log p(x)`, if two conditions hold: :math:`q > 0`
# wherever :math:`p(x, z) > 0`, and the ELBO is finite. Let :math:`\chi^2` be the
# variance of :math:`w / p(x)`. If it is finite, then for large :math:`K`
#
# .. math:: \log p(x) - \mathcal{L}_K \approx \frac{\chi^2}{2K} .
#
# ``pv.ImportanceSampling`` computes the bound for any Pyro model and guide. Here is the
# same model as two Pyro programs. The estimator gets many copies of the datum, so that
# we can average over them.


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T, noise).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", guides["far"].expand((len(x),)))


estimator = pv.ImportanceSampling(model, guide, num_particles=256, seed=0)
evidence = estimator(x.expand(20 if SMOKE_TEST else 5000, -1))
print(evidence)

# %%
# The formula for :math:`\chi^2` of two Gaussians predicts the bound. For the guide
# ``far`` it is finite, because the variance of the guide is more than half the variance
# of the posterior.

d, r = -0.9, 0.7 / sigma
spread = 2 * r**2 - 1
chi_squared = r**2 / math.sqrt(spread) * math.exp((d / sigma) ** 2 / spread) - 1
bound, predicted = evidence.mean(), log_evidence - chi_squared / (2 * 256)
print(f"L_256 = {bound.value:.4f} +- {bound.std_error:.4f}, ", end="")
print(f"log p(x) - chi-squared / 2K = {predicted:.4f} nats")
assert abs(float(bound.value) - predicted) < 4.5 * float(bound.std_error)

figure, ax = plt.subplots(figsize=(6, 3.9), layout="constrained")
pv.plots.plot_k_curve(evidence.curve, ax=ax)
# sphinx_gallery_start_ignore
ax.axhline(log_evidence, color="black", linewidth=1, linestyle=":")
ax.set_title("The importance-weighted bound rises to log p(x) (dotted)")
# sphinx_gallery_end_ignore
plt.show()

# %%
# What to try
# -----------
#
# - Set ``noise`` to 0.1. The posterior narrows. Which of the four figures changes most?
# - Make ``far`` 0.2 wide, and leave out the prediction, because :math:`\chi^2` is then
#   infinite. The ELBO is easy to estimate, but the bounds of :math:`K` draws are not:
#   look at ``evidence.pareto_k``, the index of the tail of the weights.
# - Use a Laplace distribution as the guide, with the mean and the width of the
#   posterior. What do its ``log_weights`` say about its KL?
# - Move ``x`` far away, to (15, 5). Does the KL of ``far`` change?
#
# Practice problems
# -----------------
#
# 1. Let :math:`z \sim \mathrm{N}(0, 1)` and :math:`x \mid z \sim \mathrm{N}(w z, s^2)`
#    with one number :math:`x`. Write down :math:`\mathcal{L}` for
#    :math:`q = \mathrm{N}(m, v)` and find the :math:`m` and :math:`v` at which it is
#    greatest.
# 2. Read the optimum of problem 1 as a mean that is weighted by precisions (one over
#    the variance). What happens for :math:`s \to 0`, and for :math:`w = 0`?
# 3. The model of this page has two numbers in :math:`x`. Compute the mean and the width
#    of its posterior by hand, and compare with the table (0.80 and 0.48).
# 4. Why does the ELBO fall by the square of the distance when the mean of the guide
#    moves by :math:`d`? Use it for the first row of the table.
# 5. For which widths of a centred guide, relative to the width of the posterior, is
#    :math:`\chi^2` infinite? Is the ELBO finite there?
#
# Answers
# -------
#
# 1. The mean of :math:`(x - w z)^2` under :math:`q` is :math:`(x - w m)^2 + w^2 v`, so
#
#    .. math::
#
#       \mathcal{L} = -\frac{(x - w m)^2 + w^2 v}{2 s^2} - \frac12 \log 2 \pi s^2
#       - \frac12 \left( m^2 + v - \log v - 1 \right) .
#
#    The derivatives :math:`w (x - w m) / s^2 - m` and
#    :math:`-w^2 / (2 s^2) - 1/2 + 1 / (2 v)` vanish at
#
#    .. math::
#
#       \mu^* = \frac{w x}{w^2 + s^2}, \qquad s^{*2} = \frac{s^2}{w^2 + s^2} .
# 2. The prior says 0 with precision 1. The datum says :math:`x / w` with precision
#    :math:`w^2 / s^2`. The weighted mean of the two is :math:`\mu^*`, and the sum of
#    the precisions is :math:`1 / s^{*2}`. So the variance has shrunk from 1. For
#    :math:`s \to 0` the guide becomes the point :math:`x / w`. For :math:`w = 0` it is
#    the prior.
# 3. The precision is :math:`1 + (0.8^2 + 1^2) / 0.7^2 = 4.347`, and the width
#    :math:`1 / \sqrt{4.347} = 0.480`. The mean is
#    :math:`(0.8 \cdot 1.5 + 1 \cdot 0.5) / 0.7^2 / 4.347 = 0.798`.
# 4. The KL between two Gaussians of one width :math:`\sigma` is
#    :math:`d^2 / (2 \sigma^2)`. For :math:`d = 0.9` it is
#    :math:`0.81 \cdot 4.347 / 2 = 1.7605`, as in the table.
# 5. :math:`\chi^2 + 1` is the integral of :math:`p(z \mid x)^2 / q(z)`, whose exponent
#    is :math:`-z^2 (1 / \sigma^2 - 1 / (2 v))` around the mean. It is infinite for
#    :math:`v \le \sigma^2 / 2`, that is, for widths up to 0.71 of the posterior's. The
#    ELBO is finite for every width.
#
# Next: one network that gives a guide for every datum, and a decoder that is a network
# as well: :doc:`02_first_vae`. The proofs are collected in :doc:`/theory`.
