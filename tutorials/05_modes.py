r"""
Mode-seeking and mass-covering fits
===================================

A guide with one mode cannot match a posterior with two modes. How it fails depends on
the objective. The ELBO ends on one mode, ``InclusiveKL`` spreads over both, and
importance-weighted bounds lie in between. You will see both divergences as landscapes,
and you will learn which fit is a good proposal for estimating log p(x). You will also
learn why a good Pareto k and a good effective sample size do not show a missed mode.

Prerequisites: :doc:`04_evidence`; about half a minute to run.
"""

# %%
# Two divergences
# ---------------
# The ELBO of a guide :math:`q`, written :math:`\mathcal{L}[q]`, lies below
# :math:`\log p(x)` by the *inference gap*
#
# .. math::
#
#    \log p(x) - \mathcal{L}[q] = \mathrm{KL}(q \,\|\, p)
#    = \mathrm{E}_q \log \frac{q(z)}{p(z \mid x)} .
#
# Where the guide has mass and the posterior has almost none, the logarithm is huge.
# Where the posterior has mass and the guide has none, :math:`q` draws nothing and the
# divergence has no cost. So a guide that is too simple concentrates on one mode:
# :math:`\mathrm{KL}(q \,\|\, p)` is **mode-seeking**. The divergence in the other
# direction is
#
# .. math::
#
#    \mathrm{KL}(p \,\|\, q)
#    = \mathrm{E}_{p(z \mid x)} \log \frac{p(z \mid x)}{q(z)} .
#
# It is large where the posterior has mass that the guide lacks. Guide mass in places
# without posterior mass costs little. So it is **mass-covering**. Take a Gaussian guide
# of mean :math:`m` and standard deviation :math:`s`. For a posterior of mean
# :math:`\mu`, variance :math:`\sigma^2` and entropy :math:`H`,
#
# .. math::
#
#    \mathrm{KL}(p \,\|\, q)
#    = \log s + \tfrac12 \log 2\pi + \frac{\sigma^2 + (\mu - m)^2}{2 s^2} - H .
#
# This is smallest where the guide has the mean and the variance of the posterior
# (`Minka (2005), "Divergence measures and message passing"
# <https://www.microsoft.com/en-us/research/publication/
# divergence-measures-and-message-passing/>`__).

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
# sphinx_gallery_start_ignore
BLUE, ORANGE, RED = "#0072B2", "#E69F00", "#D55E00"
# sphinx_gallery_end_ignore

# %%
# A decoder with two solutions
# ----------------------------
# The decoder squares its latent. After the observation :math:`x = 4`, the latent is
# near 2 or near -2. The mean of the prior is a little above zero, so the first solution
# is a little more probable. The guide here is not trained: it is the Gaussian with the
# mean and the width that are passed to it.

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
# With one latent, every quantity can be computed by quadrature, a sum over an even
# grid. ``ExactEvidence`` computes :math:`\log p(x)` in this way in one call, for any
# model with one or two latents.

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
print(
    f"posterior: mean {mean:.3f}, standard deviation {stddev:.3f},"
    f" {right:.3f} of the mass on the right"
)
assert abs(exact - truth) < 1e-6

# %%
# Both divergences as landscapes
# ------------------------------
# A Gaussian has two parameters, so each divergence is a function over a plane. The next
# cell computes both by quadrature.

means = torch.linspace(-3.6, 3.6, 25 if SMOKE_TEST else 97)
widths = torch.logspace(-0.9, 0.6, 13 if SMOKE_TEST else 51)


def divergences(mean, width):
    """KL(q to p) and KL(p to q)."""
    log_q = dist.Normal(mean, width).log_prob(z)
    exclusive = (log_q.exp() * (log_q - log_posterior)).sum(-1) * step
    inclusive = (posterior * (log_posterior - log_q)).sum(-1) * step
    return exclusive, inclusive


rows = [divergences(means.unsqueeze(1), width) for width in widths]
# Both of shape (widths, means):
exclusive, inclusive = (torch.stack(column) for column in zip(*rows, strict=True))

# %%
# Closed forms check the quadrature. The ELBO of this model needs only the moments of
# the guide up to the fourth, since :math:`\mathrm{E}_q (x - z^2)^2` is a polynomial in
# them.

