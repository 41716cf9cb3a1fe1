"""
Mode-seeking and mass-covering
==============================

A guide with one mode cannot be a posterior with two. Which way it fails depends on the objective: the ELBO ends on one
mode, ``InclusiveKL`` spreads over both, and importance-weighted bounds lie in between. At the end you will have seen both
divergences as landscapes, you will know which fit serves for estimating log p(x), and why a good Pareto k and a good
effective sample size cannot tell you that a mode was missed.
"""

# %%
# Two divergences
# ---------------
# The ELBO of a guide :math:`q` is short of log p(x) by the *inference gap*
#
# .. math:: \log p(x) - L[q] \;=\; \mathrm{KL}(q \,\|\, p) \;=\; E_q \log \frac{q(z)}{p(z \mid x)} .
#
# Where the guide has mass and the posterior has none, the logarithm is huge. Where the posterior has mass and the guide has
# none, nothing is drawn and nothing is paid. So a guide that is too simple hides inside one mode: KL(q to p) is
# **mode-seeking**. The other direction,
#
# .. math:: \mathrm{KL}(p \,\|\, q) \;=\; E_{p(z \mid x)} \log \frac{p(z \mid x)}{q(z)} ,
#
# pays for posterior mass that the guide lacks, and hardly for guide mass in empty places: it is **mass-covering**. For a
# Gaussian guide of mean :math:`m` and standard deviation :math:`s`, and a posterior of mean :math:`\mu`, variance
# :math:`\sigma^2` and entropy :math:`H`,
#
# .. math:: \mathrm{KL}(p \,\|\, q) = \log s + \tfrac12 \log 2\pi + \frac{\sigma^2 + (\mu - m)^2}{2 s^2} - H ,
#
# which is least where the guide has the mean and the variance of the posterior (`Minka 2005
# <https://www.microsoft.com/en-us/research/publication/divergence-measures-and-message-passing/>`__).

import math
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch.nn.functional import max_pool2d

import pyro_vae as pv
from pyro_vae.ops import log_mean_exp

SMOKE_TEST = "SMOKE_TEST" in os.environ
NUM_STEPS = 60 if SMOKE_TEST else 1000
torch.set_default_dtype(torch.float64)

# %%
# A decoder with two solutions
# ----------------------------
# The decoder squares its latent. Having seen :math:`x = 4`, the latent was near 2 or near -2; the prior, a little to the
# right of zero, makes the first a little likelier. The guide here is not trained: it is the Gaussian that it is told to be.

PRIOR, NOISE, X = (0.3, 2.0), 1.0, torch.tensor([4.0])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(*PRIOR).expand([len(x)]))
        pyro.sample("x", dist.Normal(z.square(), NOISE), obs=x)


def gaussian(mean, width):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, width).expand([len(x)]))

    return guide


# %%
# One latent is few enough to know everything by quadrature, a sum over an even grid. ``ExactEvidence`` does the same in
# one call, for any model with one or two latents.

z = torch.linspace(-32, 32, 3201)
step = z[1] - z[0]
log_joint = dist.Normal(*PRIOR).log_prob(z) + dist.Normal(z.square(), NOISE).log_prob(X)
truth = float(torch.logsumexp(log_joint, 0) + step.log())
log_posterior = log_joint - truth
posterior = log_posterior.exp()
mean = float((posterior * z).sum() * step)
stddev = math.sqrt(float((posterior * (z - mean).square()).sum() * step))
right = float(posterior[z > 0].sum() * step)

exact = float(pv.ExactEvidence(model, gaussian(2.0, 0.3), seed=0)(X).log_evidence)
print(f"log p(x): {truth:.6f} on the grid, {exact:.6f} by ExactEvidence")
print(f"posterior: mean {mean:.3f}, standard deviation {stddev:.3f}, {right:.3f} of the mass on the right")
assert abs(exact - truth) < 1e-6

# %%
# Both divergences as landscapes
# ------------------------------
# A Gaussian has two numbers, so each divergence is a landscape over a plane. Both come by quadrature and are checked
# against closed forms; the ELBO of this model needs only the entropy of the guide and its moments up to the fourth.

means = torch.linspace(-3.6, 3.6, 25 if SMOKE_TEST else 97)
widths = torch.logspace(-0.9, 0.6, 13 if SMOKE_TEST else 51)


def divergences(mean, width):
    """KL(q to p) and KL(p to q)."""
    log_q = dist.Normal(mean, width).log_prob(z)
    return (log_q.exp() * (log_q - log_posterior)).sum(-1) * step, (posterior * (log_posterior - log_q)).sum(-1) * step


rows = [divergences(means.unsqueeze(1), width) for width in widths]
exclusive, inclusive = (torch.stack(column) for column in zip(*rows, strict=True))  # (widths, means)

m, s = means, widths.unsqueeze(1)
squared_error = X**2 - 2 * X * (m**2 + s**2) + m**4 + 6 * m**2 * s**2 + 3 * s**4  # mean of (x - z^2)^2
distortion = squared_error / (2 * NOISE**2) + math.log(NOISE) + 0.5 * math.log(2 * math.pi)
rate = math.log(PRIOR[1]) - s.log() + (s**2 + (m - PRIOR[0]) ** 2) / (2 * PRIOR[1] ** 2) - 0.5
entropy = -float((posterior * log_posterior).sum() * step)
covering = s.log() + 0.5 * math.log(2 * math.pi) + (stddev**2 + (mean - m) ** 2) / (2 * s**2) - entropy
assert torch.allclose(exclusive, truth + distortion + rate, rtol=0, atol=1e-6)
assert torch.allclose(inclusive, covering, rtol=0, atol=1e-6)


def local_minima(landscape):
    """(width, mean) indices of the points that no neighbour is below."""
    lowest = -max_pool2d(-landscape[None, None], 3, stride=1, padding=1)[0, 0]
    return ((landscape == lowest)[1:-1, 1:-1].nonzero() + 1).tolist()


print(f"{'minimum of':12s}{'mean':>8s}{'width':>8s}{'KL(q to p)':>12s}{'KL(p to q)':>12s}")
for name, landscape in (("KL(q to p)", exclusive), ("KL(p to q)", inclusive)):
    for i, j in local_minima(landscape):
        print(f"{name:12s}{means[j]:8.2f}{widths[i]:8.2f}{exclusive[i, j]:12.3f}{inclusive[i, j]:12.3f}")

# %%
# KL(q to p) has three minima: one per mode, and a poor one astride both, where a guide that starts wide may get stuck.
# KL(p to q) has one.

best_i, best_j = divmod(int(exclusive.argmin()), len(means))
seeking, spread = dist.Normal(means[best_j], widths[best_i]), dist.Normal(mean, stddev)
figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
ax.fill_between(z, posterior, color="0.85", label="posterior")
ax.plot(z, seeking.log_prob(z).exp(), "k-", label="least KL(q to p): one mode")
ax.plot(z, spread.log_prob(z).exp(), "k--", label="least KL(p to q): both, and the valley")
ax.set(xlim=(-6, 6), ylim=(0, None), xlabel="z", ylabel="density", title="The best Gaussian, in either direction")
ax.legend(frameon=False, fontsize="small")
plt.show()

# %%
# The same in Pyro
# ----------------
# Now mean and width are free, and trained by five objectives. The data are fifty copies of the one datum, so that a step
# averages fifty estimates of the same bound. ``ImportanceWeightedELBO`` has
#
# .. math:: L_K = E \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k)} ,
#
# the ELBO at K = 1, and closer to log p(x) with every further draw (`Burda et al. 2016
# <https://arxiv.org/abs/1509.00519>`__). ``InclusiveKL`` takes means under the posterior by weighing draws: of a broad
# ``proposal``, or else of the guide itself.

objectives = {
    "ELBO": lambda: pv.BetaTrace_ELBO(),
    "L_10": lambda: pv.ImportanceWeightedELBO(num_particles=10, gradient="dreg"),
    "L_100": lambda: pv.ImportanceWeightedELBO(num_particles=100, gradient="dreg"),
    "InclusiveKL, own draws": lambda: pv.InclusiveKL(num_particles=200),
    "InclusiveKL, broad": lambda: pv.InclusiveKL(num_particles=200, proposal=gaussian(PRIOR[0], 1.5 * PRIOR[1])),
}