m, s = means, widths.unsqueeze(1)
second, fourth = m**2 + s**2, m**4 + 6 * m**2 * s**2 + 3 * s**4
distortion = (X**2 - 2 * X * second + fourth) / (2 * NOISE**2)
distortion = distortion + math.log(NOISE) + 0.5 * math.log(2 * math.pi)
rate = (s**2 + (m - PRIOR[0]) ** 2) / (2 * PRIOR[1] ** 2) - 0.5
rate = rate + math.log(PRIOR[1]) - s.log()
entropy = -float((posterior * log_posterior).sum() * step)
covering = s.log() + 0.5 * math.log(2 * math.pi) - entropy
covering = covering + (stddev**2 + (mean - m) ** 2) / (2 * s**2)
assert torch.allclose(exclusive, truth + distortion + rate, rtol=0, atol=1e-6)
assert torch.allclose(inclusive, covering, rtol=0, atol=1e-6)

# %%
# The next cell finds the local minima of both landscapes. In tables and figures, "KL(q
# to p)" is :math:`\mathrm{KL}(q \,\|\, p)`.


def local_minima(landscape):
    """(width, mean) indices of the points with no lower neighbour."""
    lowest = -max_pool2d(-landscape[None, None], 3, stride=1, padding=1)[0, 0]
    return ((landscape == lowest)[1:-1, 1:-1].nonzero() + 1).tolist()


names = ("minimum of", "mean", "width", "KL(q to p)", "KL(p to q)")
print("{:12s}{:>8s}{:>8s}{:>12s}{:>12s}".format(*names))
for name, landscape in (("KL(q to p)", exclusive), ("KL(p to q)", inclusive)):
    for i, j in local_minima(landscape):
        print(
            f"{name:12s}{means[j]:8.2f}{widths[i]:8.2f}"
            f"{exclusive[i, j]:12.3f}{inclusive[i, j]:12.3f}"
        )

best_i, best_j = divmod(int(exclusive.argmin()), len(means))
# sphinx_gallery_start_ignore
seeking = dist.Normal(means[best_j], widths[best_i])
spread = dist.Normal(mean, stddev)
figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
ax.fill_between(z, posterior, color="0.85", label="posterior")
seeking_density, spread_density = (q.log_prob(z).exp() for q in (seeking, spread))
ax.plot(z, seeking_density, "-", color=BLUE, label="least KL(q to p): one mode")
ax.plot(z, spread_density, "--", color=RED, label="least KL(p to q): both modes")
ax.set(xlim=(-6, 6), ylim=(0, None), xlabel="z", ylabel="density")
ax.set_title("The best Gaussian in either direction")
ax.legend(frameon=False, fontsize="small")
plt.show()
# sphinx_gallery_end_ignore

# %%
# :math:`\mathrm{KL}(q \,\|\, p)` has three minima: one at each mode, and a poor one
# that spans both modes. A guide that starts wide may end in the poor one.
# :math:`\mathrm{KL}(p \,\|\, q)` has a single minimum. The figure above shows the best
# Gaussian of each.
#
# The same in Pyro
# ----------------
# Now mean and width are free parameters, and five objectives train them. The data are
# fifty copies of the one datum (data point), so that a step averages fifty estimates of
# the same bound. ``ImportanceWeightedELBO`` maximises
#
# .. math::
#
#    \mathcal{L}_K = \mathrm{E} \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k)} ,
#
# which is the ELBO at :math:`K = 1` and comes closer to :math:`\log p(x)` with every
# further draw (`Burda, Grosse and Salakhutdinov (2016), "Importance weighted
# autoencoders" <https://arxiv.org/abs/1509.00519>`__). The output below calls it L_10
# and L_100. ``InclusiveKL`` estimates means under the posterior by weighted draws. The
# draws come from a broad ``proposal`` or, without one, from the guide.

broad = gaussian(PRIOR[0], 1.5 * PRIOR[1])
weighted = pv.ImportanceWeightedELBO
objectives = {
    "ELBO": lambda: pv.BetaTrace_ELBO(),
    "L_10": lambda: weighted(num_particles=10, gradient="dreg"),
    "L_100": lambda: weighted(num_particles=100, gradient="dreg"),
    "InclusiveKL, own draws": lambda: pv.InclusiveKL(num_particles=200),
    "InclusiveKL, broad": lambda: pv.InclusiveKL(num_particles=200, proposal=broad),
}