def fit(objective, start):
    """The path of (mean, width) through training."""

    def guide(x):
        mean = pyro.param("mean", torch.tensor(start[0]))
        width = pyro.param("width", torch.tensor(start[1]), constraint=dist.constraints.positive)
        gaussian(mean, width)(x)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / NUM_STEPS)}), objective)
    path = [start]
    for _ in range(NUM_STEPS):
        svi.step(X.expand(50))
        path.append((pyro.param("mean").item(), pyro.param("width").item()))
    return path


paths = {(name, "one mode"): fit(make(), (2.0, 0.3)) for name, make in objectives.items()}
paths |= {(name, "the prior"): fit(make(), PRIOR) for name, make in objectives.items()}

# %%
# What :math:`L_K` leaves out of log p(x) is a landscape too. It has no closed form, so it is a mean over draws: even
# quantiles of a normal distribution, shuffled into groups of K, the same at every point. Below, each landscape with two
# paths that SVI took through it. From left to right the wells at the modes fill up and the one astride them deepens: for
# large K the gap is the chi-squared divergence of the posterior from the guide, over 2K, which is mass-covering.

ranks = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
noise = dist.Normal(0.0, 1.0).icdf((ranks.unsqueeze(1) + 0.5) / len(ranks))


def weighted_gaps(width):
    """log p(x) - L_10 and log p(x) - L_100 for every mean of the grid."""
    draws = means + width * noise
    log_joint = dist.Normal(*PRIOR).log_prob(draws) + dist.Normal(draws.square(), NOISE).log_prob(X)
    log_weight = log_joint - dist.Normal(means, width).log_prob(draws)
    return [truth - log_mean_exp(log_weight.unflatten(0, (-1, k)), 1).mean(0) for k in (10, 100)]


gap_10, gap_100 = (torch.stack(column) for column in zip(*map(weighted_gaps, widths), strict=True))
landscapes = {"ELBO": exclusive, "L_10": gap_10, "L_100": gap_100, "InclusiveKL, broad": inclusive}
titles = ["KL(q to p): the gap of the ELBO", "gap of L_10", "gap of L_100", "KL(p to q)"]
figure, axes = plt.subplots(1, 4, figsize=(14, 3.9), sharey=True, layout="constrained")
levels = torch.logspace(-2, 2, 17).tolist()
for ax, title, (name, landscape) in zip(axes, titles, landscapes.items(), strict=True):
    shades = ax.contourf(means, widths, landscape.clamp(levels[0], levels[-1]), levels, norm="log", cmap="Greys_r")
    for where, style in (("one mode", "-"), ("the prior", "--")):
        path = torch.tensor(paths[name, where]).T
        ax.plot(*path, color="white", linewidth=4)
        ax.plot(*path, style, color="C3", linewidth=2, label=f"SVI from {where}")
        ax.plot(*path[:, -1], "o", color="C3", markeredgecolor="white", markersize=9)
    i, j = divmod(int(landscape.argmin()), len(means))
    ax.plot(means[j], widths[i], "*", color="white", markeredgecolor="black", markersize=15, label="lowest point")
    ax.set(yscale="log", xlabel="mean of the guide", title=title)
axes[0].set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
axes[0].set(ylabel="standard deviation of the guide")
axes[-1].legend(loc="lower left", fontsize="small")
axes[0].minorticks_off()
figure.colorbar(shades, ax=axes, label="nats", ticks=[0.01, 0.1, 1, 10, 100], format="%g")
plt.show()
# sphinx_gallery_thumbnail_number = 2

# %%
# Which one estimates log p(x)?
# -----------------------------
# Every fit now serves as the proposal of importance sampling, with 1000 draws; ``error`` is the estimate less the truth. The
# fits that stayed on one mode are all too low by the same amount: the logarithm of that mode's share of the posterior.