def fit(objective, start):
    """The path of (mean, width) through training."""

    def guide(x):
        mean = pyro.param("mean", torch.tensor(start[0]))
        positive = dist.constraints.positive
        width = pyro.param("width", torch.tensor(start[1]), constraint=positive)
        gaussian(mean, width)(x)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    adam = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / NUM_STEPS)})
    svi = SVI(model, guide, adam, objective)
    path = [start]
    for _ in range(NUM_STEPS):
        svi.step(X.expand(50))
        path.append((pyro.param("mean").item(), pyro.param("width").item()))
    return path


paths = {
    (name, "one mode"): fit(make(), (2.0, 0.3)) for name, make in objectives.items()
}
paths |= {(name, "the prior"): fit(make(), PRIOR) for name, make in objectives.items()}

# %%
# The gap :math:`\log p(x) - \mathcal{L}_K` is a landscape too. It has no closed form,
# so the next cell averages it over draws. The draws are even quantiles of a normal
# distribution, shuffled into groups of :math:`K`, and the same at every point.
#
# The figure shows each landscape with two paths of SVI through it. From left to right,
# the minima at the modes become shallower and the minimum that spans both becomes
# deeper. For large :math:`K` the gap is the chi-squared divergence of the posterior
# from the guide, divided by :math:`2K`. That divergence is mass-covering.

ranks = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
noise = dist.Normal(0.0, 1.0).icdf((ranks.unsqueeze(1) + 0.5) / len(ranks))


def weighted_gaps(width):
    """log p(x) - L_10 and log p(x) - L_100 for every mean of the grid."""
    draws = means + width * noise
    log_prior = dist.Normal(*PRIOR).log_prob(draws)
    log_joint = log_prior + dist.Normal(draws.square(), NOISE).log_prob(X)
    log_weight = log_joint - dist.Normal(means, width).log_prob(draws)
    groups = [log_weight.unflatten(0, (-1, k)) for k in (10, 100)]
    return [truth - log_mean_exp(group, 1).mean(0) for group in groups]


rows = [weighted_gaps(width) for width in widths]
gap_10, gap_100 = (torch.stack(column) for column in zip(*rows, strict=True))
landscapes = {
    "ELBO": exclusive,
    "L_10": gap_10,
    "L_100": gap_100,
    "InclusiveKL, broad": inclusive,
}
# sphinx_gallery_start_ignore
titles = [
    "KL(q to p): the gap of the ELBO",
    "gap of L_10",
    "gap of L_100",
    "KL(p to q)",
]
figure, axes = plt.subplots(1, 4, figsize=(14, 3.9), sharey=True, layout="constrained")
levels = torch.logspace(-2, 2, 17).tolist()
for ax, title, (name, landscape) in zip(axes, titles, landscapes.items(), strict=True):
    nats = landscape.clamp(levels[0], levels[-1])
    shades = ax.contourf(means, widths, nats, levels, norm="log", cmap="Blues_r")
    for where, style, color in (("one mode", "-", RED), ("the prior", "--", ORANGE)):
        path = torch.tensor(paths[name, where]).T
        ax.plot(*path, color="white", linewidth=4)
        ax.plot(*path, style, color=color, linewidth=2, label=f"SVI from {where}")
        ax.plot(*path[:, -1], "o", color=color, markeredgecolor="white", markersize=9)
    i, j = divmod(int(landscape.argmin()), len(means))
    star = {"color": "white", "markeredgecolor": "black", "markersize": 15}
    ax.plot(means[j], widths[i], "*", **star, label="lowest point", linestyle="none")
    ax.set(yscale="log", xlabel="mean of the guide", title=title)
axes[0].set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
axes[0].set(ylabel="standard deviation of the guide")
axes[-1].legend(loc="lower left", fontsize="small")
axes[0].minorticks_off()
ticks = [0.01, 0.1, 1, 10, 100]
figure.colorbar(shades, ax=axes, label="nats", ticks=ticks, format="%g")
plt.show()
# sphinx_gallery_end_ignore
# sphinx_gallery_thumbnail_number = 2