print(f"log p(x) = {truth:.3f}; logarithm of the right mode's share: {math.log(right):.3f}\n")
print(f"{'fitted by, from':36s}{'KL(q to p)':>11s}{'KL(p to q)':>11s}{'error':>8s}{'+-':>7s}{'ESS':>5s}{'Pareto k':>10s}")
errors = {}
for (name, where), path in paths.items():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)  # the table shows Pareto k
        evidence = pv.ImportanceSampling(model, gaussian(*path[-1]), num_particles=1000, seed=0)(X)
    kls = [float(kl) for kl in divergences(*path[-1])]
    errors[name, where] = float(evidence.log_evidence) - truth
    print(
        f"{f'{name}, {where}':36s}{kls[0]:11.2f}{kls[1]:11.2f}{errors[name, where]:8.3f}"
        f"{float(evidence.std_error):7.3f}{float(evidence.ess):5.0f}{float(evidence.pareto_k):10.2f}"
    )

for name in ("ELBO", "L_10", "L_100", "InclusiveKL, own draws"):
    assert abs(errors[name, "one mode"] - math.log(right)) < 0.05  # the mode that was missed, whatever Pareto k says
if not SMOKE_TEST:
    found = torch.tensor([paths[name, "one mode"][-1] for name in ("InclusiveKL, broad", "ELBO")])
    assert torch.allclose(found[0], torch.tensor([mean, stddev]), atol=0.05)  # moments of the posterior
    assert torch.allclose(found[1], torch.stack([means[best_j], widths[best_i]]), atol=0.05)  # the landscape's lowest point

# %%
# - On one mode the fits of the ELBO and of ``InclusiveKL`` with its own draws at least warn, by a Pareto k above 0.67. Those
#   of L_10 and L_100 have a k below it, an effective sample size (ESS) of nearly all draws, a small standard error, and are
#   as wrong as the others. **Weights look only where the particles went.**
# - The wide fits have the lower ESS, the larger standard error, and the truth within it. Importance sampling needs about
#   exp(KL(p to q)) draws (`Chatterjee & Diaconis 2018 <https://arxiv.org/abs/1511.01437>`__), and by KL(q to p) they look
#   worst.
# - A tighter bound is not a better search. L_10 and L_100 are best astride both modes, but SVI from one mode stays there: to
#   widen it would have to climb first, and ``InclusiveKL`` with its own draws weighs draws that all lie on one mode.
#
# How far the climb is, at the mean of the mode and up to the width of the posterior:

for name, landscape in landscapes.items():
    way = landscape[(widths >= widths[best_i]) & (widths < stddev), best_j]
    print(f"{name:20s}{float((way - way.cummin(0).values).max()):8.3f} nats")

# %%
# What to do about it
# -------------------
# ``AdaptiveImportanceSampling``, the default of this library, fits a proposal of its own to each datum and looks for further
# modes. Given the guide that saw one mode it finds the other. ``InferenceGaps`` builds on it, and says whose fault the gap
# of that guide is: all approximation, for no single Gaussian has a higher ELBO.

one_mode = gaussian(*paths["ELBO", "one mode"][-1])
adaptive = pv.AdaptiveImportanceSampling(model, one_mode, num_particles=1000, seed=0)(X)
print(f"{adaptive}\n  error {float(adaptive.log_evidence) - truth:+.3f} nats\n")
print(pv.InferenceGaps(model, one_mode, num_particles=1000, seed=0)(X))
assert abs(float(adaptive.log_evidence) - truth) < 4.5 * float(adaptive.std_error) < 0.1

# %%
# What to try
# -----------
# - ``PRIOR = (0.0, 2.0)``: both modes weigh the same. What is the error of a fit on one of them?
# - ``NOISE = 3.0``: the modes grow together. From which noise on has KL(q to p) a single minimum?
# - ``gradient="stl"`` for L_100 is not the gradient of that bound. Compare where it leads with the third landscape.
# - A guide of two components, ``dist.MixtureSameFamily``: does anything of this remain?
#
# Next: :doc:`06_rate_distortion`, what the weight of the KL trades.