# %%
# Which one estimates log p(x)?
# -----------------------------
# Every fit is now the proposal of importance sampling with 1000 draws. In the table,
# "error" is the estimate minus the true :math:`\log p(x)`, and "+-" is its stated
# error. ESS is the effective sample size: the number of equal weights with the same
# precision. The fits that stayed on one mode are all too low by the same amount: the
# logarithm of the share of the posterior that this mode has.

print(
    f"log p(x) = {truth:.3f};"
    f" logarithm of the right mode's share: {math.log(right):.3f}\n"
)
names = (
    "fitted by, from",
    "KL(q to p)",
    "KL(p to q)",
    "error",
    "+-",
    "ESS",
    "Pareto k",
)
print("{:36s}{:>11s}{:>11s}{:>8s}{:>7s}{:>5s}{:>10s}".format(*names))
errors = {}
for (name, where), path in paths.items():
    proposal = gaussian(*path[-1])
    with warnings.catch_warnings():  # the table shows the Pareto k
        warnings.simplefilter("ignore", pv.errors.UnreliableEvidenceWarning)
        evidence = pv.ImportanceSampling(model, proposal, num_particles=1000, seed=0)(X)
    kls = [float(kl) for kl in divergences(*path[-1])]
    errors[name, where] = float(evidence.log_evidence) - truth
    print(
        f"{f'{name}, {where}':36s}{kls[0]:11.2f}{kls[1]:11.2f}"
        f"{errors[name, where]:8.3f}{float(evidence.std_error):7.3f}"
        f"{float(evidence.ess):5.0f}{float(evidence.pareto_k):10.2f}"
    )

# Fits on one mode miss the other one, whatever the Pareto k says.
for name in ("ELBO", "L_10", "L_100", "InclusiveKL, own draws"):
    assert abs(errors[name, "one mode"] - math.log(right)) < 0.05
if not SMOKE_TEST:
    covers, seeks = (
        torch.tensor(paths[name, "one mode"][-1])
        for name in ("InclusiveKL, broad", "ELBO")
    )
    # The first has the moments of the posterior, the second the lowest point's.
    assert torch.allclose(covers, torch.tensor([mean, stddev]), atol=0.05)
    lowest_point = torch.stack([means[best_j], widths[best_i]])
    assert torch.allclose(seeks, lowest_point, atol=0.05)

# %%
# - On one mode, the fits of the ELBO and of ``InclusiveKL`` with its own draws at least
#   give a warning: their Pareto k is above 0.67. The fits of :math:`\mathcal{L}_{10}`
#   and :math:`\mathcal{L}_{100}` have a lower k, an ESS near the number of draws and a
#   small stated error. They are as wrong as the others. **The weights contain no
#   information about places without draws.**
# - The wide fits have a lower ESS and a larger stated error, and the true
#   :math:`\log p(x)` is within that error. Importance sampling needs about
#   :math:`\exp(\mathrm{KL}(p \,\|\, q))` draws (`Chatterjee and Diaconis (2018), "The
#   sample size required in importance sampling" <https://arxiv.org/abs/1511.01437>`__).
#   Judged by :math:`\mathrm{KL}(q \,\|\, p)`, the wide fits look worst.
# - A tighter bound does not search better. :math:`\mathcal{L}_{10}` and
#   :math:`\mathcal{L}_{100}` are best where the guide spans both modes, but SVI from
#   one mode stays there. To widen the guide, it would first have to climb.
#   ``InclusiveKL`` with its own draws also stays, because all the draws that it weighs
#   are on one mode.
#
# How high is that climb? The next cell keeps the mean at the mode and increases the
# width up to the width of the posterior.

for name, landscape in landscapes.items():
    way = landscape[(widths >= widths[best_i]) & (widths < stddev), best_j]
    climb = (way - way.cummin(0).values).max()
    print(f"{name:20s}{float(climb):8.3f} nats")

# %%
# What to do about it
# -------------------
# ``AdaptiveImportanceSampling``, the default of this library, fits a proposal to each
# datum and searches for further modes. Given the guide on one mode, it finds the other
# mode. ``InferenceGaps`` uses it and divides the gap of that guide between the encoder
# and the family. Here all of the gap is an approximation gap, because no single
# Gaussian has a higher ELBO.

one_mode = gaussian(*paths["ELBO", "one mode"][-1])
options = {"num_particles": 1000, "seed": 0}
adaptive = pv.AdaptiveImportanceSampling(model, one_mode, **options)(X)
print(f"{adaptive}\n  error {float(adaptive.log_evidence) - truth:+.3f} nats\n")
print(pv.InferenceGaps(model, one_mode, **options)(X))
stated = float(adaptive.std_error)
assert abs(float(adaptive.log_evidence) - truth) < 4.5 * stated < 0.1

# %%
# What to try
# -----------
# - Set ``PRIOR = (0.0, 2.0)``, so that both modes have the same mass. What is the error
#   of a fit on one of them? (Problem 2 has the answer.)
# - Set ``NOISE = 3.0``, which brings the modes together. From which noise on does
#   :math:`\mathrm{KL}(q \,\|\, p)` have a single minimum? (Problem 5 has the answer.)
# - ``gradient="stl"`` for :math:`\mathcal{L}_{100}` is not the gradient of that bound.
#   Compare the point where it ends with the third landscape.
# - Use a guide of two components, ``dist.MixtureSameFamily``. Which of these effects
#   remain?
#
# Practice problems
# -----------------
#
# 1. Derive the closed form of :math:`\mathrm{KL}(p \,\|\, q)` for a Gaussian :math:`q`,
#    and show that its minimum has the mean and the variance of :math:`p`.
# 2. A guide equals the posterior on one mode and is zero on the other one. The first
#    mode has the share :math:`\alpha` of the posterior. What is
#    :math:`\mathrm{KL}(q \,\|\, p)`? What is the error of importance sampling with this
#    guide? Compare with the table, and with two modes of equal mass.
# 3. By the rule :math:`\exp(\mathrm{KL}(p \,\|\, q))`, how many draws does the fit of
#    the ELBO on one mode need? How many do the wide fits need?
# 4. Show that for large :math:`K` the gap :math:`\log p(x) - \mathcal{L}_K` is
#    :math:`\chi^2(p \,\|\, q) / 2K` with :math:`\chi^2(p \,\|\, q) = \int p(z \mid x)^2
#    / q(z) \, dz - 1`.
# 5. Count the minima of :math:`\mathrm{KL}(q \,\|\, p)` with ``local_minima`` for
#    ``NOISE`` between 1 and 3. From which noise on is there only one?
#
# Answers
# -------
#
# 1. :math:`\mathrm{KL}(p \,\|\, q) = -H - \mathrm{E}_p \log q(z)`, and :math:`-\log
#    q(z) = \log s + \tfrac12 \log 2\pi + (z - m)^2 / 2s^2`. The mean of
#    :math:`(z - m)^2` under :math:`p` is :math:`\sigma^2 + (\mu - m)^2`. The derivative
#    by :math:`m` is zero at :math:`m = \mu`. The derivative by :math:`s`, which is
#    :math:`1/s - \sigma^2 / s^3` there, is zero at :math:`s = \sigma`.
# 2. On its mode :math:`q(z) = p(z \mid x) / \alpha`. So
#    :math:`\mathrm{KL}(q \,\|\, p) = -\log \alpha`, and every weight is
#    :math:`\alpha \, p(x)`: the error is :math:`\log \alpha`. Here it is -0.560, and
#    the gap of 0.58 in the table is a little larger since the mode is not quite
#    Gaussian. Two modes of equal mass give an error of :math:`-\log 2 = -0.693`.
# 3. :math:`e^{45.17}`, about :math:`4 \cdot 10^{19}`, against :math:`e^{1.27}`, about
#    4.
# 4. With weights :math:`w_k` divided by :math:`p(x)`, their mean :math:`\bar w` has the
#    expectation 1 and the variance :math:`\chi^2(p \,\|\, q) / K`. Then :math:`\log
#    \bar w \approx (\bar w - 1) - (\bar w - 1)^2 / 2`. The mean of the first term is
#    zero. The mean of the second is :math:`-\chi^2(p \,\|\, q) / 2K`.
# 5. From about 2.2 on. At ``NOISE = 2.0`` there are two minima, at the right mode and
#    between the modes, and the one between them is lower. At ``NOISE = 2.25`` only the
#    one between the modes remains.
#
# Next: :doc:`06_rate_distortion`, what the weight of the KL trades.
